"""The checks, the most important first: each is done in a process of its own, within a time of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from train.gpu import full, right
from train.gpu.results import Row
from train.gpu.setting import Setting


@dataclass(frozen=True)
class Check:
    """One of them."""

    part: str
    seconds: float
    """That it may take."""
    run: Callable[[Setting], list[Row]]
    needs: str = ""
    """Another check whose results it reads."""


CHECKS: dict[str, Check] = {
    "float32 on the CPU": Check("right", 60, right.reference),
    "fp32": Check("right", 45, partial(right.precision, name="fp32"), "float32 on the CPU"),
    "bf16": Check("right", 45, partial(right.precision, name="bf16"), "float32 on the CPU"),
    "fp16": Check("right", 45, partial(right.precision, name="fp16"), "float32 on the CPU"),
    "fp16's gradient scaler": Check("right", 45, right.scaler),
    "encoders leave the card": Check("right", 45, right.encoders),
    "out of memory": Check("right", 45, right.memory),
    "killed and resumed": Check("right", 90, right.killed),
    "compiled blocks": Check("right", 90, right.compiled),
    "main job": Check("main job", 120, full.main_job),
    "steps of 1 object": Check("full size", 90, partial(full.steps, batch_size=1)),
    "ours alone": Check("full size", 60, partial(full.alone, way=full.OURS)),
    "materials": Check("memory", 90, full.materials),
    "12 GB": Check("memory", 90, partial(full.profile_of_memory, gigabytes=12), "materials"),
    "24 GB": Check("memory", 90, partial(full.profile_of_memory, gigabytes=24), "materials"),
    "80 GB": Check("memory", 90, partial(full.profile_of_memory, gigabytes=80), "materials"),
    "long run": Check("long run", 90, full.long_run, "materials"),
    "steps of 8 objects": Check("full size", 120, partial(full.steps, batch_size=8)),
    "steps of 4 objects": Check("full size", 90, partial(full.steps, batch_size=4)),
    "steps of 2 objects": Check("full size", 90, partial(full.steps, batch_size=2)),
    "compiled, 4 objects": Check("full size", 120, partial(full.steps, batch_size=full.COMPILED_BATCH, compiled=True)),
    "FaceLift's step alone": Check("full size", 60, partial(full.alone, way="FaceLift")),
    "LoRA alone, cached": Check("full size", 60, partial(full.alone, way="LoRA, cached")),
    "LoRA alone, live": Check("full size", 60, partial(full.alone, way="LoRA, encoding live")),
    "ours alone, no KL": Check("full size", 60, partial(full.alone, way="no KL")),
    "ours alone, original domain": Check("full size", 60, partial(full.alone, way="original domain")),
    "main job on the CPU": Check("main job", 240, full.main_job_on_cpu, "main job"),
}
PARTS = tuple(dict.fromkeys(check.part for check in CHECKS.values()))
