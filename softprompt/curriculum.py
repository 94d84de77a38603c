"""Step to position on the path: a pure function, so that a resumed run needs only its step."""

import math
from collections.abc import Sequence
from typing import Literal

Easing = Literal["linear", "cosine", "step"]


def position_at(step: float, at: Sequence[float], positions: Sequence[float], easing: Easing = "linear") -> float:
    """The position s at a step, piecewise between the points (at[i], positions[i]).

    step, at: in one unit (steps, or fractions of the run); `at` rises. Before the first point its position holds, after the
    last one its position.
    easing: how a piece is crossed. `linear`; `cosine`: slow at both ends; `step`: not at all, the next position is taken at
    its point (template switching).
    Source: ours.
    """
    if step <= at[0]:
        return float(positions[0])
    for i in range(1, len(at)):
        if step < at[i]:
            x = (step - at[i - 1]) / (at[i] - at[i - 1])
            x = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "step": 0.0}[easing]
            return positions[i - 1] + x * (positions[i] - positions[i - 1])
    return float(positions[-1])
