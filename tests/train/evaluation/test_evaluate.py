"""Held-out objects: the same look at every evaluation, and previews of what they say they are of."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor

from softprompt.data.batch import seeded
from softprompt.metrics import ssim_per_view
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline
from softprompt.model.sampling import sample_views
from softprompt.prompt.templates import VIEWS
from train.evaluation.evaluator import averaged, preview_series
from train.loop import training_step
from train.objectives.terms import Shown
from train.options.config import Config
from train.setup import prepare
from train.state.run import Job


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: its losses and pictures mean something."""
    return partial(small_config, model="micro")


@pytest.fixture
def make_job(mice: Path, small_config: Callable[..., Config]) -> Callable[..., Job]:
    return lambda **overrides: prepare(small_config(mice, **{"monitor.validation_timesteps": 2, **overrides}))


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job()


def parameters(job: Job) -> list[torch.nn.Parameter]:
    return [p for group in job.adapted.trainable().values() for p in group.values()]


@torch.no_grad()
def perturb(job: Job, scale: float = 0.3) -> None:
    for index, parameter in enumerate(parameters(job)):
        parameter.add_(scale * torch.randn(parameter.shape, generator=seeded("perturb", index)))


def loss_of(job: Job, position: float) -> float:
    return float(job.evaluator.losses(position, job.held_out, reference=job.config.data.first_reference).mean())


# ------------------------------------------------------------------------------------------------------------- validation


def test_the_validation_loss_is_the_same_twice_and_between_steps_of_the_global_generator(job: Job) -> None:
    first = loss_of(job, 0.5)
    torch.rand(1000)
    assert loss_of(job, 0.5) == first > 0


def test_the_validation_loss_does_not_depend_on_how_one_trains(make_job: Callable[..., Job]) -> None:
    expected = loss_of(make_job(), 0.0)
    batches = make_job(**{"train.batch_size": 3, "train.seed": 5, "train.steps": 9})
    unweighted = make_job(**{"loss.snr_weighting": "none", "loss.condition_drop_rate": 0.33, "data.background": "random"})
    assert loss_of(batches, 0.0) == pytest.approx(expected, rel=1e-5)
    assert loss_of(unweighted, 0.0) == expected


def test_the_validation_loss_changes_with_the_model_and_where_the_prompt_stands(job: Job) -> None:
    start = loss_of(job, 0.0)
    assert abs(loss_of(job, 1.0) / start - 1) > 1e-3
    for group in ("lora", "prompt"):
        before = loss_of(job, 0.0)
        with torch.no_grad():
            for index, parameter in enumerate(job.adapted.trainable()[group].values()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(group, index)))
        assert abs(loss_of(job, 0.0) / before - 1) > 1e-3, group


def test_the_validation_loss_is_the_mean_over_objects_and_timesteps(make_job: Callable[..., Job]) -> None:
    both = make_job(**{"train.batch_size": 3})
    target_of: list[Tensor] = []
    both.adapted.forward = lambda noisy, given, timesteps, *_: target_of.append(timesteps) or torch.zeros_like(noisy)  # type: ignore[method-assign]
    loss = loss_of(both, 0.0)
    assert torch.cat(target_of).tolist() == [250, 750, 250, 750]
    assert 0.3 < loss < 3, "v has about unit variance, so a prediction of zero is wrong by about 1"


def test_evaluating_does_not_change_the_run(job: Job) -> None:
    before = [p.detach().clone() for p in parameters(job)]
    state = torch.random.get_rng_state()
    with averaged(job.adapted, None):
        loss_of(job, 0.0)
        job.evaluator.preview(job.adapted.prompt(0.0), None)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(job), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in parameters(job))
    assert job.adapted.training


@pytest.mark.parametrize("own_view", [True, False])
def test_view_weights_leave_out_the_reference_s_own_view_alone(make_job: Callable[..., Job], own_view: bool) -> None:
    job = make_job(**{"loss.own_view": own_view})
    weights = job.trainer.context.view_weights(3)
    if own_view:
        assert weights is None
    else:
        assert weights is not None and weights.tolist() == [[0, 1, 1, 1, 1, 1]] * 3
        assert loss_of(job, 0.0) == loss_of(make_job(), 0.0), "validation looks at every view, whatever trains"


def test_the_same_view_is_given_in_validation_however_it_is_drawn_in_training(make_job: Callable[..., Job]) -> None:
    fixed, drawn = (loss_of(make_job(**{"data.reference_view": r}), 0.0) for r in ("0", "random"))
    assert fixed == drawn
    assert loss_of(make_job(**{"data.reference_view": "[3,0]"}), 0.0) != fixed, "the first of a list"


