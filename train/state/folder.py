"""What lies where in a run's folder."""

from pathlib import Path

LOCK = ".lock"
"""File in a run's folder that its process holds locked: the lock ends with the process, however that ends."""


ERROR = "error.txt"
"""File in a run's folder with the error that ended it, until it is resumed."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-N."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first. One being written, or removed, has another name."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


def list_incidents(run: Path) -> list[Path]:
    """A run's incidents, oldest first."""
    found = [p for p in (run / "incidents").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))
