"""The models that `python -m train.micro` trains, its training loop, and its state file.

Each phase ends in the state file; a phase that was stopped continues from its last save and ends with the same weights.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from softprompt.errors import InputError
from softprompt.files import load_pickle, new_file, new_folder, remove_folder
from softprompt.micro.models import SIZES, cast, random_pipeline, random_text_encoder, save_models
from softprompt.micro.tokenizer import write_tokenizer
from softprompt.model.pipeline import Pipeline
from train.micro.settings import Settings


class TextHead(nn.Module):
    """From the text encoder to the image embeddings' space, and the scale of the cosines; CLIP's alone, and not kept."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embedding, bias=False)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, D] => [N, E]."""
        return self.projection(pooled)


@dataclass
class MicroParts:
    """A pipeline being trained, with its text encoder."""

    pipeline: Pipeline
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    text_head: TextHead

    def models(self) -> dict[str, nn.Module]:
        """Everything that has weights, by the name of its folder."""
        names = ("unet", "vae", "image_encoder", "image_normalizer")
        models = {name: getattr(self.pipeline, name) for name in names}
        return models | {"text_encoder": self.text_encoder, "text_head": self.text_head}


def new_parts(seed: int) -> MicroParts:
    """All parts with random weights, frozen."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="softprompt-micro-") as scratch:
        torch.manual_seed(seed)
        pipeline = random_pipeline("micro", device="cpu")
        options = SIZES["micro"].text | {"projection_dim": SIZES["micro"].vision["projection_dim"]}
        tokenizer, text_encoder = random_text_encoder(Path(scratch), **options)
        text_head = TextHead(text_encoder.config.hidden_size, options["projection_dim"])
    # The VAE's posterior starts narrow: with a standard deviation of 1 it would first have to learn that.
    mean, log_variance = pipeline.vae.quant_conv.bias.data.chunk(2)
    pipeline.vae.quant_conv.weight.data[len(mean) :] = 0
    log_variance.fill_(-6)
    return MicroParts(pipeline, text_encoder.requires_grad_(False).eval(), tokenizer, text_head.requires_grad_(False))


def save_parts(parts: MicroParts, folder: Path) -> None:
    """Write a complete pipeline folder in FaceLift's layout, in the place of an old one; it appears whole or not at all.

    UNet and text encoder, which are most of it, are stored as float16, and are so afterwards.
    """
    for model in (parts.pipeline.unet, parts.text_encoder):
        cast(model, torch.float16)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_folder(fresh) as partial:
        (partial / "tokenizer").mkdir()
        write_tokenizer(partial / "tokenizer")
        save_models(parts.pipeline, parts.text_encoder, partial)
    if folder.exists():
        remove_folder(folder)
    fresh.rename(folder)


class Trainer:
    """The optimizer's loop and the state file, for all phases."""

    def __init__(self, settings: Settings, parts: MicroParts) -> None:
        self.settings = settings
        self.parts = parts
        self._state = _read_state(settings)
        if self._state:
            for name, model in parts.models().items():
                model.load_state_dict(self._state["models"][name])
            parts.pipeline.vae.register_to_config(scaling_factor=self._state["scaling_factor"])
            print(f"continued from {settings.state_file}", flush=True)

    def done(self, phase: str) -> bool:
        """Whether the state file is past the end of a phase."""
        return phase in self._state.get("done", [])

    def run(
        self,
        phase: str,
        groups: Sequence[tuple[nn.Module, float]],
        loss_of: Callable[[int], Tensor],
        after_backward: Callable[[int], None] | None = None,
    ) -> None:
        """Train from where the state file is to the end of the phase.

        groups: (module, factor of the learning rate). loss_of: step => loss; all its randomness follows from the step.
        """
        steps = self.settings.steps(phase)
        parameters = [p for module, _ in groups for p in module.requires_grad_(True).parameters()]
        by_group = [{"params": list(module.parameters()), "factor": factor} for module, factor in groups]
        optimizer, first = torch.optim.AdamW(by_group, betas=(0.9, 0.99), weight_decay=0.01), 0
        if self._state.get("phase") == phase and self._state["optimizer"] is not None:
            optimizer.load_state_dict(self._state["optimizer"])
            first = self._state["step"]
        progress = tqdm(range(first, steps), desc=phase, initial=first, total=steps, mininterval=5)
        average = 0.0
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * group["factor"] * pace(step, steps)
            loss = loss_of(step)
            loss.backward()
            if after_backward is not None:
                after_backward(step)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
            progress.set_postfix(loss=f"{average:.4f}", refresh=False)
            if (step + 1) % self.settings.save_every == 0 and step + 1 < steps:
                self._save(phase, step + 1, optimizer)
        for module, _ in groups:
            module.requires_grad_(False)

    def finish(self, phase: str) -> None:
        """Save that a phase is over."""
        self._state["done"] = [*self._state.get("done", []), phase]
        self._save(phase, 0, None)

    def _save(self, phase: str, step: int, optimizer: torch.optim.Optimizer | None) -> None:
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


def _read_state(settings: Settings) -> dict[str, Any]:
    path = settings.state_file
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = load_pickle(path)
        differing = [(name, value) for name, value in state["settings"].items() if getattr(settings, name) != value]
    except Exception as error:  # the kind depends on the byte that is wrong
        raise InputError(f"state: {path} cannot be read ({str(error)[:120]}); delete it to start anew") from error
    for name, value in differing:
        raise InputError(
            f"state: {path} is of a run with {name} {value}, this one has {getattr(settings, name)}; continue with the same "
            f"options, or delete it to start anew"
        )
    return state


def pace(step: int, steps: int) -> float:
    """Share of the highest learning rate: a rise over the first twentieth, then a cosine down to nothing."""
    warmup = max(1, steps // 20)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))
