"""Samples of one object seen from several views: folders of pictures in and out.

A sample is a folder with one picture per view, `cam_000.png` the input view: directly inside (FaceLift's layout) or in its
folder `images` (the mouse layout). PNG, JPEG, WebP and TIFF are read, one format a sample; PNG is written. Decoding,
backgrounds, encoding, caching and splitting into training and held-out samples are elsewhere.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from softprompt.data.decode import SUFFIXES, WANTED
from softprompt.data.lists import beside_list, read_list, samples_in_list
from softprompt.data.pictures import load_picture
from softprompt.errors import InputError, base_of
from softprompt.files import new_folder

LIST_NAME = "samples.txt"
_OTHER_SUFFIXES = (".bmp", ".gif", ".heic", ".avif", ".jp2", ".jxl", ".exr", ".tga")
"""Endings of pictures that are not read, but named in errors."""


class MixedError(InputError):
    """A sample has a view in several files, or views of different formats."""


class Source(Protocol):
    """Where samples come from: folders of pictures, or a procedural world."""

    @property
    def names(self) -> Sequence[str]:
        """Unique, stable, readable by people; one per sample."""

    def __len__(self) -> int: ...

    @property
    def locations(self) -> Sequence[str]:
        """Per sample, the absolute path of its folder; empty for samples that are in no files."""

    def check(self, indices: Sequence[int]) -> None:
        """Look whether these samples are there, with all their pictures, without decoding any. Raises: InputError."""

    def files(self, index: int) -> Sequence[Path]:
        """The sample's pictures, by view; empty for one that is in no files."""

    def load(self, index: int) -> Tensor:
        """Returns: uint8 [V, 4, S, S], straight (not premultiplied) RGBA."""


@dataclass(frozen=True)
class FolderSource:
    """Samples kept as folders of pictures. Made by `open_source`."""

    origin: Path
    """The list or folder that they were opened from."""
    names: list[str]
    """The samples' folder names, led by their parents' where those alone are not unique ("june/mouse_3")."""
    locations: list[str]
    """Absolute paths of the samples' folders. `check` corrects those of a list that are in the other of its two places."""
    lines: list[tuple[int, str]] | None
    """The samples' lines in the list, numbered from 1; None for the sub-folders of a folder."""
    size: int
    """Side in pixels of what `load` returns."""
    num_views: int
    moved: str = ""
    """What to say where the list names another machine's folders and the samples lie beside it; empty: nothing."""

    def __len__(self) -> int:
        return len(self.names)

    def check(self, indices: Sequence[int]) -> None:
        """Look whether these samples are there, with all their pictures; no picture is decoded.

        Raises: InputError naming the first that is not, and how many are not.
        """
        samples = self._listed(indices) if self.lines is not None else self._in_folder(indices)
        _check_pictures(samples, self.num_views)

    def files(self, index: int) -> list[Path]:
        """The sample's pictures by view: directly in its folder (FaceLift's layout), or in its `images` (the mouse layout).

        One that is not there has the name of a PNG.
        """
        folder = Path(self.locations[index])
        for place in (folder, folder / "images"):
            if (place / picture_name(0)).is_file():  # the usual case, without a look at what else is there
                return [place / picture_name(view) for view in range(self.num_views)]
            if place.is_dir() and (found := views_in({file.name for file in place.iterdir()})):
                return [place / min(found.get(view, {picture_name(view)})) for view in range(self.num_views)]
        return [folder / picture_name(view) for view in range(self.num_views)]

    def load(self, index: int) -> Tensor:
        """Decode one sample.

        Returns: uint8 [V, 4, S, S], straight RGBA.
        Raises: InputError when a picture cannot be decoded or shows nothing.
        """
        return torch.stack([load_picture(file, self.size) for file in self.files(index)])

    def _in_folder(self, indices: Sequence[int]) -> list["_Sample"]:
        try:
            samples = [_look(Path(self.locations[index])) for index in indices]
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); expected a folder of samples") from error
        strangers = [sample.folder.name for sample in samples if not sample.has_views]
        if strangers and len(strangers) == len(self):
            raise _no_samples(self.origin, len(self))
        if strangers:
            raise InputError(
                f"{self.origin}: {len(strangers)} of {len(self)} sub-folders have no cam_ pictures ({_some(strangers)}); "
                f"{_EXPECTED_SAMPLES}; likely they are no samples: move them away, or give a list file of the samples wanted"
            )
        return samples

    def _listed(self, indices: Sequence[int]) -> list["_Sample"]:
        assert self.lines is not None
        samples, missing = [], []
        for index in indices:
            number, line = self.lines[index]
            try:
                samples.append(_look_up(line, [Path(self.locations[index]), self.origin.parent / line, Path(line)]))
            except OSError as error:
                missing.append(f"line {number}: {line!r} ({error.strerror})")
                continue
            self.locations[index] = os.path.abspath(samples[-1].folder)
        if missing:
            raise InputError(
                f"{self.origin}: {missing[0]}: no such sample folder, neither in {self.origin.parent.absolute()} (the list's "
                f"folder) nor in {Path.cwd()} (the working directory); {len(missing)} of {len(self)} samples listed are "
                "missing; likely the list or the data was moved, or a disk is not mounted"
            )
        return samples


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in the given order."""

    source: Source
    indices: Sequence[int]

    @property
    def names(self) -> list[str]:
        """Names of the chosen samples."""
        return [self.source.names[i] for i in self.indices]

    @property
    def locations(self) -> list[str]:
        """Folders of the chosen samples; empty where they are in no files."""
        return [self.source.locations[i] for i in self.indices] if self.source.locations else []

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, indices: Sequence[int]) -> None:
        """Raises: what the source does."""
        self.source.check([self.indices[i] for i in indices])

    def files(self, index: int) -> Sequence[Path]:
        """As the source has them."""
        return self.source.files(self.indices[index])

    def load(self, index: int) -> Tensor:
        """Returns: uint8 [V, 4, S, S], straight RGBA. Raises: what the source does."""
        return self.source.load(self.indices[index])


def picture_name(view: int) -> str:
    """File name of a view in both layouts, as PNG. Source: FaceLift's data folders."""
    return f"cam_{view:03d}.png"


