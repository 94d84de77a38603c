"""Cost of a training step on this machine, by phase: `python -m train.benchmark`.

Times ways of training against each other in one run, each in turn; or counts what they take, where the machine is too small.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt.files import folder_size, refuse_taken, write_json, writing_to
from train.cli import Parser, run_command
from train.options.checks import FROM_1, POSITIVE, Check, Checked, option

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.benchmark.way import Setting, Way


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of the command."""

    size: Literal["tiny", "micro", "medium", "sd21"] = "micro"
    """Model with random weights: the embedded one, FaceLift's (Stable Diffusion 2.1), the smallest that there can be,
    or one of a hundred million weights."""
    write_pipeline: str | None = None
    """Instead of measuring, write a complete pipeline folder of this size and random weights to this folder, new or empty: to
    try on a machine what is done with FaceLift's (sd21 takes 8 GB)."""
    picture: int | None = option(None, Check(lambda side: side > 0 and side % 64 == 0, "a multiple of 64"))
    """With write_pipeline: side of its pictures in pixels, a multiple of 64; null: 512 for sd21, 64 for medium and micro."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of frozen weights and arithmetic; auto: as in training."""
    batch_size: int = option(1, FROM_1)
    """Objects a step."""
    rank: int = option(16, FROM_1)
    """Rank of the LoRA."""
    repeats: int = option(5, FROM_1)
    """Rounds of four steps of each way; the median counts."""
    facelift: bool = True
    """Also measure FaceLift's own way of training, which takes 16 bytes of memory a weight."""
    objectives: bool = False
    """Also measure steps with each objective that samples, decodes or needs more than the denoising loss does."""
    only: str | None = None
    """Measure the ways whose names hold this alone, e.g. `KL at every 4th`: their peak of memory is then theirs."""
    kernels: bool = False
    """Also list the ten kernels in which the last way spends most of its time."""
    compile: bool = False
    """torch.compile for the transformer blocks, in all ways but FaceLift's."""
    tflops: float | None = option(None, POSITIVE)
    """With --count: TFLOP/s of a GPU, for the shortest time that a step can take on it."""
    objects: list[int] = field(default_factory=lambda: [10, 100, 1000, 10_000, 100_000])
    """With --growth: numbers of objects in the cache, rising; 100,000 take a quarter of an hour."""
    output: str | None = None
    """JSON file of all numbers; with --growth also a picture beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = bool(self.objects) and all(a < b for a, b in pairwise([0, *self.objects]))
        self.require("objects", rising, "rising numbers from 1 up, e.g. '[10, 100, 1000]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit code."""
    parser = Parser(prog="python -m train.benchmark", description=__doc__)
    parser.add_class_arguments(Options, None)
    parser.add_argument("--count", action="store_true", help="Count operations and bytes instead: any size on any machine.")
    parser.add_argument("--growth", action="store_true", help="How cost grows with objects, batch, views and picture size.")
    given = parser.parse_args(argv).as_dict()
    return run_command(lambda: _benchmark(**given), interrupted="interrupted; nothing was written")


def _benchmark(*, count: bool, growth: bool, **given: Any) -> int:
    options = Options(**given)
    if options.write_pipeline is not None:
        return _write(options)
    rows = _count(options) if count else _growth(options) if growth else _measure(options)
    if options.output:
        write_json(options.output, rows)
        print(f"written    {options.output}")
    return 0


def _write(options: Options) -> int:
    from softprompt.micro.models import write_pipeline
    from train.device import quiet_libraries

    quiet_libraries(True)
    folder = Path(options.write_pipeline or "")
    refuse_taken(folder)  # before anything long
    with writing_to(f"write_pipeline: {folder}"):
        write_pipeline(options.size, folder, picture=options.picture)
    print(f"written    {folder}: a pipeline of random weights, {options.size}, {folder_size(folder) / 1e6:.0f} MB")
    return 0


def _count(options: Options) -> dict[str, Any]:
    from train.benchmark.count import arms, count_parts, objective_arms

    parts = count_parts(options.size, rank=options.rank)
    print(f"counted    {options.size}, one object of six views, bf16, LoRA rank {options.rank}; nothing was run")
    floor = f" {'least time':>10}" if options.tflops else ""
    print(f"\n{'':55s} {'TFLOP':>8} {'state':>9} {'activations':>12}{floor}")
    found = arms(parts)
    added = [*objective_arms(parts), *objective_arms(parts, last=2)[:1]]
    for arm in [*found, *added]:
        if arm is added[0]:
            print("\nwhat objectives add, with their own peak")
        kept = "little" if arm.activation_bytes is None else f"{arm.activation_bytes / 1e9:.2f} GB"
        time = f" {arm.flop / options.tflops / 1e9:>7.1f} ms" if options.tflops else ""
        print(f"{arm.name:55s} {arm.flop / 1e12:8.2f} {arm.state_bytes / 1e9:6.2f} GB {kept:>12}{time}")
    return {"options": asdict(options), "parts": asdict(parts), "ways": [asdict(arm) for arm in [*found, *added]]}


