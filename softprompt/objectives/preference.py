"""Preferring one set of views to another: Diffusion-DPO, its curriculum, SPIN-Diffusion.

One item is the six views of an object; its error is one number, so a preference is between whole objects, not between views.
Everything is computed in float64: beta makes thousands of a difference of errors that are nearly equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt.objectives.losses import PredictionType

ChunkBy = Literal["equal_width", "equal_count"]


@dataclass(frozen=True)
class RankedPair:
    """Two sample sets of one object, as indices, the better one first."""

    winner: int
    loser: int
    ranks: int
    """Difference of their ranks: 1 for neighbours."""
    reward: float
    """Difference of their rewards."""


# ------------------------------------------------------------------------------------------------------------- the loss


def item_errors(
    prediction: Tensor,
    target: Tensor,
    alphabar: Tensor,
    *,
    prediction_type: PredictionType = "v_prediction",
    view_weights: Tensor | None = None,
) -> Tensor:
    """D: mean squared error of the predicted noise, of each object.

    prediction, target: [B, V, C, H, W], of the model's type. An error of v is alphabar times as large as one of the noise
    (exactly: eps = a v + s z, so eps - eps' = a (v - v')), so it is multiplied by that.
    alphabar: [B], of each object's timestep. view_weights: [B, V], 0 leaves a view out of the mean.
    Returns: [B], float64: mean over views, channels and pixels.
    Source: Wallace et al. 2311.12908; the factor for v: ours, checked numerically.
    """
    per_view = (prediction.double() - target.double()).square().mean(dim=(2, 3, 4))  # B V
    weights = torch.ones_like(per_view) if view_weights is None else view_weights
    errors = (per_view * weights).sum(dim=1) / weights.sum(dim=1)
    return errors if prediction_type == "epsilon" else errors * alphabar.to(errors)


def preference(policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor) -> Tensor:
    """How much more the model prefers the winner than the reference does; 0 where they agree.

    All [B]: errors D of `item_errors`, of winner and loser at one timestep and one noise.
    Returns: [B], (D_ref(w) - D_ref(l)) - (D(w) - D(l)): positive where the winner's error fell by more than the loser's.
    Source: Wallace et al. 2311.12908, eq. 14 without its constant.
    """
    return (reference_winner - reference_loser) - (policy_winner - policy_loser)


def dpo_loss(
    policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, *, beta: float
) -> Tensor:
    """Diffusion-DPO: -log sigmoid(-beta/2 [(D(w) - D(l)) - (D_ref(w) - D_ref(l))]), mean over pairs; log 2 at the start.

    beta: absorbs the number of timesteps, for errors that are means over elements. The 1/2 is the official code's; diffusers'
    example has beta without it, so its 2500 is 5000 here.
    With the true views as winner, the previous iterate's own sample as loser and that iterate as reference it is the
    approximate objective of SPIN-Diffusion (Yuan et al. 2402.10210; its form from secondary sources, its beta not verified).
    Returns: a scalar, float64.
    Source: Wallace et al. 2311.12908; SalesforceAIResearch/DiffusionDPO 5233e75.
    """
    preferred = preference(policy_winner, policy_loser, reference_winner, reference_loser)
    return -F.logsigmoid(0.5 * beta * preferred.double()).mean()


def prefers_winner(preferred: Tensor) -> Tensor:
    """The implicit accuracy: share of pairs whose winner the model prefers by more than the reference does.

    preferred: of `preference`, [B] or [B, ...]. Returns: a scalar in [0, 1], float64. At the start, where model and reference
    are one, it is 0, not a half: nothing is preferred yet.
    Source: SalesforceAIResearch/DiffusionDPO 5233e75.
    """
    return (preferred > 0).double().mean()


def share_won(ours: Tensor, theirs: Tensor) -> Tensor:
    """Share of objects on which our sample is closer to the true views than theirs; a draw counts a half.

    ours, theirs: [B], larger is closer. Returns: a scalar in [0, 1]; a half where both are equally good.
    """
    return torch.sign(ours.double() - theirs.double()).add(1).div(2).mean()


# ------------------------------------------------------------------------------------------- the pairs, from easy to hard


def ranked_pairs(rewards: Sequence[float], *, min_gap: float = 0.0) -> list[RankedPair]:
    """Every two sample sets of an object, by their reward.

    min_gap: pairs whose rewards differ by no more than this are near-ties and left out; equal ones always are.
    Raises: ValueError for a reward that is not finite.
    Source: Croitoru et al. 2405.13637.
    """
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"rewards are {[f'{reward:g}' for reward in rewards]}; expected finite numbers")
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return [
        RankedPair(better, worse, ranks=j - i, reward=rewards[better] - rewards[worse])
        for i, better in enumerate(order)
        for j, worse in enumerate(order[i + 1 :], start=i + 1)
        if rewards[better] - rewards[worse] > min_gap
    ]


def stages_by_rank(gaps: Sequence[int], samples: int, chunks: int) -> list[int]:
    """Stage of a curriculum, from 0, in which each pair joins, by its difference of ranks.

    Chunk k of B (k = 1 the easiest) holds the gaps in (L_k, R_k], L_k = (M - 1)(B - k)/B, R_k = (M - 1)(B - k + 1)/B. Closed
    above, so each of the gaps 1 .. M - 1 is in one chunk. Which end the paper closes is not verified.
    gaps: of each pair, 1 .. M - 1. samples: M. chunks: B.
    Source: Croitoru et al. 2405.13637, from secondary notes.
    """
    return [next(k for k in range(1, chunks + 1) if gap * chunks > (samples - 1) * (chunks - k)) - 1 for gap in gaps]


def stages_by_reward(gaps: Sequence[float], chunks: int, edges: ChunkBy) -> list[int]:
    """Stage of a curriculum, from 0, in which each pair joins, by its difference of rewards, or any other gap.

    edges: `equal_width`: stage k of B trains the gaps of at least max - k (max - min)/B; `equal_count`: the k/B of the pairs
    with the largest gaps, rounded up.
    gaps: of each pair, larger is easier.
    Source: CroitoruAlin/Curriculum-DPO 3454543, which does this where its paper takes the gap of ranks.
    """
    if edges == "equal_count":
        easiest = sorted(range(len(gaps)), key=lambda index: -gaps[index])
        places = {index: place for place, index in enumerate(easiest)}
        ends = [math.ceil(len(gaps) * k / chunks) for k in range(1, chunks + 1)]
        return [next(k for k, end in enumerate(ends) if places[index] < end) for index in range(len(gaps))]
    most, least = max(gaps, default=0.0), min(gaps, default=0.0)
    bounds = [*(most - (most - least) * k / chunks for k in range(1, chunks)), least]  # the last without rounding error
    return [next(k for k, bound in enumerate(bounds) if gap >= bound) for gap in gaps]


def stage_at(steps: int, stage_steps: int, stages: int) -> int:
    """The stage, from 0, `steps` steps after the first began."""
    return min(stages - 1, steps // stage_steps)


def open_pairs(joins: Sequence[int], stage: int) -> list[int]:
    """Pairs that a stage trains on: its own and all easier ones (P_k = S_1 u ... u S_k). joins: stage of each pair."""
    return [index for index, join in enumerate(joins) if join <= stage]
