"""From pictures to the UNet's inputs and targets: latents, class labels, batches."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding
from einops import repeat
from PIL import Image
from torch import Tensor

from softprompt.data.batch import Batch, Draw, EncodedViews, view_order
from softprompt.model.pipeline import Pipeline


@torch.no_grad()
def encode_views(pipeline: Pipeline, pictures: Tensor) -> EncodedViews:
    """Encode the pictures of one object with VAE and CLIP. pictures: [V, 3, S, S] in [0, 1], on a background."""
    with pipeline.encoders_on_device():
        parts = [_posterior(pipeline, part) for part in pictures.split(pipeline.pictures_at_once)]
        return EncodedViews(
            mean=torch.cat([part.mean for part in parts]).float().cpu(),
            std=torch.cat([part.std for part in parts]).float().cpu(),
            embeds=image_embeddings(pipeline, pictures).cpu(),
        )


@torch.no_grad()
def image_embeddings(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """[N, 3, S, S] in [0, 1] => [N, E] CLIP image embeddings, float32, on the image encoder's device."""
    encoder = pipeline.image_encoder
    pixels = (pictures.clamp(0, 1) * 255).round().to("cpu", torch.uint8)  # as in a PNG
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    features = pipeline.feature_extractor(images=images, return_tensors="pt").pixel_values
    return encoder(features.to(encoder.device, encoder.dtype)).image_embeds.float()


@torch.no_grad()
def input_latents(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """[N, 3, S, S] in [0, 1] => [N, C, H, W] latents of input pictures: the posterior's mode, scaled, float32."""
    mode = torch.cat([_posterior(pipeline, part).mode() for part in pictures.split(pipeline.pictures_at_once)])
    return mode.float() * pipeline.vae.config.scaling_factor


def class_labels(pipeline: Pipeline, embeds: Tensor, noise: Tensor) -> Tensor:
    """Class labels of the UNet: image embeddings noised at level 0, the level's sinusoid appended.

    embeds, noise: [N, E], noise standard normal. Returns: [N, 2E], float32.
    Source: Stable unCLIP's `noise_image_embeddings`, as FaceLift calls it with noise_level 0.
    """
    level = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
    normalizer = pipeline.image_normalizer
    noised = pipeline.image_noising_scheduler.add_noise(normalizer.scale(embeds.float()), noise.float(), level)
    sinusoid = get_timestep_embedding(level, embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([normalizer.unscale(noised), sinusoid], dim=-1)


@torch.no_grad()
def make_batch(pipeline: Pipeline, objects: Sequence[EncodedViews], draws: Sequence[Draw]) -> Batch:
    """Make a batch of objects and their draws, on the pipeline's device.

    With a reference view other than 0 the views, and their prompts with them, are rotated so that it comes first: FaceLift's
    attention takes slot 0 as the reference.
    """
    device = pipeline.device
    scale = pipeline.vae.config.scaling_factor
    num_views = len(objects[0].mean)
    orders = [view_order(d.reference, num_views) for d in draws]
    latents = [(o.mean + o.std * d.target_noise)[order] for o, d, order in zip(objects, draws, orders, strict=True)]
    given = [o.mean[d.reference] * d.keep_latents for o, d in zip(objects, draws, strict=True)]
    embeds = torch.stack([o.embeds[d.reference] for o, d in zip(objects, draws, strict=True)]).to(device)
    labels = class_labels(
        pipeline,
        repeat(embeds, "b e -> (b v) e", v=num_views),
        torch.cat([d.label_noise for d in draws]).to(device),
    ).unflatten(0, (len(objects), num_views))
    keep_label = torch.tensor([d.keep_label for d in draws], device=device)
    return Batch(
        latents=torch.stack(latents).to(device) * scale,
        noise=torch.stack([d.noise for d in draws]).to(device),
        given=repeat(torch.stack(given).to(device) * scale, "b c h w -> b v c h w", v=num_views),
        labels=labels * keep_label[:, None, None],
        timesteps=torch.tensor([d.timestep for d in draws], device=device),
        order=torch.stack(orders).to(device),
    )


def noisy_and_target(scheduler: DDIMScheduler, batch: Batch) -> tuple[Tensor, Tensor]:
    """The noised latents z_t and the target of the prediction (v or epsilon), both [B, V, C, H, W]."""
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    if scheduler.config["prediction_type"] == "epsilon":
        return noisy, batch.noise
    return noisy, scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)


def _posterior(pipeline: Pipeline, pictures: Tensor) -> DiagonalGaussianDistribution:
    vae = pipeline.vae
    return vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1).latent_dist