def _start(options: Options) -> tuple["Setting", "Accelerator", str]:
    """Settings of the measurement, and a note on the machine. Raises: InputError for a device that it does not have."""
    import torch
    from accelerate import Accelerator

    from train.benchmark.way import Setting
    from train.device import choose_precision, dtype_of, quiet_libraries

    precision, note = choose_precision(options.device, options.precision, group="")
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))
    quiet_libraries(True)
    machine = f"{note}; torch {torch.__version__}"
    print(machine)
    setting = Setting(
        options.size, accelerator.device, dtype_of(precision), options.batch_size, rank=options.rank, compiled=options.compile
    )
    return setting, accelerator, machine


def _growth(options: Options) -> dict[str, Any]:
    setting, accelerator, machine = _start(options)
    from train.benchmark.growth import draw, growing_steps, many_objects
    from train.benchmark.steps import adapting_ways

    def with_kl_at_each_step(setting: "Setting") -> "Way":
        return next(way for way in adapting_ways(setting, accelerator) if way.name == "ours, KL at each step")

    progress = sys.stderr.isatty()
    with tempfile.TemporaryDirectory(prefix="softprompt-growth-") as folder:
        objects = many_objects(options.objects, Path(folder), progress=progress)
    names = ("objects", "written/s", "open s", "MB opened", "MB epoch", "epoch s")
    print("\ncache of objects with one view of 8x8 pixels\n" + " ".join(f"{name:>10}" for name in names))
    for one in objects:
        memory = [b / 1e6 for b in (one.memory_bytes, one.epoch_memory_bytes)]
        numbers = [one.built / one.build_seconds, one.open_seconds, *memory, one.epoch_seconds]
        print(f"{one.objects:10d} " + " ".join(f"{number:10.3g}" for number in numbers))
    steps = growing_steps(setting, with_kl_at_each_step, repeats=options.repeats, progress=progress)
    for name, group in steps.items():
        print(f"\n{name:>10} {'ms/step':>10}")
        for step in group:
            print(f"{step[name]:10d} {step['seconds'] * 1e3:10.1f}")
    if options.output:
        picture = Path(options.output).with_suffix(".png")
        draw(objects, steps, picture)
        print(f"drawn      {picture}")
    return {"options": asdict(options), "machine": machine, "objects": [asdict(one) for one in objects], "steps": steps}


def _measure(options: Options) -> dict[str, Any]:
    setting, accelerator, machine = _start(options)
    from train.benchmark.measure import dearest_kernels, matmul_flops, measure
    from train.benchmark.steps import FACELIFT, adapting_ways, facelift_way

    device, dtype = setting.device, setting.dtype
    ways = []
    if options.facelift and (options.only is None or options.only in FACELIFT):
        ways.append(facelift_way(setting))
    if options.only is None or options.only not in FACELIFT:
        ways += adapting_ways(setting, accelerator, objectives=options.objectives, only=options.only)
    found = measure(ways, device=device, repeats=options.repeats, progress=sys.stderr.isatty())
    most = matmul_flops(device, dtype)
    print(f"a matrix product reaches {most / 1e12:.3g} TFLOP/s\n")
    print(f"{'':55s} {'ms/step':>8} {'spread':>7} {'objects/s':>9} {'against':>8} {'TFLOP':>8} {'used':>5} {'peak':>8}")
    for one in found:
        spread = (max(one.seconds) - min(one.seconds)) / one.typical
        used, peak = one.flop / one.typical / most, "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f} GB"
        print(
            f"{one.name:55s} {one.typical * 1e3:8.1f} {spread:7.0%} {options.batch_size / one.typical:9.3g} "
            f"{found[0].typical / one.typical:7.2f}x {one.flop / 1e12:8.4g} {used:5.0%} {peak:>8}"
        )
    names = list(dict.fromkeys(name for one in found for name in one.phases))
    print(f"\n{'where the time goes, ms':55s} " + " ".join(f"{name:>10}" for name in names))
    for one in found:
        print(f"{one.name:55s} " + " ".join(f"{one.phases.get(name, 0) * 1e3:10.1f}" for name in names))
    rows = [asdict(one) | {"objects_per_second": options.batch_size / one.typical} for one in found]
    kernels = dearest_kernels(ways[-1], device) if options.kernels else {}
    if kernels:
        print(f"\ndearest kernels of {ways[-1].name}, share of all")
    for name, share in kernels.items():
        print(f"{share:7.1%}  {name}")
    return {"options": asdict(options), "machine": machine, "matmul_flops": most, "ways": rows, "kernels": kernels}


if __name__ == "__main__":
    sys.exit(main())
