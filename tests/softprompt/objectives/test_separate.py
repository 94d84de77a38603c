"""Separate-and-Enhance's losses against slow, obvious versions in float64, and their gradients."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from softprompt.objectives.separate import absence, overlap, smoothed


def maps(size: int = 4) -> Tensor:
    """[2, N, heads, H, W] shares of attention."""
    return torch.rand(2, 3, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2


def pixels(one: Tensor) -> list[tuple[int, ...]]:
    return list(product(*map(range, one.shape)))


def slow_smoothed(one: Tensor, h: int, y: int, x: int) -> float:
    """G at a pixel: nine neighbours, those outside mirrored at the border."""
    size, total, weights = one.shape[-1], 0.0, 0.0
    for dy, dx in product((-1, 0, 1), repeat=2):
        weight = math.exp(-(dy**2 + dx**2) / (2 * 0.25))
        yy, xx = (abs(p) if p < size else 2 * (size - 1) - p for p in (y + dy, x + dx))
        total += weight * float(one[h, yy, xx])
        weights += weight
    return total / weights


def test_the_overlap_is_the_largest_of_the_products_over_the_sums() -> None:
    first, second = maps()
    expected = [max(float(a[p] * b[p] / (a[p] + b[p])) for p in pixels(a)) for a, b in zip(first, second, strict=True)]
    assert overlap(first.float(), second.float()).tolist() == pytest.approx(expected, abs=1e-5)
    assert overlap(first, torch.zeros_like(first)).tolist() == [0, 0, 0]
    assert not overlap(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).isnan().any(), "neither part gets attention"


def test_the_absence_is_what_the_weaker_part_lacks_at_its_smoothed_peak() -> None:
    both = maps()
    both[1, 0] *= 0.1
    expected = [1 - min(max(slow_smoothed(part[n], *p) for p in pixels(part[n])) for part in both) for n in range(3)]
    assert absence(both.float()).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_smoothing_keeps_a_flat_map_and_the_shape() -> None:
    flat = torch.full((2, 3, 4, 5), 0.3)
    assert torch.allclose(smoothed(flat), flat)


def test_the_gradients_are_those_of_finite_differences_and_the_absence_moves_the_weaker_part_alone() -> None:
    first, second = (part.requires_grad_() for part in maps().clone())
    assert torch.autograd.gradcheck(overlap, (first, second))
    both = maps(3)
    both[1] *= 0.5
    both.requires_grad_()
    assert torch.autograd.gradcheck(absence, (both,))
    absence(both).sum().backward()
    assert both.grad is not None and not both.grad[0].any() and both.grad[1].any()
