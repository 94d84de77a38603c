"""The runs in a folder: how far each came, how good it is, what ended it, and how to go on: `python -m train.runs`."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from softprompt.errors import InputError, base_of
from train.cli import PlainParser, run_command
from train.log.series import FILE, is_evaluation, read_series
from train.state.folder import ERROR, LOCK


@dataclass(frozen=True)
class Row:
    """A run, as its folder shows it."""

    name: str
    folder: Path
    state: str
    """running, finished, failed, or stopped."""
    step: int
    """Of the newest point in its log."""
    steps: int
    """That it was to take."""
    best: tuple[float, int] | None
    """Lowest validation loss, and its step."""
    last: float | None
    """Newest validation loss."""
    psnr: float | None
    """Of the newest previews, dB."""
    written: float | None
    """When it last wrote to its log, in seconds since 1970."""
    error: str
    """That ended it, or what is wrong with its folder."""
    resumable: bool
    """Whether it has its configuration, so that --resume takes it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit code."""
    parser = PlainParser(
        prog="python -m train.runs",
        description=__doc__,
        epilog="Examples: python -m train.runs | python -m train.runs runs/evidence/runs",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("runs"), help="Folder of runs, or one run; runs by default."
    )
    given = parser.parse_args(argv)
    return run_command(lambda: _list(given.folder), interrupted="interrupted")


def _list(folder: Path) -> int:
    print(table(look(folder), now=time.time()))
    return 0


def look(folder: Path) -> list[Row]:
    """The runs in a folder, by name, or the one that it is. Raises: InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder{base_of(folder)}; expected one that holds runs, e.g. runs")
    found = [folder] if _is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    if not found:
        raise InputError(f"{folder}: holds no run; expected folders with a config.yaml, as train.softprompt leaves them")
    return [_row(path) for path in found]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / LOCK).is_file()


def _row(run: Path) -> Row:
    error, points, steps = "", [], 0
    try:
        points = read_series(run)
        steps = _steps(run / "config.yaml")
    except InputError as problem:
        error = str(problem)
    if not error and (run / ERROR).is_file():
        error = (run / ERROR).read_text(encoding="utf-8", errors="replace").strip()
    evaluations = [point for point in points if is_evaluation(point) and point["loss/validation"] is not None]
    best = min(((p["loss/validation"], p["step"]) for p in evaluations), default=None)
    step = points[-1]["step"] if points else 0
    whole = steps > 0 and step >= steps and (run / "export" / "clr_embeds.pt").is_file()
    return Row(
        name=run.name,
        folder=run,
        state="running" if is_running(run) else "failed" if error else "finished" if whole else "stopped",
        step=step,
        steps=steps,
        best=best,
        last=evaluations[-1]["loss/validation"] if evaluations else None,
        psnr=next((p["views/psnr"] for p in reversed(evaluations) if p.get("views/psnr") is not None), None),
        written=(run / FILE).stat().st_mtime if points else None,
        error=error,
        resumable=(run / "config.yaml").is_file(),
    )


def _steps(config: Path) -> int:
    """Raises: InputError."""
    try:
        content: Any = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {"train": {"steps": 0}}
        return int(content["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"{config}: train.steps cannot be read ({type(error).__name__}); likely the file is damaged"
        ) from error


def is_running(run: Path) -> bool:
    """Whether a process holds a run's lock now."""
    if not (run / LOCK).is_file():
        return False
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # of another user, or on a disk that is read-only: whoever trains there is not asked
        return False
    lock.release()
    return False


def table(rows: Sequence[Row], *, now: float) -> str:
    """A line a run, then errors, then how to go on. now: seconds since 1970."""
    width = max(4, *(len(row.name) for row in rows))
    lines = [f"{'run':{width}s}  {'state':8s}  {'step':>15s}  {'best loss at step':>18s}  {'last':>8s}  {'PSNR':>6s}  written"]
    for row in rows:
        best = "-" if row.best is None else f"{row.best[0]:.4g} at {row.best[1]}"
        last, psnr = (f"{v:{f}}" if v is not None else "-" for v, f in ((row.last, ".4g"), (row.psnr, ".2f")))
        when = "-" if row.written is None else _ago(now - row.written)
        step = f"{row.step} of {row.steps}"
        lines.append(f"{row.name:{width}s}  {row.state:8s}  {step:>15s}  {best:>18s}  {last:>8s}  {psnr:>6s}  {when}")
    lines += [f"\n{row.name}: {row.error}" for row in rows if row.error]
    unfinished = [row for row in rows if row.state in ("failed", "stopped")]
    resumable = [shlex.quote(str(row.folder)) for row in unfinished if row.resumable]
    if resumable:
        lines += ["\ngo on with", *(f"  python -m train.softprompt --resume {folder}" for folder in resumable)]
    begun = [row.name for row in unfinished if not row.resumable]
    if begun:
        lines.append(f"\nstopped before anything was written, to be started again: {', '.join(begun)}")
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


if __name__ == "__main__":
    sys.exit(main())