def test_the_loss_of_each_view_is_logged_under_its_own_name(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"data.reference_view": "4", "data.original": "micro"})
    series = job.evaluator.validation(0.0, with_original=True)
    views = [series[f"loss_view/{name}"] for name in VIEWS]
    assert sum(views) / 6 == pytest.approx(series["loss/validation"])
    assert len(set(views)) == 6 and views == job.evaluator.losses(0.0, job.held_out, reference=4).tolist()
    assert job.evaluator.original is not None
    expected = float(job.evaluator.losses(0.0, job.evaluator.original, reference=0).mean())
    assert series["loss/original"] == expected != series["loss/validation"]
    assert "loss/original" not in job.evaluator.validation(0.0, with_original=False)
    assert "loss/original" not in make_job().evaluator.validation(0.0, with_original=True), "none is at hand"


# ---------------------------------------------------------------------------------------------------------------- average


def test_the_average_is_in_place_inside_the_block_and_gone_after_it_bit_for_bit(job: Job) -> None:
    ema = EMAModel(parameters(job), decay=0.5)
    perturb(job)
    ema.step(parameters(job))
    perturb(job)
    before = [p.detach().clone() for p in parameters(job)]
    shadow = [p.clone() for p in ema.shadow_params]
    raw = loss_of(job, 0.0)
    with averaged(job.adapted, ema):
        assert not job.adapted.training
        assert all(torch.equal(p, s) for p, s in zip(parameters(job), shadow, strict=True))
        assert not all(torch.equal(p, b) for p, b in zip(parameters(job), before, strict=True))
        assert loss_of(job, 0.0) != raw
    assert job.adapted.training
    assert all(torch.equal(p, b) for p, b in zip(parameters(job), before, strict=True))
    with pytest.raises(RuntimeError, match="inside"), averaged(job.adapted, ema):
        raise RuntimeError("inside")
    assert job.adapted.training
    assert all(torch.equal(p, b) for p, b in zip(parameters(job), before, strict=True))
    assert all(torch.equal(p, s) for p, s in zip(ema.shadow_params, shadow, strict=True))


def test_without_an_average_the_model_is_only_switched_to_evaluation(job: Job) -> None:
    before = [p.detach().clone() for p in parameters(job)]
    with averaged(job.adapted, None):
        assert not job.adapted.training and not job.pipeline.unet.training
        assert all(torch.equal(p, b) for p, b in zip(parameters(job), before, strict=True))
    assert job.adapted.training


# --------------------------------------------------------------------------------------------------------------- previews


@torch.no_grad()
def test_the_pretrained_row_is_the_untouched_model_after_lora_and_prompt_have_moved(job: Job) -> None:
    training_step(job.trainer, 0)
    perturb(job)
    monitor = job.config.monitor
    with averaged(job.adapted, None):
        shown = job.evaluator.preview(job.adapted.prompt(0.5), None)
    assert shown.names == VIEWS
    untouched = sample_views(
        load_pipeline(MICRO_MODEL),
        job.adapted.prompt.waypoints[0],
        shown.pictures,
        steps=monitor.preview_steps,
        guidance_scale=monitor.guidance_scale,
        eta=monitor.eta,
        seed=job.config.train.seed,
    )
    assert torch.equal(shown.pretrained, untouched)
    assert (shown.now - shown.pretrained).abs().max() > 0.05
    again = job.evaluator.preview(job.adapted.prompt(0.5), shown.pretrained)
    assert again.pretrained is shown.pretrained, "it never changes, so it is not sampled again"


