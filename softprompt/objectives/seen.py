"""Argument of a user's own objective, `custom.function` of the main job."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """One batch of a training step, on the model's device; B objects of V views, slot 0 of each the reference view.

    Latents are scaled by the VAE's scaling factor. Only `prediction`, `clean` and `prompt` carry a gradient.
    """

    prediction: Tensor
    """[B, V, C, H, W]: the adapted model's v or epsilon, see `prediction_type`; possibly in half precision."""
    target: Tensor
    """[B, V, C, H, W]: the value that the prediction is trained toward."""
    clean: Tensor
    """[B, V, C, H, W]: the clean latents of the prediction, float32."""
    latents: Tensor
    """[B, V, C, H, W]: the true clean latents."""
    noisy: Tensor
    """[B, V, C, H, W]: the latents at the timestep."""
    given: Tensor
    """[B, V, C, H, W]: latents of the input picture, the same for all views; zero where the condition is dropped."""
    timesteps: Tensor
    """[B]."""
    alphas_cumprod: Tensor
    """[num_timesteps], alphabar of the noise schedule."""
    order: Tensor
    """[B, V]: which view is in each slot."""
    prompt: Tensor
    """[V, T, D]: E, by view and not by slot."""
    start: Tensor
    """[V, T, D]: W_0, the prompt of the pretrained model."""
    step: int
    """Optimizer steps done before this one; 0 where held-out objects are evaluated."""
    prediction_type: str
    """`v_prediction` or `epsilon`."""
    untouched: Callable[[], Tensor]
    """Computes, once a batch, the pretrained model's prediction on the same input, [B, V, C, H, W]; it has no gradient."""
