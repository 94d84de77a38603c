"""The checks, the most important first: each is done in a process of its own, within a time of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from train.gpu.results import Row

OURS = "KL at every 4th"
"""Part of the name of this project's own way of training."""


SMALL = {
    "train.batch_size": "1",
    "train.steps": "3",
    "train.warmup_steps": "0",
    "lora.rank": "2",
    "data.limit": "4",
    "kl.domain": "new",
    "kl.every": "1",
    "monitor.log_every": "1",
    "monitor.validate_every": "6",
    "monitor.validation_timesteps": "1",
    "monitor.preview_every": "6",
    "monitor.preview_objects": "1",
    "monitor.preview_steps": "2",
    "monitor.checkpoint_every": "6",
    "export.pipeline": "false",
    "export.report": "false",
}
"""Options of a small run of the embedded model."""


def compiler(device: str) -> Callable[..., None]:
    """`compile_blocks`; on a CPU it makes the same graphs, without the minutes that compiling them takes there."""
    from softprompt.model.adapted import compile_blocks  # seconds, which not every check needs

    return partial(compile_blocks, backend="inductor" if device == "cuda" else "eager")


@dataclass(frozen=True)
class Setting:
    """Settings of a check."""

    size: str
    """sd21, or tiny to try the checks themselves."""
    device: str
    """cuda or cpu."""
    folder: Path
    """Folder of results, runs and the written pipeline."""

    @property
    def reference(self) -> Path:
        """File of the numbers of float32 on the CPU."""
        return self.folder / "reference.json"

    @property
    def model(self) -> Path:
        """The pipeline folder of random weights."""
        return self.folder / "pipeckpts"

    @property
    def data(self) -> Path:
        """A folder of samples."""
        return self.folder / "mice"


@dataclass(frozen=True)
class Check:
    """One check."""

    part: str
    seconds: float
    """Its time limit."""
    function: str
    """`module:function`, by name: only the process of the check imports it."""
    needs: str = ""
    """Another check whose results it reads."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the function."""

    def run(self, setting: Setting) -> list[Row]:
        """Run it in this process."""
        rows: list[Row] = resolve_name(self.function)(setting, **self.options)
        return rows


def arguments(options: Mapping[str, object]) -> list[str]:
    """Options by name => a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(module: str, options: list[str]) -> int:
    """Run a command's `main` in this process, whose memory may be capped. Returns: its exit code."""
    code: int = resolve_name(f"{module}:main")(options)
    return code


def _right(seconds: float, function: str, needs: str = "", **options: Any) -> Check:
    return Check("right", seconds, f"train.gpu.right:{function}", needs, options)


def _full(part: str, seconds: float, function: str, needs: str = "", **options: Any) -> Check:
    return Check(part, seconds, f"train.gpu.full:{function}", needs, options)


CHECKS: dict[str, Check] = {
    "float32 on the CPU": _right(60, "reference"),
    "fp32": _right(45, "precision", "float32 on the CPU", name="fp32"),
    "bf16": _right(45, "precision", "float32 on the CPU", name="bf16"),
    "fp16": _right(45, "precision", "float32 on the CPU", name="fp16"),
    "fp16's gradient scaler": _right(45, "scaler"),
    "encoders leave the card": _right(45, "encoders"),
    "out of memory": _right(45, "memory"),
    "killed and resumed": _right(90, "killed"),
    "compiled blocks": _right(90, "compiled"),
    "main job": _full("main job", 120, "main_job"),
    "steps of 1 object": _full("full size", 90, "steps", batch_size=1),
    "ours alone": _full("full size", 60, "alone", way=OURS),
    "materials": _full("memory", 90, "materials"),
    "12 GB": _full("memory", 90, "profile_of_memory", "materials", gigabytes=12),
    "24 GB": _full("memory", 90, "profile_of_memory", "materials", gigabytes=24),
    "80 GB": _full("memory", 90, "profile_of_memory", "materials", gigabytes=80),
    "long run": _full("long run", 90, "long_run", "materials"),
    "steps of 8 objects": _full("full size", 120, "steps", batch_size=8),
    "steps of 4 objects": _full("full size", 90, "steps", batch_size=4),
    "steps of 2 objects": _full("full size", 90, "steps", batch_size=2),
    "compiled, 4 objects": _full("full size", 120, "steps", batch_size=4, compiled=True),
    "FaceLift's step alone": _full("full size", 60, "alone", way="FaceLift"),
    "LoRA alone, cached": _full("full size", 60, "alone", way="LoRA, cached"),
    "LoRA alone, live": _full("full size", 60, "alone", way="LoRA, encoding live"),
    "ours alone, no KL": _full("full size", 60, "alone", way="no KL"),
    "ours alone, original domain": _full("full size", 60, "alone", way="original domain"),
    "main job on the CPU": _full("main job", 240, "main_job_on_cpu", "main job"),
}
PARTS = tuple(dict.fromkeys(check.part for check in CHECKS.values()))
