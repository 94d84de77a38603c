"""Samples of a data set, each with its measurements and all its faults; training stops at the first fault."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from softprompt.data.pictures import load_picture
from softprompt.data.samples import FolderSource, MixedError, open_source, views_in, what_moved
from softprompt.errors import InputError
from train.doctor.inspect import Files, Picture, inspect_all

LEAST_SHARE = 1e-3
"""Share of the foreground below which a picture counts as nearly empty: a disc of 18 pixels' diameter in 512x512."""


@dataclass(frozen=True)
class Sample:
    """One object, and what was found in its files."""

    name: str
    is_train: bool
    """False for the validation data."""
    pictures: list[Picture | None]
    """By view; None for one that is missing, broken or empty."""
    files: Files = ()
    refused: dict[str, dict[int, str]] = field(default_factory=dict)
    """Views that training refuses: kind of finding => view => reason, perhaps empty."""
    fault: tuple[str, str] | None = None
    """Kind and detail of a fault of the whole folder; then `refused` is empty."""

    def foreground(self, view: int) -> Picture | None:
        """The picture of a view, if its foreground is known and more than a speck."""
        picture = self.pictures[view]
        return picture if picture is not None and picture.share >= LEAST_SHARE else None


def collect(train: str, val: str | None, *, num_views: int, size: int) -> list[Sample]:
    """Find and measure all samples, those of the training data first.

    train, val: list files or folders, as data.train and data.val. size: side in pixels at which training reads the pictures.
    Raises: InputError if there are no samples.
    """
    paths = {"data.train": train} | ({} if val is None else {"data.val": val})
    sources = {option: _open(option, path, num_views, size) for option, path in paths.items()}
    for moved in what_moved(*sources.values()):
        print(f"WARNING    {moved}")
    found = []
    for option, source in sources.items():
        here = [_find(source, index) for index in range(len(source))]
        if not any(any(files) for _, files in here):
            with _named(option):
                source.check(range(len(source)))  # says what is there instead
        found += [(option, name, *one) for name, one in zip(source.names, here, strict=True)]
    measured = inspect_all([files for *_, files in found])
    return [
        _sample(name, option == "data.train", fault, files, pictures, size)
        for (option, name, fault, files), pictures in zip(found, measured, strict=True)
    ]


def _open(option: str, path: str, num_views: int, size: int) -> FolderSource:
    if path == "micro" and not os.path.exists(path):
        raise InputError(f"--{option}: is micro, the embedded world, which has no files; expected a list file or a folder")
    with _named(option):
        return open_source(path, size=size, num_views=num_views, check=False)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors begin with the option."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{option}: {error}") from error


def _find(source: FolderSource, index: int) -> tuple[tuple[str, str] | None, Files]:
    """A sample's (fault of the whole folder, files by view)."""
    fault = None
    try:
        source.check([index])  # also finds which of its two places a line of a list refers to
        return None, source.files(index)
    except MixedError as error:
        fault = "mixed_files", str(error).partition(";")[0]
    except InputError:
        pass
    folder, nothing = Path(source.locations[index]), [None] * source.num_views
    if not folder.is_dir():
        number, line = source.lines[index] if source.lines else (None, folder.name)
        return ("missing_folder", f"{source.origin.name}, line {number}: {line}"), nothing
    if not os.access(folder, os.R_OK | os.X_OK):
        return ("no_views", f"{folder} cannot be listed"), nothing
    for place in (folder, folder / "images"):
        found = views_in([file.name for file in place.iterdir() if file.is_file()]) if place.is_dir() else {}
        files = [place / min(found[view]) if view in found else None for view in range(source.num_views)]
        if any(files):
            return fault, files
    return ("no_views", str(folder)), nothing


def _sample(
    name: str, is_train: bool, fault: tuple[str, str] | None, files: Files, pictures: Sequence[Picture | None], size: int
) -> Sample:
    kept = list(pictures)
    refused: dict[str, dict[int, str]] = {"missing_views": {}, "broken": {}, "empty": {}}
    for view, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        if file is None:
            refused["missing_views"][view] = ""
        elif picture is None or (picture.has_alpha and picture.share < LEAST_SHARE):
            try:
                load_picture(file, size)  # training's own reader decides what is refused
            except InputError as error:
                kept[view] = None
                reason = str(error).removeprefix(f"{file}: ").partition(";")[0]
                refused["empty" if picture else "broken"][view] = "" if picture else reason
    return Sample(name if is_train else f"{name} (val)", is_train, kept, files, {} if fault else refused, fault)