def views_in(names: Collection[str]) -> dict[int, set[str]]:
    """The pictures of each view among the names in a folder, of any format that is read; more than one of a view is a fault."""
    found: dict[int, set[str]] = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() in SUFFIXES and re.fullmatch(r"cam_\d{3,}", stem):
            found.setdefault(int(stem[4:]), set()).add(name)
    return found


def open_source(path: str | Path, *, size: int, num_views: int = 6, check: bool = True) -> FolderSource:
    """Open samples; no picture is decoded before `load`.

    path: a list file (one sample folder a line, relative to the list's folder or else to the working directory: the one that
    has the first of them is tried first for all; blank lines and lines that start with # are skipped; absolute paths of
    another machine are looked for beside the list, see `beside_list`), a sample, or a folder whose sub-folders are all samples
    (hidden ones aside; taken by name). Views past num_views are left alone.
    size: side S in pixels of what `load` returns.
    check: look at once whether every picture is there; False leaves that to `FolderSource.check`, so that opening takes no
    longer for many samples than for a few.
    Raises: InputError when the path, a sample or a picture is missing, or a sample is there twice.
    """
    path, moved = Path(path), ""
    if os.path.isdir(path):
        lines, locations = None, _samples_in_folder(path)
    elif os.path.exists(path):
        lines = read_list(path)
        beside, moved = beside_list(path, [line for _, line in lines])
        lines = [(number, beside.get(line, line)) for number, line in lines]
        locations = samples_in_list(path, lines)
    else:
        raise InputError(
            f"{path}: not found{base_of(path)}; expected a list of samples or a folder; likely a typing mistake in the path"
        )
    source = FolderSource(path, _unique_names(locations), locations, lines, size, num_views, moved)
    if check:
        source.check(range(len(source)))
    return source


def what_moved(*sources: Source) -> list[str]:
    """Messages about lists that name another machine's folders, each once."""
    wholes = [source.source if isinstance(source, Subset) else source for source in sources]
    return list(dict.fromkeys(whole.moved for whole in wholes if isinstance(whole, FolderSource) and whole.moved))


def write_source(source: Source, folder: str | Path) -> Path:
    """Write samples in FaceLift's layout, and beside them a list of all (`samples.txt`).

    folder: must be new or empty. A name with a parent's in it ("june/mouse_3") becomes one folder, "june__mouse_3".
    Returns: the list file; opened at the same size, it gives the same tensors.
    Raises: InputError when the folder holds something.
    """
    names = [name.replace("/", "__") for name in source.names]
    with new_folder(folder) as partial:
        for index, name in enumerate(names):
            (partial / name).mkdir()
            for view, rgba in enumerate(source.load(index)):
                pixels = rearrange(rgba, "c h w -> h w c").contiguous().numpy()
                Image.fromarray(pixels).save(partial / name / picture_name(view))
        (partial / LIST_NAME).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return Path(folder) / LIST_NAME


@dataclass(frozen=True)
class _Sample:
    """Contents of a sample's folder."""

    folder: Path
    pictures_folder: Path
    pictures: set[str]
    """Names of the picture files, of whatever format and numbering."""
    subfolders: list[str]

    @property
    def has_views(self) -> bool:
        return any(name.startswith("cam_") and name.lower().endswith(SUFFIXES) for name in self.pictures)


def _look(folder: Path) -> _Sample:
    """List a folder, once; and its `images` where it has no views itself. Raises OSError where it cannot be listed."""
    found = _look_into(folder, folder)
    if not found.has_views and "images" in found.subfolders:
        found = _look_into(folder, folder / "images")
    return found


