"""Reading prompt files: a bare tensor as this project and FaceLift write it, or the formats of other programs.

Other formats are recognized, so that an error can name the command that converts them; only that command accepts them.
"""

import pickle
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.errors import InputError, base_of
from softprompt.files import load_pickle
from softprompt.prompt.templates import VIEWS

NUM_TOKENS = 77
"""T: the length to which every CLIP text encoder pads."""
_EXPECTED = "expected one bare tensor [6, 77, D] (views, tokens, width)"
_PREFIX = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
"""Prefixes of DistributedDataParallel and torch.compile in the names of a state dict."""
_MEANT = ("prompt", "prompt_embeds", "clr_embeds", "embeddings")
"""Names of the prompt among several tensors of its shape."""
_DEEPEST = 3
_NUMPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Content:
    """A prompt file's tensor, and the form in which it was found."""

    tensor: Tensor
    """[V, T, D] where it may be a prompt; of any shape where it is bare. Without gradient, in its stored type."""
    found: str
    """The form in words, for errors."""
    is_bare: bool
    """Whether the file is in the form that training reads."""


def read_prompt_file(path: str | Path) -> Content:
    """Read a prompt file of any format; no pickled code is run.

    Raises: InputError when it is missing, cannot be read, or holds no tensor that may be a prompt, or more than one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such prompt file{base_of(path)}; expected a .pt or .safetensors file with a tensor [6, 77, D]"
        )
    content = _read(path)
    if isinstance(content, Mapping) and {"trainable", "waypoints", "optimizer"} <= set(content):
        run = path.parents[2] if len(path.parents) > 2 else "RUN"
        raise InputError(
            f"{path}: holds a checkpoint of a run, not a prompt; {_EXPECTED}; write it with: python -m train.export "
            f"{shlex.quote(str(run))} --step {path.parent.name[5:].lstrip('0') or 0} --output FOLDER"
        )
    if isinstance(content, Tensor | np.ndarray):
        tensor = _tensor(content)
        if tensor is None:
            raise InputError(f"{path}: holds a NumPy array of {content.dtype}; expected floating-point numbers")
        squeezed, is_torch = _squeezed(tensor), isinstance(content, Tensor)
        kind = "tensor" if is_torch else "NumPy array"
        return Content(squeezed, f"a {kind} {_shape(tensor)}", is_torch and squeezed.ndim == tensor.ndim)
    if isinstance(content, Mapping | list | tuple):
        return _among_several(path, content)
    raise InputError(f"{path}: holds a {type(content).__name__}; {_EXPECTED}")


def convert_command(path: str | Path) -> str:
    """The command that converts another program's prompt file."""
    path = Path(path)
    output = path.with_suffix(".pt")
    if output.exists():
        output = path.with_name(f"{path.stem}_converted.pt")
    return f"python -m train.prompts convert {shlex.quote(str(path))} {shlex.quote(str(output))}"


def _read(path: Path) -> Any:
    """Raises: InputError."""
    try:
        with path.open("rb") as file:
            is_numpy = file.read(len(_NUMPY)) == _NUMPY or path.suffix in (".npy", ".npz")
        if is_numpy:
            return _read_numpy(path)
        if path.suffix == ".safetensors":
            content = load_file(path)
            return next(iter(content.values())) if len(content) == 1 else content
        return load_pickle(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: is no plain tensor file ({error}); expected a bare tensor as torch.save(tensor) writes it; likely a "
            f"whole object was saved: save its tensor alone"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a prompt file ({' '.join(str(error).split())[:200]})") from error


def _read_numpy(path: Path) -> Any:
    """An array, or arrays by name. Raises: ValueError where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd headers: the error reports them
            content = np.load(path, allow_pickle=False)
            return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # which one depends on the byte that is wrong
        problem = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError("".join(c if c.isprintable() else "?" for c in problem)) from error


def _among_several(path: Path, content: Mapping[Any, Any] | Sequence[Any]) -> Content:
    """The one tensor of a prompt's shape, or one tensor a view, by its name or number. Raises: InputError."""
    kind = "file of arrays" if path.suffix == ".npz" else "dict" if isinstance(content, dict) else type(content).__name__
    named = isinstance(content, Mapping)
    flat = dict(_flat(content if isinstance(content, Mapping) else dict(enumerate(content))))
    tensors = {name: tensor for name, one in flat.items() if (tensor := _tensor(one)) is not None}
    for names in (VIEWS, tuple(map(str, range(len(flat))))):
        if set(tensors) == set(flat) == set(names) and (stacked := _stacked([tensors[name] for name in names])) is not None:
            shape = _shape(tensors[names[0]])
            found = f"with a tensor {shape} for each of {', '.join(names)}" if named else f"of {len(names)} tensors {shape}"
            return Content(stacked, f"a {kind} {found}", False)
    fitting = {name: squeezed for name, one in tensors.items() if _is_prompt(squeezed := _squeezed(one))}
    chosen = list(fitting) if len(fitting) == 1 else [name for name in fitting if name.rpartition(".")[2] in _MEANT]
    if len(chosen) == 1:
        beside = f", and {len(flat) - 1} more" if len(flat) > 1 else ""
        return Content(fitting[chosen[0]], f"a {kind} with {chosen[0]!r} {_shape(tensors[chosen[0]])}{beside}", False)
    holds = [f"{name} ({_shape(tensors[name]) if name in tensors else type(one).__name__})" for name, one in flat.items()]
    several = f"{len(fitting)} tensors in it have a prompt's shape, and which is meant is not known"
    cause = several if fitting else "no tensor in it has a prompt's shape"
    raise InputError(
        f"{path}: holds a {kind} with {'keys ' if named and holds else ''}{', '.join(holds[:5]) or 'nothing in it'}; "
        f"{_EXPECTED}; {cause}: save the prompt's tensor alone, with torch.save(tensor, FILE)"
    )


def _flat(content: Mapping[Any, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Values by dotted name, without the prefixes of wrappers, and without an optimizer's moments of the prompt's shape."""
    for key, value in content.items():
        name = before + _PREFIX.sub("", str(key))
        if str(key).lower().startswith("optim"):
            continue
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{name}.", depth + 1)
        else:
            yield name, value


def _tensor(value: Any) -> Tensor | None:
    """A tensor, parameter or array of numbers as a tensor without gradient; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if not (isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number)):
        return None
    # torch knows neither big-endian numbers nor long doubles.
    longer = np.issubdtype(value.dtype, np.floating) and value.dtype.itemsize > 8
    return torch.from_numpy(np.array(value, dtype=np.float64 if longer else value.dtype.newbyteorder("=")))


def _squeezed(tensor: Tensor) -> Tensor:
    """[1, V, T, D] => [V, T, D]: dimensions of 1 removed while there are more than three."""
    while tensor.ndim > 3 and 1 in tensor.shape[:-2]:
        tensor = tensor.squeeze(tensor.shape.index(1))
    return tensor


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors [T, D], dimensions of 1 before them allowed => [V, T, D]; None where they are no such tensors."""
    views = [one.reshape(one.shape[-2:]) for one in tensors if one.shape[:-2].numel() == 1 < one.ndim]
    same = len(views) == len(tensors) > 1 and len({one.shape for one in views}) == 1 and _is_prompt(views[0][None])
    return torch.stack([one.to(views[0].dtype) for one in views]) if same else None


def _is_prompt(tensor: Tensor) -> bool:
    """Whether the tensor may be a prompt, by its shape and type."""
    return tensor.ndim == 3 and tensor.shape[1] == NUM_TOKENS and tensor.is_floating_point()


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
