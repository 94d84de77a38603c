"""Storage on disk that many processes share: rows of tensors found by key, and the contents of files.

A row is kept under a key made of everything that decides its content, so it never changes: any number of processes may read
and write one folder at once, and a lost or damaged row is made again. Rows are in safetensors shards, each complete or absent,
read through memory maps: 100,000 objects of six pictures need about a thousand files, not 600,000.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_file

KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")
SHARD_BYTES = 64 * 2**20
"""A shard is written at this size: a killed process loses at most so much."""
_OPEN_SHARDS = 16
"""Shards mapped at a time: pages read through a map count as memory until it is closed."""
_STALE_SECONDS = 3600
"""A half-written file older than this belongs to a process that was killed."""

_SETTLED_NS = 2 * 10**9
"""A file changed so recently may change again within one tick of its clock: it is read anew the next time."""
Table = Mapping[str, NDArray[np.generic]]


def key_of(*parts: bytes | str | int | float) -> bytes:
    """Hash of all `parts`, 16 bytes."""
    text = "\0".join(part.hex() if isinstance(part, bytes) else repr(part) for part in parts)
    return blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _look_up(table: NDArray[Any], keys: NDArray[np.bytes_]) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Returns: which keys are in a sorted table; the place of each that is."""
    places = np.searchsorted(table, keys)
    found = np.asarray(places < len(table))
    found[found] = table[places[found]] == keys[found]
    return found, places


class ShardStore:
    """Rows of named tensors in a folder of shards; every row has the same names, shapes and dtypes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._seen: set[str] = set()
        self._keys = np.empty(0, dtype=KEY)
        """Sorted."""
        self._places = np.empty((0, 2), dtype=np.int32)
        """[keys, 2]: shard and row of each key."""
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = Lock()
        self.refresh()

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._keys)

    def refresh(self) -> list[str]:
        """Add the shards that any process has written since.

        Returns: names of shards that could not be read. They are removed, so that their rows are made again.
        """
        new, unreadable = [], []
        with self._lock:
            for path in sorted(self.folder.glob("*.safetensors")):
                if path.name.startswith("."):
                    _remove_stale(path)
                elif path.name in self._seen:
                    continue
                elif (keys := _keys_in(path)) is not None:
                    new.append((path, keys))
                else:
                    unreadable.append(path.name)
                    path.unlink(missing_ok=True)
            self._add(new)
        return unreadable

    def __contains__(self, key: bytes) -> bool:
        return bool(self.has(np.array([key], dtype=KEY))[0])

    def has(self, keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of the keys have a row."""
        return _look_up(self._keys, keys)[0]

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor] | None:
        """The rows of some keys, stacked; None where one of them is missing or damaged (its shard is then removed)."""
        wanted = np.array(keys, dtype=KEY)
        with self._lock:
            found, places = _look_up(self._keys, wanted)
            if not found.all():
                return None
            rows = []
            for shard, number in self._places[places].tolist():
                row = self._row(shard, number)
                if row is None:
                    self._drop(shard)
                    return None
                rows.append(row)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def write(self, keys: Sequence[bytes], rows: Mapping[str, Tensor]) -> None:
        """Add a shard. rows: by name, [len(keys), ...] each.

        Raises: InputError when the disk is full or may not be written; what is there stays usable.
        """
        names = np.array(keys, dtype=KEY)
        tensors = {name: tensor.contiguous() for name, tensor in rows.items()}
        checks = torch.tensor([_checksum({n: t[i] for n, t in tensors.items()}) for i in range(len(keys))])
        path = self.folder / f"{_name_of(names)}.safetensors"
        try:
            with new_file(path) as partial:
                as_bytes = torch.from_numpy(names.view(np.uint8).reshape(-1, KEY_BYTES))
                save_file({**tensors, "keys": as_bytes, "crc": checks}, partial)
        except (OSError, SafetensorError) as error:
            size = sum(t.nbytes for t in tensors.values())
            raise InputError(
                f"{path}: cannot be written ({' '.join(str(error).split())}); {size / 1e6:.0f} MB were to go there. Likely "
                f"the disk is full or read-only: make room, or give data.cache another folder. What is kept stays usable"
            ) from error
        with self._lock:
            if path.name not in self._seen:
                self._add([(path, names)])

    def _add(self, shards: Sequence[tuple[Path, NDArray[np.bytes_]]]) -> None:
        """Add shards to the index, which is sorted once for all of them."""
        keys, places = [self._keys], [self._places]
        for number, (path, names) in enumerate(shards, start=len(self._shards)):
            self._seen.add(path.name)
            keys.append(names)
            places.append(np.stack([np.full(len(names), number), np.arange(len(names))], axis=1).astype(np.int32))
        self._shards += [path for path, _ in shards]
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys, self._places = joined[order], np.concatenate(places)[order]

    def _drop(self, number: int) -> None:
        """Forget and remove a damaged shard."""
        kept = self._places[:, 0] != number
        self._keys, self._places = self._keys[kept], self._places[kept]
        self._open.pop(number, None)
        self._seen.discard(self._shards[number].name)
        self._shards[number].unlink(missing_ok=True)

    def _row(self, number: int, row: int) -> dict[str, Tensor] | None:
        """A row of a shard; None where it is damaged."""
        try:
            shard = self._open.pop(number, None) or _Shard(self._shards[number])
            self._open[number] = shard  # as the one used last
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard.row(row)
        except (SafetensorError, FileNotFoundError, ValueError, RuntimeError, IndexError):
            return None  # any other OSError, no permission say, is no damage: it is raised, and the shard stays


