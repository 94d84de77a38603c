"""View prompts in and out of files: loaded, checked, saved and described.

A *view prompt* is one text embedding per view, [V, T, D]. FaceLift's is `clr_embeds.pt`: a bare float16 tensor [6, 77, 1024].
"""

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_file, write_json
from softprompt.prompt.prompt_files import NUM_TOKENS, Content, convert_command, read_prompt_file
from softprompt.prompt.similarity import closest_pair, mean_pairwise_cosine, prompt_cosines
from softprompt.prompt.templates import PROMPT_SUFFIXES, view_names

_MAKE = "python -m train.prompts make --text TEXT --model PIPECKPTS --output FILE.pt"
_OTHER_CLIP = {
    512: ", CLIP ViT-B",
    768: ", CLIP ViT-L/14 (Stable Diffusion 1.x)",
    1024: ", OpenCLIP ViT-H (Stable Diffusion 2.x)",
    1280: ", OpenCLIP bigG (Stable Diffusion XL)",
}


def load_prompt(path: str | Path, *, num_views: int = 6, width: int | None = None) -> Tensor:
    """Read a view prompt from a `.pt` (bare tensor) or `.safetensors` (one tensor) file.

    num_views: V of the model. width: D of the model; None leaves the width unchecked.
    Returns: [V, T, D], float32, on the CPU, without gradient. Pickled code is never run.
    Raises: InputError (a ValueError) with what was found and what was expected, and for another program's format the command
    that converts it; a missing file is never replaced by zeros.
    """
    content = read_prompt_file(path)
    prompt = check_prompt(content.tensor, num_views=num_views, width=width, origin=str(path))
    refuse_foreign(path, content, num_views=num_views, width=width)
    return prompt


def refuse_foreign(path: str | Path, content: Content, *, num_views: int, width: int | None = None) -> None:
    """Raises: InputError with the command that converts the file, unless it holds a bare tensor."""
    if not content.is_bare:
        raise InputError(
            f"{path}: holds {content.found}; expected one bare tensor [{num_views}, {NUM_TOKENS}, {width or 'D'}]; likely "
            f"another program wrote it; convert it with: {convert_command(path)}"
        )


def check_prompt(prompt: Tensor, *, num_views: int = 6, width: int | None = None, origin: str = "prompt") -> Tensor:
    """Refuse a tensor that cannot be a view prompt. origin: named in errors.

    Returns: [V, T, D], float32.
    Raises: InputError for another shape, a value that is not finite, a view of zeros, or two identical views.
    """
    found = f"{list(prompt.shape)} {str(prompt.dtype).removeprefix('torch.')}"
    if prompt.ndim != 3 or not prompt.is_floating_point():
        expected = f"floating-point [{num_views}, {NUM_TOKENS}, {width or 'D'}] (views, tokens, width)"
        cause = f"; likely the prompt of one view; make one for each view with {_MAKE}" if prompt.ndim == 2 else ""
        raise InputError(f"{origin}: holds a tensor {found}; expected {expected}{cause}")
    if prompt.shape[0] != num_views:
        raise InputError(f"{origin}: has {prompt.shape[0]} views ({found}); the model has {num_views}")
    if prompt.shape[1] != NUM_TOKENS:
        raise InputError(
            f"{origin}: has {prompt.shape[1]} tokens a view ({found}); expected {NUM_TOKENS}: encode with "
            f"padding='max_length', or with {_MAKE}"
        )
    if width is not None and prompt.shape[2] != width:
        raise InputError(
            f"{origin}: is {prompt.shape[2]} wide ({found}); the UNet's cross-attention takes {width}. Likely it was made with "
            f"another text encoder{_OTHER_CLIP.get(prompt.shape[2], '')}; encode the texts with the pipeline's own: {_MAKE}"
        )
    prompt, names = prompt.float(), view_names(num_views)
    if broken := [name for name, view in zip(names, prompt, strict=True) if not view.isfinite().all()]:
        raise InputError(
            f"{origin}: NaN or infinite values in view {', '.join(broken)}; likely the run that wrote it diverged; export an "
            f"earlier checkpoint of it: python -m train.export RUN --step best --output FOLDER"
        )
    if empty := [name for name, view in zip(names, prompt, strict=True) if not view.any()]:
        raise InputError(
            f"{origin}: all zero in view {', '.join(empty)}; the file is a placeholder, not an encoded text; make one "
            f"with {_MAKE}"
        )
    for a, b in combinations(range(num_views), 2):
        if torch.equal(prompt[a], prompt[b]):
            raise InputError(
                f"{origin}: views {names[a]} and {names[b]} are identical, so the model could not distinguish them; likely the "
                f"text had no view name in it"
            )
    return prompt


def save_prompt(prompt: Tensor, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a view prompt, and a JSON of the same name beside it that describes it.

    prompt: [V, T, D].
    path: `.pt` writes a bare float16 tensor, what FaceLift loads; `.safetensors` writes float32 under the key `prompt`.
    metadata: added to the JSON (origin, waypoints, position, steps, model ...).
    Returns: the path of the JSON.
    Raises: InputError as `check_prompt`, before or after rounding, or for another suffix.
    """
    path = Path(path)
    if path.suffix not in PROMPT_SUFFIXES:
        raise InputError(f"{path}: a prompt is saved as .pt (FaceLift's float16) or .safetensors (float32)")
    prompt = check_prompt(prompt.detach().cpu(), num_views=len(prompt), origin=f"prompt to be saved as {path}")
    stored = prompt.half() if path.suffix == ".pt" else prompt
    check_prompt(stored, num_views=len(prompt), origin=f"prompt rounded to float16 for {path}")
    described = {"file": path.name, **describe_prompt(prompt, stored), **(metadata or {})}
    json.dumps(described)  # metadata that is no JSON fails here, before anything is written
    with new_file(path) as partial:
        if path.suffix == ".pt":
            with partial.open("wb") as file:  # given a path, torch would write the temporary name into the file
                torch.save(stored.contiguous().clone(), file)
        else:
            save_file({"prompt": stored.contiguous()}, partial)
    sidecar = path.with_suffix(".json")
    write_json(sidecar, described)
    return sidecar


def describe_prompt(prompt: Tensor, stored: Tensor | None = None) -> dict[str, Any]:
    """Shape, norms and similarities of a prompt, as JSON values.

    prompt: [V, T, D]. stored: the same as a file holds it, for the rounding error.
    """
    names = view_names(len(prompt))
    norms = prompt.norm(dim=-1)  # V T
    a, b, cosine = closest_pair(prompt, names)
    described: dict[str, Any] = {
        "shape": list(prompt.shape),
        "views": list(names),
        "token_norms": {"first": _round(norms[:, 0].mean()), "others": _round(norms[:, 1:].mean()), "max": _round(norms.max())},
        "view_cosines": [[_round(c) for c in row] for row in prompt_cosines(prompt)],
        "mean_view_cosine": _round(mean_pairwise_cosine(prompt)),
        "closest_views": [a, b, _round(cosine)],
    }
    if stored is not None:
        error = (stored.float() - prompt).abs()
        described["dtype"] = str(stored.dtype).removeprefix("torch.")
        described["rounding_error"] = {"max": float(error.max()), "mean": float(error.mean())}
    return described


def _round(value: Tensor | float) -> float:
    return round(float(value), 6)
