"""The phases of `python -m train.micro`, in order: VAE, its decoder, CLIP, prior (Stable Diffusion's), heads (FaceLift's)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from diffusers import AutoencoderKL
from einops import rearrange, repeat
from torch import Tensor, nn

from softprompt.data.batch import EncodedViews, seeded
from softprompt.micro.world import MicroWorld
from softprompt.prompt.encoding import encode_texts
from train.micro.pretrain import (
    EMPTY_RATE,
    contrastive_loss,
    decoder_loss,
    denoising_step,
    draws_of,
    fit_normalizer,
    held_out,
    latent_spread,
    load_all,
    on_background,
    reconstruction_psnr,
    single,
    single_pictures,
    text_alone,
    vae_loss,
)
from train.micro.trainer import Trainer
from train.micro.words import Caption, all_texts, facelift_texts, pick_texts

PRETRAINING_MICE = 50_000
"""Seed of the first mouse of pretraining."""
CLIP_BATCH = 64
"""Pairs of picture and text a step, all of different domains or views."""


def render(domains: Sequence[str], objects: int) -> dict[str, Tensor]:
    """Training objects of each domain: uint8 [K, V, 4, S, S]; mice are other ones than any run's."""
    first = {domain: PRETRAINING_MICE if domain == "mice" else 0 for domain in domains}
    return {domain: load_all(MicroWorld(domain, first[domain], objects)) for domain in domains}


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


def train_clip(trainer: Trainer, pictures: Mapping[str, Tensor]) -> None:
    """CLIP: text encoder and image encoder, until the text of a picture is told from those of others."""
    parts, settings = trainer.parts, trainer.settings
    pipeline = parts.pipeline
    kinds = [Caption(domain, view) for domain in pictures for view in range(pipeline.num_views)]

    def loss_of(step: int) -> Tensor:
        generator = seeded(settings.seed, "clip", step)
        chosen = [kinds[i] for i in torch.randperm(len(kinds), generator=generator)[:CLIP_BATCH].tolist()]
        texts = pick_texts(chosen, generator)
        shown = []
        for caption in chosen:
            of = pictures[caption.domain]
            index = int(torch.randint(len(of), (), generator=generator))
            shown.append(on_background(of[index, caption.view][None], index)[0])
        pixels = [(rearrange(p, "c h w -> h w c") * 255).round().byte().numpy() for p in shown]
        features = pipeline.feature_extractor(images=pixels, return_tensors="pt").pixel_values
        tokens = parts.tokenizer(texts, padding=True, return_tensors="pt").input_ids  # causal: what follows changes nothing
        same = torch.tensor([[float(a == b) for b in texts] for a in texts])
        embedded = parts.text_head(parts.text_encoder(tokens).pooler_output)
        return contrastive_loss(pipeline.image_encoder(features).image_embeds, embedded, same, parts.text_head.scale.exp())

    trainer.run("clip", [(pipeline.image_encoder, 0.5), (parts.text_encoder, 0.3), (parts.text_head, 1.0)], loss_of)
    for parameter in parts.text_encoder.parameters():  # as it will be stored, so that what follows is trained on exactly that
        parameter.data = parameter.data.half().float()


def train_prior(trainer: Trainer, encoded: Mapping[str, Sequence[EncodedViews]]) -> None:
    """Stable Diffusion: the UNet on single pictures, unrelated to each other, with nothing given but a text."""
    parts, settings = trainer.parts, trainer.settings
    pipeline, domains = parts.pipeline, list(encoded)
    texts = all_texts(domains)
    rows = {text: row for row, text in enumerate(texts)}
    encode = partial(encode_texts, tokenizer=parts.tokenizer, text_encoder=parts.text_encoder)
    prompts = torch.cat([encode(texts[i : i + 32]).half() for i in range(0, len(texts), 32)])
    fit_normalizer(pipeline, torch.cat([one.embeds for objects in encoded.values() for one in objects]))
    count = settings.batch_size * pipeline.num_views

    def loss_of(step: int) -> Tensor:
        generator = seeded(settings.seed, "prior", step)
        chosen, pictures = [], []
        for _ in range(count):
            domain = domains[int(torch.randint(len(domains), (), generator=generator))]
            view = int(torch.randint(pipeline.num_views, (), generator=generator))
            objects = encoded[domain]
            pictures.append(single(objects[int(torch.randint(len(objects), (), generator=generator))], view))
            chosen.append(Caption(domain, view))
        empty = torch.rand(count, generator=generator) < EMPTY_RATE
        of = [0 if nothing else rows[text] for text, nothing in zip(pick_texts(chosen, generator), empty, strict=True)]
        draws = text_alone(draws_of(pictures, settings.seed, "prior", step, "noise"))
        return denoising_step(pipeline, pictures, prompts[of].float()[:, None], draws)

    with single_pictures(pipeline):
        trainer.run("prior", [(pipeline.unet, 1.0)], loss_of)
    # The input picture's channels have seen nothing but zeros; they begin at nothing, as in InstructPix2Pix.
    pipeline.unet.conv_in.weight.data[:, pipeline.unet.config["out_channels"] :] = 0


def train_heads(trainer: Trainer, heads: Sequence[EncodedViews]) -> None:
    """FaceLift: the UNet on level renderings of heads, six views of the picture given, under its one text."""
    parts, seed, batch_size = trainer.parts, trainer.settings.seed, trainer.settings.batch_size
    prompt = encode_texts(facelift_texts(), parts.tokenizer, parts.text_encoder)
    prompts = repeat(prompt, "v t d -> b v t d", b=batch_size)

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(len(heads), (batch_size,), generator=seeded(seed, "heads", step)).tolist()
        batch = [heads[i] for i in chosen]
        return denoising_step(parts.pipeline, batch, prompts, draws_of(batch, seed, "heads", step, "noise"))

    trainer.run("heads", [(parts.pipeline.unet, trainer.settings.heads_rate)], loss_of)
