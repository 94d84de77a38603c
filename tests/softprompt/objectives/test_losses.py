"""Losses: FaceLift's own numbers, formulas written out, the KL against its two Gaussians, conversions against the noise."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from softprompt.data.batch import Batch
from softprompt.model.adapted import predict
from softprompt.model.conditioning import noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.objectives import losses

SCHEDULE = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
"""Stable Diffusion's and FaceLift's, alphabar_0 ... alphabar_999."""
BOTH_TYPES = pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])


def facelift_batch(golden: dict[str, Tensor]) -> Batch:
    views = {k: rearrange(v, "(b v) ... -> b v ...", v=6) for k, v in golden.items() if len(v) == 12}
    assert (views["timesteps"] == views["timesteps"][:, :1]).all()
    return Batch(
        latents=views["latents"],
        noise=views["noise"],
        given=views["cond_latents"],
        labels=views["class_labels"],
        timesteps=views["timesteps"][:, 0],
        order=torch.arange(6).expand(2, 6),
    )


def test_a_training_step_matches_facelift_s(tiny_models: Pipeline, facelift: Path) -> None:
    golden = load_file(facelift / "tiny" / "training_step.safetensors")
    batch, scheduler = facelift_batch(golden), tiny_models.scheduler
    prompt = golden["prompt"].clone().requires_grad_()

    noisy, target = noisy_and_target(scheduler, batch)
    weights = losses.snr_weights(losses.snr(scheduler.alphas_cumprod, batch.timesteps), "facelift")
    prediction = predict(tiny_models.unet, prompt, noisy, batch.given, batch.timesteps, batch.labels, batch.order)
    loss = losses.denoising_loss(prediction, target, weights)
    loss.backward()

    torch.testing.assert_close(target.flatten(0, 1), golden["target"], atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.repeat_interleave(6), golden["loss_weights"], atol=1e-4, rtol=0)
    torch.testing.assert_close(prediction.flatten(0, 1), golden["prediction"], atol=1e-4, rtol=0)
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), abs=1e-4)
    error = (prompt.grad - golden["prompt_grad"]).norm() / golden["prompt_grad"].norm()
    assert error < 1e-3


@BOTH_TYPES
def test_targets_match_their_formulas(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")
    torch.manual_seed(0)
    x, noise = torch.randn(2, 2, 6, 4, 3, 3)
    batch = Batch(x, noise, x, x, timesteps=torch.tensor([3, 700]), order=torch.arange(6).expand(2, 6))
    noisy, target = noisy_and_target(scheduler, batch)
    for b, t in enumerate(batch.timesteps.tolist()):
        a, s = float(scheduler.alphas_cumprod[t]) ** 0.5, (1 - float(scheduler.alphas_cumprod[t])) ** 0.5
        torch.testing.assert_close(noisy[b], a * x[b] + s * noise[b])
        torch.testing.assert_close(target[b], noise[b] if prediction_type == "epsilon" else a * noise[b] - s * x[b])


def test_snr_weights_match_their_formulas() -> None:
    ratio = torch.tensor([0.01, 0.5, 4.99, 5.0, 20.0, 1000.0])
    table = {
        "facelift": [1, 1, 1, 1, 5 / 20, 5 / 1000],
        "v": [0.01 / 1.01, 0.5 / 1.5, 4.99 / 5.99, 5 / 6, 5 / 21, 5 / 1001],
        "none": [1, 1, 1, 1, 1, 1],
    }
    for weighting, expected in table.items():
        assert losses.snr_weights(ratio, weighting).tolist() == pytest.approx(expected, rel=1e-5), weighting
    assert losses.snr_weights(ratio, "v", gamma=1.0)[4] == pytest.approx(1 / 21)


def test_snr_is_signal_over_noise() -> None:
    expected = [float(SCHEDULE[t]) / (1 - float(SCHEDULE[t])) for t in (0, 400, 999)]
    assert losses.snr(SCHEDULE, torch.tensor([0, 400, 999])).tolist() == pytest.approx(expected, rel=1e-4)


def test_denoising_loss_matches_a_loop_over_views() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 4, 2, 2)
    weights, view_weights = torch.tensor([0.5, 2.0]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    errors = {(b, v): float(((prediction[b, v] - target[b, v]) ** 2).mean() * weights[b]) for b in range(2) for v in range(3)}
    assert float(losses.denoising_loss(prediction, target, weights)) == pytest.approx(sum(errors.values()) / 6, rel=1e-5)
    kept = [errors[0, 1], errors[0, 2], errors[1, 0], errors[1, 1]]
    found = losses.denoising_loss(prediction, target, weights, view_weights)
    assert float(found) == pytest.approx(sum(kept) / 4, rel=1e-5)


def test_half_precision_predictions_are_compared_in_float32() -> None:
    prediction, target = torch.full((1, 1, 4, 8, 8), 300.0).half(), torch.zeros(1, 1, 4, 8, 8).half()
    found = losses.denoising_loss(prediction, target, torch.ones(1))  # 300 squared is infinite in float16
    assert found.dtype == torch.float32 and float(found) == pytest.approx(90_000)
    assert losses.kl_to_reference(prediction, target, torch.ones(1)).tolist() == [[pytest.approx(90_000)]]


def reverse_step(noisy: Tensor, prediction: Tensor, t: int, prediction_type: str) -> torch.distributions.Normal:
    """p(z_{t-1} | z_t): q(z_{t-1} | z_t, z_0) at the predicted z_0. Ho et al. 2006.11239, equations 6 and 7, in float64."""
    alphabar = SCHEDULE.double()
    now, before = alphabar[t], alphabar[t - 1]
    alpha, beta = now / before, 1 - now / before
    if prediction_type == "epsilon":
        clean = (noisy - (1 - now).sqrt() * prediction) / now.sqrt()
    else:
        clean = now.sqrt() * noisy - (1 - now).sqrt() * prediction
    mean = before.sqrt() * beta / (1 - now) * clean + alpha.sqrt() * (1 - before) / (1 - now) * noisy
    variance = (1 - before) / (1 - now) * beta
    return torch.distributions.Normal(mean, variance.sqrt())


@BOTH_TYPES
def test_kl_equals_that_of_the_two_gaussians_of_the_reverse_step(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy, ours, reference = torch.randn(3, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    for t in [1, 2, 3, 5, 10, 37, 100, 250, 500, 750, 998, 999]:
        steps = [reverse_step(noisy, p, t, prediction_type) for p in (ours, reference)]
        expected = torch.distributions.kl_divergence(*steps).mean(dim=(1, 2, 3))
        weights = losses.kl_weights(
            SCHEDULE, torch.tensor([t]), prediction_type=prediction_type, weighting="posterior", clip=1e9
        )
        found = losses.kl_to_reference(ours[None], reference[None], weights)[0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0, msg=lambda m, t=t: f"timestep {t}: {m}")


def test_kl_weight_is_cut_where_the_step_has_no_noise() -> None:
    timesteps = torch.arange(1000)
    free = losses.kl_weights(SCHEDULE, timesteps, clip=1e9)
    assert free[0] == 1e9, "at t = 0 the weight is infinite"
    clip = float(free[100])
    cut = losses.kl_weights(SCHEDULE, timesteps, clip=clip)
    assert cut.dtype == torch.float32 and cut.isfinite().all()
    assert torch.equal(cut, free.clamp(max=clip))
    assert (cut == clip).any() and (cut < clip).any()


def test_uniform_kl_is_the_plain_squared_difference() -> None:
    weights = losses.kl_weights(SCHEDULE, torch.tensor([0, 10, 999]), weighting="uniform")
    ours, reference = torch.randn(2, 3, 2, 4, 3, 3)
    expected = [[float(((ours[b, v] - reference[b, v]) ** 2).mean()) for v in range(2)] for b in range(3)]
    found = losses.kl_to_reference(ours, reference, weights)
    assert weights.tolist() == [1, 1, 1] and found.tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


def test_the_hinge_is_that_of_its_formula_and_pushes_apart_only_what_has_come_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    prompt = (start + 0.5 * torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    apart = [
        [math.dist(p[a].flatten(), p[b].flatten()) for a, b in combinations(range(4), 2)] for p in (prompt.detach(), start)
    ]
    ratios = [now / before for now, before in zip(*apart, strict=True)]
    terms = [max(0.0, 1 - ratio) ** 2 for ratio in ratios]
    assert losses.separation_ratios(prompt, start).tolist() == pytest.approx(ratios)
    hinge = losses.separation_hinge(prompt, start)
    assert 0 < hinge.item() == pytest.approx(sum(terms) / len(terms))
    hinge.backward()
    assert prompt.grad is not None
    assert float(losses.separation_hinge(prompt.detach() - 0.1 * prompt.grad, start)) < hinge.item()


def test_the_hinge_is_zero_at_the_start_and_beyond() -> None:
    start = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert float(losses.separation_hinge(start, start)) == float(losses.separation_hinge(2 * start, start)) == 0
    assert float(losses.separation_hinge(0.5 * start, start)) == pytest.approx(0.25)


TIMESTEPS = torch.tensor([0, 400, 999])


def noised(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Clean latents, noise, both mixed, and v."""
    clean, noise = torch.randn(2, 3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s = (x.reshape(3, 1, 1, 1, 1).sqrt() for x in (SCHEDULE.double()[TIMESTEPS], 1 - SCHEDULE.double()[TIMESTEPS]))
    return tuple(x.to(dtype) for x in (clean, noise, a * clean + s * noise, a * noise - s * clean))


@BOTH_TYPES
def test_a_perfect_prediction_amounts_to_the_latents_and_noise_it_was_made_from(prediction_type: str) -> None:
    clean, noise, noisy, v = noised(torch.float64)
    schedule = SCHEDULE.double()
    prediction = noise if prediction_type == "epsilon" else v
    torch.testing.assert_close(losses.clean_latents(noisy, prediction, schedule, TIMESTEPS, prediction_type), clean)
    torch.testing.assert_close(losses.epsilon(noisy, prediction, schedule, TIMESTEPS, prediction_type), noise)


def test_the_squared_error_of_epsilon_is_alphabar_times_that_of_v() -> None:
    _, _, noisy, v = noised(torch.float64)
    other = v + torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eps = [losses.epsilon(noisy, p, SCHEDULE.double(), TIMESTEPS, "v_prediction") for p in (v, other)]
    for b, t in enumerate(TIMESTEPS.tolist()):
        of_v = float((v[b] - other[b]).square().mean())
        assert float((eps[0][b] - eps[1][b]).square().mean()) == pytest.approx(float(SCHEDULE[t]) * of_v, rel=1e-6)


def test_half_precision_is_converted_in_float32() -> None:
    clean, _, noisy, v = noised(torch.float16)
    found = losses.clean_latents(noisy, v, SCHEDULE, TIMESTEPS, "v_prediction")
    assert found.dtype == torch.float32 and torch.allclose(found, clean.float(), atol=3e-3)
