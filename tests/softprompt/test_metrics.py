"""Metrics against slow, obvious versions of themselves, and at the ends of their scales."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softprompt import metrics

BOTH = pytest.mark.parametrize("metric", [metrics.psnr_per_view, metrics.ssim_per_view])


def random_views(seed: int, b: int = 2, v: int = 3, size: int = 16) -> Tensor:
    return torch.rand(b, v, 3, size, size, generator=torch.Generator().manual_seed(seed))


def square_mask(b: int = 2, v: int = 3, size: int = 16) -> Tensor:
    mask = torch.zeros(b, v, 1, size, size)
    mask[..., 4:12, 5:11] = 1
    return mask


def slow_psnr(generated: Tensor, truth: Tensor) -> list[float]:
    """Picture by picture; the mean over objects."""
    errors = [[float(((x - y) ** 2).mean()) for x, y in zip(*pair, strict=True)] for pair in zip(generated, truth, strict=True)]
    return [sum(-10 * math.log10(error) for error in view) / len(view) for view in zip(*errors, strict=True)]


def slow_ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """One channel [S, S] at a time, pixel by pixel, in float64."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(weights, weights) / weights.sum() ** 2
    padded = [torch.nn.functional.pad(a.double()[None, None], (5, 5, 5, 5), mode="reflect")[0, 0] for a in (x, y)]
    result = torch.zeros(x.shape, dtype=torch.float64)
    for row, column in itertools.product(*map(range, x.shape)):
        a, b = (p[row : row + 11, column : column + 11] for p in padded)
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 0.01**2, 0.03**2
        result[row, column] = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
            (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
        )
    return result


def test_psnr_matches_the_formula_picture_by_picture_and_with_a_mask_the_foreground_only() -> None:
    generated, truth, mask = random_views(0), random_views(1), square_mask()
    assert metrics.psnr_per_view(generated, truth).tolist() == pytest.approx(slow_psnr(generated, truth), abs=1e-4)
    expected = slow_psnr(generated[..., 4:12, 5:11], truth[..., 4:12, 5:11])
    found = metrics.psnr_per_view(generated, truth, mask)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    elsewhere = torch.where(mask > 0, generated, 1 - generated)
    assert torch.equal(metrics.psnr_per_view(elsewhere, truth, mask), found)


@BOTH
def test_a_mask_of_ones_changes_nothing(metric: Callable[..., Tensor]) -> None:
    generated, truth = random_views(0), random_views(1)
    ones = torch.ones(2, 3, 1, 16, 16)
    torch.testing.assert_close(metric(generated, truth, ones), metric(generated, truth), rtol=1e-4, atol=1e-5)


def test_half_transparent_pixels_count_half() -> None:
    generated, truth, mask = torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 1, 8, 8)
    generated[..., 0, 0], generated[..., 0, 1] = 0.1, 0.4
    mask[..., 0, 0], mask[..., 0, 1] = 1.0, 0.5
    expected = -10 * math.log10((0.1**2 + 0.5 * 0.4**2) / 1.5)
    assert float(metrics.psnr_per_view(generated, truth, mask)) == pytest.approx(expected, abs=1e-4)


def test_ssim_matches_a_pixel_by_pixel_version_and_is_the_mean_over_objects() -> None:
    truth = random_views(0, b=2, v=1, size=12)
    generated = (truth + 0.3 * random_views(1, b=2, v=1, size=12)).clamp(0, 1)
    maps = torch.stack([torch.stack([slow_ssim_map(generated[b, 0, c], truth[b, 0, c]) for c in range(3)]) for b in range(2)])
    assert float(metrics.ssim_per_view(generated, truth)) == pytest.approx(float(maps.mean()), abs=1e-4)
    mask = torch.zeros(2, 1, 1, 12, 12)
    mask[..., 2:7, 3:11] = 1
    masked = metrics.ssim_per_view(generated, truth, mask)
    assert float(masked) == pytest.approx(float(maps[..., 2:7, 3:11].mean()), abs=1e-4)


