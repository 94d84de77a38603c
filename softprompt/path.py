"""The path between prompts: waypoints W_0 ... W_S and a position s in [0, S]."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["lerp", "slerp"]


def point_on_path(waypoints: Tensor, position: float, interpolation: Interpolation = "lerp") -> Tensor:
    """path(s): from W_floor(s) toward the next waypoint.

    waypoints: [S + 1, V, T, D]. position: s in [0, S]; at a whole number it is that waypoint exactly.
    Returns: [V, T, D].
    Source: ours (design.md, the one formula).
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
    """Spherical interpolation per token (last axis), with the norm going linearly from one end's to the other's.

    A straight line between two tokens of equal norm passes nearer to the origin; this does not.
    Tokens that (nearly) coincide in direction, where the two agree, and tokens of norm zero are interpolated linearly.
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
