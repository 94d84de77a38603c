"""The path between prompts: waypoints W_0 ... W_S and a position s in [0, S]."""

from typing import Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Interpolation = Literal["lerp", "slerp"]
Matching = Literal["none", "per_view", "shared"]


def match_tokens(waypoints: Tensor, matching: Matching) -> Tensor:
    """Reorder each waypoint's tokens so that they lie nearest to those of the waypoint before, token by token.

    Cross-attention does not see the order of its tokens, so every waypoint keeps its meaning; between two of them each token
    then moves to its nearest one instead of to the one of the same index in another text.
    waypoints: [S + 1, V, T, D]. matching: `per_view`: an order for each view; `shared`: one order for all views; `none`.
    Returns: [S + 1, V, T, D], the first waypoint unchanged.
    Source: ours; least sum of squared distances, by scipy's Hungarian assignment.
    """
    if matching == "none":
        return waypoints
    matched = [waypoints[0]]
    for waypoint in waypoints[1:]:
        costs = torch.cdist(matched[-1].double(), waypoint.double()).square()  # V T T
        if matching == "shared":
            costs = costs.sum(dim=0, keepdim=True).expand_as(costs)
        orders = [torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]) for cost in costs]
        matched.append(torch.stack([view[order] for view, order in zip(waypoint, orders, strict=True)]))
    return torch.stack(matched)


def point_on_path(waypoints: Tensor, position: float, interpolation: Interpolation = "lerp") -> Tensor:
    """path(s): from W_floor(s) toward the next waypoint.

    waypoints: [S + 1, V, T, D]. position: s in [0, S]; at a whole number it is that waypoint exactly.
    Returns: [V, T, D].
    Raises: ValueError for a position outside [0, S].
    Source: ours.
    """
    last = len(waypoints) - 1
    if not 0 <= position <= last:
        raise ValueError(f"position {position} is not on the path [0, {last}]")
    floor = int(position)
    fraction = position - floor
    if fraction == 0:
        return waypoints[floor]
    between = slerp if interpolation == "slerp" else torch.lerp
    return between(waypoints[floor], waypoints[floor + 1], fraction)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation per token (last axis); the norm goes linearly from one end's to the other's.

    A straight line between two tokens of equal norm passes nearer to the origin; this does not.
    Tokens of nearly one direction, where the two agree, and tokens of norm zero are interpolated linearly.
    Source: Shoemake, "Animating rotation with quaternion curves", 1985, applied to directions.
    """
    start_norm, end_norm = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    a, b = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    direction = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / sine
    spherical = direction * torch.lerp(start_norm, end_norm, fraction)
    straight = (sine < 1e-4) | (start_norm == 0) | (end_norm == 0)
    return torch.where(straight, torch.lerp(start, end, fraction), spherical)