def _look_into(folder: Path, pictures_folder: Path) -> _Sample:
    with os.scandir(pictures_folder) as entries:
        listing = list(entries)
    pictures = {
        entry.name for entry in listing if entry.name.lower().endswith((*SUFFIXES, *_OTHER_SUFFIXES)) and entry.is_file()
    }
    subfolders = sorted(entry.name for entry in listing if not entry.name.startswith(".") and entry.is_dir())
    return _Sample(folder, pictures_folder, pictures, subfolders)


_EXPECTED_SAMPLES = (
    f"expected sub-folders with {picture_name(0)}, {picture_name(1)}, ... (or images/{picture_name(0)}, ...), each {WANTED}"
)


def _samples_in_folder(path: Path) -> list[str]:
    """The folder itself when it is a sample, its sub-folders otherwise, which are not listed."""
    try:
        # `_look` may have gone into `images`; the sub-folders wanted are those of the path.
        folders = [path] if _look(path).has_views else [path / name for name in _look_into(path, path).subfolders]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); expected a folder of samples") from error
    if not folders:
        raise _no_samples(path, 0)
    return [os.path.abspath(folder) for folder in folders]


def _no_samples(path: Path, subfolders: int) -> InputError:
    some = [path, *(path / name for name in _look_into(path, path).subfolders[:3])]
    places = [place for folder in some for place in (folder, folder / "images") if os.access(place, os.R_OK | os.X_OK)]
    shown = next((look for look in (_look_into(place, place) for place in places if place.is_dir()) if look.pictures), None)
    if shown is None:
        found, cause = "no pictures", "a level too high or too low, or data not there yet"
    else:
        pictures = sorted(shown.pictures)
        where = "" if shown.folder == path else f" in {shown.folder.relative_to(path)}"
        found, cause = f"{len(pictures)} pictures{where} ({_some(pictures)})", f"pictures {_why_not_views(pictures)}"
    return InputError(f"{path}: no samples in {subfolders} sub-folders, {found}; {_EXPECTED_SAMPLES}; likely {cause}")


def _why_not_views(pictures: Collection[str]) -> str:
    """Likely cause why pictures are not taken for views."""
    if all(name.lower().endswith(_OTHER_SUFFIXES) for name in pictures):
        return "of a format that is not read"
    return "numbered or named otherwise"


def _look_up(line: str, candidates: Sequence[Path]) -> _Sample:
    """Look into the first of the folders that there is. Raises OSError when there is none, or it cannot be listed."""
    for folder in candidates:
        if folder.exists():
            return _look(folder)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), line)


def _check_pictures(samples: list[_Sample], num_views: int) -> None:
    for sample in samples:
        _refuse_mixed(sample, num_views)
    incomplete = [sample for sample in samples if not views_in(sample.pictures).keys() >= set(range(num_views))]
    if not incomplete:
        return
    first = incomplete[0]
    there = views_in(first.pictures)
    ending = os.path.splitext(min(min(names) for names in there.values()))[1] if there else ".png"
    expected = [Path(picture_name(view)).stem + ending for view in range(num_views)]
    missing = [name for view, name in enumerate(expected) if view not in there]
    others = sorted(first.pictures.difference(*(there.get(view, set()) for view in range(num_views))))
    cause = f"the pictures are {_why_not_views(others)} ({_some(others)})" if others else "a view was not exported"
    more = f"; {len(incomplete) - 1} more samples are incomplete" if len(incomplete) > 1 else ""
    raise InputError(
        f"{first.pictures_folder}: {_some(missing)} missing, {num_views - len(missing)} of {num_views} views found; expected "
        f"{expected[0]} to {expected[-1]}{'' if there else f', each {WANTED}'}; likely {cause}{more}"
    )


def _refuse_mixed(sample: _Sample, num_views: int) -> None:
    """Raises: MixedError for a view that is there twice, or views of different formats: likely two exports in one folder."""
    chosen = {view: names for view, names in views_in(sample.pictures).items() if view < num_views}
    likely = "expected one picture a view, all of one format; likely two exports lie in one folder"
    for view, names in sorted(chosen.items()):
        if len(names) > 1:
            raise MixedError(
                f"{sample.pictures_folder}: view {view} is there {len(names)} times ({_some(sorted(names))}); {likely}"
            )
    by_ending = {_ending(min(names)): min(names) for _, names in sorted(chosen.items(), reverse=True)}
    if len(by_ending) > 1:
        raise MixedError(f"{sample.pictures_folder}: mixed formats ({_some(sorted(by_ending.values()))}); {likely}")


def _ending(name: str) -> str:
    """Ending of a file name, in one spelling for each format."""
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(ending := os.path.splitext(name)[1].lower(), ending)


def _unique_names(locations: Sequence[str]) -> list[str]:
    """Folder names, each led by as many parents' as it takes to tell it from the others."""
    names = [os.path.basename(location) for location in locations]
    depth = 1
    while True:
        holders = Counter(names)
        if len(holders) == len(names):
            return names
        depth += 1
        for index, name in enumerate(names):
            if holders[name] > 1:
                names[index] = "/".join(Path(locations[index]).parts[-depth:])


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
