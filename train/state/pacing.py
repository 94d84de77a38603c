"""What the curricula of a run have come to: one small state, moved on after every step and validation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from softprompt.prompt.curriculum import (
    Budget,
    Stage,
    adapted_kl_weight,
    lowest_timestep,
    move_within_budget,
    position_at,
    position_of_stage,
    timestep_edges,
    wait_for_plateau,
)
from train.options.config import Config


@dataclass(frozen=True)
class Pace:
    """Saved whole in a checkpoint: what steps alone do not say."""

    kl_weight: float
    """Of the KL term, as adapted so far."""
    budget: Budget = field(default_factory=Budget)
    """With pacing `kl_budget`."""
    stage: Stage = field(default_factory=Stage)
    """Of the path, with pacing `plateau`."""
    timesteps: Stage = field(default_factory=Stage)
    """Of the timestep curriculum."""

    @classmethod
    def start(cls, config: Config) -> "Pace":
        """At step 0."""
        return cls(kl_weight=config.kl.weight, budget=Budget(position=config.curriculum.position[0]))

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Pace":
        """What `to_json` gave."""
        return cls(
            kl_weight=saved["kl_weight"],
            budget=Budget(**saved["budget"]),
            stage=Stage(**saved["stage"]),
            timesteps=Stage(**saved["timesteps"]),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def position_of(config: Config, pace: Pace, step: int) -> float:
    """s after `step` optimizer steps."""
    curriculum = config.curriculum
    if curriculum.pacing == "kl_budget":
        return pace.budget.position
    if curriculum.pacing == "plateau":
        return position_of_stage(pace.stage, step, curriculum.position, curriculum.glide_steps, curriculum.easing)
    when = step / config.train.steps if curriculum.unit == "run" else step
    return position_at(when, curriculum.at, curriculum.position, curriculum.easing)


def lowest_timestep_of(config: Config, pace: Pace, alphas_cumprod: Tensor) -> int:
    """The least noisy timestep that is trained now."""
    settings = config.timesteps
    if settings.clusters == 1:
        return 0
    return lowest_timestep(timestep_edges(alphas_cumprod, settings.clusters, settings.edges), pace.timesteps.number)


def least_steps(config: Config) -> dict[str, int]:
    """Steps that a curriculum paced by patience takes at least, were nothing ever to improve, by what it moves."""
    curriculum, timesteps = config.curriculum, config.timesteps
    found = {}
    if timesteps.clusters > 1:
        stage = min(timesteps.patience + 2, timesteps.max_stage_steps or config.train.steps + 1)  # the first value is the best
        found["timesteps"] = (timesteps.clusters - 1) * stage
    if curriculum.pacing == "plateau":
        interval = 1 if curriculum.watch == "train" else config.monitor.validate_every
        stage = (curriculum.patience + 2) * interval + curriculum.glide_steps
        found["prompt"] = (len(curriculum.position) - 1) * min(stage, curriculum.max_stage_steps or stage)
    return found


def unfinished(config: Config, pace: Pace, step: int) -> list[str]:
    """What a run that ends at `step` has not come to, as sentences; none where all curricula arrived."""
    found = []
    position, last = position_of(config, pace, step), config.curriculum.position[-1]
    if config.curriculum.pacing != "step" and position != last:
        found.append(
            f"the prompt came to position {position:.3g} of {last:g}: pacing {config.curriculum.pacing} did not move "
            f"it further in {step} steps"
        )
    if (stage := pace.timesteps.number + 1) < config.timesteps.clusters:
        found.append(
            f"the timestep curriculum came to stage {stage} of {config.timesteps.clusters}: the less noisy timesteps were "
            f"never trained; lower timesteps.patience or timesteps.max_stage_steps"
        )
    return found


def after_step(config: Config, pace: Pace, step: int, *, denoising: float | None, kl: float | None) -> Pace:
    """Move on after an optimizer step.

    step: optimizer steps done, this one included. denoising, kl: its loss and KL; None where not measured.
    """
    timesteps = wait_for_plateau(
        pace.timesteps,
        step,
        denoising,
        last=config.timesteps.clusters - 1,
        patience=config.timesteps.patience,
        smoothing=config.timesteps.smoothing,
        max_steps=config.timesteps.max_stage_steps,
    )
    pace = replace(pace, timesteps=timesteps)
    if config.kl.target is not None and kl is not None:
        weight = adapted_kl_weight(pace.kl_weight, kl, target=config.kl.target, rate=config.kl.rate)
        pace = replace(pace, kl_weight=weight)
    curriculum = config.curriculum
    if curriculum.pacing == "kl_budget":
        budget = move_within_budget(
            pace.budget,
            kl,
            budget=curriculum.kl_budget,
            fastest=curriculum.fastest,
            last=curriculum.position[-1],
            smoothing=curriculum.smoothing,
        )
        return replace(pace, budget=budget)
    return _watch(config, pace, step, denoising if curriculum.watch == "train" else None)


def after_validation(config: Config, pace: Pace, step: int, loss: float) -> Pace:
    """Move on after a validation."""
    return _watch(config, pace, step, loss) if config.curriculum.watch == "validation" else pace


def _watch(config: Config, pace: Pace, step: int, loss: float | None) -> Pace:
    """The path's next stage, where the watched loss has stopped falling; losses measured on the way to a stage do not count."""
    curriculum = config.curriculum
    if curriculum.pacing != "plateau":
        return pace
    gliding = pace.stage.number > 0 and step - pace.stage.began < curriculum.glide_steps
    stage = wait_for_plateau(
        pace.stage,
        step,
        None if gliding else loss,
        last=len(curriculum.position) - 1,
        patience=curriculum.patience,
        min_gain=curriculum.min_gain,
        smoothing=curriculum.smoothing,
        max_steps=curriculum.max_stage_steps,
    )
    return replace(pace, stage=stage)
