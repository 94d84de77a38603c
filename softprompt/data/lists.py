"""List files of samples: one sample folder a line."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from softprompt.errors import InputError


def read_list(path: Path) -> list[tuple[int, str]]:
    """The entries of a list file with their line numbers."""
    wanted = "expected a UTF-8 text with one sample folder a line"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list ({error}); {wanted}; likely another kind of file") from error
    if "\0" in text:
        raise InputError(f"{path}: holds NUL characters; {wanted}; likely another kind of file")
    stripped = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{path}: lists no sample; {wanted}; likely it was written before the data was there")
    return lines


def samples_in_list(path: Path, lines: Sequence[tuple[int, str]]) -> list[str]:
    """Paths of the samples of a list; only the first is searched for."""
    first = next((line for _, line in lines if not os.path.isabs(line)), None)
    in_working_directory = first is not None and not os.path.isdir(path.parent / first) and os.path.isdir(first)
    base = os.getcwd() if in_working_directory else os.path.abspath(path.parent)
    # Not resolved: two links to one folder are two samples, as their owner wanted.
    locations = [os.path.normpath(os.path.join(base, line)) for _, line in lines]
    line_of: dict[str, int] = {}
    for (number, line), location in zip(lines, locations, strict=True):
        first_number = line_of.setdefault(location, number)
        if first_number != number:
            raise InputError(
                f"{path}: line {number} names {line!r} again, after line {first_number}; expected every sample once; likely "
                "two lists were joined"
            )
    return locations


def beside_list(path: Path, folders: Sequence[str]) -> tuple[dict[str, str], str]:
    """Where the folders of a list from another machine lie on this one: by the same names beside the list.

    path: of the list, e.g. FaceLift's data_mvdiff_train.txt, which names its samples by absolute paths. A list is taken for one
    of another machine where no folder is here that it names by an absolute path.
    Returns: (the folder beside the list for each absolute one, what to say of it); both empty where the list is right as it is,
    or nothing that it names lies beside it.
    Raises: InputError where a sample might be in two places, or two in one, or only some of them are there.
    """
    names = {folder: found for folder in folders if (found := _names_below_root(folder))}
    if not names or any(map(os.path.isdir, names)):
        return {}, ""
    root, is_folder = path.absolute().parent, cache(os.path.isdir)
    places = {folder: _ends_below(root, parts, is_folder) for folder, parts in names.items()}
    taken = {folder: found[0] for folder, found in places.items() if found}
    if not taken:
        return {}, ""
    first, holder = next(iter(taken)), {place: folder for folder, place in taken.items()}
    why = ""
    if twice := next((folder for folder in taken if len(places[folder]) > 1), None):
        why = f"{twice} might be {' or '.join(places[twice])} beside the list"
    elif len(taken) < len(names):
        why = f"beside the list are {len(taken)} of its {len(names)} folders (e.g. {taken[first]})"
    elif shared := next((folder for folder, place in taken.items() if holder[place] != folder), None):
        why = f"{shared} and {holder[taken[shared]]} would both be {taken[shared]}"
    if why:
        raise InputError(
            f"{path}: none of its absolute paths is here, e.g. {next(iter(names))}, and {why}; expected each folder once; "
            "likely the list is of other data, or not all of them were copied: correct its paths"
        )
    return taken, (
        f"{path}: its {len(names)} absolute paths are another machine's, e.g. {first}; the folders of these names beside the "
        f"list are taken, e.g. {taken[first]}"
    )


def _names_below_root(folder: str) -> tuple[str, ...]:
    """Parts of an absolute POSIX or Windows path below its root; empty for a relative path."""
    kind = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", folder) else PurePosixPath
    return kind(folder).parts[1:] if kind(folder).is_absolute() else ()


def _ends_below(root: Path, names: tuple[str, ...], is_folder: Callable[[str], bool]) -> list[str]:
    """The folders below root that have the last of the names, or the last few."""
    ends = [names[-size:] for size in range(1, len(names) + 1)]
    # Nearly all fail at the first name, which most of the list's folders share: asked once.
    return [os.path.join(root, *end) for end in ends if is_folder(os.path.join(root, end[0])) and root.joinpath(*end).is_dir()]
