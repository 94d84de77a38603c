"""Predictions to clean latents and epsilon, against the noise they were made from."""

import pytest
import torch
from diffusers import DDIMScheduler

from softprompt.objectives.convert import clean_latents, epsilon

SCHEDULE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
TIMESTEPS = torch.tensor([0, 400, 999])


def noised(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Clean latents, noise, both mixed, and v."""
    clean, noise = torch.randn(2, 3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s = (x.reshape(3, 1, 1, 1, 1).sqrt() for x in (SCHEDULE.double()[TIMESTEPS], 1 - SCHEDULE.double()[TIMESTEPS]))
    return tuple(x.to(dtype) for x in (clean, noise, a * clean + s * noise, a * noise - s * clean))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_perfect_prediction_amounts_to_the_latents_and_noise_it_was_made_from(prediction_type: str) -> None:
    clean, noise, noisy, v = noised(torch.float64)
    schedule = SCHEDULE.double()
    prediction = noise if prediction_type == "epsilon" else v
    torch.testing.assert_close(clean_latents(noisy, prediction, schedule, TIMESTEPS, prediction_type), clean)
    torch.testing.assert_close(epsilon(noisy, prediction, schedule, TIMESTEPS, prediction_type), noise)


def test_the_squared_error_of_epsilon_is_alphabar_times_that_of_v() -> None:
    _, _, noisy, v = noised(torch.float64)
    other = v + torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eps = [epsilon(noisy, p, SCHEDULE.double(), TIMESTEPS, "v_prediction") for p in (v, other)]
    for b, t in enumerate(TIMESTEPS.tolist()):
        of_v = float((v[b] - other[b]).square().mean())
        assert float((eps[0][b] - eps[1][b]).square().mean()) == pytest.approx(float(SCHEDULE[t]) * of_v, rel=1e-6)


def test_half_precision_is_converted_in_float32() -> None:
    clean, _, noisy, v = noised(torch.float16)
    found = clean_latents(noisy, v, SCHEDULE, TIMESTEPS, "v_prediction")
    assert found.dtype == torch.float32 and torch.allclose(found, clean.float(), atol=3e-3)
