"""Reading the weights of a part of a pipeline, however they were saved: whole or in shards, a variant or not, under the model's
own names or those of a wrapper."""

import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError, InputWarning
from softprompt.files import load_pickle, read_json

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", ("model", "pytorch_model")
"""Stems of the files of weights; transformers has one for safetensors and one for pickles."""
_OUTSIDE = re.compile(r"^(?:module\.)+")
"""Prefix of all names in weights saved through DistributedDataParallel."""
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefix of each module wrapped by torch.compile, FSDP or activation checkpointing."""


class WeightsNote(InputWarning):
    """A remark for the user on how weights were read."""


@dataclass(frozen=True)
class WeightFiles:
    """Files of a part's weights."""

    files: tuple[Path, ...]
    """One, or its shards."""
    variant: str | None
    """fp16 for model.fp16.safetensors; None: the plain names."""

    @property
    def is_safe(self) -> bool:
        """Whether they are safetensors; otherwise torch's pickles."""
        return self.files[0].suffix == ".safetensors"


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Append each WeightsNote of the block to `notes`, once; all warnings still reach the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsNote)
        yield
    for warning in caught:
        if issubclass(warning.category, WeightsNote) and str(warning.message) not in notes:
            notes.append(str(warning.message))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def find_weights(folder: Path, *stems: str) -> WeightFiles:
    """Find the weights in a part's folder, as `from_pretrained` of diffusers and transformers would.

    The plain names come before a variant's, safetensors before pickles; diffusers prefers shards to one file, transformers
    one file to shards.

    stems: of the file names, as diffusion_pytorch_model.
    Raises: InputError for no weights, several variants without plain names, or a shard that is missing.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    found: dict[tuple[bool, bool, bool], dict[str | None, str]] = {}
    for stem in stems:
        for name in names:
            one = re.fullmatch(rf"{stem}(?:\.([\w-]+))?\.(safetensors|bin)", name)
            index = re.fullmatch(rf"{stem}\.(safetensors|bin)(?:\.index(?:\.([\w-]+))?|\.([\w-]+)\.index)\.json", name)
            if one and not re.search(r"-\d{5}-of-\d{5}", name):
                variant, kind = one[1], one[2]
            elif index:
                kind, variant = index[1], index[2] or index[3]  # older diffusers had the variant in the middle
            else:
                continue
            second = (index is None) == (stem == DIFFUSERS)
            found.setdefault((variant is not None, kind == "bin", second), {})[variant] = name
    if not found:
        raise InputError(
            f"{folder}: the weights are missing; expected {stems[0]}.safetensors or {stems[-1]}.bin, an index of shards, or a "
            f"variant such as {stems[0]}.fp16.safetensors; likely the folder was copied incompletely"
        )
    chosen = found[min(found)]
    if len(chosen) > 1:
        raise InputError(
            f"{folder}: has variants of its weights ({', '.join(sorted(chosen.values()))}) and no {stems[0]}.safetensors; "
            f"expected one of them; move the others away"
        )
    ((variant, name),) = chosen.items()
    return WeightFiles(_shards(folder / name) if name.endswith(".json") else (folder / name,), variant)


def read_weights(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The weights in a part's folder, under the model's own names.

    Warns where they were saved through a wrapper, whose prefix is removed. Raises: InputError naming the file.
    """
    weights: dict[str, Tensor] = {}
    for file in find_weights(folder, *stems).files:
        weights |= _read(file)
    return unwrapped(weights, folder)


