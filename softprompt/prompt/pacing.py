"""The curricula of a run - the prompt's position, the range of timesteps, the KL weight - and the one small state they share.

A `Curriculum` holds plain values and never changes; a `CurriculumState` is advanced after every step and validation, and saved
whole in a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from softprompt.prompt.curriculum import (
    Budget,
    Easing,
    Stage,
    adapted_kl_weight,
    lowest_timestep,
    move_within_budget,
    position_at,
    position_of_stage,
    wait_for_plateau,
)

Pacing = Literal["step", "plateau", "kl_budget"]
Watched = Literal["validation", "train"]


@dataclass(frozen=True)
class CurriculumState:
    """Everything about the curricula that the number of steps alone does not determine."""

    kl_weight: float
    """Weight of the KL term, as adapted so far."""
    budget: Budget = field(default_factory=Budget)
    """Position and smoothed KL with pacing `kl_budget`."""
    stage: Stage = field(default_factory=Stage)
    """Stage of the path with pacing `plateau`."""
    timesteps: Stage = field(default_factory=Stage)
    """Stage of the timestep curriculum."""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "CurriculumState":
        """Inverse of `to_json`."""
        stages = {name: Stage(**saved[name]) for name in ("stage", "timesteps")}
        return cls(kl_weight=saved["kl_weight"], budget=Budget(**saved["budget"]), **stages)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PathSchedule:
    """How the prompt moves along its path. The fields are the options of the same name in the group `curriculum`."""

    steps: int
    """Optimizer steps of the run."""
    pacing: Pacing
    unit: Literal["run", "step"]
    at: list[float]
    position: list[float]
    easing: Easing
    watch: Watched
    patience: int
    min_gain: float
    smoothing: float
    max_stage_steps: int | None
    glide_steps: int
    kl_budget: float
    fastest: float


@dataclass(frozen=True, kw_only=True)
class TimestepSchedule:
    """From high noise down: each stage adds a cluster of timesteps."""

    edges: list[int]
    """Bounds of the clusters, see `timestep_edges`; two of them for a single cluster."""
    patience: int
    smoothing: float
    max_stage_steps: int | None

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return len(self.edges) - 1


@dataclass(frozen=True)
class Curriculum:
    """The curricula of a run."""

    path: PathSchedule
    timesteps: TimestepSchedule
    kl_weight: float
    """Weight of the KL term at step 0."""
    kl_target: float | None
    """KL that the weight is adapted to, in nats per latent element; None: a fixed weight."""
    kl_rate: float
    """K_beta of `adapted_kl_weight`."""

    def start(self) -> CurriculumState:
        """State at step 0."""
        return CurriculumState(kl_weight=self.kl_weight, budget=Budget(position=self.path.position[0]))

    def position(self, state: CurriculumState, step: int) -> float:
        """Position s after `step` optimizer steps."""
        path = self.path
        if path.pacing == "kl_budget":
            return state.budget.position
        if path.pacing == "plateau":
            return position_of_stage(state.stage, step, path.position, path.glide_steps, path.easing)
        return position_at(step / path.steps if path.unit == "run" else step, path.at, path.position, path.easing)

    def lowest_timestep(self, state: CurriculumState) -> int:
        """The least noisy timestep that is trained now."""
        return 0 if self.timesteps.clusters == 1 else lowest_timestep(self.timesteps.edges, state.timesteps.number)

    def after_step(self, state: CurriculumState, step: int, *, denoising: float | None, kl: float | None) -> CurriculumState:
        """State after an optimizer step.

        step: optimizer steps done, this one included. denoising, kl: its loss and its KL; None where not measured.
        """
        timesteps = wait_for_plateau(
            state.timesteps,
            step,
            denoising,
            last=self.timesteps.clusters - 1,
            patience=self.timesteps.patience,
            smoothing=self.timesteps.smoothing,
            max_steps=self.timesteps.max_stage_steps,
        )
        state = replace(state, timesteps=timesteps)
        if self.kl_target is not None and kl is not None:
            state = replace(state, kl_weight=adapted_kl_weight(state.kl_weight, kl, target=self.kl_target, rate=self.kl_rate))
        path = self.path
        if path.pacing == "kl_budget":
            budget = move_within_budget(
                state.budget, kl, budget=path.kl_budget, fastest=path.fastest, last=path.position[-1], smoothing=path.smoothing
            )
            return replace(state, budget=budget)
        return self._watch(state, step, denoising if path.watch == "train" else None)

    def after_validation(self, state: CurriculumState, step: int, loss: float) -> CurriculumState:
        """State after a validation with this loss."""
        return self._watch(state, step, loss) if self.path.watch == "validation" else state

    def _watch(self, state: CurriculumState, step: int, loss: float | None) -> CurriculumState:
        """Begin the path's next stage where the loss has stopped falling; losses measured while it glides do not count."""
        path = self.path
        if path.pacing != "plateau":
            return state
        gliding = state.stage.number > 0 and step - state.stage.began < path.glide_steps
        stage = wait_for_plateau(
            state.stage,
            step,
            None if gliding else loss,
            last=len(path.position) - 1,
            patience=path.patience,
            min_gain=path.min_gain,
            smoothing=path.smoothing,
            max_steps=path.max_stage_steps,
        )
        return replace(state, stage=stage)

    def unfinished(self, state: CurriculumState, step: int) -> list[str]:
        """One sentence for each curriculum that a run which ends at `step` has not completed."""
        found = []
        position, last = self.position(state, step), self.path.position[-1]
        if self.path.pacing != "step" and position != last:
            found.append(
                f"the prompt came to position {position:.3g} of {last:g}: pacing {self.path.pacing} did not move it further in "
                f"{step} steps"
            )
        if (stage := state.timesteps.number + 1) < self.timesteps.clusters:
            found.append(
                f"the timestep curriculum came to stage {stage} of {self.timesteps.clusters}: the less noisy timesteps were "
                f"never trained; lower timesteps.patience or timesteps.max_stage_steps"
            )
        return found
