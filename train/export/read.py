"""Loads the prompt and the LoRA of an export."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.model.adapted import AdaptedModel
from softprompt.model.pipeline import Pipeline
from softprompt.model.weights import how_they_fit, noted, unwrapped
from softprompt.prompt.embeddings import load_prompt
from train.export.write import LORA_WEIGHTS, has_lora, with_lora_of
from train.options.config import Config
from train.options.groups import ExportConfig
from train.state.folder import exported_prompt


def refuse_another_unet(given: str | None, trained_on: object, export: Path) -> None:
    """Check the UNet that a user gives for an export. Its folder may have moved, but under the same name.

    given: the option `unet`. trained_on: the same option in the export's description.

    Raises: InputError where one of the two is the pipeline's own, or the names differ, as of unet and unet_ema.
    """
    if trained_on is None and given is not None:
        raise InputError(
            f"unet: is {given}; {export} was trained on the UNet of its --model: leave --unet out, or give the export of a run "
            f"that was trained on it"
        )
    if isinstance(trained_on, str) and (given is None or Path(given).name != Path(trained_on).name):
        raise InputError(
            f"unet: is {'null' if given is None else given}; {export} was trained on {trained_on}: give that with --unet, "
            f"under the name it had where it has moved"
        )


def open_lora(pipeline: Pipeline, folder: Path, dtype: torch.dtype) -> Pipeline:
    """`with_lora_of` for an export that a user names.

    Raises: InputError where its LoRA is damaged, belongs to another model, or is not finite.
    """
    try:
        with noted(notes := list(pipeline.notes)), _with_plain_names(folder) as plain:
            adapted = with_lora_of(pipeline, plain, dtype)
            stored = load_file(plain / "lora" / LORA_WEIGHTS) if (folder / "lora").is_dir() else {}
        ours = {f"unet.{name}" for name in get_peft_model_state_dict(adapted.unet)} if stored else set()
    except Exception as error:  # which one depends on what is wrong in the file
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{folder / 'lora'}: cannot be loaded into {pipeline.folder} ({problem[:300]}); likely it is damaged, or --model "
            f"is another than it was trained from"
        ) from error
    if others := sorted(stored.keys() - ours):  # diffusers would leave them out and say nothing
        raise InputError(
            f"{folder / 'lora'}: {len(others)} of its {len(stored)} tensors have no place in {pipeline.folder}, e.g. "
            f"{', '.join(others[:3])}; likely --model is another than it was trained from"
        )
    if broken := [name for name, weight in stored.items() if not weight.isfinite().all()]:
        raise InputError(f"{folder / 'lora'}: NaN or infinite values, e.g. in {broken[0]}; it comes from a run that diverged")
    return replace(adapted, notes=notes)


@contextmanager
def _with_plain_names(folder: Path) -> Iterator[Path]:
    """The export, or, if its LoRA was saved from a compiled or wrapped UNet, a temporary copy with the UNet's own names."""
    file = folder / "lora" / LORA_WEIGHTS
    stored = load_file(file) if file.is_file() else {}
    plain = _plain(stored, file)
    if plain.keys() == stored.keys():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="softprompt-") as name, safe_open(file, framework="pt") as opened:
        (Path(name) / "lora").mkdir()
        save_file(plain, Path(name) / "lora" / LORA_WEIGHTS, metadata=opened.metadata())
        yield Path(name)


def _plain(stored: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A LoRA's tensors under the names of the UNet itself; warns of a wrapper's prefix, before `unet.` or after."""
    inner = {name.removeprefix("unet."): weight for name, weight in unwrapped(stored, file).items()}
    return {f"unet.{name}": weight for name, weight in unwrapped(inner, file).items()}


def start_from(folder: Path, adapted: AdaptedModel, position: float) -> None:
    """Put an export's prompt and LoRA into a fresh model. position: s at which E is to be that prompt.

    Raises: InputError when the folder is no export, or its LoRA is another kind than the configuration's.
    """
    prompt = adapted.prompt
    file = exported_prompt(folder, option="init_from")
    views, _, width = prompt.start.shape
    if prompt.share(position) == 0:
        raise InputError(f"init_from: with prompt.carry fade nothing learned is in the prompt at position {position:g}")
    prompt.begin_at(load_prompt(file, num_views=views, width=width), position)
    file = folder / "lora" / LORA_WEIGHTS
    if file.is_file() != has_lora(adapted.unet):
        found, asked = ("a LoRA", "0") if file.is_file() else ("no LoRA", "more than 0")
        raise InputError(f"init_from: {folder} holds {found}; lora.rank is {asked}. Prompt and LoRA belong together")
    if not has_lora(adapted.unet):
        return
    try:
        weights = {name.removeprefix("unet."): weight for name, weight in _plain(load_file(file), file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: cannot be read ({' '.join(str(error).split())}); expected a LoRA as a run exports it"
        ) from error
    ours = get_peft_model_state_dict(adapted.unet)
    if misfit := how_they_fit(weights, ours):
        raise InputError(
            f"init_from: {file} is not this configuration's LoRA: of its tensors {misfit}; likely lora.rank or lora.targets is "
            f"another"
        )
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"init_from: {file} holds NaN or infinite values; it comes from a run that diverged, or is damaged")
    set_peft_model_state_dict(adapted.unet, weights)


@dataclass(frozen=True)
class Source:
    """A model with its trained prompt and LoRA, in float32, and their origin."""

    folder: Path
    """Checkpoint or export that it was read from."""
    run: Path | None
    """The run that it belongs to; None for an export outside a run's folder."""
    config: Config | None
    """The configuration of that run."""
    metadata: Mapping[str, Any]
    """See `train.export.write.describe`."""
    pipeline: Pipeline
    """Its UNet carries the LoRA, where there is one."""
    prompt: Tensor
    """E [V, T, D], float32."""
    averaged: bool = False
    """Whether prompt and LoRA are the run's moving average."""

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for."""
        return int(self.metadata["steps"])

    @property
    def tolerance(self) -> float:
        """Largest difference allowed between the views of the model in memory and of the files read back."""
        return (ExportConfig() if self.config is None else self.config.export).tolerance


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, not an export."""
    return (folder / "config.yaml").is_file() and not (folder / "clr_embeds.json").is_file()
