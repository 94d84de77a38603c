"""What a prediction amounts to: clean latents and epsilon, exactly, for v- and for epsilon-prediction."""

import torch
from einops import rearrange
from torch import Tensor


def signal_and_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """a_t = sqrt(alphabar_t) and s_t = sqrt(1 - alphabar_t). alphas_cumprod: [num_timesteps]; timesteps: [B].

    Returns: two of [B, 1, 1, 1, 1].
    """
    alphabar = rearrange(alphas_cumprod.to(timesteps.device)[timesteps], "b -> b 1 1 1 1")
    return alphabar.sqrt(), (1 - alphabar).sqrt()


def clean_latents(noisy: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """z_0 = a_t z_t - s_t v, or (z_t - s_t eps) / a_t. noisy, prediction, result: [B, V, C, H, W], at least float32."""
    a, s = signal_and_noise(alphas_cumprod, timesteps)
    noisy, prediction = _at_least_float32(noisy), _at_least_float32(prediction)
    if prediction_type == "epsilon":
        return (noisy - s * prediction) / a
    return a * noisy - s * prediction


def epsilon(noisy: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """eps = a_t v + s_t z_t, or the prediction itself. Shapes as of `clean_latents`.

    Of two predictions on one z_t: |eps_1 - eps_2|^2 = alphabar_t |v_1 - v_2|^2.
    """
    a, s = signal_and_noise(alphas_cumprod, timesteps)
    noisy, prediction = _at_least_float32(noisy), _at_least_float32(prediction)
    return prediction if prediction_type == "epsilon" else a * prediction + s * noisy


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
