"""Growth of cost with the number of objects in the cache, with the batch, the views and the size of the pictures."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from softprompt.data.batch import seeded
from softprompt.data.cache import EncodedObjects, PictureCache
from softprompt.data.samples import open_source, picture_name
from softprompt.files import new_file
from softprompt.micro.models import SIZES, random_pipeline
from softprompt.model.pipeline import Pipeline
from train.benchmark.measure import measure
from train.benchmark.way import Setting, Way

SIDE = 8
"""Side of the pictures whose number grows, in pixels: small, since handling many is measured, not encoding."""


@dataclass(frozen=True)
class ManyObjects:
    """Measurements of a cache of objects with one view."""

    objects: int
    build_seconds: float
    """Time to read, encode and write the objects that the row before did not have."""
    built: int
    open_seconds: float
    """Time in a new process from the list of samples to the first encoded object, without imports and models."""
    memory_bytes: int
    """Memory that the process gained by opening the cache."""
    epoch_memory_bytes: int
    """Memory that it gained by opening the cache and reading every object once."""
    epoch_seconds: float


def many_objects(counts: Sequence[int], folder: Path, *, progress: bool) -> list[ManyObjects]:
    """Build a cache of ever more objects, and open each in a process of its own. folder: empty, for pictures and cache."""
    pipeline, found, made = stand_in(), [], 0
    for count in tqdm(counts, desc="objects", unit="cache", disable=not progress, leave=False):
        _write_samples(folder, range(made, count))
        began = time.perf_counter()
        objects = _open(pipeline, folder)
        encoded = objects.fill(progress=False)
        build_seconds, made = time.perf_counter() - began, count
        assert encoded <= count
        done = subprocess.run(
            [sys.executable, "-m", "train.benchmark.growth", str(folder)], capture_output=True, text=True, check=True
        )
        found.append(ManyObjects(objects=count, build_seconds=build_seconds, built=encoded, **json.loads(done.stdout)))
    return found


def stand_in() -> Pipeline:
    """The smallest models that encode a picture of SIDE pixels, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_pipeline("tiny", device="cpu", views=1)


def _open(pipeline: Pipeline, folder: Path) -> EncodedObjects:
    source = open_source(folder / "samples.txt", size=SIDE, num_views=1, check=False)
    return EncodedObjects(source, pipeline, "white", PictureCache(folder / "cache", pipeline))


def _write_samples(folder: Path, numbers: range) -> None:
    with (folder / "samples.txt").open("a", encoding="utf-8") as listing:
        for number in numbers:
            sample = folder / f"{number // 1000:04d}" / f"{number:07d}"
            sample.mkdir(parents=True)
            pixels = np.full((SIDE, SIDE, 4), 255, dtype=np.uint8)
            pixels[0, :4, 0] = np.frombuffer(number.to_bytes(4, "little"), dtype=np.uint8)  # no two alike
            Image.fromarray(pixels).save(sample / picture_name(0))
            os.utime(sample / picture_name(0), (1e9, 1e9))  # as data is that was not written a moment ago
            listing.write(f"{sample.relative_to(folder)}\n")


def _opened_in_a_new_process(folder: Path) -> dict[str, float]:
    pipeline = stand_in()
    before = _memory()
    began = time.perf_counter()
    objects = _open(pipeline, folder)
    objects.fill(progress=False)
    objects.get(0, seeded("open"))
    opened, memory = time.perf_counter() - began, _memory()
    began = time.perf_counter()
    for index in torch.randperm(len(objects), generator=seeded("epoch")).tolist():
        objects.get(index, seeded("epoch", index))
    return {
        "open_seconds": opened,
        "memory_bytes": memory - before,
        "epoch_memory_bytes": _memory() - before,
        "epoch_seconds": time.perf_counter() - began,
    }


def _memory() -> int:
    """Resident bytes of this process, but for the pages of mapped files, which the system takes back when it needs them."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def growing_steps(
    setting: Setting, way_of: Callable[[Setting], Way], *, repeats: int, progress: bool
) -> dict[str, list[dict[str, Any]]]:
    """Seconds of a step by batch size, by number of views and by picture size; everything else as in `setting`.

    way_of: the way of training that is measured, for a setting.
    """
    side = SIZES[setting.size].picture
    settings = {
        "batch_size": [replace(setting, batch_size=n) for n in (1, 2, 4, 8, 16)],
        "views": [replace(setting, views=n) for n in (1, 2, 4, 6, 8, 12)],
        "picture": [replace(setting, picture=side * n // 4) for n in (2, 3, 4, 6)],
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, group in settings.items():
        found[name] = []
        for one in group:
            (measured,) = measure([way_of(one)], device=setting.device, repeats=repeats, progress=progress)
            value = getattr(one, name) or side
            found[name].append({name: value, "seconds": measured.typical, "peak_bytes": measured.peak_bytes})
    return found


def draw(objects: Sequence[ManyObjects], steps: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw all measurements as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    counts = [one.objects for one in objects]
    series = [
        ("cache: objects written a second", [one.built / one.build_seconds for one in objects], "objects"),
        ("cache: seconds to open", [one.open_seconds for one in objects], "objects"),
        ("cache: MB of memory after an epoch", [one.epoch_memory_bytes / 1e6 for one in objects], "objects"),
    ]
    for axis, (title, values, label) in zip(axes[0], series, strict=True):
        axis.plot(counts, values, "o-")
        axis.set(title=title, xlabel=label, xscale="log", ylim=(0, None))
    for axis, (name, group) in zip(axes[1], steps.items(), strict=True):
        axis.plot([one[name] for one in group], [one["seconds"] * 1e3 for one in group], "o-")
        axis.set(title="ms a step, KL at each", xlabel=name, ylim=(0, None))
    with new_file(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    print(json.dumps(_opened_in_a_new_process(Path(sys.argv[1]))))
