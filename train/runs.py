"""List the runs in a folder: their progress, validation loss and errors, and how to resume them: `python -m train.runs`."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from softprompt.errors import InputError, base_of
from train.cli import PlainParser, run_command
from train.log.series import FILE, is_evaluation, read_series
from train.state.folder import ERROR, LOCK


@dataclass(frozen=True)
class Row:
    """A run, as its folder shows it."""

    folder: Path
    state: str
    """running, finished, failed, or stopped."""
    step: int
    """Step of the newest point in its log."""
    steps: int
    """Length of the run; 0 where its configuration cannot be read."""
    best: tuple[float, int] | None
    """Lowest validation loss, and its step."""
    last: float | None
    """Newest validation loss."""
    psnr: float | None
    """PSNR of the newest previews, dB."""
    written: float | None
    """When it last wrote to its log, in seconds since 1970."""
    error: str
    """The error that ended it, or what is wrong with its folder."""


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
    print(table(read_runs(folder), now=time.time()))
    return 0


def read_runs(folder: Path) -> list[Row]:
    """The runs in a folder, by name, or the run that it is. Raises: InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder{base_of(folder)}; expected one that holds runs, e.g. runs")
    paths = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [path for path in paths if (path / "config.yaml").is_file() or (path / LOCK).is_file()]
    if not found:
        raise InputError(f"{folder}: holds no run; expected folders with a config.yaml, as train.softprompt leaves them")
    return [_row(path) for path in (found[:1] if found[0] == folder else found)]


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
    step = points[-1]["step"] if points else 0
    whole = 0 < steps <= step and (run / "export" / "clr_embeds.pt").is_file()
    return Row(
        folder=run,
        state="running" if is_running(run) else "failed" if error else "finished" if whole else "stopped",
        step=step,
        steps=steps,
        best=min(((p["loss/validation"], p["step"]) for p in evaluations), default=None),
        last=evaluations[-1]["loss/validation"] if evaluations else None,
        psnr=next((p["views/psnr"] for p in reversed(evaluations) if p.get("views/psnr") is not None), None),
        written=(run / FILE).stat().st_mtime if points else None,
        error=error,
    )


def _steps(config: Path) -> int:
    """Raises: InputError."""
    try:
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"]) if config.is_file() else 0
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
    except OSError:  # another user's, or on a read-only disk: unknown
        return False
    lock.release()
    return False


def table(rows: Sequence[Row], *, now: float) -> str:
    """A line for each run, then errors, then the commands that resume runs. now: seconds since 1970."""
    width = max(4, *(len(row.folder.name) for row in rows))
    lines = [f"{'run':{width}s}  {'state':8s}  {'step':>15s}  {'best loss at step':>18s}  {'last':>8s}  {'PSNR':>6s}  written"]
    for row in rows:
        best = "-" if row.best is None else f"{row.best[0]:.4g} at {row.best[1]}"
        last, psnr = (f"{v:{f}}" if v is not None else "-" for v, f in ((row.last, ".4g"), (row.psnr, ".2f")))
        when = "-" if row.written is None else _ago(now - row.written)
        step = f"{row.step} of {row.steps}"
        lines.append(f"{row.folder.name:{width}s}  {row.state:8s}  {step:>15s}  {best:>18s}  {last:>8s}  {psnr:>6s}  {when}")
    lines += [f"\n{row.folder.name}: {row.error}" for row in rows if row.error]
    unfinished = [row.folder for row in rows if row.state in ("failed", "stopped")]
    resumable = [folder for folder in unfinished if (folder / "config.yaml").is_file()]
    if resumable:
        lines += ["\nresume with", *(f"  python -m train.softprompt --resume {shlex.quote(str(f))}" for f in resumable)]
    empty = [folder.name for folder in unfinished if folder not in resumable]
    if empty:
        lines.append(f"\nstopped before anything was written, start again: {', '.join(empty)}")
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


if __name__ == "__main__":
    sys.exit(main())
