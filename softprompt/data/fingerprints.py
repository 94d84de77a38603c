"""What files hold, as 16 bytes each: read once, and then known by their size and time of change, as git does."""

import os
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from softprompt.data.shards import KEY, KEY_BYTES, key_of
from softprompt.errors import InputError
from softprompt.files import new_file

_SETTLED_NS = 2 * 10**9
"""A file changed so recently may change again within one tick of its clock: it is read anew the next time."""
Table = Mapping[str, NDArray[np.generic]]


class Fingerprints:
    """Contents of groups of files, e.g. the views of a sample, each group under a name.

    path: where they are kept between runs; a damaged file there is no more than a slower start. count: files in a group.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self._table = _read(path, count)
        """Sorted by key."""
        self._new: dict[bytes, tuple[list[tuple[int, int]], list[bytes]]] = {}
        """By key: size and time of change of each file; contents. Not in the table yet."""
        self._unsaved = False

    def known(self, names: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bytes_]]:
        """What was found when the groups were last read, without a look at the disk.

        Returns: which of them were read before, [len(names)]; contents, [len(names), count], empty where not.
        """
        self._take_in()
        keys = np.array([key_of(name) for name in names], dtype=KEY)
        places = np.searchsorted(self._table["keys"], keys)
        found = places < len(self._table["keys"])
        found[found] = self._table["keys"][places[found]] == keys[found]
        contents = np.zeros((len(names), self.count), dtype=KEY)
        contents[found] = self._table["contents"][places[found]]
        return found, contents

    def of(self, name: str, files: Sequence[str | Path]) -> list[bytes]:
        """Contents of a group's files; read where size or time of change is not what it was. Safe in many threads.

        Raises: OSError when one cannot be read.
        """
        key = key_of(name)
        stats = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, files)]
        kept = self._new.get(key) or self._in_table(key)
        if kept is not None and kept[0] == stats:
            return kept[1]
        contents = [_content(file) for file in files]
        if all(time.time_ns() - changed > _SETTLED_NS for _, changed in stats):
            self._new[key] = stats, contents
        return contents

    def save(self) -> None:
        """Keep what is new, beside what other processes have kept meanwhile.

        Raises: InputError where the file cannot be written.
        """
        self._take_in()
        if not self._unsaved:
            return
        self._table = _joined(_read(self.path, self.count), self._table)
        arrays = {
            name: np.ascontiguousarray(array.view(np.uint8) if array.dtype == KEY else array)
            for name, array in self._table.items()
        }
        try:
            with new_file(self.path) as partial:
                save_file(arrays | {"check": _check(arrays)}, partial)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.path}: cannot be written ({' '.join(str(error).split())}); likely the folder given as data.cache is a "
                f"file or read-only, or its disk is full; give another, or null to encode into memory"
            ) from error
        self._unsaved = False

    def _take_in(self) -> None:
        if not self._new:
            return
        rows = {
            "keys": np.array(list(self._new), dtype=KEY),
            "stats": np.array([stats for stats, _ in self._new.values()], dtype=np.int64),
            "contents": np.array([contents for _, contents in self._new.values()], dtype=KEY),
        }
        self._table, self._new, self._unsaved = _joined(self._table, rows), {}, True

    def _in_table(self, key: bytes) -> tuple[list[tuple[int, int]], list[bytes]] | None:
        keys = self._table["keys"]
        place = int(np.searchsorted(keys, np.array(key, dtype=KEY)))
        if place == len(keys) or keys[place] != np.array(key, dtype=KEY):
            return None
        stats = [(int(size), int(changed)) for size, changed in self._table["stats"][place]]
        return stats, [bytes(content).ljust(KEY_BYTES, b"\0") for content in self._table["contents"][place]]


def _empty(count: int) -> dict[str, NDArray[np.generic]]:
    return {
        "keys": np.empty(0, dtype=KEY),
        "stats": np.empty((0, count, 2), dtype=np.int64),
        "contents": np.empty((0, count), dtype=KEY),
    }


def _read(path: Path, count: int) -> Table:
    try:
        arrays = load_file(path)
        if not np.array_equal(arrays.pop("check"), _check(arrays)):
            return _empty(count)
        keys, contents = (np.ascontiguousarray(arrays[name]).view(KEY) for name in ("keys", "contents"))
        table = {"keys": keys, "stats": arrays["stats"], "contents": contents}
        if any(array.shape[1:] != empty.shape[1:] for array, empty in zip(table.values(), _empty(count).values(), strict=True)):
            return _empty(count)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return _empty(count)  # none yet, or damaged: the files themselves are read again
    return table


def _check(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """16 bytes that stand for all of a table: a content that is another's would give one picture for another."""
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _joined(older: Table, newer: Table) -> Table:
    stays = ~np.isin(older["keys"], newer["keys"])
    joined = {name: np.concatenate([older[name][stays], newer[name]]) for name in older}
    order = np.argsort(joined["keys"], kind="stable")
    return {name: array[order] for name, array in joined.items()}


def _content(file: str | Path) -> bytes:
    with open(file, "rb") as opened:
        digest = blake2b(digest_size=KEY_BYTES)
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.digest()
