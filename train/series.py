"""metrics.jsonl: the series of a run, one line a point."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_series(run: Path) -> list[dict[str, Any]]:
    """The points in a run's folder, by step; half a line, as a killed run may have left, is passed over; no file: none."""
    path = run / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def is_evaluation(point: Mapping[str, float]) -> bool:
    """Whether a point is one of validation and previews; the others are of training."""
    return "loss/validation" in point