def unwrapped(weights: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """Weights under the model's own names; warns where a wrapper's prefix was removed."""
    names = _own_names(weights)
    if names is None:
        return dict(weights)
    number, first = sum(a != b for a, b in names.items()), next(a for a, b in names.items() if a != b)
    warnings.warn(
        f"{origin}: {number} of its {len(names)} weights are named as {first}; the wrapper's prefix is taken off (saved "
        f"compiled, or under DDP or FSDP)",
        WeightsNote,
        stacklevel=3,
    )
    return {names[name]: weight for name, weight in weights.items()}


@contextmanager
def as_saved_plainly(folder: Path, *stems: str) -> Iterator[tuple[Path, WeightFiles]]:
    """A part's folder for `from_pretrained`: itself, or a temporary copy under plain names if its weights have a wrapper's.

    Yields: the folder, and its weights. Raises: InputError.
    """
    found = find_weights(folder, *stems)
    if _own_names(_names(found)) is None:
        yield folder, found
        return
    with tempfile.TemporaryDirectory(prefix="softprompt-") as name:
        copy = Path(name)
        shutil.copyfile(folder / "config.json", copy / "config.json")
        weights = {name: weight.contiguous().clone() for name, weight in read_weights(folder, *stems).items()}
        save_file(weights, copy / f"{stems[0]}.safetensors", metadata={"format": "pt"})
        yield copy, find_weights(copy, *stems)


def how_they_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """How many weights fit a model, and the first three that do not, in words; empty where all fit."""
    missing = [name for name in wanted if name not in weights]
    left = [name for name in weights if name not in wanted]
    other = [name for name in weights if name in wanted and weights[name].shape != wanted[name].shape]
    if not (missing or left or other):
        return ""
    parts = [f"{len(wanted) - len(missing) - len(other)} of {len(wanted)} fit"]
    for names, what in ((missing, "are missing"), (left, "have no place"), (other, "have another shape")):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(names[:3])})")
    return ", ".join(parts)


def refuse_misfit(folder: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises: InputError, with the likely cause, for weights that do not fit the model of the folder's config.json."""
    if misfit := how_they_fit(weights, wanted):
        raise InputError(f"{folder}: weights and config.json do not belong together: {misfit}; {_why_not(weights, wanted)}")


def _why_not(weights: Collection[str], wanted: Collection[str]) -> str:
    """The likely cause, by the names."""
    left = [name for name in weights if name not in wanted]
    inside = re.match(r"\w+\.", left[0]) if left else None
    if inside and all(name.removeprefix(inside[0]) in wanted for name in weights if name.startswith(inside[0])):
        return f"likely they were saved as a part of a larger model, under {inside[0]}"
    if any(".lora_" in name or name.startswith("lora_") for name in left):
        return "likely they are a LoRA, or a UNet with one that is not merged"
    if weights and len(left) == len(weights):
        return "likely they are of another kind of model"
    if left:
        return "likely they are of two models, or of one with layers that the stock one has not"
    if len(weights) < len(wanted):
        return "likely they were saved or copied incompletely"
    return "likely config.json is of a model of another size"


def _shards(index: Path) -> tuple[Path, ...]:
    """Raises: InputError."""
    names = read_json(index, what="the index of a part's shards").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: has no weight_map; expected the file of each weight; likely it is damaged")
    shards = list(dict.fromkeys(names.values()))
    # By their names: in a hub's cache the files themselves are links that lead elsewhere.
    if odd := [name for name in shards if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin")]:
        raise InputError(f"{index}: names {odd[0]!r}; expected files of weights in its own folder; likely it is damaged")
    files = [index.parent / name for name in shards]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{index}: {len(missing)} of {len(files)} shards are missing, e.g. {missing[0]}; likely they were not all copied"
        )
    return tuple(files)


def _read(file: Path) -> dict[str, Tensor]:
    """Raises: InputError."""
    try:
        weights: Any = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read ({problem}); the file is damaged, cut short, or no weights at all") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise InputError(f"{file}: holds a {type(weights).__name__}; expected weights by name")
    return weights


def _names(found: WeightFiles) -> list[str]:
    """Names in the first file; none if it cannot be read: what loads it reports that."""
    try:
        if not found.is_safe:
            return list(_read(found.files[0]))
        with safe_open(found.files[0], framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, InputError):
        return []


def _own_names(names: Iterable[str]) -> dict[str, str] | None:
    """Each name without wrappers' prefixes; None if there are none, or if two names would become one."""
    own = {name: _ANYWHERE.sub("", name) for name in names}
    if all(_OUTSIDE.match(name) for name in own.values()):
        own = {name: _OUTSIDE.sub("", plain) for name, plain in own.items()}
    changed = any(name != plain for name, plain in own.items())
    return own if changed and len(set(own.values())) == len(own) else None
