"""Each picture through the frozen encoders once, not every step: in memory, or on disk for all runs."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.batch import EncodedViews
from softprompt.data.pictures import backgrounds, composite, pick_background
from softprompt.data.samples import Source, Subset
from softprompt.data.storage import SHARD_BYTES, Fingerprints, ShardStore, key_of
from softprompt.errors import InputError
from softprompt.model.conditioning import encode_views
from softprompt.model.pipeline import Pipeline

PREPROCESSING = 2
"""Version of `load_picture`, `composite` and `encode_views`: raise it when a change alters encoded pictures."""
_READERS = max(2, min(16, os.cpu_count() or 2))
_ENCODERS = ("vae", "image_encoder", "feature_extractor")
_ATTEMPTS = 3
"""To read an object's pictures back: each failure removes a damaged shard."""
_SPARE_BYTES = 2**28
"""Left free on the disk."""
T = TypeVar("T")


class PictureCache:
    """Encoded pictures on disk, found by all that decides them: the bytes of the picture's file, its size in pixels, the
    background, the weights and settings of the encoders, and the preprocessing.

    folder: of all caches; each combination of encoders, size and background has a folder in it. Any number of processes may
    use it at once.
    """

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        views = pipeline.num_views
        self.folder = folder
        self.fingerprints = Fingerprints(folder / f"pictures-{views}.safetensors", views)
        self._encoders = encoders_key(pipeline, folder).hex()
        self._stores: dict[tuple[float, ...], ShardStore] = {}

    def store(self, colour: Tensor) -> ShardStore:
        """Store of pictures on a background, [3] in [0, 1]; the keys are the contents of their files."""
        key = tuple(colour.tolist())
        if key not in self._stores:
            name = "-".join(f"{channel:g}" for channel in key)
            self._stores[key] = ShardStore(self.folder / f"{self._encoders}-{name}")
        return self._stores[key]

    def refresh(self) -> None:
        """Take in what other processes have encoded meanwhile."""
        for store in self._stores.values():
            store.refresh()


def encoders_key(pipeline: Pipeline, folder: Path) -> bytes:
    """Stands for everything about a pipeline that an encoded picture depends on.

    folder: where the contents of its weights' files are remembered: reading gigabytes takes seconds.
    """
    parts: list[bytes] = []
    for name in _ENCODERS:
        files = sorted(file for file in (pipeline.folder / name).iterdir() if file.is_file())
        fingerprints = Fingerprints(folder / f"{name}-{len(files)}.safetensors", len(files))
        parts += fingerprints.of(str(pipeline.folder.absolute() / name), files)
        fingerprints.save()
    return key_of(PREPROCESSING, pipeline.picture_size, *parts)


