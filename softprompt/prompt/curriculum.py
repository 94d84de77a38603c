"""Schedules of a run: position on the path, range of timesteps, weight of the KL, learning rate.

Pure functions. A schedule that depends on measurements is a function of a small frozen state that is saved whole in a
checkpoint, so a resumed run continues as one that was not interrupted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Easing = Literal["linear", "cosine", "step"]
Edges = Literal["uniform", "log_snr"]
Schedule = Literal["constant", "cosine", "linear"]


def position_at(step: float, at: Sequence[float], positions: Sequence[float], easing: Easing = "linear") -> float:
    """The position s at a step, piecewise between the points (at[i], positions[i]).

    step, at: in one unit (steps, or fractions of the run); `at` rises. The first position holds before the first point, the
    last one after the last point.
    easing: between two points. `linear`; `cosine`: slow at both ends; `step`: the next position is taken at its point
    (template switching).
    Source: ours.
    """
    if step <= at[0]:
        return float(positions[0])
    for i in range(1, len(at)):
        if step < at[i]:
            x = eased((step - at[i - 1]) / (at[i] - at[i - 1]), easing)
            return positions[i - 1] + x * (positions[i] - positions[i - 1])
    return float(positions[-1])


def eased(x: float, easing: Easing) -> float:
    """Share of the way between two points at share x of the time between them, both in [0, 1]."""
    return {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "step": float(x >= 1)}[easing]


@dataclass(frozen=True)
class Stage:
    """State of a curriculum in stages: the present stage, and how long the watched series has not improved."""

    number: int = 0
    """From 0."""
    began: int = 0
    """Step at which the stage began."""
    smoothed: float | None = None
    """Running mean of the series in this stage; None before its first value."""
    best: float | None = None
    """Lowest running mean in this stage."""
    waited: int = 0
    """Number of values since the best one."""


def wait_for_plateau(
    stage: Stage,
    step: int,
    value: float | None,
    *,
    last: int,
    patience: int,
    min_gain: float = 0.0,
    smoothing: float = 0.0,
    max_steps: int | None = None,
) -> Stage:
    """The stage after a step: the next one once the series has stopped falling.

    step: optimizer steps done. value: of the watched series after it; None where it was not measured.
    last: number of the last stage, which never ends. patience: the next stage begins after more than this many values in a
    row without an improvement. min_gain: share of the best by which the running mean must fall to be an improvement.
    smoothing: share of the running mean that is kept at each value, in [0, 1). max_steps: most steps of a stage.
    Source: Kim et al. 2403.10348 (pacing by patience, the best forgotten at each stage); running mean and ceiling ours.
    """
    if stage.number >= last:
        return stage
    if value is not None:
        smoothed = value if stage.smoothed is None else smoothing * stage.smoothed + (1 - smoothing) * value
        better = stage.best is None or smoothed < stage.best * (1 - min_gain)
        stage = replace(
            stage,
            smoothed=smoothed,
            best=smoothed if better else stage.best,
            waited=0 if better else stage.waited + 1,
        )
    if stage.waited > patience or (max_steps is not None and step - stage.began >= max_steps):
        return Stage(number=stage.number + 1, began=step)
    return stage


def position_of_stage(stage: Stage, step: int, positions: Sequence[float], glide_steps: int, easing: Easing) -> float:
    """s in a stage: positions[number], reached from the previous stage's position within `glide_steps` steps."""
    target = positions[stage.number]
    if stage.number == 0 or step - stage.began >= glide_steps:
        return float(target)
    before = positions[stage.number - 1]
    return before + eased((step - stage.began) / glide_steps, easing) * (target - before)


@dataclass(frozen=True)
class Budget:
    """State of a curriculum under a KL budget: how far the run has moved along the path, and its KL."""

    position: float = 0.0
    """s."""
    smoothed: float | None = None
    """Running mean of the KL to the pretrained model; None before it was first measured."""


def move_within_budget(
    state: Budget, kl: float | None, *, budget: float, fastest: float, last: float, smoothing: float = 0.0
) -> Budget:
    """Advance by `fastest` at a KL of zero, slower as it nears the budget, not at all above it.

    kl: measured at this step, in nats per latent element; None where it was not. budget: the KL at which s stands still.
    fastest: in positions per step. last: the final position. smoothing: of the KL, as in `wait_for_plateau`.
    Source: ours.
    """
    smoothed = state.smoothed
    if kl is not None:
        smoothed = kl if smoothed is None else smoothing * smoothed + (1 - smoothing) * kl
    room = 0.0 if smoothed is None else min(1.0, max(0.0, 1 - smoothed / budget))
    return Budget(position=min(last, state.position + fastest * room), smoothed=smoothed)


def adapted_kl_weight(weight: float, kl: float, *, target: float, rate: float) -> float:
    """The KL term's weight for the next steps: higher where the KL is above its target, lower below.

    kl, target: nats per latent element. rate: K_beta; the weight changes by at most a fifth of this share at a time.
    Source: Ziegler et al. 1909.08593, section 2.2 (proportional control, error clipped to +-0.2).
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return weight * (1 + rate * error)


def timestep_edges(alphas_cumprod: Tensor, clusters: int, edges: Edges) -> list[int]:
    """Bounds of `clusters` groups of timesteps: cluster i is [edges[i], edges[i + 1]).

    alphas_cumprod: [num_timesteps]. edges: `uniform`: equally many timesteps each; `log_snr`: equal steps of log SNR, so few
    timesteps where the noise is low and many where it is high.
    Raises: ValueError for more clusters than timesteps, or `log_snr` of a schedule that ends in pure noise.
    Source: Kim et al. 2403.10348; the log-SNR bounds ours.
    """
    count = len(alphas_cumprod)
    if clusters > count:
        raise ValueError(f"{clusters} clusters of {count} timesteps: some would be empty")
    if edges == "uniform":
        return [round(i * count / clusters) for i in range(clusters + 1)]
    alphabar = alphas_cumprod.double().cpu()
    log_snr = (alphabar / (1 - alphabar)).log()
    if not log_snr.isfinite().all():
        raise ValueError("a noise schedule that ends in pure noise has no log SNR there; expected uniform edges")
    levels = torch.linspace(float(log_snr[0]), float(log_snr[-1]), clusters + 1, dtype=torch.float64)
    first = torch.searchsorted(-log_snr, -levels[:-1] - 1e-9).tolist()  # the first timestep at or below each level
    return sorted({*first, count})  # many clusters leave some empty where the noise is low


def lowest_timestep(edges: Sequence[int], stage: int) -> int:
    """Least noisy timestep trained in a stage: the noisiest cluster alone in stage 0, one more cluster in each next stage."""
    return edges[max(0, len(edges) - 2 - stage)]


def learning_rate_factor(step: int, *, first: int, end: int, warmup: int, schedule: Schedule) -> float:
    """Factor on a group's learning rate in a step: 0 outside the steps [first, end).

    warmup: steps in which it rises from 0. schedule: over the remaining steps: constant, or to 0 as a half cosine or a line.
    With first 0 these are the schedules of diffusers.optimization.get_scheduler, which has no such window.
    Source: ours.
    """
    if not first <= step < end:
        return 0.0
    done = step - first
    if done < warmup:
        return done / warmup
    x = (done - warmup) / max(1, end - first - warmup)
    return {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[schedule]
