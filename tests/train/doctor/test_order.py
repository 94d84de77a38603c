"""Views in the wrong order."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.train.doctor.conftest import SIZE, Doctor, measured, mouse, reorder
from train.doctor.checks import find, not_inspected
from train.doctor.inspect import Picture
from train.doctor.order import better_order, exchange_gains, mirror_overlap, view_distances
from train.doctor.samples import Sample


def findings(pictures: Sequence[Sequence[Picture | None]]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Kind, samples and views of all findings."""
    samples = [Sample(str(n), True, list(views)) for n, views in enumerate(pictures)]
    return [(f.kind, f.samples, f.views) for f in find(samples, 6, SIZE)]


def test_every_exchange_of_two_views_is_found(colony: Path) -> None:
    pictures = measured(colony)
    for number, (a, b) in enumerate(itertools.combinations(range(6), 2)):
        order = list(range(6))
        order[a], order[b] = b, a
        planted = [[views[v] for v in order] if n == number else views for n, views in enumerate(pictures)]
        assert findings(planted) == [("view_order", (number,), (a, b))]


@pytest.mark.parametrize("order", [(0, 5, 4, 3, 2, 1), (5, 4, 3, 2, 1, 0), (1, 2, 3, 4, 5, 0), (3, 4, 5, 0, 1, 2)])
def test_a_ring_that_is_reversed_or_turned_is_found(herd: Path, doctor: Doctor, order: tuple[int, ...]) -> None:
    reorder(mouse(herd), order)
    code, found = doctor(herd)
    assert code == 0 and list(found) == ["view_order"] and [samples for samples, _ in found["view_order"]] == [["mice-00007"]]
    detail = json.loads((herd.parent / "doctor" / "doctor.json").read_text())["findings"][0]["detail"]
    assert f"the ring looks {'reversed' if order[0] - order[1] in (1, -5) else 'turned'}" in detail


def test_an_order_that_all_share_is_found_where_opposite_views_are_not(colony: Path, heads: Path) -> None:
    for folder in (colony, heads):
        pictures = [[*views[1:], views[0]] for views in measured(folder)]
        assert [kind for kind, *_ in findings(pictures)] == ["view_order_of_all"]


def test_better_order_returns_the_assignment_and_its_gain() -> None:
    distance = np.array([[4.0, 1, 9], [1, 4, 9], [9, 9, 2]])
    assert better_order(distance) == ([1, 0, 2], pytest.approx(1 - 4 / 10))
    assert better_order(np.eye(3) * -1 + 1) == ([0, 1, 2], 0.0)


def test_exchange_gains_equal_those_of_better_order() -> None:
    distance = np.random.default_rng(0).random((4, 3, 3)) + 1 - np.eye(3)
    gains = exchange_gains(distance)
    for one, expected in zip(distance, gains, strict=True):
        for (a, b), gain in zip(((0, 1), (0, 2), (1, 2)), expected, strict=True):
            order = [0, 1, 2]
            order[a], order[b] = b, a
            assert better_order(one[order]) == (order, pytest.approx(gain))


def test_views_that_look_alike_are_named(colony: Path) -> None:
    samples = [Sample(str(n), True, [*views[n % 6 :], *views[: n % 6]]) for n, views in enumerate(measured(colony))]
    assert any("0% would be noticed" in sentence for sentence in not_inspected(samples))


def test_views_are_compared_by_silhouette_and_pattern_not_by_brightness() -> None:
    generator = np.random.default_rng(0)
    alpha = (generator.random((1, 6, 16, 16, 1)) > 0.5).astype(float)
    colour = generator.random((1, 6, 16, 16, 3)) * 0.4 * alpha
    light = np.concatenate([colour, alpha], -1)
    dark = np.concatenate([colour + 0.5 * alpha, alpha], -1)
    distance = view_distances(np.concatenate([light, dark]))
    assert distance[:, range(6), range(6)] == pytest.approx(0)
    assert distance[:, 0, 1:].min() > 50  # about half of 256 pixels


def test_mirror_overlap_is_one_for_mirror_images() -> None:
    alpha = np.zeros((1, 2, 4, 4))
    alpha[0, 0, :, :2], alpha[0, 1, :, 2:] = 1, 1
    assert mirror_overlap(alpha)[0].tolist() == [[0, 1], [1, 0]]
