"""What lies in a prompt file: a bare tensor as this project and FaceLift write it, or what other programs write.

What others write is recognized, so that an error can name the command that converts it; only that command takes it.
"""

import pickle
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
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
"""T: the length every CLIP text encoder pads to."""
_PREFIX = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
"""What DistributedDataParallel and torch.compile put before the names of a state dict."""
_MEANT = ("prompt", "prompt_embeds", "clr_embeds", "embeddings")
"""Names by which the prompt is known among several tensors of its shape."""
_DEEPEST = 3
_NUMPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    tensor: Tensor
    """[V, T, D] where it may be a prompt; of any shape where it is bare. Without gradient, as it is stored."""
    found: str
    """What it lay in, in words."""
    is_bare: bool
    """Whether the file is one as training reads them."""


def read_prompt_file(path: str | Path) -> Content:
    """Read a prompt file of any kind; no pickled code is run.

    Raises: InputError when it is missing, cannot be read, or holds nothing that may be a prompt, or more than one such thing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such prompt file{base_of(path)}; expected a .pt or .safetensors file with a tensor [6, 77, D]"
        )
    content, expected = _read(path), "one bare tensor [6, 77, D] (views, tokens, width)"
    if isinstance(content, Mapping) and {"trainable", "waypoints", "optimizer"} <= set(content):
        run = path.parents[2] if len(path.parents) > 2 else "RUN"
        raise InputError(
            f"{path}: holds a checkpoint of a run, not a prompt; expected {expected}; write it with: python -m train.export "
            f"{shlex.quote(str(run))} --step {path.parent.name[5:].lstrip('0') or 0} --output FOLDER"
        )
    if isinstance(content, Tensor):
        tensor = _squeezed(content.detach())
        return Content(tensor, f"a tensor {_shape(content)}", tensor.ndim == content.ndim)
    if isinstance(content, np.ndarray):
        if not np.issubdtype(content.dtype, np.number):
            raise InputError(f"{path}: holds a NumPy array of {content.dtype}; expected floating-point numbers")
        array = _of_array(content)
        return Content(_squeezed(array), f"a NumPy array {_shape(array)}", False)
    if isinstance(content, list | tuple):
        return _of_list(path, content)
    if isinstance(content, Mapping):
        return _of_mapping(path, content)
    raise InputError(f"{path}: holds a {type(content).__name__}; expected {expected}")


def convert_command(path: str | Path) -> str:
    """The command that makes a prompt file of one that another program wrote."""
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
            warnings.simplefilter("ignore")  # of odd headers: the error says it
            content = np.load(path, allow_pickle=False)
            return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # which one depends on the byte that is wrong
        problem = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError("".join(c if c.isprintable() else "?" for c in problem)) from error


def _of_list(path: Path, content: Sequence[Any]) -> Content:
    """One tensor, or one a view. Raises: InputError."""
    kind = type(content).__name__
    tensors = [_tensor(one) for one in content]
    if len(tensors) == 1 and tensors[0] is not None and (only := _squeezed(tensors[0])).ndim == 3:
        return Content(only, f"a {kind} of one tensor {_shape(tensors[0])}", False)
    stacked = _stacked(tensors)
    if stacked is None:
        kinds = sorted({"something else" if one is None else f"a tensor {_shape(one)}" for one in tensors}) or ["nothing"]
        raise InputError(
            f"{path}: holds a {kind} of {len(content)} with {', '.join(kinds[:3])}; expected one bare tensor [6, 77, D], or a "
            f"tensor [77, D] for each view"
        )
    return Content(stacked, f"a {kind} of {len(content)} tensors {_shape(tensors[0])}", False)


def _of_mapping(path: Path, content: Mapping[Any, Any]) -> Content:
    """One tensor that has a prompt's shape, or one a view by its name or number. Raises: InputError."""
    kind = "dict" if isinstance(content, dict) else type(content).__name__
    kind = "file of arrays" if path.suffix == ".npz" else kind
    flat = dict(_flat(content))
    for names in (VIEWS, tuple(map(str, range(len(flat))))):
        if set(flat) == set(names):
            tensors = [_tensor(flat[name]) for name in names]
            stacked = _stacked(tensors)
            if stacked is not None:
                return Content(stacked, f"a {kind} with a tensor {_shape(tensors[0])} for each of {', '.join(names)}", False)
    fitting = {name: t for name, one in flat.items() if (t := _tensor(one)) is not None and _is_prompt(_squeezed(t))}
    meant = [name for name in fitting if name.rpartition(".")[2] in _MEANT]
    chosen = list(fitting) if len(fitting) == 1 else meant
    if len(chosen) == 1:
        name = chosen[0]
        others = len(flat) - 1
        beside = f", and {others} more" if others else ""
        return Content(_squeezed(fitting[name]), f"a {kind} with {name!r} {_shape(fitting[name])}{beside}", False)
    keys = f" with keys {', '.join([*map(str, content)][:5])}" if content else " with nothing in it"
    cause = f"{len(fitting)} tensors in it have a prompt's shape, and which is meant is not known" if fitting else ""
    cause = cause or "no tensor in it has a prompt's shape"
    raise InputError(
        f"{path}: holds a {kind}{keys}; expected one bare tensor [6, 77, D]; {cause}: save that of the prompt alone, with "
        f"torch.save(tensor, FILE)"
    )


def _flat(content: Mapping[Any, Any], before: str = "", depth: int = 1) -> list[tuple[str, Any]]:
    """Values by dotted name, without the prefixes of wrappers; an optimizer's moments have the prompt's shape, and are none."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = before + _PREFIX.sub("", str(key))
        if str(key).lower().startswith("optim"):
            continue
        if isinstance(value, Mapping) and depth < _DEEPEST:
            found += _flat(value, f"{name}.", depth + 1)
        else:
            found.append((name, value))
    return found


def _tensor(value: Any) -> Tensor | None:
    """Of a tensor, parameter or array of numbers; None of anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    return _of_array(value) if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number) else None


def _of_array(array: np.ndarray) -> Tensor:
    """Numbers in the order of bytes, and of a length, that torch knows."""
    longer = np.issubdtype(array.dtype, np.floating) and array.dtype.itemsize > 8
    return torch.from_numpy(np.array(array, dtype=np.float64 if longer else array.dtype.newbyteorder("=")))


def _squeezed(tensor: Tensor) -> Tensor:
    """[1, V, T, D] => [V, T, D], where more than three dimensions are there and the others count one."""
    while tensor.ndim > 3 and 1 in tensor.shape[:-2]:
        tensor = tensor.squeeze(tensor.shape.index(1))
    return tensor


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """A [T, D] each, perhaps with dimensions of 1 before => [V, T, D]; None where they are no such tensors."""
    views = [one.reshape(one.shape[-2:]) for one in tensors if one is not None and one.shape[:-2].numel() == 1 < one.ndim]
    same = len(views) == len(tensors) > 1 and len({one.shape for one in views}) == 1 and _is_prompt(views[0][None])
    return torch.stack([one.to(views[0].dtype) for one in views]) if same else None


def _is_prompt(tensor: Tensor) -> bool:
    """Whether it may be one, by its shape and type."""
    return tensor.ndim == 3 and tensor.shape[1] == NUM_TOKENS and tensor.is_floating_point()


def _shape(tensor: Tensor | None) -> str:
    assert tensor is not None, "is only asked of tensors"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
