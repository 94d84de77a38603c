"""Files and folders that appear whole or not at all."""

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from softprompt.errors import InputError, base_of


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder under a temporary name; it takes its own name when the block ends without an error.

    Yields: the temporary folder, beside `path`. It is removed when the block raises, so nothing half-written stays.
    Raises: InputError when `path` exists and is not an empty folder.
    """
    path = Path(path)
    refuse_taken(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            _let_others_read(file)
            _onto_the_disk(file)
        os.replace(partial, path)
        _onto_the_disk(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """Raises: InputError when `path` exists and is not an empty folder, so that a new folder could not have its name."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists already and is not an empty folder; choose another name, or move it away first")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name; it replaces `path` when the block ends without an error.

    Yields: the temporary path, beside `path`, with the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{uuid4().hex[:12]}{path.suffix}")  # processes of other machines write too
    try:
        yield partial
        _let_others_read(partial)
        _onto_the_disk(partial)
        os.replace(partial, path)
        _onto_the_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Around a block that writes. place: the path, or the option and the path, for the error.

    Raises: InputError in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); likely read-only, or its disk is full") from error


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and its sub-folders; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def lack_of_space(folder: Path, needed: int) -> str | None:
    """How much space is free on the disk that `folder` is or will be on, for an error; None where `needed` bytes fit."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    return f"{existing} has {free / 1e9:.1f} GB free" if free < needed else None


def remove_folder(path: str | Path) -> None:
    """Remove a folder so that a kill in the middle leaves none that looks whole."""
    path = Path(path)
    doomed = path.with_name(f".{path.name}.partial-removed-{uuid4().hex[:12]}")
    os.replace(path, doomed)
    doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed)


def remove_partial(folder: str | Path) -> None:
    """Remove what a process that was killed left half-written anywhere below `folder`."""
    for left_over in list(Path(folder).rglob(".*.partial-*")):
        is_folder = left_over.is_dir() and not left_over.is_symlink()
        shutil.rmtree(left_over) if is_folder else left_over.unlink(missing_ok=True)


def _let_others_read(path: Path) -> None:
    """The permissions anything new gets: safetensors and tempfile make theirs readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _onto_the_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: str | Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object.

    what: what the file is, for the error ("the UNet's configuration").
    Raises: InputError when it is missing, unreadable, or no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found{base_of(path)}; {what} was expected there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); {what} was expected there") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}; {what} was expected there")
    return content


def load_pickle(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU; pickled code is never run.

    Raises: UnpicklingError where it holds something else, ValueError where it cannot be read, both in one line.
    """
    import torch  # a second, for which those who only read JSON should not wait

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd versions of the format: the error says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError("it holds pickled objects other than tensors, or is no torch file at all") from error
    except Exception as error:  # which one depends on the byte that is wrong
        problem = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError("".join(c if c.isprintable() else "?" for c in problem)[:200]) from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, under its own name only when it is whole."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expanded(path: str, *, option: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` filled in, as a shell does it.

    option: that gives it, for the error. A name with a `~` or `$` that cannot be filled in stays as it is where it is there.
    Raises: InputError naming a variable that is not set, or a user that there is not.
    """
    unset = [name for match in _VARIABLE.finditer(path) if (name := match[1] or match[2]) not in os.environ]
    filled = os.path.expandvars(os.path.expanduser(path))
    if not (unset or filled.startswith("~")) or os.path.lexists(path):
        return path if unset else filled
    if unset:
        raise InputError(
            f"{option}: is {path}; the environment variable {unset[0]} is not set; expected one that is, or the path written "
            f"out; likely it was set without `export`, or in another shell"
        )
    user = filled.partition(os.sep)[0]
    raise InputError(
        f"{option}: is {path}; this machine has no user {user[1:]!r} with a home folder; expected ~ for your own, ./{user} for "
        f"a folder of that name, or the path written out"
    )
