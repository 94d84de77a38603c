"""Picture statistics against slow, obvious versions, and what they see."""

import math
from collections import Counter

import pytest
import torch

from softprompt.objectives.statistics import (
    background_colour,
    colour_entropy,
    edge_density,
    foreground_share,
    statistics_of_truth,
)


def random_views(size: int = 6) -> torch.Tensor:
    return torch.rand(1, 2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_statistics_equal_their_slow_versions() -> None:
    views = random_views()
    edges, entropies, shares = edge_density(views), colour_entropy(views), foreground_share(views, torch.ones(1, 3))
    for v in range(2):
        picture = views[0, v]
        grey = [[sum(float(picture[c, y, x]) for c in range(3)) / 3 for x in range(6)] for y in range(6)]
        at_edge = [
            max(abs(grey[y][x + 1] - grey[y][x]), abs(grey[y + 1][x] - grey[y][x])) > 0.1 for y in range(5) for x in range(5)
        ]
        assert float(edges[0, v]) == pytest.approx(sum(at_edge) / 25)
        colours = Counter(tuple(min(7, int(8 * float(picture[c, y, x]))) for c in range(3)) for y in range(6) for x in range(6))
        entropy = -sum(n / 36 * math.log2(n / 36) for n in colours.values())
        assert float(entropies[0, v]) == pytest.approx(entropy, rel=1e-5)
        far = [math.dist([float(picture[c, y, x]) for c in range(3)], (1, 1, 1)) > 0.1 for y in range(6) for x in range(6)]
        assert float(shares[0, v]) == pytest.approx(sum(far) / 36)


def test_pictures_that_are_no_numbers_have_statistics() -> None:
    views = torch.full((1, 2, 3, 6, 6), float("nan"))
    assert colour_entropy(views).isfinite().all() and edge_density(views).isfinite().all()


def test_the_background_is_the_mean_colour_where_the_masks_are_zero() -> None:
    truth, masks = torch.full((1, 2, 3, 4, 4), 0.5), torch.zeros(1, 2, 1, 4, 4)
    truth[0, 0, :, :2], masks[0, 0, :, :2] = 0.9, 1
    assert background_colour(truth, masks).tolist() == [pytest.approx([0.5, 0.5, 0.5])]
    with pytest.raises(ValueError, match="no background"):
        background_colour(truth, torch.ones_like(masks))


def test_grey_blurred_or_empty_pictures_fall_below_the_true_ones_where_they_lack_something() -> None:
    truth, masks = torch.ones(1, 2, 3, 16, 16), torch.zeros(1, 2, 1, 16, 16)
    truth[..., 4:12, 4:12], masks[..., 4:12, 4:12] = 0.8 * random_views(8), 1
    alike = statistics_of_truth(truth, truth, masks)
    assert {name: float(value) for name, value in alike.items()} == pytest.approx(dict(edges=1, colours=1, foreground=1))
    # 64 of 256 pixels are the object; a hundredth is added to both sides of the ratio.
    assert float(statistics_of_truth(torch.ones_like(truth), truth, masks)["foreground"]) == pytest.approx(0.01 / 0.26)
    flat = torch.where(masks > 0, truth[..., 4:12, 4:12].mean(), truth)
    found = statistics_of_truth(flat, truth, masks)
    assert float(found["foreground"]) == pytest.approx(1) and found["edges"] < 0.5 and found["colours"] < 0.5
    opaque = statistics_of_truth(torch.ones_like(truth), truth, torch.ones_like(masks))
    assert float(opaque["foreground"]) == 1, "there is no background to tell an object from: nothing is known"
    both = [torch.cat(pair) for pair in ((torch.ones_like(truth), truth), (truth, truth), (masks, torch.ones_like(masks)))]
    assert float(statistics_of_truth(*both)["foreground"]) == pytest.approx(0.01 / 0.26), "of the objects that have one"


def test_soft_pictures_of_many_pixels_have_edges_and_a_little_more_of_them_is_no_news() -> None:
    ramp = torch.linspace(-1, 1, 512)
    radius = (ramp[:, None] ** 2 + ramp[None] ** 2).sqrt()
    soft, softer, ruined = (torch.sigmoid((radius - 0.5) * k).expand(1, 2, 3, 512, 512) for k in (48, 40, 6))
    masks = (soft < 0.999).float()[:, :, :1]
    assert not edge_density(soft).any(), "at its own size, no two neighbours differ by a tenth"
    found = statistics_of_truth(softer, soft, masks)
    assert found["edges"] == pytest.approx(1, abs=0.1) and found["foreground"] == pytest.approx(1, abs=0.1)
    assert statistics_of_truth(ruined, soft, masks)["edges"] < 0.5
    flat = torch.full_like(soft, 0.9)
    assert 1 < statistics_of_truth(soft, flat, masks)["edges"] < 20, "of true pictures without an edge: finite, no hundreds"


def test_half_transparent_fur_does_not_darken_the_background() -> None:
    truth, masks = torch.ones(1, 1, 3, 4, 4), torch.zeros(1, 1, 1, 4, 4)
    truth[..., :2], masks[..., :2] = 0.5, 0.5
    assert background_colour(truth, masks).tolist() == [[1, 1, 1]]
    assert background_colour(truth, masks.clamp(min=0.1))[0, 0] < 1, "where none is empty, what is nearest to it counts most"
