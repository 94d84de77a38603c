"""The loss of the untouched model on some samples under each of several prompts, at the same noise: `train.prompts probe`."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.batch import Objects, spread_timesteps
from softprompt.data.cache import EncodedObjects
from softprompt.data.samples import Source, Subset, open_source
from softprompt.errors import InputError
from softprompt.files import write_json, writing_to
from softprompt.micro.world import MicroWorld
from softprompt.model.adapted import predict
from softprompt.model.loading import load_pipeline
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.encoding import load_waypoints
from softprompt.prompt.templates import TEMPLATES, view_names
from train.compare.results import Interval, paired_change
from train.device import choose_device, choose_precision, dtype_of, quiet_libraries
from train.evaluation.evaluator import fixed_batches, view_errors
from train.options.groups import MICRO
from train.prompts.sources import model_folder

TIMESTEP_RANGES = 4
"""Number of equal ranges of timesteps in the table."""
FEWEST_OBJECTS = 3
"""Objects from which an interval says something."""


@dataclass(frozen=True)
class Row:
    """The loss under one prompt."""

    name: str
    loss: float
    change: Interval
    """Relative change from the first prompt: mean over objects, 95 % paired t interval of the logarithm."""
    by_view: Sequence[float]
    by_timestep: Sequence[float]
    """Loss in each of TIMESTEP_RANGES equal ranges, the least noisy first."""


def run_probe(given: argparse.Namespace) -> None:
    """Measure, print and write. given: options of `train.prompts probe`. Raises: InputError."""
    for name in ("objects", "timesteps", "batch_size"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name}: is {getattr(given, name)}; expected 1 or more")
    precision, chosen = choose_precision(given.device, given.precision, group="--")
    quiet_libraries(True)
    folder, names = model_folder(given.model), [*TEMPLATES, *given.also]
    pipeline = load_pipeline(folder, unet=given.unet, dtype=dtype_of(precision)).to(choose_device(given.device))
    schedule = len(pipeline.scheduler.alphas_cumprod)
    if given.timesteps > schedule:
        raise InputError(f"--timesteps: is {given.timesteps}; the model has {schedule} timesteps, expected so many at most")
    prompts = load_waypoints(
        names,
        folder=folder,
        subject=given.subject,
        angle=given.angle,
        num_views=pipeline.num_views,
        width=pipeline.prompt_width,
        option="--also",
    )
    objects = EncodedObjects(_open_samples(getattr(given, "data.train"), given.objects, pipeline), pipeline, "white")
    objects.fill(progress=True)
    timesteps = spread_timesteps(given.timesteps, schedule)
    print(f"{chosen}\nsamples    {len(objects)}, at {len(timesteps)} timesteps; the noise is the same for each prompt")
    losses = probe(pipeline, objects, dict(zip(names, prompts, strict=True)), timesteps, given.batch_size, precision)
    rows = summarise(losses, timesteps, schedule)
    print_table(rows, pipeline.num_views, schedule)
    print(suggestion(rows, len(objects)))
    if given.output:
        found = {
            "command": given.command,
            "objects": list(objects.names),
            "timesteps": timesteps,
            "rows": [asdict(r) for r in rows],
        }
        with writing_to(f"--output {given.output}"):
            write_json(given.output, json.loads(json.dumps(found), parse_constant=lambda _: None))  # JSON has no NaN


def _open_samples(samples: str, count: int, pipeline: Pipeline) -> Source:
    """Samples, spread evenly over the list. Raises: InputError."""
    if samples == MICRO:
        return MicroWorld("mice", 0, count, size=pipeline.picture_size)
    source = open_source(samples, size=pipeline.picture_size, num_views=pipeline.num_views, check=False)
    count = min(count, len(source))
    return Subset(source, [index * len(source) // count for index in range(count)])


@torch.no_grad()
def probe(
    pipeline: Pipeline,
    objects: Objects,
    prompts: Mapping[str, Tensor],
    timesteps: Sequence[int],
    batch_size: int,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """The model's loss on each object, timestep and view under each prompt [V, T, D], at the same noise.

    Returns: {name: [N, K, V]}, float64, on the CPU.
    """
    items = [(index, timestep) for index in range(len(objects)) for timestep in timesteps]
    found: dict[str, list[Tensor]] = {name: [] for name in prompts}
    on_device = {name: prompt.to(pipeline.device) for name, prompt in prompts.items()}
    kind = dtype_of(precision)
    with tqdm(total=len(items), unit="item", desc="probing", leave=False) as bar:
        for batch, noisy, target in fixed_batches(pipeline, objects, items, reference=0, batch_size=batch_size):
            for name, prompt in on_device.items():
                with nullcontext() if kind == torch.float32 else torch.autocast(pipeline.device.type, kind):
                    prediction = predict(pipeline.unet, prompt, noisy, batch.given, batch.timesteps, batch.labels, batch.order)
                found[name].append(view_errors(prediction, target).cpu())
            bar.update(len(noisy))
    return {name: torch.cat(errors).unflatten(0, (len(objects), len(timesteps))) for name, errors in found.items()}


def summarise(losses: Mapping[str, Tensor], timesteps: Sequence[int], schedule: int) -> list[Row]:
    """Means, and changes from the first prompt. losses: {name: [N, K, V]}. schedule: number of the model's timesteps."""
    first = next(iter(losses.values())).mean(dim=(1, 2)).tolist()
    group = torch.tensor([timestep * TIMESTEP_RANGES // schedule for timestep in timesteps])
    rows = []
    for name, errors in losses.items():
        by_timestep = [float(errors[:, group == g].mean()) for g in range(TIMESTEP_RANGES)]  # NaN where none lies
        change = paired_change(errors.mean(dim=(1, 2)).tolist(), first)
        rows.append(Row(name, float(errors.mean()), change, errors.mean(dim=(0, 1)).tolist(), by_timestep))
    return rows


def print_table(rows: Sequence[Row], views: int, schedule: int) -> None:
    """A line for each prompt: loss, change from the first, loss by view and by range of timesteps."""
    width = min(40, max(len(row.name) for row in rows))
    ranges = [f"t<{(g + 1) * schedule // TIMESTEP_RANGES}" for g in range(TIMESTEP_RANGES)]
    columns = [*view_names(views), *ranges]
    print(f"\n{'prompt':<{width}}  {'loss':>7}  {'change from ' + rows[0].name + ' (95 %)':<28}")
    for row in rows:
        print(f"{row.name[:width]:<{width}}  {row.loss:7.4f}  {in_percent(row.change) if row is not rows[0] else ''}")
    print(f"\n{'prompt':<{width}}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        print(f"{row.name[:width]:<{width}}" + "".join(f"{loss:12.4f}" for loss in (*row.by_view, *row.by_timestep)))
    print()


def in_percent(change: Interval) -> str:
    """E.g. "-35.0 % (-40.1 to -30.2)"; without bounds where one object gives none."""
    value, *bounds = (f"{100 * number:+.1f}" for number in (change.value, change.low, change.high))
    return f"{value} %" if math.isnan(change.low) else f"{value} % ({' to '.join(bounds)})"


def suggestion(rows: Sequence[Row], objects: int) -> str:
    """Which waypoint to begin with: the prompt of the lowest loss, where its interval lies below the first prompt's."""
    first, best = rows[0], min(rows, key=lambda row: row.loss)
    if objects < FEWEST_OBJECTS:
        return f"suggestion  none: an interval needs more than {objects} of them; give {FEWEST_OBJECTS} or more with --objects"
    if best is first or not best.change.high < 0:
        return (
            f"suggestion  begin at {first.name}: no other prompt's loss is lower beyond chance, so a path toward one "
            f"has nothing to gain at its start"
        )
    return (
        f"suggestion  begin at {best.name}: the untouched model's loss is {in_percent(best.change)} against {first.name}\n"
        f"            prompt: {{waypoints: [{first.name}, {_quoted(best.name)}]}}\n"
        f"            curriculum: {{at: [0.0], position: [1.0]}}"
    )


def _quoted(name: str) -> str:
    return name if name in TEMPLATES else json.dumps(name)  # which is YAML, too
