"""The path between prompts: waypoints W_0 ... W_S and a position s in [0, S]."""

from typing import Literal

import torch
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
    Tokens that (nearly) coincide in direction are interpolated linearly, where the two agree.
    Source: Shoemake, "Animating rotation with quaternion curves", 1985, applied to directions.
    """
    start_norm, end_norm = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    cosine = ((start / start_norm) * (end / end_norm)).sum(-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    direction = ((1 - fraction) * angle).sin() / sine * (start / start_norm) + (fraction * angle).sin() / sine * (
        end / end_norm
    )
    spherical = direction * torch.lerp(start_norm, end_norm, fraction)
    return torch.where(sine < 1e-4, torch.lerp(start, end, fraction), spherical)
