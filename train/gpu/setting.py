"""Settings that all checks share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from softprompt.model.adapted import compile_blocks

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
    return partial(compile_blocks, backend="inductor" if device == "cuda" else "aot_eager")


@dataclass(frozen=True)
class Setting:
    """Settings of a check."""

    size: str
    """sd21, or tiny to try the checks themselves."""
    device: str
    """cuda or cpu."""
    folder: Path
    """Where results, runs and the written pipeline are."""

    @property
    def reference(self) -> Path:
        """Numbers of float32 on the CPU."""
        return self.folder / "reference.json"

    @property
    def model(self) -> Path:
        """The pipeline folder of random weights."""
        return self.folder / "pipeckpts"

    @property
    def data(self) -> Path:
        """A folder of samples."""
        return self.folder / "mice"
