"""The denoising loss, the KL to the pretrained model and the separation of the prompts; exact conversions of predictions."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

SnrWeighting = Literal["facelift", "v", "none"]
KLWeighting = Literal["posterior", "uniform"]
PredictionType = Literal["v_prediction", "epsilon"]


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio alphabar_t / (1 - alphabar_t). alphas_cumprod: [num_timesteps]; timesteps, result: [B]."""
    # diffusers' compute_snr squares the ratio of the two square roots: not equal to the last bit.
    alphabar = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphabar / (1 - alphabar)


def snr_weights(ratio: Tensor, weighting: SnrWeighting, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma weights of the denoising loss.

    ratio: [B] SNR. gamma: where the weight is cut.
    weighting: `facelift` min(SNR, g) / SNR, which FaceLift uses and which is right for epsilon-prediction; `v`
    min(SNR, g) / (SNR + 1), right for v-prediction; `none` 1.
    Returns: [B].
    Source: Hang et al. 2303.09556; FaceLift's train_diffusion.py.
    """
    if weighting == "none":
        return torch.ones_like(ratio)
    return ratio.clamp(max=gamma) / (ratio if weighting == "facelift" else ratio + 1)


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor, view_weights: Tensor | None = None) -> Tensor:
    """Weighted mean squared error.

    prediction, target: [B, V, C, H, W]. weights: [B]. view_weights: [B, V], 0 leaves a view out of the mean.
    Returns: a scalar, float32.
    """
    per_view = (prediction.float() - target.float()).square().mean(dim=(2, 3, 4)) * weights[:, None]  # B V
    if view_weights is None:
        return per_view.mean()
    return (per_view * view_weights).sum() / view_weights.sum()


def kl_weights(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    *,
    prediction_type: PredictionType = "v_prediction",
    weighting: KLWeighting = "posterior",
    clip: float = 1.0,
) -> Tensor:
    """Weight of the squared difference of two predictions in the KL of their reverse steps.

    `posterior`: the exact Gaussian KL of p(z_{t-1} | z_t), 1/2 snr(t-1) beta_t for v-prediction and that over alphabar_t for
    epsilon. It is infinite at t = 0, where the step has no noise, so it is cut at `clip`. `uniform`: 1, as in DRaFT+.
    alphas_cumprod: [num_timesteps]. timesteps, result: [B].
    Source: ours; ||mu - mu_ref||^2 / (2 sigma^2) of the DDPM posterior (Ho et al. 2006.11239, eq. 7), with
    z_0 = sqrt(alphabar) z_t - sqrt(1 - alphabar) v.
    """
    if weighting == "uniform":
        return torch.ones_like(timesteps, dtype=torch.float32)
    alphabar = alphas_cumprod.to(timesteps.device).double()
    before = torch.cat([alphabar.new_ones(1), alphabar])[timesteps]  # alphabar_{t-1}; 1 before the first step
    now = alphabar[timesteps]
    beta = 1 - now / before
    weight = 0.5 * before / (1 - before) * beta
    if prediction_type == "epsilon":
        weight = weight / now
    return weight.clamp(max=clip).float()


def kl_to_reference(prediction: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """KL of the adapted model's reverse step to the reference's, per object and view, in nats per latent element.

    prediction, reference: [B, V, C, H, W], of the same noisy latents. weights: [B], of `kl_weights`.
    Returns: [B, V], float32.
    """
    return (prediction.float() - reference.float()).square().mean(dim=(2, 3, 4)) * weights[:, None]


def separation_hinge(prompt: Tensor, start: Tensor) -> Tensor:
    """How much nearer to each other the views' prompts are than at the start; 0 where none is.

    prompt, start: E and W_0, [V, T, D].
    Returns: a scalar: mean over pairs of views of max(0, 1 - d / d_0)^2, d the distance of their prompts, d_0 at the start.
    Source: ours.
    """
    return (1 - separation_ratios(prompt, start)).clamp(min=0).square().mean()


def separation_ratios(prompt: Tensor, start: Tensor) -> Tensor:
    """Distance between the prompts of every two views, as a share of that at the start. Returns: [V (V - 1) / 2]."""
    first, second = torch.triu_indices(len(prompt), len(prompt), offset=1, device=prompt.device)
    now, before = ((p.index_select(0, first) - p.index_select(0, second)).flatten(1).norm(dim=-1) for p in (prompt, start))
    return now / before


def clean_latents(noisy: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """Clean latents of a prediction: z_0 = a_t z_t - s_t v, or (z_t - s_t eps) / a_t.

    noisy, prediction: [B, V, C, H, W]. alphas_cumprod: [num_timesteps]. timesteps: [B]. prediction_type: of PredictionType.
    Returns: [B, V, C, H, W], float32 or wider.
    """
    a, s = _signal_and_noise(alphas_cumprod, timesteps)
    noisy, prediction = _at_least_float32(noisy), _at_least_float32(prediction)
    return (noisy - s * prediction) / a if prediction_type == "epsilon" else a * noisy - s * prediction


def epsilon(noisy: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """Noise of a prediction: eps = a_t v + s_t z_t, or the prediction itself. Arguments as of `clean_latents`.

    For two predictions on one z_t: |eps_1 - eps_2|^2 = alphabar_t |v_1 - v_2|^2.
    """
    a, s = _signal_and_noise(alphas_cumprod, timesteps)
    noisy, prediction = _at_least_float32(noisy), _at_least_float32(prediction)
    return prediction if prediction_type == "epsilon" else a * prediction + s * noisy


def _signal_and_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """a_t = sqrt(alphabar_t) and s_t = sqrt(1 - alphabar_t), [B, 1, 1, 1, 1] each."""
    alphabar = rearrange(alphas_cumprod.to(timesteps.device)[timesteps], "b -> b 1 1 1 1")
    return alphabar.sqrt(), (1 - alphabar).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