class EncodedObjects:
    """A source of samples, encoded once per picture and background.

    background: one of softprompt.data.pictures.BACKGROUNDS. With `random` nothing can be kept: each object is encoded anew each
    time it is asked for.
    cache: where what is encoded from files is kept; None, or a source that is in no files: in memory.
    """

    def __init__(self, source: Source, pipeline: Pipeline, background: str, cache: PictureCache | None = None) -> None:
        self.source = source
        self.pipeline = pipeline
        self.background = background
        self.cache = cache if backgrounds(background) is not None and source.locations else None
        self._memory: dict[tuple[int, tuple[float, ...]], EncodedViews] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> Sequence[str]:
        """Names of the samples."""
        return self.source.names

    def fill(self, *, progress: bool, share: tuple[int, int] = (0, 1), bad: dict[int, str] | None = None) -> int:
        """Read every sample that is new now, so that a broken picture stops the run before it starts; encode it where that can
        be kept. Pictures already in the cache are not read before they are used.

        progress: show a bar. share: (i, n): encode objects i, i + n, ...; other processes do the rest, and
        `PictureCache.refresh` then brings it together. bad: samples of the share that cannot be used are put in here, index
        => what is wrong, instead of an error; `leave_out` then takes them away.
        Returns: pictures encoded.
        Raises: InputError naming the first sample that cannot be used, or a disk that is full. What was encoded until then
        is kept.
        """
        new = self._not_kept()
        if not new:
            return 0
        if bad is None:
            self.source.check(new)
        with self.pipeline.encoders_on_device():
            return self._fill(progress, share, bad)

    def _fill(self, progress: bool, share: tuple[int, int], bad: dict[int, str] | None) -> int:
        if self.cache is not None:
            mine = [index for index in self._not_kept() if index % share[1] == share[0]]
            return _encode_into(self.cache, self.source, self.pipeline, self.background, mine, progress, bad)
        colours = backgrounds(self.background) or []
        samples = _read_ahead(_forgiving(self.source, self.source.load, bad), range(len(self)))
        for index, rgba in enumerate(_bar(samples, len(self), progress)):
            if rgba is None:
                continue
            for colour in colours:
                self._memory[index, _key(colour)] = encode_views(self.pipeline, composite(rgba, colour))
        return len(self._memory) * self.pipeline.num_views

    def leave_out(self, indices: Collection[int]) -> None:
        """Go on without some samples; the others keep their order."""
        kept = [index for index in range(len(self)) if index not in indices]
        places = {index: place for place, index in enumerate(kept)}
        self.source = Subset(self.source, kept)
        self._memory = {(places[i], colour): views for (i, colour), views in self._memory.items() if i in places}

    def get(self, index: int, generator: torch.Generator) -> EncodedViews:
        """Object `index` on a background drawn from `generator`.

        Raises: InputError when its pictures were removed or damaged since the run began.
        """
        colour = pick_background(self.background, generator)
        if self.cache is None:
            kept = self._memory.get((index, _key(colour)))
            return kept or encode_views(self.pipeline, composite(self.source.load(index), colour))
        contents = _contents(self.cache, self.source, index)
        store = self.cache.store(colour)
        for _ in range(_ATTEMPTS):
            if (rows := store.read(contents)) is not None:
                return EncodedViews(**rows)
            # Edited since it was encoded, or a shard is damaged and now removed.
            missing = [view for view, content in enumerate(contents) if content not in store]
            encoded = encode_views(self.pipeline, composite(self.source.load(index)[missing], colour))
            store.write([contents[view] for view in missing], _rows(encoded))
        raise InputError(
            f"{store.folder}: what was written there was read back damaged {_ATTEMPTS} times; likely the disk is failing; give "
            f"data.cache a folder on another one"
        )

    def pictures(self, index: int, generator: torch.Generator) -> Tensor:
        """[V, 3, S, S] in [0, 1]: the pictures themselves, on a background drawn from `generator`."""
        return self.views(index, generator)[0]

    def masks(self, index: int) -> Tensor:
        """[V, 1, S, S] in [0, 1]: where the object is; 1 throughout for pictures without alpha."""
        return self.source.load(index)[:, 3:].float() / 255

    def views(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`pictures` and `masks`, read once."""
        rgba = self.source.load(index)
        return composite(rgba, pick_background(self.background, generator)), rgba[:, 3:].float() / 255

    def _not_kept(self) -> Sequence[int]:
        """Objects that are not whole in the cache, as far as can be told without a look at their files."""
        if self.cache is None:
            return range(len(self))
        kept, contents = self.cache.fingerprints.known(self.source.locations)
        for colour in backgrounds(self.background) or []:
            kept &= self.cache.store(colour).has(contents).all(axis=1)
        indices: list[int] = (~kept).nonzero()[0].tolist()
        return indices


def _encode_into(
    cache: PictureCache,
    source: Source,
    pipeline: Pipeline,
    background: str,
    indices: Sequence[int],
    progress: bool,
    bad: dict[int, str] | None,
) -> int:
    """Encode the pictures of some objects that are not in the cache. bad: as of `EncodedObjects.fill`. Returns: how many."""
    colours = backgrounds(background) or []
    _refuse_a_full_disk(cache.folder, len(indices) * pipeline.num_views * len(colours), pipeline.encoded_bytes)

    def read(index: int) -> tuple[list[bytes], Tensor]:
        contents = _contents(cache, source, index)  # first: pixels of an edit in between are then not kept for good
        return contents, source.load(index)

    waiting = [_Waiting(cache.store(colour)) for colour in colours]
    with ThreadPoolExecutor(1) as disk:
        try:
            for found in _bar(_read_ahead(_forgiving(source, read, bad), indices), len(indices), progress):
                if found is None:
                    continue
                contents, rgba = found
                for colour, rows in zip(colours, waiting, strict=True):
                    if new := rows.new(contents):
                        encoded = encode_views(pipeline, composite(rgba[new], colour))
                        rows.add([contents[view] for view in new], encoded, disk)
        finally:  # also where a picture is broken, or at Ctrl-C: nothing that was encoded is lost
            for rows in waiting:
                rows.flush(disk)
            cache.fingerprints.save()
    for rows in waiting:
        rows.raise_errors()
    return sum(rows.count for rows in waiting)


class _Waiting:
    """Encoded pictures that wait until a shard is full."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.count = 0
        self._keys: list[bytes] = []
        self._rows: list[EncodedViews] = []
        self._bytes = 0
        self._writing: Future[None] | None = None

    def new(self, contents: Sequence[bytes]) -> list[int]:
        """Which views are neither kept nor waiting, each content once."""
        waiting = set(self._keys)
        return [v for v, c in enumerate(contents) if c not in waiting and c not in self.store and c not in contents[:v]]

    def add(self, contents: list[bytes], encoded: EncodedViews, disk: ThreadPoolExecutor) -> None:
        """Raises: InputError where the shard before could not be written."""
        self._keys += contents
        self._rows.append(encoded)
        self._bytes += sum(tensor.nbytes for tensor in _rows(encoded).values())
        self.count += len(contents)
        if self._bytes >= SHARD_BYTES:
            self.flush(disk)

    def flush(self, disk: ThreadPoolExecutor) -> None:
        """Hand the shard to be written, once the one before is."""
        self.raise_errors()
        if self._keys:
            parts = [_rows(encoded) for encoded in self._rows]
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._writing = disk.submit(self.store.write, self._keys, rows)
            self._keys, self._rows, self._bytes = [], [], 0

    def raise_errors(self) -> None:
        """Wait for what is being written. Raises: InputError where it could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def _read_ahead(read: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """`read` of each index, in order, the next few in threads while one is worked on."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for index in indices:
                ahead.append(pool.submit(read, index))
                if len(ahead) > 2 * _READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _forgiving(source: Source, read: Callable[[int], T], bad: dict[int, str] | None) -> Callable[[int], T | None]:
    """`read`, which gives None for a sample that cannot be used and notes it in `bad`; where that is None it raises."""
    if bad is None:
        return read

    def read_or_note(index: int) -> T | None:
        try:
            source.check([index])
            return read(index)
        except InputError as error:
            bad[index] = str(error)
            return None

    return read_or_note


def _contents(cache: PictureCache, source: Source, index: int) -> list[bytes]:
    """Contents of a sample's picture files. Raises: InputError when they cannot be read."""
    try:
        return cache.fingerprints.of(source.locations[index], source.files(index))
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); expected a picture; likely it was moved or deleted"
        ) from error


def _rows(encoded: EncodedViews) -> dict[str, Tensor]:
    return {"mean": encoded.mean, "std": encoded.std, "embeds": encoded.embeds}


def _refuse_a_full_disk(folder: Path, pictures: int, picture_bytes: int) -> None:
    """Before hours of work, not after. Raises: InputError."""
    if not pictures:
        return
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, wanted = shutil.disk_usage(there).free, pictures * picture_bytes
    if wanted + _SPARE_BYTES > free:
        raise InputError(
            f"data.cache: {folder.absolute()} has {free / 1e9:.1f} GB free; {pictures} pictures to encode take "
            f"{wanted / 1e9:.1f} GB. Make room, give a folder on another disk, or null to encode into memory"
        )


def _bar(items: Iterator[T], total: int, show: bool) -> Iterator[T]:
    yield from tqdm(items, total=total, desc="encoding pictures", unit="object", disable=not show, leave=False, delay=2)


def _key(colour: Tensor) -> tuple[float, ...]:
    return tuple(colour.tolist())
