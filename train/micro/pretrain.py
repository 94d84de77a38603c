"""Pretraining of the micro model: its objects encoded, its texts, and one loss per kind of training.

The order of the phases, optimisers and files are in train/micro.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange, repeat
from torch import Tensor

from softprompt.data.batch import Draw, EncodedViews, draw, seeded
from softprompt.data.pictures import BACKGROUNDS, composite, pick_background
from softprompt.data.samples import Source
from softprompt.micro.world import MicroWorld
from softprompt.model.attention import MultiViewAttnProcessor
from softprompt.model.conditioning import encode_views, make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline

DROP_RATE = 0.05
"""r of `keep_conditions`, FaceLift's."""

EMPTY_RATE = 0.05
"""Share of the single pictures that are trained under the empty text."""

VAE_DOMAINS = ("heads", "heads_above", "cats", "cats_above")
"""Domains that the VAE is trained on, beside mice; the other bodies it decodes as well as a VAE decodes what is new to it."""

_KL_WEIGHT = 1e-4
_FIXED_TIMESTEPS = (100, 350, 600, 850)


def load_all(source: Source) -> Tensor:
    """Every object of a source. Returns: uint8 [K, V, 4, S, S]."""
    return torch.stack([source.load(index) for index in range(len(source))])


def on_background(rgba: Tensor, index: int) -> Tensor:
    """Object `index` of its domain on its background: every other one on white, the rest on black or gray.

    rgba: uint8 [V, 4, S, S]. Returns: [V, 3, S, S] in [0, 1].
    """
    name = ("white", "black", "white", "gray")[index % 4]
    return composite(rgba, torch.tensor(BACKGROUNDS[name]))


def encode_domain(pipeline: Pipeline, rgba: Tensor) -> list[EncodedViews]:
    """Objects after VAE and image encoder. rgba: uint8 [K, V, 4, S, S]."""
    return [encode_views(pipeline, on_background(views, index)) for index, views in enumerate(rgba)]


def vae_loss(vae: AutoencoderKL, rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction on any background, most often white, with just enough KL to keep the latents bounded.

    rgba: uint8 [K, 4, S, S].
    """
    pictures = _on_any_background(rgba, generator)
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + _KL_WEIGHT * divergence


def decoder_loss(vae: AutoencoderKL, rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction by the decoder, the encoder frozen; the foreground weighs more than the background.

    rgba: uint8 [K, 4, S, S].
    """
    pictures = _on_any_background(rgba, generator)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    error = vae.decode(latents).sample - pictures
    return ((error.abs() + error.square()) * (1 + 2 * rgba[:, 3:].float() / 255)).mean()


def _on_any_background(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [K, 4, S, S] => [K, 3, S, S] in [-1, 1], each on a background of its own."""
    choices = ["white", "white", *BACKGROUNDS, "random"]
    chosen = torch.randint(len(choices), (len(rgba),), generator=generator).tolist()
    colours = [pick_background(choices[c], generator) for c in chosen]
    return torch.stack([composite(p, c) for p, c in zip(rgba, colours, strict=True)]) * 2 - 1


@torch.no_grad()
def latent_spread(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Standard deviation of the unscaled latents of pictures [K, 3, S, S] in [0, 1]."""
    return float(torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in pictures.split(12)]).std())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of the VAE's reconstructions of pictures [K, 3, S, S] in [0, 1]."""
    decoded = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in pictures.split(12)])
    error = (decoded / 2 + 0.5).clamp(0, 1) - pictures
    return float(-10 * error.square().mean(dim=(1, 2, 3)).log10().mean())


def draws_of(objects: Sequence[EncodedViews], *key: int | str) -> list[Draw]:
    """The randomness of one step: timesteps are spread over the schedule, one in each of B equal parts."""
    generator, count = seeded(*key), len(objects)
    place = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (place * 1000).long().clamp(max=999).tolist()
    return [
        draw(generator, encoded=o, num_timesteps=1000, drop_rate=DROP_RATE, timestep=t)
        for o, t in zip(objects, timesteps, strict=True)
    ]


