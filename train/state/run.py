"""A prepared run (`Job`), and its state while it trains (`Run`), which a checkpoint saves whole."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from softprompt.data.batch import Objects
from softprompt.data.storage import key_of
from softprompt.model.adapted import AdaptedModel
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.pacing import CurriculumState
from train.evaluation.evaluator import Evaluator
from train.log.logger import Logger
from train.objectives.terms import Shown
from train.options.config import Config
from train.state.checkpoint import Parts
from train.state.folder import Exported
from train.step import StepResult, Trainer


@dataclass
class Job:
    """A run, ready to start. Made by `train.setup.prepare`."""

    config: Config
    trainer: Trainer
    evaluator: Evaluator
    train: Objects
    held_out: Objects
    replay: Objects | None
    """Objects of the original domain that the KL may be measured on; None without data.original."""
    notes: list[str]
    """Decisions made on the user's behalf, and warnings, to be printed."""
    skipped: list[str]
    """Samples that are left out since they cannot be used, each with the reason."""

    @property
    def accelerator(self) -> Accelerator:
        """Device, precision and processes."""
        return self.trainer.context.accelerator

    @property
    def pipeline(self) -> Pipeline:
        """Its `unet` is the adapted one."""
        return self.trainer.context.pipeline

    @property
    def adapted(self) -> AdaptedModel:
        """Prompt, LoRA and UNet, not wrapped."""
        return self.trainer.context.adapted

    @property
    def data(self) -> dict[str, str]:
        """Fingerprint of each set of samples: their number, and a digest of their names in order. Paths may differ."""
        sets = {"data.train": self.train, "data.val": self.held_out}
        if self.evaluator.original is not None:
            sets["data.original"] = self.evaluator.original
        return {name: f"{len(objects)} objects, {key_of(*objects.names).hex()[:8]}" for name, objects in sets.items()}


@dataclass
class Run:
    """A run as it is now."""

    job: Job
    folder: Path
    schedule: LambdaLR
    ema: EMAModel | None
    logger: Logger
    curricula: CurriculumState
    step: int = 0
    """Optimizer steps done."""
    diagnostics: dict[str, str] = field(default_factory=dict)
    """Signs that the run goes wrong, by name, with the message that was printed."""
    worse: int = 0
    """Number of newest validations in a row with a higher loss than the first."""
    running_loss: float | None = None
    """Running mean of the training loss, which spikes are measured against."""
    window: list[StepResult] = field(default_factory=list)
    """Steps since the last point of the log."""
    first: dict[str, float] | None = None
    """Series of the evaluation at step 0, of the pretrained model."""
    last: dict[str, float] | None = None
    """Series of the newest evaluation."""
    best: dict[str, float] | None = None
    """{"step", "loss"} of the lowest validation loss so far."""
    shown: Shown | None = None
    """The newest previews of this process."""
    exported: Exported | None = None
    merged: float | None = None
    """Largest difference between views of the exported pipeline folder and of UNet and LoRA; None without one."""
    skipped_in_a_row: int = 0
    """Number of newest steps in a row that were skipped since numbers were not finite."""
    frozen: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the frozen tensors at the start."""
    at_evaluation: dict[str, list[Tensor]] = field(default_factory=dict)
    """By group, the weights at the newest evaluation of this process, or at its start."""
    evaluated_step: int = 0
    """Step of `at_evaluation`."""

    @property
    def position(self) -> float:
        """Position s at the present step."""
        return self.job.trainer.curriculum.position(self.curricula, self.step)

    @property
    def parts(self) -> Parts:
        """The objects whose state a checkpoint saves and `restore` loads."""
        trainer = self.job.trainer
        scaler = self.job.accelerator.scaler
        return Parts(trainer.adapted, trainer.optimizer, self.schedule, self.ema, scaler, trainer.objectives)

    def progress(self) -> dict[str, Any]:
        """Progress of the run, as JSON values."""
        return {
            "step": self.step,
            "first": self.first,
            "last": self.last,
            "best": self.best,
            "pace": self.curricula.to_json(),
            "warned": self.diagnostics,
            "worse": self.worse,
            "running_loss": self.running_loss,
            "window": [asdict(result) for result in self.window],
            "skipped_in_a_row": self.skipped_in_a_row,
            "objects_per_step": self.job.trainer.batches.objects_per_step,
            "data": self.job.data,
        }

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Inverse of `progress`."""
        for name in ("step", "first", "last", "best", "worse", "running_loss", "skipped_in_a_row"):
            setattr(self, name, progress[name])
        self.diagnostics = progress["warned"]
        self.curricula = CurriculumState.from_json(progress["pace"])
        self.window = [StepResult(**result) for result in progress["window"]]

    def is_due(self, every: int) -> bool:
        """Whether the present step is one of every `every` steps, or the last one."""
        return self.step % every == 0 or self.step == self.job.config.train.steps

    @property
    def is_evaluated(self) -> bool:
        """Whether the present step has been evaluated."""
        return self.last is not None and self.last["step"] == self.step

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """Change of each group's weights since `remember_weights`, as a share of their norm."""

        def norm(tensors: Iterable[Tensor]) -> float:
            return float(torch.stack([t.norm() for t in tensors]).norm())

        found = {}
        for name, group in self.job.adapted.trainable().items():
            before = self.at_evaluation[name]
            found[name] = norm(p - b for p, b in zip(group.values(), before, strict=True)) / norm(before)
        return found

    def remember_weights(self) -> None:
        """Keep a copy of each group's weights, against which `moved` compares."""
        groups = self.job.adapted.trainable()
        self.at_evaluation = {name: [p.detach().clone() for p in group.values()] for name, group in groups.items()}
        self.evaluated_step = self.step
