"""Pictures to what the UNet is conditioned on and trained toward: latents, class labels, condition dropout."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import Tensor

from softprompt.model.pipeline import Pipeline


@dataclass(frozen=True)
class EncodedViews:
    """One object's pictures after the frozen encoders, on the CPU, float32."""

    mean: Tensor
    """[V, C, H, W] mean of the VAE's posterior, unscaled."""
    std: Tensor
    """[V, C, H, W] standard deviation of the VAE's posterior, unscaled."""
    embeds: Tensor
    """[V, E] CLIP image embeddings."""


@torch.no_grad()
def encode_views(pipeline: Pipeline, pictures: Tensor) -> EncodedViews:
    """Run the VAE's encoder and CLIP over the pictures of one object.

    pictures: [V, 3, S, S] in [0, 1], on a background.
    """
    with pipeline.encoders_on_device():
        parts = [_posterior(pipeline, part) for part in pictures.split(pipeline.pictures_at_once)]
        return EncodedViews(
            mean=torch.cat([part.mean for part in parts]).float().cpu(),
            std=torch.cat([part.std for part in parts]).float().cpu(),
            embeds=image_embeddings(pipeline, pictures).cpu(),
        )


def _posterior(pipeline: Pipeline, pictures: Tensor) -> DiagonalGaussianDistribution:
    vae = pipeline.vae
    return vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1).latent_dist


@torch.no_grad()
def image_embeddings(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """[N, 3, S, S] in [0, 1] => [N, E] CLIP image embeddings, float32, on the image encoder's device."""
    encoder = pipeline.image_encoder
    pixels = (pictures.clamp(0, 1) * 255).round().to("cpu", torch.uint8)  # what a PNG would hold
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    features = pipeline.feature_extractor(images=images, return_tensors="pt").pixel_values
    return encoder(features.to(encoder.device, encoder.dtype)).image_embeds.float()


@torch.no_grad()
def input_latents(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """[N, 3, S, S] in [0, 1] => [N, C, H, W] latents of given pictures: the posterior's mode, scaled, float32."""
    mode = torch.cat([_posterior(pipeline, part).mode() for part in pictures.split(pipeline.pictures_at_once)])
    return mode.float() * pipeline.vae.config.scaling_factor


def class_labels(pipeline: Pipeline, embeds: Tensor, noise: Tensor) -> Tensor:
    """The UNet's class labels: image embeddings noised at level 0, the level's sinusoid appended.

    embeds, noise: [N, E], noise standard normal. Returns: [N, 2E], float32.
    Source: Stable unCLIP's `noise_image_embeddings`, as FaceLift calls it with noise_level 0.
    """
    level = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
    normalizer = pipeline.image_normalizer
    noised = pipeline.image_noising_scheduler.add_noise(normalizer.scale(embeds.float()), noise.float(), level)
    sinusoid = get_timestep_embedding(level, embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([normalizer.unscale(noised), sinusoid], dim=-1)


def keep_conditions(p: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Condition dropout, per object: which conditions stay.

    p: [B] uniform in [0, 1). rate: r in [0, 1/3].
    Returns: (keep_labels, keep_latents), [B] booleans: class labels are dropped where p < 2r, the input's latents where
    r <= p < 3r. The prompt is never dropped.
    Source: FaceLift, train_diffusion.py (`drop_as_a_whole`, r = 0.05).
    """
    return ~(p < 2 * rate), ~((p >= rate) & (p < 3 * rate))
