"""DRaFT+: a reward's gradient through the last steps of the sampler, and a KL on those steps.

    L = - mean_b r(x_b) + kl * KL,    KL = 1/K sum_{i in last K steps} mean (eps_theta(z_i) - sg[eps_0(z_i)])^2

x_b are the drafted pictures, decoded from the last step's clean estimate; z_i lies on the draft's own trajectory; eps is with
guidance, (1 - w) eps_u + w eps_c; eps_0 is that of the pretrained model at the same z_i. It is the KL of Gaussians of one
variance without its factor for the step and without its 1/2. Here an item is an object's V views: `mean` is over them too.
Source: NVIDIA/NeMo-Aligner af2b3bd9, megatron_sd_draftp_model.py and megatron_sdxl_draftp_model.py. That the code's eps there
is the one with guidance was read in its sampler, not in the thin wrapper that passes it on. No number of theirs is verified.
DRaFT (Clark et al., 2309.17400) is the same without the KL.
"""

import torch
from torch import Tensor

from softprompt.objectives.losses import epsilon

ALIGNPROP = (0.84, 0.1)
"""Mean and standard deviation of the first step with a gradient, as shares of all steps: 42 and 5 of 50 in AlignProp's
code."""


def steps_with_gradient(steps: int, last: int, generator: torch.Generator | None = None) -> int:
    """K: how many of the sampler's last steps the gradient goes through.

    last: K where it is fixed. generator: draws it instead, steps - int(N(0.84 steps, 0.1 steps)), cut to 1 .. steps - 1.
    Source: DRaFT's K; AlignProp (2310.03739; mihirp1998/AlignProp b22918a), which draws the first such step with N(42, 5) of
    50.
    """
    if generator is None:
        return min(last, steps)
    mean, deviation = (share * steps for share in ALIGNPROP)
    first = int(mean + deviation * float(torch.randn((), generator=generator)))
    return steps - min(max(first, 1), steps - 1) if steps > 1 else 1


def trajectory_kl(
    noisy: Tensor, ours: Tensor, pretrained: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str
) -> Tensor:
    """One step's term of the KL: mean (eps_theta - sg[eps_0])^2 of an object's views, = alphabar_t mean (v_theta - v_0)^2.

    The equality is of values: eps_0 is held fixed as a whole, of a v-model also its share of z_i, through which eps_theta has a
    gradient.
    noisy, ours, pretrained: [B, V, C, H, W], z_i and the predictions with guidance. timesteps: [B]. Returns: [B].
    """
    eps = epsilon(noisy, ours, alphas_cumprod, timesteps, prediction_type)
    eps_0 = epsilon(noisy.detach(), pretrained.detach(), alphas_cumprod, timesteps, prediction_type)
    return (eps - eps_0).square().mean(dim=(1, 2, 3, 4))


def renoised(clean: Tensor, noise: Tensor, alphabar: Tensor) -> Tensor:
    """DRaFT-LV: the drafted latents noised again to the last step's level, a sg(z_0) + s eps; K = 1 and a mean over noises.

    alphabar: of the sampler's last timestep, a scalar.
    Source: DRaFT's low-variance variant (2309.17400); the idea is the paper's, the formula recalled and not verified.
    """
    return alphabar.sqrt() * clean.detach() + (1 - alphabar).sqrt() * noise


def draft_loss(rewards: Tensor, kls: Tensor, kl_weight: float) -> Tensor:
    """- mean r + kl_weight * mean KL. rewards: [B], higher is better; kls: [K, B]. Returns: a scalar."""
    return kl_weight * kls.mean() - rewards.mean()
