"""The phases of `python -m train.micro`, the training loop they share, and the state file.

Each phase ends in the state file, and a phase that was stopped goes on from its last save, as if it had not been.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from einops import repeat
from torch import Tensor, nn

from softprompt.data.batch import seeded
from softprompt.errors import InputError
from softprompt.files import new_file
from softprompt.micro.parts import MicroParts, round_weights
from softprompt.micro.world import MicroWorld
from softprompt.prompt.encoding import encode_texts
from train.micro.pretrain import (
    PRIOR_TEXTS,
    EncodedDomain,
    TrainedPrompts,
    decoder_loss,
    denoising_step,
    draws_of,
    encode_domain,
    fit_normalizer,
    held_out,
    latent_spread,
    load_all,
    on_background,
    reconstruction_psnr,
    vae_loss,
    with_embeds,
)

if TYPE_CHECKING:
    from train.micro.settings import Settings


class Trainer:
    """The optimiser's loop and the state file, the same for every phase."""

    def __init__(self, settings: "Settings", parts: MicroParts) -> None:
        self.settings = settings
        self.parts = parts
        self._state = _read_state(settings)
        if self._state:
            self._load_models()

    def done(self, phase: str) -> bool:
        """Whether the state file is past the end of a phase."""
        return bool(self._state) and phase in self._state["done"]

    def run(
        self,
        phase: str,
        steps: int,
        groups: Sequence[tuple[nn.Module, float]],
        loss_of: Callable[[int], Tensor],
        after_backward: Callable[[int], None] | None = None,
    ) -> None:
        """Train from where the state file is to the end of the phase.

        groups: (module, factor of the learning rate). loss_of: step => loss; all its randomness follows from the step.
        """
        parameters = [list(module.requires_grad_(True).parameters()) for module, _ in groups]
        by_group = [{"params": p, "factor": factor} for p, (_, factor) in zip(parameters, groups, strict=True)]
        optimizer = torch.optim.AdamW(by_group, betas=(0.9, 0.99), weight_decay=0.01)
        first = self._restore_optimizer(phase, optimizer)
        progress = _Progress(phase, first, steps)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * group["factor"] * pace(step, steps)
            loss = loss_of(step)
            loss.backward()
            if after_backward is not None:
                after_backward(step)
            torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.show(step, loss.item())
            if (step + 1) % self.settings.save_every == 0 and step + 1 < steps:
                self._save(phase, step + 1, optimizer)
        for module, _ in groups:
            module.requires_grad_(False)

    def finish(self, phase: str) -> None:
        """Save that a phase is over."""
        self._state["done"] = [*self._state.get("done", []), phase]
        self._save(phase, 0, None)

    def _save(self, phase: str, step: int, optimizer: Any) -> None:
        done = self._state.get("done", [])
        self._state = {
            "settings": self.settings.fingerprint(sorted({*done, phase})),
            "done": done,
            "phase": phase,
            "step": step,
            "models": {name: model.state_dict() for name, model in self.parts.models().items()},
            "scaling_factor": self.parts.pipeline.vae.config["scaling_factor"],
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        with new_file(self.settings.state_file) as partial:
            torch.save(self._state, partial)

    def _load_models(self) -> None:
        for name, model in self.parts.models().items():
            model.load_state_dict(self._state["models"][name])
        self.parts.pipeline.vae.register_to_config(scaling_factor=self._state["scaling_factor"])
        print(f"going on from {self.settings.state_file}", flush=True)

    def _restore_optimizer(self, phase: str, optimizer: Any) -> int:
        if self._state.get("optimizer") is None or self._state["phase"] != phase:
            return 0
        optimizer.load_state_dict(self._state["optimizer"])
        return int(self._state["step"])


def _read_state(settings: "Settings") -> dict[str, Any]:
    path = settings.state_file
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:  # what a damaged pickle raises depends on the byte that is wrong
        raise InputError(
            f"state: {path} cannot be read ({' '.join(str(error).split())[:120]}); delete it to start anew"
        ) from error
    differing = [name for name, value in saved.items() if getattr(settings, name) != value]
    if differing:
        name = differing[0]
        raise InputError(
            f"state: {path} is of a run with {name} {saved[name]}, this one has {getattr(settings, name)}; go on with "
            f"the same options, or delete it to start anew"
        )
    return state


def pace(step: int, steps: int) -> float:
    """Share of the highest learning rate: a rise over the first twentieth, then a cosine down to nothing."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))


class _Progress:
    """A line every so often: phase, step, mean loss since the last one, time left."""

    def __init__(self, phase: str, first: int, steps: int) -> None:
        self._phase, self._first, self._steps = phase, first, steps
        self._began, self._losses = time.monotonic(), list[float]()

    def show(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        done = step + 1
        if done % max(1, min(100, self._steps // 10)) and done != self._steps:
            return
        per_step = (time.monotonic() - self._began) / (done - self._first)
        mean = sum(self._losses) / len(self._losses)
        left = per_step * (self._steps - done) / 60
        print(
            f"{self._phase:7} {done:5}/{self._steps}  loss {mean:.4f}  {per_step:.2f} s/step  {left:.1f} min left",
            flush=True,
        )
        self._losses.clear()


# -------------------------------------------------------------------------------------------------------------- phases


def render(settings: "Settings") -> dict[str, Tensor]:
    """Training objects of each domain: uint8 [K, V, 4, S, S]."""
    pictures = {domain: load_all(MicroWorld(domain, 0, settings.objects)) for domain in PRIOR_TEXTS}
    # The VAE sees mice as well, as Stable Diffusion's has seen everything; other ones than any run will be given.
    return pictures | {"mice": load_all(MicroWorld("mice", 50_000, max(1, settings.objects // 2)))}


def train_vae(trainer: Trainer, pictures: Mapping[str, Tensor]) -> None:
    """Phase 0: pictures to latents and back; ends by measuring the latents' spread."""
    if trainer.done("vae"):
        return
    vae, seed = trainer.parts.pipeline.vae, trainer.settings.seed
    everything = torch.cat([p.flatten(0, 1) for p in pictures.values()])  # K 4 S S

    def loss_of(step: int) -> Tensor:
        generator = seeded(seed, "vae", step)
        chosen = torch.randint(len(everything), (4,), generator=generator)
        return vae_loss(vae, everything[chosen], generator)

    trainer.run("vae", trainer.settings.vae_steps, [(vae, 4.0)], loss_of)
    shown = torch.cat([on_background(rgba, i) for p in pictures.values() for i, rgba in enumerate(p[:24])])
    vae.register_to_config(scaling_factor=1 / latent_spread(vae, shown))
    _print_psnr("vae", vae)
    trainer.finish("vae")


def train_decoder(trainer: Trainer, pictures: Mapping[str, Tensor]) -> None:
    """Phase 3: the VAE's decoder alone goes on learning. The latents stay what they are, so nothing else is touched."""
    if trainer.done("decoder"):
        return
    vae, settings = trainer.parts.pipeline.vae, trainer.settings
    everything = torch.cat([p.flatten(0, 1) for p in pictures.values()])  # K 4 S S

    def loss_of(step: int) -> Tensor:
        generator = seeded(settings.seed, "decoder", step)
        chosen = torch.randint(len(everything), (4,), generator=generator)
        return decoder_loss(vae, everything[chosen], generator)

    groups = [(vae.decoder, 3.0), (vae.post_quant_conv, 3.0)]
    trainer.run("decoder", settings.decoder_steps, groups, loss_of)
    _print_psnr("decoder", vae)
    trainer.finish("decoder")


def _print_psnr(phase: str, vae: AutoencoderKL) -> None:
    for domain in ("heads", "cats_above", "mice"):
        seen = torch.cat([on_background(rgba, i) for i, rgba in enumerate(load_all(held_out(domain, 4)))])
        print(f"{phase:7} held-out {domain}: PSNR {reconstruction_psnr(vae, seen):.1f} dB", flush=True)


def encode(parts: MicroParts, pictures: Mapping[str, Tensor]) -> dict[str, EncodedDomain]:
    """The UNet's training objects after the VAE, by domain."""
    return {domain: encode_domain(parts.pipeline, pictures[domain]) for domain in PRIOR_TEXTS}


def train_prior(trainer: Trainer, encoded: Mapping[str, EncodedDomain]) -> None:
    """Phase 1: UNet, text encoder and image encoder on every domain under its own text."""
    if trainer.done("prior"):
        return
    parts, settings = trainer.parts, trainer.settings
    pipeline, domains = parts.pipeline, list(encoded.values())
    prompts = TrainedPrompts(parts, [PRIOR_TEXTS[domain] for domain in encoded], settings.TEXT_EVERY)
    num_views = pipeline.num_views

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(
            settings.objects, (settings.batch_size,), generator=seeded(settings.seed, "prior", step)
        ).tolist()
        kinds = [(i + step) % len(domains) for i in range(settings.batch_size)]  # each meets every part of the schedule
        embeds = pipeline.image_encoder(
            torch.stack([domains[k].features[i] for k, i in zip(kinds, chosen, strict=True)])
        ).image_embeds
        objects = [
            replace(domains[k].objects[i], embeds=repeat(e.detach(), "e -> v e", v=num_views))
            for k, i, e in zip(kinds, chosen, embeds, strict=True)
        ]
        draws = draws_of(objects, settings.seed, "prior", step, "noise")
        return denoising_step(pipeline, objects, prompts.get()[kinds], draws, embeds)

    groups = [(pipeline.unet, 1.0), (pipeline.image_encoder, 0.5), (parts.text_encoder, 0.3)]
    trainer.run("prior", settings.prior_steps, groups, loss_of, prompts.after_backward)
    round_weights(parts.text_encoder)
    fit_normalizer(pipeline, torch.cat([domain.features for domain in domains]))
    trainer.finish("prior")


def train_heads(trainer: Trainer, heads: EncodedDomain) -> None:
    """Phase 2, FaceLift's: the UNet alone, on heads under its one text."""
    if trainer.done("heads"):
        return
    parts, settings = trainer.parts, trainer.settings
    pipeline = parts.pipeline
    prompt = encode_texts(PRIOR_TEXTS["heads"], parts.tokenizer, parts.text_encoder)
    prompts = repeat(prompt, "v t d -> b v t d", b=settings.batch_size)
    objects = with_embeds(pipeline, heads).objects

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(len(objects), (settings.batch_size,), generator=seeded(settings.seed, "heads", step)).tolist()
        batch = [objects[i] for i in chosen]
        return denoising_step(pipeline, batch, prompts, draws_of(batch, settings.seed, "heads", step, "noise"))

    trainer.run("heads", settings.heads_steps, [(pipeline.unet, 0.8)], loss_of)
    trainer.finish("heads")
