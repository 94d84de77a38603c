"""Six views from one picture: the sampling of previews, commands and tests alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.model.adapted import adapters_off
from softprompt.model.conditioning import class_labels, image_embeddings, input_latents
from softprompt.model.pipeline import Pipeline

Rise = Literal["linear", "square", "fourth", "step"]
RISES: Mapping[Rise, Callable[[float], float]] = {
    "linear": lambda done: done,
    "square": lambda done: done**2,
    "fourth": lambda done: done**4,
    "step": lambda done: float(done >= 0.6),
}
"""Weight of the adapted model by the share i/N of the sampling steps that are done: 0 at the noisiest, below 1 at the last.
Source: annealed importance guidance (2409.06493), as in NVIDIA/NeMo-Aligner af2b3bd9."""


@dataclass(frozen=True)
class Annealed:
    """Sampling that begins with the pretrained model and ends with the adapted one: the first steps, which decide the layout,
    stay the pretrained model's."""

    pretrained: Tensor
    """The prompt W_0 of the pretrained model, [V, T, D] or [B, V, T, D]."""
    weight: Callable[[float], float]
    """Weight of the adapted model by the share of the steps that are done, as in RISES."""


def sample_views(pipeline: Pipeline, prompt: Tensor, pictures: Tensor, **options: Any) -> Tensor:
    """Sample six views of each input picture.

    prompt, pictures, options (steps, guidance_scale, eta, seed ...): as of `sample_latents`.
    Returns: [B, V, 3, S, S] in [0, 1], float32, on the UNet's device.
    Source: FaceLift's pipeline_mvdiffusion_unclip.py; the defaults of guidance, steps and eta are those of its inference.py.
    """
    with pipeline.encoders_on_device():
        return decode_latents(pipeline, sample_latents(pipeline, prompt, pictures, **options))


@torch.no_grad()
def sample_latents(
    pipeline: Pipeline,
    prompt: Tensor,
    pictures: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 3.0,
    eta: float = 1.0,
    seed: int = 0,
    latents: Tensor | None = None,
    embed_noise: Tensor | None = None,
    annealed: Annealed | None = None,
) -> Tensor:
    """Sample the latents of six views of each input picture; the encoders must be on the device.

    prompt: [V, T, D], or [B, V, T, D] for a prompt of its own per object.
    pictures: [3, S, S] or [B, 3, S, S] in [0, 1], each on its background; the reference view (view 0) of its object.
    steps: DDIM steps. guidance_scale: 1 is no guidance. eta: 0 deterministic DDIM .. 1 as noisy as DDPM.
    seed: of all noise. Every object gets the same noise, so its views do not depend on what else is in the batch.
    latents: [V, C, H, W] starting noise, embed_noise: [V, E] noise of the class labels; drawn from `seed` if not given.
    annealed: mixes in the pretrained model; such a step takes twice as long, except where the weight is 0 or 1.
    Returns: [B, V, C, H, W], float32.
    Raises: ValueError for a prompt of another shape.
    """
    unet, views, device = pipeline.unet, pipeline.num_views, pipeline.device
    pictures = (pictures if pictures.ndim == 4 else pictures[None]).to(device)
    num_objects = len(pictures)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every machine
    embeds = image_embeddings(pipeline, pictures).to(device)
    if embed_noise is None:
        embed_noise = torch.randn(views, embeds.shape[-1], generator=generator)
    if latents is None:
        latents = torch.randn(views, *pipeline.latent_shape, generator=generator)

    labels = class_labels(
        pipeline,
        repeat(embeds, "b e -> (b v) e", v=views),
        repeat(embed_noise.to(device), "v e -> (b v) e", b=num_objects),
    )
    given = repeat(input_latents(pipeline, pictures).to(device), "b c h w -> (b v) c h w", v=views)
    prompts = [prompt, prompt if annealed is None else annealed.pretrained]
    for one in prompts:
        if one.shape[:-2] not in ((views,), (num_objects, views)):
            raise ValueError(f"prompt is {list(one.shape)}; expected [{views}, T, D] or [{num_objects}, {views}, T, D]")
    tokens, pretrained = (one.flatten(end_dim=-3).to(device, unet.dtype) for one in prompts)  # (v) or (b v) t d
    guided = guidance_scale != 1.0
    if guided:  # the first half sees no picture; the prompt is the same in both
        labels, given = (torch.cat([torch.zeros_like(x), x]) for x in (labels, given))
    labels, given = labels.to(unet.dtype), given.to(unet.dtype)

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    z = repeat(latents.to(device, torch.float32), "v c h w -> (b v) c h w", b=num_objects) * scheduler.init_noise_sigma

    def predict(tokens: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """[(B V), C, H, W], with guidance."""
        prompt_of = torch.arange(num_objects * views, device=device) % len(tokens)
        noisy = scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t).to(unet.dtype)
        predicted: Tensor = unet(
            torch.cat([noisy, given], dim=1),
            t,
            encoder_hidden_states=tokens,
            class_labels=labels,
            cross_attention_kwargs={"prompt_of": torch.cat([prompt_of, prompt_of]) if guided else prompt_of},
        ).sample.float()
        if not guided:
            return predicted
        without, with_picture = predicted.chunk(2)
        return with_guidance(without, with_picture, guidance_scale)

    for step, t in enumerate(scheduler.timesteps):
        weight = 1.0 if annealed is None else annealed.weight(step / steps)
        if weight == 1:
            predicted = predict(tokens, z, t)
        else:
            with adapters_off(unet):
                predicted = predict(pretrained, z, t)
            if weight != 0:
                # eps = a v + s z: at one (z, t), with weights of sum 1, mixing v is mixing eps.
                predicted = (1 - weight) * predicted + weight * predict(tokens, z, t)
        fresh = torch.randn(views, *pipeline.latent_shape, generator=generator) if eta > 0 else None
        noise = None if fresh is None else repeat(fresh.to(device), "v c h w -> (b v) c h w", b=num_objects)
        z = scheduler.step(predicted, t, z, eta=eta, variance_noise=noise).prev_sample
    return rearrange(z, "(b v) c h w -> b v c h w", v=views)


def with_guidance(without: Tensor, with_picture: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + w (c - u), of v or of epsilon alike."""
    return without + scale * (with_picture - without)


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """[B, V, C, H, W] scaled latents => [B, V, 3, S, S] pictures in [0, 1], float32."""
    return decode_with_gradient(pipeline, latents)


def decode_with_gradient(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """`decode_latents` with a gradient, for objectives on pictures.

    The decoder's activations are not kept but computed again in the backward pass, a few pictures at a time: the encoders
    must stay on the device until then.
    """
    vae = pipeline.vae
    z = rearrange(latents, "b v c h w -> (b v) c h w").to(vae.device, vae.dtype) / vae.config.scaling_factor

    def decode(part: Tensor) -> Tensor:
        decoded: Tensor = vae.decode(part).sample
        return decoded

    parts = z.split(pipeline.pictures_at_once)
    decoded = torch.cat([checkpoint(decode, p, use_reentrant=False) if z.requires_grad else decode(p) for p in parts])
    return rearrange((decoded.float() / 2 + 0.5).clamp(0, 1), "(b v) c h w -> b v c h w", v=latents.shape[1])