@torch.no_grad()
def test_a_preview_of_reference_view_2_begins_with_it(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"data.reference_view": 2, "monitor.preview_objects": 9})
    perturb(job)
    with averaged(job.adapted, None):
        shown = job.evaluator.preview(job.adapted.prompt(0.0), None)
    order = [2, 3, 4, 5, 0, 1]
    assert shown.names == ("right", "back", "left", "front_left", "front", "front_right") == tuple(VIEWS[i] for i in order)
    truth = torch.stack([job.held_out.pictures(i, seeded("any")) for i in range(2)])
    assert torch.equal(shown.truth, truth[:, order]) and torch.equal(shown.pictures, truth[:, 2])
    for b in range(2):
        for slot, view in enumerate(order):
            with Image.open(Path(job.held_out.source.locations[b]) / f"cam_{view:03d}.png") as file:
                alpha = torch.from_numpy(np.array(file)[:, :, 3] / np.float32(255))
            assert torch.equal(shown.masks[b, slot, 0], alpha) and 0 < alpha.mean() < 1
    assert shown.masks.shape == (2, 6, 1, 64, 64)
    prompt, options = job.adapted.prompt(0.0)[order], {"steps": 2, "guidance_scale": 2.0, "eta": 0.0, "seed": 0}
    expected = torch.cat([sample_views(job.pipeline, prompt, truth[b, 2], **options) for b in range(2)])
    torch.testing.assert_close(shown.now, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_previews_are_the_same_at_every_evaluation(job: Job) -> None:
    first = job.evaluator.preview(job.adapted.prompt(0.0), None)
    torch.rand(1000)
    assert torch.equal(job.evaluator.preview(job.adapted.prompt(0.0), None).now, first.now)


def test_preview_series_are_named_after_the_view_in_each_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, now = torch.rand(2, 2, 6, 3, 16, 16, generator=generator)
    names = ("right", "back", "left", "front_left", "front", "front_right")
    masks = (torch.rand(2, 6, 1, 16, 16, generator=generator) - 0.5).clamp(0)  # about half of it background, the rest partly so
    series = preview_series(Shown(truth[:, 0], truth, masks, truth, now, names))
    for v, name in enumerate(names):
        psnr = sum(-10 * float(torch.log10((now[b, v] - truth[b, v]).square().mean())) for b in range(2)) / 2
        assert series[f"views_psnr/{name}"] == pytest.approx(psnr, abs=1e-4)
        assert series[f"views_ssim/{name}"] == pytest.approx(float(ssim_per_view(now[:, [v]], truth[:, [v]])), abs=1e-5)
    assert series["views/psnr"] == pytest.approx(sum(series[f"views_psnr/{name}"] for name in names) / 6)
    assert series["views/ssim"] == pytest.approx(sum(series[f"views_ssim/{name}"] for name in names) / 6)
    assert set(series) == {
        *(f"views_{kind}/{name}" for kind in ("psnr", "ssim") for name in names),
        *(f"views/{kind}{of}" for kind in ("psnr", "ssim") for of in ("", "_foreground")),
        *(f"views/{kind}" for kind in ("copy_score", "separation_ratio")),
    }
    objects_and_views = [(b, v) for b in range(2) for v in range(6)]
    psnr = [slow_foreground_psnr(now[b, v], truth[b, v], masks[b, v, 0]) for b, v in objects_and_views]
    ssim = [slow_foreground_ssim(now[b, v], truth[b, v], masks[b, v, 0]) for b, v in objects_and_views]
    assert series["views/psnr_foreground"] == pytest.approx(sum(psnr) / 12, abs=1e-4)
    assert series["views/ssim_foreground"] == pytest.approx(sum(ssim) / 12, abs=1e-5)
    assert abs(series["views/psnr_foreground"] - series["views/psnr"]) > 1e-3, "the masks change nothing"
    assert abs(series["views/ssim_foreground"] - series["views/ssim"]) > 1e-4, "the masks change nothing"


def slow_foreground_psnr(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Pictures [3, S, S], mask [S, S]; pixel by pixel."""
    error = weight = 0.0
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            for c in range(3):
                error += float(mask[y, x]) * float(a[c, y, x] - b[c, y, x]) ** 2
                weight += float(mask[y, x])
    return 10 * math.log10(weight / error)


def slow_foreground_ssim(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Wang et al. 2004, equation 13, in a Gaussian window of 11 pixels around each pixel; edges are mirrored."""
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()
    total = weight = 0.0
    for c in range(3):
        p, q = (np.pad(x[c].double().numpy(), 5, mode="reflect") for x in (a, b))
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                u, v = p[y : y + 11, x : x + 11], q[y : y + 11, x : x + 11]
                mu, mv = (window * u).sum(), (window * v).sum()
                uu, vv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                uv = (window * (u - mu) * (v - mv)).sum()
                similar = (2 * mu * mv + 1e-4) * (2 * uv + 9e-4) / ((mu**2 + mv**2 + 1e-4) * (uu + vv + 9e-4))
                total += float(mask[y, x]) * similar
                weight += float(mask[y, x])
    return total / weight


def test_what_is_behind_the_object_does_not_count_in_the_foreground_series() -> None:
    truth = torch.rand(1, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 6, 1, 16, 16)
    masks[..., 4:9, 3:8] = 1
    now = truth + 0.25 * masks
    behind = now + 0.5 * (1 - masks)
    alone, both = (preview_series(Shown(truth[:, 0], truth, masks, truth, shown, VIEWS)) for shown in (now, behind))
    assert alone["views/psnr_foreground"] == pytest.approx(-20 * math.log10(0.25), abs=1e-4)
    assert both["views/psnr_foreground"] == pytest.approx(alone["views/psnr_foreground"], abs=1e-4)
    assert both["views/psnr"] < alone["views/psnr"] - 3


@pytest.mark.parametrize(("kind", "copies", "apart"), [("copy", 1.0, 0.0), ("truth", 0.0, 1.0)])
def test_preview_series_tell_a_copy_of_the_input_from_the_truth(kind: str, copies: float, apart: float) -> None:
    truth = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    now = truth[:, :1].expand_as(truth) if kind == "copy" else truth
    masks = torch.ones(2, 6, 1, 16, 16)
    series = preview_series(Shown(truth[:, 0], truth, masks, truth, now, VIEWS))
    assert series["views/copy_score"] == pytest.approx(copies, abs=1e-6)
    assert series["views/separation_ratio"] == pytest.approx(apart, abs=1e-6)
