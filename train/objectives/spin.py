"""SPIN-Diffusion: the true views are preferred to what the model's previous iterate made of the same picture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt.data.batch import EncodedViews
from softprompt.files import remove_folder
from softprompt.objectives.rewards import REWARDS
from train.objectives.own_samples import OwnSamples, Snapshot, predict_as
from train.objectives.preferences import Contest, HeldOut, Predict, PreferenceTerm, sampled
from train.objectives.terms import Context, StepBatch
from train.options.config import Config
from train.options.preferences import SpinConfig

CLOSENESS = ("spin: psnr", REWARDS["psnr"])
"""Reward that `evaluate` compares samples by; nothing is trained on it."""


class Spin(PreferenceTerm):
    """K iterations: as each begins, the model as it is becomes the iterate that it is held to and whose samples lose."""

    name = "spin"
    copies = 2
    options: SpinConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.spin, start=config.spin.start, guidance_scales=[config.monitor.guidance_scale])
        steps, count = config.train.steps - self.first, self.options.iterations
        self.boundaries = [self.first + k * steps // count for k in range(count)]
        """The steps at which iterations begin."""
        self.iterate: Snapshot | None = None
        """The previous iterate: the model as it was when the present iteration began."""
        self._own: OwnSamples | None = None
        """Its samples, once all are there."""

    def open(self, context: Context) -> list[str]:
        """Say what sampling will cost."""
        return [self.cost_of_samples(context, sets=1, rounds=len(self.boundaries))]

    def kept_bytes(self, context: Context) -> int:
        """The samples of two iterates: the later ones are made before the earlier ones are removed."""
        return 2 * self.bytes_of_samples(context, sets=1)

    def begins(self, step: int) -> bool:
        """At the beginning of an iteration, until all its samples are there."""
        trains = self.weight > 0 and self.first <= step < self.end
        return step >= self.first and (self.others is None or (trains and (self._own is None or self._is_due(step))))

    def _is_due(self, step: int) -> bool:
        """Whether the model becomes the next iterate before this step."""
        return self.iterate is None or (step in self.boundaries and self.iterate.step != step)

    def begin(self, context: Context, folder: Path, step: int, position: float, stopped: Callable[[], bool]) -> None:
        """Take over the present model as iterate where that is due; make its samples."""
        started = self.take_start(context, step, position)
        if self.others is None:
            self.others = self.samples_of_held_out(context, folder, sets=1, reward=CLOSENESS)
            self.held_out = [
                HeldOut(_true_against_own(*self.others.given(index), self.others.latents(index)[0]), ((0, 1),))
                for index in range(len(self.others))
            ]
        if self.weight == 0 or step >= self.end:
            return
        if self._is_due(step):
            self.iterate = started if started.step == step else Snapshot.take(context.adapted, step, position)
            self._own = None
        assert self.iterate is not None
        self.iterate = self.iterate.to(context.accelerator.device)
        name = f"iterate-{self.iterate.step:06d}"
        own = self.samples_of_training(context, folder, name, self.iterate, sets=1, reward=CLOSENESS)
        if own.fill(stopped=stopped, what=f"spin: own samples of step {self.iterate.step}"):
            self._own = own
            if context.accelerator.is_main_process:
                for old in own.folder.parent.glob(f"{self.name}-iterate-*"):
                    if old.name < own.folder.name:  # of an earlier one; what is lost with it can be made again
                        remove_folder(old)

    def turn(self, batch: StepBatch, index: int, generator: torch.Generator) -> Contest:
        """The object whose turn it is, or, where there are samples of fewer, one of those."""
        del batch, generator
        assert self._own is not None, "samples are made before the first step"
        index %= len(self._own)
        return _true_against_own(*self._own.given(index), self._own.latents(index)[0])

    def regularised_toward(self, context: Context) -> Predict:
        """The previous iterate."""
        assert self.iterate is not None, "it is taken before the first step"
        iterate = self.iterate
        return lambda *inputs: predict_as(context.adapted, iterate, *inputs)

    def measured_against(self, context: Context) -> Predict:
        """The model as it was when the objective began, whichever iterate is trained against."""
        assert self.started_from is not None, "nothing is held out before"
        started = self.started_from
        return lambda *inputs: predict_as(context.adapted, started, *inputs)

    def rehearse(self, context: Context) -> bool:
        """Held to itself."""
        self.iterate = Snapshot.take(context.adapted, 0, 0.0)
        return super().rehearse(context)

    def state(self) -> dict[str, Any]:
        """The first and the present iterate."""
        iterates = {"start": self.started_from, "iterate": self.iterate}
        return {name: snapshot.state() for name, snapshot in iterates.items() if snapshot is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.started_from = Snapshot.from_state(state["start"])
        self.iterate = Snapshot.from_state(state["iterate"]) if "iterate" in state else None


def _true_against_own(encoded: EncodedViews, reference: int, own: torch.Tensor) -> Contest:
    return Contest(encoded, reference, ((encoded.mean, encoded.std), sampled(own)))
