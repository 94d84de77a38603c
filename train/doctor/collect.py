"""From paths to measured samples: all faults collected, where training stops at the first."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from softprompt.data.pictures import load_picture
from softprompt.data.samples import FolderSource, MixedError, open_source, views_in, what_moved
from softprompt.errors import InputError
from train.doctor.kinds import LEAST_SHARE, Sample
from train.doctor.look import Picture, look_at_all


def collect(train: str, val: str | None, *, num_views: int, size: int) -> tuple[list[Sample], list[list[Path | None]]]:
    """Find and measure all samples.

    train, val: list files or folders, as data.train and data.val. size: side S at which training takes the pictures.
    Returns: samples, those to train on first; and their files, by view, None for one that is not there.
    Raises: InputError where there is nothing to look at.
    """
    sources = [_open("data.train", train, num_views, size)]
    if val is not None:
        sources.append(_open("data.val", val, num_views, size))
    for moved in what_moved(*sources):
        print(f"WARNING    {moved}")
    found = [(source, index, *_find(source, index)) for source in sources for index in range(len(source))]
    files = [one for *_, one in found]
    for source in sources:
        if not any(any(one) for other, _, _, one in found if other is source):
            option = "data.train" if source is sources[0] else "data.val"
            with _named(option):
                source.check(range(len(source)))  # says what is there instead
    samples = []
    for (source, index, fault, views), pictures in zip(found, look_at_all(files), strict=True):
        name = source.names[index] if source is sources[0] else f"{source.names[index]} (val)"
        samples.append(_sample(name, source is sources[0], fault, views, pictures, size))
    return samples, files


def _open(option: str, path: str, num_views: int, size: int) -> FolderSource:
    if path == "micro" and not os.path.exists(path):
        raise InputError(f"--{option}: is micro, the embedded world, which is in no files; expected a list file or a folder")
    with _named(option):
        return open_source(path, size=size, num_views=num_views, check=False)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors begin with the option whose value they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{option}: {error}") from error


def _find(source: FolderSource, index: int) -> tuple[tuple[str, str] | None, list[Path | None]]:
    """A sample's (fault of the folder as a whole, files by view)."""
    fault = None
    try:
        source.check([index])  # also looks up which of its two places a line of a list is in
    except MixedError as error:
        fault = "mixed", str(error).partition(";")[0]
    except InputError:
        pass
    else:
        return None, list(source.files(index))
    folder = Path(source.locations[index])
    number, line = source.lines[index] if source.lines else (None, folder.name)
    if not folder.is_dir():
        return ("missing_folder", f"{source.origin.name}, line {number}: {line}"), [None] * source.num_views
    if not os.access(folder, os.R_OK | os.X_OK):
        return ("no_views", f"{folder} cannot be listed"), [None] * source.num_views
    for place in (folder, folder / "images"):
        found = views_in([file.name for file in place.iterdir() if file.is_file()]) if place.is_dir() else {}
        there = [place / min(found[view]) if view in found else None for view in range(source.num_views)]
        if any(there):
            return fault, there
    return ("no_views", str(folder)), [None] * source.num_views


def _sample(
    name: str,
    is_train: bool,
    fault: tuple[str, str] | None,
    files: Sequence[Path | None],
    pictures: Sequence[Picture | None],
    size: int,
) -> Sample:
    """What cannot be decoded, or hardly shows anything, is given to training's own reader, whose word counts."""
    broken, empty = {}, []
    kept = list(pictures)
    for view, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        if file is None or (picture is not None and not (picture.has_alpha and picture.share < LEAST_SHARE)):
            continue
        try:
            load_picture(file, size)
        except InputError as error:
            kept[view] = None
            if picture is None:
                broken[view] = str(error).removeprefix(f"{file}: ").partition(";")[0]
            else:
                empty.append(view)
    missing = [] if fault else [view for view, file in enumerate(files) if file is None]
    return Sample(name, is_train, kept, missing, broken, empty, fault)
