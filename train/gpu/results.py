"""Results of the checks: rows, kept as JSON and as a Markdown table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.files import new_file, write_json
from train.log.series import is_evaluation, read_series

MARKS = {"pass": "pass", "fail": "**FAIL**", "skip": "skipped", "info": ""}


@dataclass(frozen=True)
class Row:
    """One result."""

    name: str
    found: str
    """The value, with its unit."""
    wanted: str = ""
    outcome: str = "info"
    """pass, fail, skip (could not be checked here) or info (a number without a bound)."""
    check: str = ""
    """Name of its check; filled in when all rows are gathered."""
    seconds: float | None = None
    """Duration of the check, on its first row."""


def judged(name: str, found: float, *, most: float | None = None, least: float | None = None, unit: str = "") -> Row:
    """A number against a bound; NaN fails."""
    good = (most is None or found <= most) and (least is None or found >= least)
    wanted = f"at most {most:.4g}{unit}" if most is not None else f"at least {least:.4g}{unit}" if least is not None else ""
    return Row(name, f"{found:.4g}{unit}", wanted, "info" if not wanted else "pass" if good else "fail")


def is_true(name: str, holds: bool, found: str, wanted: str) -> Row:
    """A condition."""
    return Row(name, found, wanted, "pass" if holds else "fail")


def skipped(name: str, why: str) -> list[Row]:
    """The row of a check that cannot be done here."""
    return [Row(name, why, "", "skip")]


def failed(name: str, code: int, error: str = "") -> list[Row]:
    """The row of a command that ended with another exit code than 0. error: its last line."""
    return [is_true(name, False, f"exit code {code}{error and f': {error}'}", "exit code 0")]


def last_loss(run: Path) -> float:
    """A run's newest held-out loss."""
    return float([point["loss/validation"] for point in read_series(run) if is_evaluation(point)][-1])


def save_rows(rows: Sequence[Row], file: Path) -> None:
    """Write the rows of one check, for the process that started it."""
    write_json(file, {"rows": [asdict(row) for row in rows]})


def read_rows(file: Path, seconds: float) -> list[Row]:
    """The rows of a check that has ended, after so many seconds."""
    rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return [replace(row, seconds=seconds if index == 0 else None) for index, row in enumerate(rows)]


def write_results(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> None:
    """FOLDER/gpu.json and FOLDER/gpu.md, each whole at any moment."""
    write_json(folder / "gpu.json", about | {"rows": [asdict(row) for row in rows]})
    lines = [f"{name}: {value}  " for name, value in about.items()]
    lines += ["", "| check | what | found | wanted | | s |", "|---|---|---|---|---|---|"]
    shown = ""
    for row in rows:
        cells = [row.check if row.check != shown else "", row.name, row.found, row.wanted, MARKS[row.outcome]]
        cells.append("" if row.seconds is None else f"{row.seconds:.0f}")
        shown = row.check
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    with new_file(folder / "gpu.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
