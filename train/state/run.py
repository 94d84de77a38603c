"""A run and its state: what changes while it trains, saved whole in a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from train.evaluation.evaluate import Preview
from train.export.write import Exported
from train.log.logger import Monitor
from train.setup import Job
from train.state.checkpoint import Parts
from train.state.pacing import Pace, lowest_timestep_of, position_of
from train.step import StepResult


@dataclass
class Run:
    """A run as it is now."""

    job: Job
    folder: Path
    schedule: LambdaLR
    ema: EMAModel | None
    monitor: Monitor
    pace: Pace
    """What the curricula have come to."""
    step: int = 0
    """Optimizer steps done."""
    warned: dict[str, str] = field(default_factory=dict)
    """Signs that the run goes wrong which stand, and what was said of them."""
    worse: int = 0
    """Newest validations in a row with a higher loss than the first."""
    running_loss: float | None = None
    """Running mean of the training loss, to tell spikes by."""
    window: list[StepResult] = field(default_factory=list)
    """Steps since the newest point in the log."""
    first: dict[str, float] | None = None
    """Series at step 0: what the pretrained model gives."""
    last: dict[str, float] | None = None
    """Series of the newest evaluation."""
    best: dict[str, float] | None = None
    """{"step", "loss"} of the lowest validation loss so far."""
    pretrained_views: Tensor | None = None
    """The untouched model's previews."""
    shown: Preview | None = None
    """The newest previews of this process."""
    exported: Exported | None = None
    merged: float | None = None
    """Views of the exported pipeline folder against UNet and LoRA apart; None where none was written."""
    skipped_in_a_row: int = 0
    """Newest steps in which nothing trained, since numbers were not finite."""
    frozen: dict[str, list[float]] = field(default_factory=dict)
    """Sums of what must not move, at the start."""
    at_evaluation: dict[str, list[Tensor]] = field(default_factory=dict)
    """By group, the weights at the newest evaluation of this process, or at its start."""
    evaluated_step: int = 0
    """The step of `at_evaluation`."""

    @property
    def position(self) -> float:
        """s at the present step."""
        return position_of(self.job.config, self.pace, self.step)

    @property
    def lowest_timestep(self) -> int:
        """The least noisy timestep that is trained at the present step."""
        return lowest_timestep_of(self.job.config, self.pace, self.job.pipeline.scheduler.alphas_cumprod)

    @property
    def parts(self) -> Parts:
        """What a checkpoint saves and `restore` puts back, but for `progress`."""
        job = self.job
        return Parts(job.adapted, job.optimizer, self.schedule, self.ema, job.accelerator.scaler, job.objectives)

    def progress(self) -> dict[str, Any]:
        """How far the run is, as JSON values."""
        return {
            "step": self.step,
            "first": self.first,
            "last": self.last,
            "best": self.best,
            "pace": self.pace.to_json(),
            "warned": self.warned,
            "worse": self.worse,
            "running_loss": self.running_loss,
            "window": [asdict(result) for result in self.window],
            "skipped_in_a_row": self.skipped_in_a_row,
            "objects_per_step": self.job.objects_per_step,
            "data": self.job.data,
        }

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Take over what `progress` gave."""
        for name in ("step", "first", "last", "best", "warned", "worse", "running_loss", "skipped_in_a_row"):
            setattr(self, name, progress[name])
        self.pace = Pace.from_json(progress["pace"])
        self.window = [StepResult(**result) for result in progress["window"]]

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """By what share of its norm each group has moved since `remember_weights`."""

        def norm(tensors: Iterable[Tensor]) -> float:
            return float(torch.stack([t.norm() for t in tensors]).norm())

        found = {}
        for name, group in self.job.adapted.trainable().items():
            before = self.at_evaluation[name]
            found[name] = norm(p - b for p, b in zip(group.values(), before, strict=True)) / norm(before)
        return found

    def remember_weights(self) -> None:
        """Of each group, to tell at the next evaluation whether it has moved."""
        groups = self.job.adapted.trainable()
        self.at_evaluation = {name: [p.detach().clone() for p in group.values()] for name, group in groups.items()}
        self.evaluated_step = self.step
