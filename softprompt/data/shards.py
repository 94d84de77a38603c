"""Rows of tensors on disk, found by key: safetensors shards, each complete or absent, read through memory maps.

A row is kept under a key made of all that decides its content, so it never changes: any number of processes may read and
write one folder at once, and whatever is lost or damaged is only made again.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
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
"""A shard is written when so much is ready: what a killed process loses at most."""
_OPEN_SHARDS = 16
"""Mapped at a time: what a map was read through counts as memory until it is closed."""
_STALE_SECONDS = 3600
"""A half-written file so old belongs to a process that was killed."""


def key_of(*parts: bytes | str | int | float) -> bytes:
    """16 bytes that stand for all of `parts`."""
    text = "\0".join(part.hex() if isinstance(part, bytes) else repr(part) for part in parts)
    return blake2b(text.encode(), digest_size=KEY_BYTES).digest()


class ShardStore:
    """Rows of named tensors in a folder of shards; every row has the same names, shapes and dtypes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._seen: set[str] = set()
        self._keys = np.empty(0, dtype=KEY)
        """Sorted."""
        self._places = np.empty((0, 2), dtype=np.int32)
        """Of each key: which shard, which row."""
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = Lock()
        self.refresh()

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._keys)

    def refresh(self) -> list[str]:
        """Take in the shards that were written since, by whichever process.

        Returns: names of shards that could not be read. They are removed, so that their rows are made again.
        """
        found = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        unreadable = []
        with self._lock:
            for path in found:
                if path.name.startswith("."):
                    _remove_stale(path)
                elif path.name not in self._seen and (keys := _keys_in(path)) is not None:
                    self._add(path, keys)
                elif path.name not in self._seen:
                    unreadable.append(path.name)
                    path.unlink(missing_ok=True)
        return unreadable

    def __contains__(self, key: bytes) -> bool:
        return bool(self.has(np.array([key], dtype=KEY))[0])

    def has(self, keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of the keys have a row."""
        places = np.searchsorted(self._keys, keys)
        inside = places < len(self._keys)
        found = np.zeros(keys.shape, dtype=bool)
        found[inside] = self._keys[places[inside]] == keys[inside]
        return found

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor] | None:
        """The rows of some keys, stacked; None where one of them is missing or damaged (its shard is then removed)."""
        wanted = np.array(keys, dtype=KEY)
        with self._lock:
            if not self.has(wanted).all():
                return None
            places = self._places[np.searchsorted(self._keys, wanted)]
            rows = []
            for shard, number in places.tolist():
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
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            size = sum(t.nbytes for t in tensors.values())
            raise InputError(
                f"{path}: cannot be written ({' '.join(str(error).split())}); {size / 1e6:.0f} MB were to go there. Likely "
                f"the disk is full or read-only: make room, or give data.cache another folder. What is kept stays usable"
            ) from error
        with self._lock:
            if path.name not in self._seen:
                self._add(path, names)

    def _add(self, path: Path, keys: NDArray[np.bytes_]) -> None:
        number = len(self._shards)
        self._shards.append(path)
        self._seen.add(path.name)
        places = np.stack([np.full(len(keys), number, dtype=np.int32), np.arange(len(keys), dtype=np.int32)], axis=1)
        joined, joined_places = np.concatenate([self._keys, keys]), np.concatenate([self._places, places])
        order = np.argsort(joined, kind="stable")
        self._keys, self._places = joined[order], joined_places[order]

    def _drop(self, number: int) -> None:
        """Forget and remove a damaged shard."""
        kept = self._places[:, 0] != number
        self._keys, self._places = self._keys[kept], self._places[kept]
        self._open.pop(number, None)
        self._seen.discard(self._shards[number].name)
        self._shards[number].unlink(missing_ok=True)

    def _row(self, number: int, row: int) -> dict[str, Tensor] | None:
        """A row of a shard; None where it is not what was written."""
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
        """Raises: ValueError when it is not what was written."""
        row = {name: part[index].clone() for name, part in self._slices.items()}
        if _checksum(row) != int(self._checks[index]):
            raise ValueError("damaged")
        return row


def _keys_in(path: Path) -> NDArray[np.bytes_] | None:
    """Of the rows in a shard; None where it cannot be read, or has other keys than it was written with."""
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
    """What a shard's file is called: the checksums of rows do not cover which key each belongs to, this does."""
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
