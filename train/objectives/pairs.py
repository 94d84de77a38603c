"""Ranked pairs on the disk: a list that says which of two sets of views is the better one."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.data.lists import beside_list
from softprompt.data.samples import FolderSource
from softprompt.errors import InputError, base_of

COLUMNS = ("input", "winner", "loser", "gap")
BEYOND = "beyond the last name"
"""Where a table's row is longer than its line of names, the rest of it."""


@dataclass(frozen=True)
class ListedPair:
    """Two sets of views of one object, by their place in the list's samples."""

    input: int
    """Whose picture is given."""
    winner: int
    loser: int
    gap: float | None
    """How much better the winner is, as its author measures it; None where the list does not say."""


@dataclass(frozen=True)
class PairList:
    """A list of pairs, and every sample folder that it names, once."""

    samples: FolderSource
    pairs: list[ListedPair]


def read_pairs(path: str | Path, *, size: int, num_views: int, option: str) -> PairList:
    """Read a list of ranked pairs, and look whether every picture is there; none is decoded.

    path: JSON Lines (.jsonl), one object a line, or a table (.csv) with a line of names: `input`, `winner` and `loser`, each a
    sample folder (see softprompt.data.samples), relative to the list's folder or else to the working directory; and `gap`, a
    positive number or absent. size: side in pixels of what the samples load. option: named in errors.
    Raises: InputError naming the line.
    """
    path = Path(path)
    rows = _rows(path, option)
    if not rows:
        raise InputError(f"{option}: {path}: lists no pair; expected lines with {', '.join(COLUMNS[:3])}")
    folders: dict[str, tuple[int, int]] = {}
    pairs = [_pair(f"{option}: {path}: line {number}", number, row, folders) for number, row in rows]
    try:
        beside, moved = beside_list(path, list(folders))
        lines = [(number, beside.get(folder, folder)) for folder, (_, number) in folders.items()]
        locations = [_location(path, folder) for _, folder in lines]
        samples = FolderSource(path, list(folders), locations, lines, size, num_views, moved)
        samples.check(range(len(samples)))
    except InputError as error:
        of_list = "" if str(error).startswith(f"{path}: ") else f"{path}: "
        raise InputError(f"{option}: {of_list}{error}") from error
    return PairList(samples, pairs)


Told = tuple[str, str, str]
"""The folders of a pair: given, winner, loser."""


def doubtful(pairs: Sequence[Told], measured: Sequence[Told]) -> list[str]:
    """What a list may not have meant, as warnings: pairs twice, or that say the opposite, or are also measured on."""
    known = set(pairs)
    found = {
        "are there more than once": len(pairs) - len(known),
        "say the opposite of another": sum((given, loser, winner) in known for given, winner, loser in known),
        "are in dpo.held_out_pairs too, which then measures what was learned by heart": len(known & set(measured)),
    }
    return [f"WARNING    dpo.pairs: {count} of {len(pairs)} {what}" for what, count in found.items() if count]


def _rows(path: Path, option: str) -> list[tuple[int, Mapping[str, Any]]]:
    """(line number, its values by name)."""
    if path.suffix not in (".jsonl", ".csv"):
        raise InputError(f"{option}: is {path}; expected `own`, or a list of pairs: a .jsonl or a .csv file")
    if not path.exists():
        raise InputError(f"{option}: {path}: no such file{base_of(path)}; expected a list of pairs")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{option}: {path}: cannot be read as a list of pairs ({error}); expected a text file with a pair in each line"
        ) from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        return [(number, _json_object(f"{option}: {path}: line {number}", line)) for number, line in lines]
    try:
        reader = csv.DictReader(text.splitlines(), strict=True, restkey=BEYOND, skipinitialspace=True)
        found: list[tuple[int, Mapping[str, Any]]]
        found = [(reader.line_num, {name: value for name, value in row.items() if value}) for row in reader]
    except csv.Error as error:
        raise InputError(f"{option}: {path}: cannot be read as a table ({error})") from error
    if "winner" not in (reader.fieldnames or []):
        named = ", ".join(reader.fieldnames or []) or "nothing"
        raise InputError(f"{option}: {path}: its first line names {named}; expected {', '.join(COLUMNS)}")
    return found


def _json_object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is no JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: holds a JSON {type(row).__name__}; expected an object with {', '.join(COLUMNS)}")
    return row


def _each_name_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        raise ValueError("a name is given twice")
    return row


def _pair(where: str, number: int, row: Mapping[str, Any], folders: dict[str, tuple[int, int]]) -> ListedPair:
    """folders: (place, line) of each folder that was named so far; those of this pair are put in."""
    for name in ("winner", "loser", "input"):
        if row.get(name) in (None, ""):
            why = ": a pair that does not say which is better has nothing to teach" if name == "winner" else ""
            raise InputError(f"{where}: has no {name}; expected {', '.join(COLUMNS[:3])}{why}")
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name}: is {row[name]}; expected a sample folder")
    if BEYOND in row:
        raise InputError(f"{where}: has {len(row[BEYOND])} values more than the first line has names; expected as many")
    if unknown := [str(name) for name in row if name not in COLUMNS]:
        raise InputError(f"{where}: has {', '.join(unknown)}; expected {', '.join(COLUMNS)} alone")
    if os.path.normpath(row["winner"]) == os.path.normpath(row["loser"]):
        raise InputError(f"{where}: winner and loser are both {row['winner']}; expected two sample folders")
    given, winner, loser = (folders.setdefault(os.path.normpath(row[n]), (len(folders), number))[0] for n in COLUMNS[:3])
    return ListedPair(given, winner, loser, _gap(where, row.get("gap")))


def _gap(where: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        gap = float(value)
    except (TypeError, ValueError):
        gap = math.nan
    if not (math.isfinite(gap) and gap > 0) or isinstance(value, bool):
        raise InputError(f"{where}: gap: is {value}; expected how much better the winner is, a positive number, or none")
    return gap


def _location(path: Path, folder: str) -> str:
    """Beside the list, or else in the working directory, where such a folder is."""
    beside = os.path.abspath(path.parent / folder)
    return beside if os.path.isdir(beside) or not os.path.isdir(folder) else os.path.abspath(folder)


def gaps_of(pairs: Sequence[ListedPair], option: str) -> list[float]:
    """Raises: InputError where a pair has none."""
    without = sum(pair.gap is None for pair in pairs)
    if without:
        raise InputError(
            f"{option}: {without} of {len(pairs)} pairs have no gap; expected one for each, since a curriculum from easy to "
            f"hard needs to know which are easy"
        )
    return [float(pair.gap) for pair in pairs if pair.gap is not None]
