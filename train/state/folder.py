"""A run's folder: the names of what lies in it, and its lock."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from softprompt.errors import InputError, no_folder
from softprompt.files import read_json

LOCK = ".lock"
"""File that the run's process holds locked: the lock ends with the process, however that ends."""
REPORT = "report.html"
"""The report's page."""
DESCRIPTION = "clr_embeds.json"
"""The file beside an exported prompt that says where it comes from."""
ERROR = "error.txt"
"""File with the error that ended the run, until it is resumed."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-N."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first. One that is being written or removed has another name."""
    return _by_step([folder for folder in (run / "checkpoints").glob("step-*") if folder.is_dir()])


def list_incidents(run: Path) -> list[Path]:
    """A run's incidents, oldest first."""
    return _by_step(list((run / "incidents").glob("step-*")))


def step_of(folder: Path) -> int:
    """N of step-N."""
    return int(folder.name.removeprefix("step-"))


def _by_step(folders: list[Path]) -> list[Path]:
    return sorted((folder for folder in folders if folder.name.removeprefix("step-").isdecimal()), key=step_of)


# --------------------------------------------------------------------------------------------------------------------- lock


@contextmanager
def locked(output: Path | None, name: str, *, resume: Path | None) -> Iterator[Path]:
    """Take and lock the folder of a run: no second run can write into it.

    output: the folder that the user chose; None: the next free runs/NAME-NNN. resume: the folder of the run that is resumed.
    A new folder is removed if the run ends before it has written anything. Raises: InputError.
    """
    folder, lock = _take(output, name, resume)
    try:
        yield folder
    finally:
        if resume is None and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
        lock.release()


def _take(output: Path | None, name: str, resume: Path | None) -> tuple[Path, FileLock]:
    chosen = resume or output
    while True:
        folder = chosen or next_run_folder(name)
        if resume is None:
            refuse_used(folder)
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if chosen:
                raise InputError(
                    f"{'--resume' if resume else 'output'}: {folder} is in use: another process trains there; wait for it or "
                    f"stop it first"
                ) from None
            continue
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); expected a folder for the run") from error
        if resume is None and _others_in(folder):  # another run came and went in the meantime
            lock.release()
            refuse_used(folder)
        return folder, lock


def refuse_used(folder: Path) -> None:
    """Raises: InputError for a folder that holds more than a run leaves that is killed before its config.yaml is written."""
    if folder.exists() and (not folder.is_dir() or _others_in(folder)):
        hint = f" Go on with that run: --resume {folder}" if (folder / "config.yaml").is_file() else ""
        raise InputError(f"output: {folder} is not empty; a run never writes over another. Give a new folder.{hint}")


def _others_in(folder: Path) -> list[str]:
    """Files besides the lock and what a killed process left half-written."""
    return [name for name in os.listdir(folder) if name != LOCK and not (name.startswith(".") and ".partial-" in name)]


def next_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME-001, or the number after the highest that is there."""
    numbers = [0]
    with suppress(FileNotFoundError):
        numbers += [int(n) for e in os.listdir(root) if (n := e.removeprefix(f"{name}-")) != e and n.isdecimal()]
    return root / f"{name}-{max(numbers) + 1:03d}"


@dataclass(frozen=True)
class Exported:
    """A verified export. Differences are the largest between views, in pictures of range 0 to 1."""

    folder: Path
    read_back: float
    """Views of the files read back in a fresh model, against the model in memory under the same rounded prompt."""
    rounding: float
    """Difference made by rounding the prompt to float16."""


def read_description(export: Path) -> dict[str, Any]:
    """The JSON beside an exported prompt. Raises: InputError when it is missing or unreadable."""
    return read_json(export / DESCRIPTION, what="the description of an exported prompt")


def exported_prompt(folder: Path, *, option: str) -> Path:
    """The prompt in an export, float32 where it has that. option: that named the folder.

    Raises: InputError when there is none.
    """
    for name in ("clr_embeds.safetensors", "clr_embeds.pt"):
        if (folder / name).is_file():
            return folder / name
    inside = f"; did you mean {folder / 'export'}?" if (folder / "export").is_dir() else no_folder(folder)
    raise InputError(f"{option}: {folder} holds no clr_embeds.safetensors or .pt; expected a run's export folder{inside}")
