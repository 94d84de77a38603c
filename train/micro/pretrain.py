"""Pretraining of the micro model: its objects encoded, its texts, and one loss per kind of training.

The order of the phases, optimisers and files are in train/micro.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange, repeat
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from softprompt.data.batch import Draw, EncodedViews, draw, seeded
from softprompt.data.pictures import BACKGROUNDS, composite, pick_background
from softprompt.data.samples import Source
from softprompt.micro.world import MicroWorld
from softprompt.model.conditioning import encode_views, make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.templates import view_texts

DROP_RATE = 0.05
"""r of `keep_conditions`, FaceLift's."""

PRIOR_TEXTS = {
    "heads": view_texts("facelift"),
    "heads_above": view_texts("elevated"),
    "cats": view_texts("a photograph of a cat, {view} view."),
    "cats_above": view_texts("realistic", subject="cat"),
}
"""Domains of the prior: never mice, which are left for the user's run to learn."""

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


@dataclass(frozen=True)
class EncodedDomain:
    """The objects of a domain after the VAE, K of them."""

    objects: list[EncodedViews]
    features: Tensor
    """[K, 3, S, S] view 0 as the image encoder takes it."""


def encode_domain(pipeline: Pipeline, rgba: Tensor) -> EncodedDomain:
    """rgba: uint8 [K, V, 4, S, S]."""
    objects, features = [], []
    for index, views in enumerate(rgba):
        pictures = on_background(views, index)
        objects.append(encode_views(pipeline, pictures))
        pixels = (rearrange(pictures[0], "c h w -> h w c") * 255).round().byte().numpy()
        features.append(pipeline.feature_extractor(images=[pixels], return_tensors="pt").pixel_values)
    return EncodedDomain(objects, torch.cat(features))


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


def denoising_step(
    pipeline: Pipeline,
    objects: Sequence[EncodedViews],
    prompts: Tensor,
    draws: Sequence[Draw],
    embeds: Tensor | None = None,
) -> Tensor:
    """FaceLift's training loss: mean squared error of v over the views of some objects.

    prompts: [B, V, T, D]. embeds: [B, E] view 0's embeddings with gradient, where the image encoder is trained along;
    those of `objects` must have the same values.
    """
    batch = make_batch(pipeline, objects, draws)
    labels = batch.labels
    if embeds is not None:  # `class_labels` has no gradient: pass it straight through
        kept = torch.tensor([d.keep_label for d in draws])[:, None, None]
        live = F.pad((embeds - embeds.detach())[:, None] * kept, (0, labels.shape[-1] - embeds.shape[-1]))
        labels = labels + live
    noisy, target = noisy_and_target(pipeline.scheduler, batch)
    num_views = noisy.shape[1]
    prediction = pipeline.unet(
        rearrange(torch.cat([noisy, batch.given], dim=2), "b v c h w -> (b v) c h w"),
        repeat(batch.timesteps, "b -> (b v)", v=num_views),
        encoder_hidden_states=rearrange(prompts, "b v t d -> (b v) t d"),
        class_labels=rearrange(labels, "b v e -> (b v) e"),
    ).sample
    return F.mse_loss(prediction, rearrange(target, "b v c h w -> (b v) c h w"))


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


@torch.no_grad()
def fit_normalizer(pipeline: Pipeline, features: Tensor) -> None:
    """Set the image normaliser to the mean and spread of the embeddings of features [K, 3, S, S]."""
    embeds = pipeline.image_encoder(features).image_embeds
    pipeline.image_normalizer.mean.data = embeds.mean(0, keepdim=True)
    pipeline.image_normalizer.std.data = embeds.std(0, keepdim=True)


class TrainedPrompts:
    """The texts' prompts while the text encoder is trained along.

    Encoding costs as much as a step of the UNet, so it is done once in `every` steps; the gradients of these steps add up
    at the prompts and go through the text encoder together.
    """

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, texts: Sequence[Sequence[str]], every: int) -> None:
        flat = [text for views in texts for text in views]
        self._tokens = tokenizer(flat, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        self._encoder, self._every, self._num_texts = encoder, every, len(texts)
        self._encoded: Tensor | None = None
        self._leaf: Tensor | None = None

    def get(self) -> Tensor:
        """[K, V, T, D], one per text; a leaf that collects the gradients."""
        if self._leaf is None:
            self._encoded = rearrange(self._encoder(self._tokens)[0], "(k v) t d -> k v t d", k=self._num_texts)
            self._leaf = self._encoded.detach().requires_grad_()
        return self._leaf

    def after_backward(self, step: int) -> None:
        """Call after each step's `backward`: every so often gives the text encoder its gradient."""
        if (step + 1) % self._every == 0:
            assert self._encoded is not None and self._leaf is not None and self._leaf.grad is not None
            self._encoded.backward(self._leaf.grad / self._every)
            self._encoded = self._leaf = None


def held_out(domain: str, count: int) -> MicroWorld:
    """Objects that the micro model was not trained on."""
    return MicroWorld(domain, 20_000, count)


def given_picture(source: Source, index: int) -> Tensor:
    """[V, 3, S, S] in [0, 1]: an object on white; view 0 is the input picture."""
    return on_background(source.load(index), 0)