class _Shard:
    """One shard, mapped into memory."""

    def __init__(self, path: Path) -> None:
        file = safe_open(path, framework="pt")
        self._slices = {name: file.get_slice(name) for name in set(file.keys()) if name not in ("keys", "crc")}
        self._checks = file.get_tensor("crc").clone()

    def row(self, index: int) -> dict[str, Tensor]:
        """Raises: ValueError when the row is damaged."""
        row = {name: part[index].clone() for name, part in self._slices.items()}
        if _checksum(row) != int(self._checks[index]):
            raise ValueError("damaged")
        return row


def _keys_in(path: Path) -> NDArray[np.bytes_] | None:
    """Keys of the rows in a shard; None where it cannot be read, or has other keys than it was written with."""
    try:
        with safe_open(path, framework="np") as file:
            keys = file.get_tensor("keys")
    except (SafetensorError, FileNotFoundError, ValueError, RuntimeError, TypeError):
        return None  # any other OSError is no damage
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
        return None
    names = np.ascontiguousarray(keys).view(KEY)[:, 0]
    return names if path.stem == _name_of(names) else None


def _name_of(keys: NDArray[np.bytes_]) -> str:
    """File name of a shard, which protects its keys: the checksums of rows do not cover them."""
    return blake2b(keys.tobytes(), digest_size=16).hexdigest()


def _checksum(row: Mapping[str, Tensor]) -> int:
    check = 0
    for name in sorted(row):
        check = zlib.crc32(f"{name} {row[name].dtype} {list(row[name].shape)}".encode(), check)
        check = zlib.crc32(row[name].contiguous().flatten().view(torch.uint8).numpy().data, check)
    return check


def _remove_stale(path: Path) -> None:
    try:
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink()
    except FileNotFoundError:
        pass  # another process was faster, or has just given it its name


class Fingerprints:
    """Hashes of the contents of groups of files, e.g. the views of a sample, each group under a name. As in git, a file is
    read again only when its size or time of change differs.

    path: file that keeps them between runs; if it is damaged, the files are read again. count: files in a group.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self._table = _read_table(path, count)
        """Sorted by key."""
        self._new: dict[bytes, tuple[list[tuple[int, int]], list[bytes]]] = {}
        """By key: size and time of change of each file; contents. Not in the table yet."""
        self._unsaved = False

    def known(self, names: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bytes_]]:
        """Contents when the groups were last read, without access to their files.

        Returns: which of them were read before, [len(names)]; contents, [len(names), count], empty where not.
        """
        self._take_in()
        keys = np.array([key_of(name) for name in names], dtype=KEY)
        found, places = _look_up(self._table["keys"], keys)
        contents = np.zeros((len(names), self.count), dtype=KEY)
        contents[found] = self._table["contents"][places[found]]
        return found, contents

    def of(self, name: str, files: Sequence[str | Path]) -> list[bytes]:
        """Contents of a group's files; read again where size or time of change differs. Safe in many threads.

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
        """Write new contents, and keep those that other processes have written meanwhile.

        Raises: InputError where the file cannot be written.
        """
        self._take_in()
        if not self._unsaved:
            return
        self._table = _joined(_read_table(self.path, self.count), self._table)
        arrays = {
            name: np.ascontiguousarray(array.view(np.uint8) if array.dtype == KEY else array)
            for name, array in self._table.items()
        }
        try:
            with new_file(self.path) as partial:
                safetensors.numpy.save_file(arrays | {"check": _table_check(arrays)}, partial)
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
        (found,), (place,) = _look_up(self._table["keys"], np.array([key], dtype=KEY))
        if not found:
            return None
        stats = [(int(size), int(changed)) for size, changed in self._table["stats"][place]]
        return stats, [bytes(content).ljust(KEY_BYTES, b"\0") for content in self._table["contents"][place]]


def _empty(count: int) -> dict[str, NDArray[np.generic]]:
    return {
        "keys": np.empty(0, dtype=KEY),
        "stats": np.empty((0, count, 2), dtype=np.int64),
        "contents": np.empty((0, count), dtype=KEY),
    }


def _read_table(path: Path, count: int) -> Table:
    try:
        arrays = safetensors.numpy.load_file(path)
        if not np.array_equal(arrays.pop("check"), _table_check(arrays)):
            return _empty(count)
        keys, contents = (np.ascontiguousarray(arrays[name]).view(KEY) for name in ("keys", "contents"))
        table = {"keys": keys, "stats": arrays["stats"], "contents": contents}
        if any(array.shape[1:] != empty.shape[1:] for array, empty in zip(table.values(), _empty(count).values(), strict=True)):
            return _empty(count)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return _empty(count)  # none yet, or damaged: the files themselves are read again
    return table


def _table_check(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Hash of a table: a wrong content would give one picture for another."""
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
