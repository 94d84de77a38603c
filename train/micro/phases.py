"""The phases of `python -m train.micro`, in order: VAE, prior, heads, decoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from einops import repeat
from torch import Tensor, nn

from softprompt.data.batch import seeded
from softprompt.micro.world import MicroWorld
from softprompt.prompt.encoding import encode_texts
from train.micro.pretrain import (
    PRIOR_TEXTS,
    EncodedDomain,
    TrainedPrompts,
    decoder_loss,
    denoising_step,
    draws_of,
    fit_normalizer,
    held_out,
    latent_spread,
    load_all,
    on_background,
    reconstruction_psnr,
    vae_loss,
)
from train.micro.settings import TEXT_EVERY
from train.micro.trainer import Trainer


def render(objects: int) -> dict[str, Tensor]:
    """Training objects of each domain: uint8 [K, V, 4, S, S]."""
    pictures = {domain: load_all(MicroWorld(domain, 0, objects)) for domain in PRIOR_TEXTS}
    # The VAE sees mice as well, as Stable Diffusion's has seen everything; other ones than any run will be given.
    return pictures | {"mice": load_all(MicroWorld("mice", 50_000, max(1, objects // 2)))}


def train_vae(trainer: Trainer, pictures: Mapping[str, Tensor]) -> None:
    """Phase 0: pictures to latents and back; ends by measuring the latents' spread."""
    vae = trainer.parts.pipeline.vae
    _reconstruct(trainer, "vae", [(vae, 4.0)], pictures, vae_loss)
    shown = torch.cat([on_background(rgba, i) for p in pictures.values() for i, rgba in enumerate(p[:24])])
    vae.register_to_config(scaling_factor=1 / latent_spread(vae, shown))
    _print_psnr("vae", vae)


def train_decoder(trainer: Trainer, pictures: Mapping[str, Tensor]) -> None:
    """Phase 3: the VAE's decoder alone goes on learning. The latents stay as they are, so nothing else changes."""
    vae = trainer.parts.pipeline.vae
    _reconstruct(trainer, "decoder", [(vae.decoder, 3.0), (vae.post_quant_conv, 3.0)], pictures, decoder_loss)
    _print_psnr("decoder", vae)


def _reconstruct(
    trainer: Trainer,
    phase: str,
    groups: Sequence[tuple[nn.Module, float]],
    pictures: Mapping[str, Tensor],
    loss: Callable[[AutoencoderKL, Tensor, torch.Generator], Tensor],
) -> None:
    """Train on four pictures of any domain at each step."""
    everything = torch.cat([p.flatten(0, 1) for p in pictures.values()])  # K 4 S S

    def loss_of(step: int) -> Tensor:
        generator = seeded(trainer.settings.seed, phase, step)
        chosen = torch.randint(len(everything), (4,), generator=generator)
        return loss(trainer.parts.pipeline.vae, everything[chosen], generator)

    trainer.run(phase, groups, loss_of)


def _print_psnr(phase: str, vae: AutoencoderKL) -> None:
    for domain in ("heads", "cats_above", "mice"):
        seen = torch.cat([on_background(rgba, i) for i, rgba in enumerate(load_all(held_out(domain, 4)))])
        print(f"{phase:7} held-out {domain}: PSNR {reconstruction_psnr(vae, seen):.1f} dB", flush=True)


def train_prior(trainer: Trainer, encoded: Mapping[str, EncodedDomain]) -> None:
    """Phase 1: UNet, text encoder and image encoder on every domain under its own text."""
    parts, seed, batch_size = trainer.parts, trainer.settings.seed, trainer.settings.batch_size
    pipeline, domains = parts.pipeline, list(encoded.values())
    prompts = TrainedPrompts(parts.tokenizer, parts.text_encoder, [PRIOR_TEXTS[domain] for domain in encoded], TEXT_EVERY)

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(trainer.settings.objects, (batch_size,), generator=seeded(seed, "prior", step)).tolist()
        kinds = [(i + step) % len(domains) for i in range(batch_size)]  # each meets every part of the schedule
        features = torch.stack([domains[k].features[i] for k, i in zip(kinds, chosen, strict=True)])
        embeds = pipeline.image_encoder(features).image_embeds
        objects = [
            replace(domains[k].objects[i], embeds=repeat(e.detach(), "e -> v e", v=pipeline.num_views))
            for k, i, e in zip(kinds, chosen, embeds, strict=True)
        ]
        draws = draws_of(objects, seed, "prior", step, "noise")
        return denoising_step(pipeline, objects, prompts.get()[kinds], draws, embeds)

    groups = [(pipeline.unet, 1.0), (pipeline.image_encoder, 0.5), (parts.text_encoder, 0.3)]
    trainer.run("prior", groups, loss_of, prompts.after_backward)
    for parameter in parts.text_encoder.parameters():  # as it will be stored, so that what follows is trained on exactly that
        parameter.data = parameter.data.half().float()
    fit_normalizer(pipeline, torch.cat([domain.features for domain in domains]))


def train_heads(trainer: Trainer, heads: EncodedDomain) -> None:
    """Phase 2, FaceLift's: the UNet alone, on heads under its one text."""
    parts, seed, batch_size = trainer.parts, trainer.settings.seed, trainer.settings.batch_size
    pipeline = parts.pipeline
    prompt = encode_texts(PRIOR_TEXTS["heads"], parts.tokenizer, parts.text_encoder)
    prompts = repeat(prompt, "v t d -> b v t d", b=batch_size)
    with torch.no_grad():  # view 0's embedding by the image encoder as it is now, for every view
        embeds = pipeline.image_encoder(heads.features).image_embeds
    objects = [
        replace(o, embeds=repeat(e, "e -> v e", v=pipeline.num_views)) for o, e in zip(heads.objects, embeds, strict=True)
    ]

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(len(objects), (batch_size,), generator=seeded(seed, "heads", step)).tolist()
        batch = [objects[i] for i in chosen]
        return denoising_step(pipeline, batch, prompts, draws_of(batch, seed, "heads", step, "noise"))

    trainer.run("heads", [(pipeline.unet, 0.8)], loss_of)