@pytest.mark.parametrize("mask", [None, square_mask()])
def test_identical_pictures_reach_the_top_of_both_scales_and_broken_ones_are_not_hidden(mask: Tensor | None) -> None:
    views = random_views(0)
    assert metrics.psnr_per_view(views, views, mask).tolist() == [metrics.MAX_PSNR] * 3
    assert metrics.ssim_per_view(views, views, mask).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    other = views.clone()
    other[1, 2] = 1 - other[1, 2]
    psnr = metrics.psnr_per_view(other, views, mask)
    assert psnr[:2].tolist() == [metrics.MAX_PSNR] * 2
    assert metrics.MAX_PSNR / 2 < psnr[2] < metrics.MAX_PSNR, "one of two objects is still identical"
    other[0, 1] = float("nan")
    assert metrics.psnr_per_view(other, views, mask).isnan().tolist() == [False, True, False]


@BOTH
def test_a_picture_without_foreground_is_an_error(metric: Callable[..., Tensor]) -> None:
    mask = square_mask()
    mask[1, 2] = 0
    with pytest.raises(ValueError, match=r"mask: object 1, view 2 has no foreground"):
        metric(random_views(0), random_views(1), mask)


@BOTH
@pytest.mark.parametrize("mask", [None, square_mask()])
def test_half_precision_pictures_are_measured_in_float32(metric: Callable[..., Tensor], mask: Tensor | None) -> None:
    generated, truth = random_views(0).bfloat16(), random_views(1).bfloat16()
    torch.testing.assert_close(metric(generated, truth, mask), metric(generated.float(), truth.float(), mask))


def test_view_separation_matches_a_loop_over_pairs_and_spans_its_range() -> None:
    views = random_views(0, b=3, v=4)
    pairs = [float(((x - y) ** 2).mean().sqrt()) for one in views for x, y in itertools.combinations(one, 2)]
    assert metrics.view_separation(views) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert metrics.view_separation(views[:, :1].expand_as(views)) == 0
    assert metrics.view_separation(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])[None]) == pytest.approx(1)


def test_separation_ratio_is_one_for_the_truth_and_zero_for_collapsed_views() -> None:
    truth = random_views(0)
    collapsed = truth[:, :1].expand_as(truth)
    halfway = truth.mean(dim=1, keepdim=True).lerp(truth, 0.5)
    assert metrics.separation_ratio(truth, truth) == 1
    assert metrics.separation_ratio(collapsed, truth) == 0
    assert metrics.separation_ratio(halfway, truth) == pytest.approx(0.5, abs=1e-5)
    assert math.isnan(metrics.separation_ratio(truth, collapsed))


def test_copy_score_detects_a_copy() -> None:
    truth = random_views(0)
    pictures = truth[:, 0]
    copies = pictures[:, None].expand_as(truth)
    assert metrics.copy_score(copies, truth, pictures) == 1
    assert metrics.copy_score(truth, truth, pictures) == 0
    assert metrics.copy_score(copies.lerp(truth, 0.5), truth, pictures) == pytest.approx(0.75, abs=1e-5)
    assert metrics.copy_score(copies.lerp(truth, 2.0), truth, pictures) == pytest.approx(-3, abs=1e-4)


def test_copy_score_matches_a_loop_and_ignores_the_reference_view() -> None:
    generated, truth, pictures = random_views(0), random_views(1), random_views(2)[:, 0]
    scores = []
    for b, v in itertools.product(range(2), range(1, 3)):
        generated_error, true_error = (float(((x[b, v] - pictures[b]) ** 2).mean()) for x in (generated, truth))
        scores.append(1 - generated_error / true_error)
    assert metrics.copy_score(generated, truth, pictures) == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    generated[:, 0] = pictures
    assert metrics.copy_score(generated, truth, pictures) == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_copy_score_leaves_out_views_that_truly_look_like_the_picture() -> None:
    truth, generated = random_views(0, b=1), random_views(1, b=1)
    truth[0, 1] = truth[0, 0]
    generated[0, 2] = truth[0, 0]
    assert metrics.copy_score(generated, truth, truth[:, 0]) == 1
    alike = truth[:, :1].expand_as(truth)
    assert math.isnan(metrics.copy_score(generated, alike, truth[:, 0]))
