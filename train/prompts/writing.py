"""Prompts => files: each whole, and over nothing else unless asked to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import InputError
from softprompt.prompt.embeddings import save_prompt
from softprompt.prompt.similarity import closest_pair
from train.prompts.sources import SUFFIXES, described

KINDS = {".pt": "float16, what FaceLift loads", ".safetensors": "float32"}


def refuse_output(path: Path, *, overwrite: bool, beside: Path | None = None) -> None:
    """Before any work is done. beside: a prompt file whose JSON may be replaced, since it describes the same prompt.

    Raises: InputError where a prompt cannot be written under that name, or something lies there.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a prompt is saved as .pt (FaceLift's float16) or .safetensors (float32)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")
    sidecar = path.with_suffix(".json")
    shared = beside is not None and beside.with_suffix(".json").resolve() == sidecar.resolve()
    taken = [file for file in (path, sidecar) if file.exists() and not (shared and file is sidecar)]
    if taken and not overwrite:
        raise InputError(f"{taken[0]}: exists already; choose another --output, or replace it with --overwrite")


def write(prompt: Tensor, path: Path, views: tuple[str, ...], metadata: Mapping[str, Any]) -> str:
    """Write a prompt and the JSON beside it. Returns: what was written, in a sentence.

    prompt: [V, T, D]. Raises: InputError when it cannot be written.
    """
    a, b, cosine = closest_pair(prompt, views)
    named = {"views": list(views), "closest_views": [a, b, round(cosine, 6)]}
    try:
        sidecar = save_prompt(prompt, path, metadata={**metadata, **named})
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); likely read-only, or its disk is full") from error
    return f"{path} ({KINDS[path.suffix]}) and {sidecar.name}; closest {a} and {b}, cosine {cosine:.3f}"


def kept_metadata(path: Path, prompt: Tensor) -> dict[str, Any]:
    """What the JSON beside a prompt file says that still holds of a copy in the other format."""
    measured = ("file", "shape", "dtype", "token_norms", "view_cosines", "mean_view_cosine", "rounding_error")
    return {key: value for key, value in described(path, prompt).items() if key not in measured}
