"""metrics.jsonl: the series of a run, one line a point."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.errors import InputError

FILE = "metrics.jsonl"
ABLATION_PSNR, ABLATION_SSIM, VIEWS_FOLLOW = "ablation_psnr", "ablation_ssim", "ablation/views_follow"
"""Series of an ablation: the first two by row, as ablation_psnr/both."""
HANDED_ON = "next_prompt"
"""The row of an ablation whose views are not to be those of their places."""
OUTCOMES = {
    "loss/validation": "held-out loss",
    "views/psnr": "PSNR of views, dB",
    "views/psnr_foreground": "the same on the object alone, dB",
    "views/ssim": "SSIM of views",
    "views/copy_score": "copy score (1: copies of the input, 0: as different from it as the truth)",
}
"""The series that say how good a run is, in words."""


def read_series(run: Path) -> list[dict[str, Any]]:
    """The points in a run's folder, by step; half a line, as a killed run may have left, is passed over; no file: none.

    Raises: InputError naming a line that is no point.
    """
    path = run / FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [_point(line, path, number) for number, line in enumerate(lines[:-1], start=1) if line.endswith(b"}")]


def _point(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        point: dict[str, Any] = json.loads(line)
        if type(point["step"]) is int and all(isinstance(value, int | float | None) for value in point.values()):
            return point
    except (ValueError, KeyError, RecursionError):
        pass  # said below
    raise InputError(
        f"{path}: line {number} is no point of a series; expected a JSON object with `step` and numbers; likely the file is "
        f"damaged: remove the line"
    )


def is_evaluation(point: Mapping[str, float]) -> bool:
    """Whether a point is one of validation and previews; the others are of training."""
    return "loss/validation" in point


def is_ablation(point: Mapping[str, float]) -> bool:
    """Whether a point is the ablation at a run's end."""
    return VIEWS_FOLLOW in point


def display_name(name: str) -> str:
    """The name of a view, a row or a part as people read it: front_right => "front right", lora_alone => "LoRA alone"."""
    return "shifted prompts" if name == HANDED_ON else name.replace("_", " ").replace("lora", "LoRA")