def denoising_step(pipeline: Pipeline, objects: Sequence[EncodedViews], prompts: Tensor, draws: Sequence[Draw]) -> Tensor:
    """FaceLift's training loss: mean squared error of v over the views of some objects. prompts: [B, V, T, D]."""
    return denoising_errors(pipeline, objects, prompts, draws).mean()


def denoising_errors(pipeline: Pipeline, objects: Sequence[EncodedViews], prompts: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Mean squared error of v of each view, [B, V]. prompts: [B, V, T, D]."""
    batch = make_batch(pipeline, objects, draws)
    noisy, target = noisy_and_target(pipeline.scheduler, batch)
    num_views = noisy.shape[1]
    prediction = pipeline.unet(
        rearrange(torch.cat([noisy, batch.given], dim=2), "b v c h w -> (b v) c h w"),
        repeat(batch.timesteps, "b -> (b v)", v=num_views),
        encoder_hidden_states=rearrange(prompts, "b v t d -> (b v) t d"),
        class_labels=rearrange(batch.labels, "b v e -> (b v) e"),
    ).sample
    error = (rearrange(prediction, "(b v) c h w -> b v c h w", v=num_views) - target).square()
    return error.mean(dim=(2, 3, 4))


def single(encoded: EncodedViews, view: int) -> EncodedViews:
    """One view of an object, as a picture of its own."""
    return EncodedViews(**{field.name: getattr(encoded, field.name)[view : view + 1] for field in fields(encoded)})


def text_alone(draws: Sequence[Draw]) -> list[Draw]:
    """The same draws with neither input picture nor class label."""
    return [replace(one, keep_label=False, keep_latents=False) for one in draws]


@contextmanager
def single_pictures(pipeline: Pipeline) -> Iterator[None]:
    """Inside the block a picture's self-attention sees that picture alone, as in Stable Diffusion."""
    layers = [p for p in pipeline.unet.attn_processors.values() if isinstance(p, MultiViewAttnProcessor)]
    kinds = [layer.kind for layer in layers]
    for layer in layers:
        layer.kind = "single"
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.kind = kind


@torch.no_grad()
def fixed_noise_loss(pipeline: Pipeline, source: Source, prompt: Tensor) -> float:
    """The denoising loss at fixed noise and timesteps, on white, nothing dropped: for comparisons.

    prompt: [V, T, D].
    """
    losses = []
    for index in range(len(source)):
        encoded = encode_views(pipeline, on_background(source.load(index), 0))
        draws = [draw(seeded("fixed", index, t), encoded=encoded, num_timesteps=1000, timestep=t) for t in _FIXED_TIMESTEPS]
        prompts = repeat(prompt, "v t d -> b v t d", b=len(draws))
        losses.append(denoising_step(pipeline, [encoded] * len(draws), prompts, draws))
    return float(torch.stack(losses).mean())


def contrastive_loss(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss, over pictures and texts both ways. images, texts: [N, E]. same: [N, N], which texts are equal.

    A text that several pictures have is right for each of them. scale: of the cosines, positive.
    Source: Radford et al. 2103.00020, figure 3; equal texts as in Khosla et al. 2004.11362.
    """
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    wanted = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


@torch.no_grad()
def fit_normalizer(pipeline: Pipeline, embeds: Tensor) -> None:
    """Set the image normaliser to the mean and spread of image embeddings [K, E]."""
    pipeline.image_normalizer.mean.data = embeds.mean(0, keepdim=True)
    pipeline.image_normalizer.std.data = embeds.std(0, keepdim=True)


def held_out(domain: str, count: int) -> MicroWorld:
    """Objects that the micro model was not trained on."""
    return MicroWorld(domain, 20_000, count)


def given_picture(source: Source, index: int) -> Tensor:
    """[V, 3, S, S] in [0, 1]: an object on white; view 0 is the input picture."""
    return on_background(source.load(index), 0)
