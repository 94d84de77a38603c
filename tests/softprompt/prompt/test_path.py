"""The path between prompts: exact at its waypoints, straight or spherical between them."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from softprompt.prompt.soft_prompt import match_tokens, point_on_path, slerp


def waypoints(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 5, 8, generator=torch.Generator().manual_seed(0))


def slow_slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """One token [D], in float64."""
    a, b = start.double(), end.double()
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    direction = math.sin((1 - fraction) * angle) * a / a.norm() + math.sin(fraction * angle) * b / b.norm()
    return direction / math.sin(angle) * ((1 - fraction) * a.norm() + fraction * b.norm())


@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_whole_positions_are_the_waypoints_exactly(interpolation: str) -> None:
    w = waypoints()
    for position in (0, 1, 2, 2.0):
        assert torch.equal(point_on_path(w, position, interpolation), w[int(position)])


def test_lerp_is_a_straight_line_between_neighbours() -> None:
    w = waypoints()
    torch.testing.assert_close(point_on_path(w, 0.25), 0.75 * w[0] + 0.25 * w[1])
    torch.testing.assert_close(point_on_path(w, 1.5), (w[1] + w[2]) / 2)


def test_slerp_matches_a_slow_version_token_by_token() -> None:
    w = waypoints()
    found = point_on_path(w, 1.3, "slerp")
    for v in range(2):
        for t in range(5):
            torch.testing.assert_close(found[v, t].double(), slow_slerp(w[1, v, t], w[2, v, t], 0.3), atol=1e-5, rtol=1e-5)


def test_slerp_s_norm_goes_linearly_from_one_end_to_the_other() -> None:
    start, end = waypoints()[:2]
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = (1 - fraction) * start.norm(dim=-1) + fraction * end.norm(dim=-1)
        torch.testing.assert_close(slerp(start, end, fraction).norm(dim=-1), expected)
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end)


@pytest.mark.parametrize("nudge", [0.0, 1e-7, 1e-5])
def test_slerp_between_tokens_that_nearly_coincide_is_finite_and_near(nudge: float) -> None:
    start = waypoints()[0]
    torch.testing.assert_close(slerp(start, start * 2 + nudge, 0.5), 1.5 * start, atol=1e-4, rtol=1e-4)


def test_slerp_of_opposite_tokens_and_with_a_token_of_zeros_is_finite() -> None:
    start, end = waypoints()[:2].clone()
    assert slerp(start, -start, 0.25).isfinite().all()
    start[1, 2] = 0
    found = slerp(start, end, 0.5)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], slerp(start[0], end[0], 0.5))


@pytest.mark.parametrize("position", [-0.01, 2.01, math.nan])
def test_a_position_off_the_path_is_an_error(position: float) -> None:
    with pytest.raises(ValueError, match=r"position .* is not on the path \[0, 2\]"):
        point_on_path(waypoints(), position)


def test_a_path_of_one_waypoint_has_one_position() -> None:
    w = waypoints(1)
    assert torch.equal(point_on_path(w, 0.0), w[0])
    with pytest.raises(ValueError, match=r"not on the path \[0, 0\]"):
        point_on_path(w, 0.5)


def shuffled_waypoints() -> tuple[Tensor, list[Tensor]]:
    """W_0 [2, 5, 3], and as W_1 its tokens, moved a little, in another order for each view; and those orders."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, 3, generator=generator)
    orders = [torch.tensor([3, 1, 4, 0, 2]), torch.tensor([0, 2, 1, 4, 3])]
    other = torch.stack([view[order] for view, order in zip(start, orders, strict=True)])
    return torch.stack([start, other + 0.01]), orders


def test_tokens_are_matched_with_their_nearest_for_each_view() -> None:
    waypoints, _ = shuffled_waypoints()
    matched = match_tokens(waypoints, "per_view")
    assert torch.equal(matched[0], waypoints[0])
    torch.testing.assert_close(matched[1], waypoints[0] + 0.01)
    assert torch.equal(match_tokens(waypoints, "none"), waypoints)


def test_a_shared_order_is_the_cheapest_single_one() -> None:
    waypoints, _ = shuffled_waypoints()
    matched = match_tokens(waypoints, "shared")

    def cost(order: tuple[int, ...]) -> float:
        return float((waypoints[1][:, list(order)] - waypoints[0]).square().sum())

    cheapest = min(permutations(range(5)), key=cost)
    assert torch.equal(matched[1], waypoints[1][:, list(cheapest)])


def test_each_waypoint_is_matched_with_the_one_before_it() -> None:
    waypoints, orders = shuffled_waypoints()
    third = torch.stack([view[order] for view, order in zip(waypoints[1], orders, strict=True)])
    matched = match_tokens(torch.cat([waypoints, third[None]]), "per_view")
    torch.testing.assert_close(matched[2], matched[1])
