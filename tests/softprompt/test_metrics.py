"""Metrics against slow, obvious versions of themselves, and at the ends of their scales."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from softprompt import metrics


def random_views(seed: int, b: int = 2, v: int = 3, size: int = 16) -> Tensor:
    return torch.rand(b, v, 3, size, size, generator=torch.Generator().manual_seed(seed))


def square_mask(b: int = 2, v: int = 3, size: int = 16) -> Tensor:
    mask = torch.zeros(b, v, 1, size, size)
    mask[..., 4:12, 5:11] = 1
    return mask


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


# -------------------------------------------------------------------------------------------------------- PSNR, SSIM


def test_psnr_matches_the_formula_picture_by_picture():
    generated, truth = random_views(0), random_views(1)
    expected = [
        sum(-10 * math.log10(float(((generated[b, v] - truth[b, v]) ** 2).mean())) for b in range(2)) / 2 for v in range(3)
    ]
    assert metrics.psnr_per_view(generated, truth).tolist() == pytest.approx(expected, abs=1e-4)


def test_foreground_psnr_looks_at_the_foreground_only():
    generated, truth, mask = random_views(0), random_views(1), square_mask()
    expected = []
    for v in range(3):
        errors = [float((generated[b, v, :, 4:12, 5:11] - truth[b, v, :, 4:12, 5:11]).square().mean()) for b in range(2)]
        expected.append(sum(-10 * math.log10(error) for error in errors) / 2)
    result = metrics.psnr_per_view(generated, truth, mask)
    assert result.tolist() == pytest.approx(expected, abs=1e-4)
    elsewhere = torch.where(mask > 0, generated, 1 - generated)
    assert torch.equal(metrics.psnr_per_view(elsewhere, truth, mask), result)


def test_a_mask_of_ones_changes_nothing():
    generated, truth = random_views(0), random_views(1)
    ones = torch.ones(2, 3, 1, 16, 16)
    for metric in (metrics.psnr_per_view, metrics.ssim_per_view):
        torch.testing.assert_close(metric(generated, truth, ones), metric(generated, truth), rtol=1e-4, atol=1e-5)


def test_half_transparent_pixels_count_half():
    generated, truth = torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 3, 8, 8)
    generated[..., 0, 0], generated[..., 0, 1] = 0.1, 0.4
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., 0, 0], mask[..., 0, 1] = 1.0, 0.5
    expected = -10 * math.log10((0.1**2 + 0.5 * 0.4**2) / 1.5)
    assert float(metrics.psnr_per_view(generated, truth, mask)) == pytest.approx(expected, abs=1e-4)


def test_ssim_matches_a_pixel_by_pixel_version():
    truth = random_views(0, b=1, v=2, size=12)
    generated = (truth + 0.3 * random_views(1, b=1, v=2, size=12)).clamp(0, 1)
    maps = torch.stack([torch.stack([slow_ssim_map(generated[0, v, c], truth[0, v, c]) for c in range(3)]) for v in range(2)])
    whole = metrics.ssim_per_view(generated, truth)
    assert whole.tolist() == pytest.approx(maps.mean(dim=(1, 2, 3)).tolist(), abs=1e-4)
    mask = torch.zeros(1, 2, 1, 12, 12)
    mask[..., 2:7, 3:11] = 1
    masked = metrics.ssim_per_view(generated, truth, mask)
    assert masked.tolist() == pytest.approx(maps[:, :, 2:7, 3:11].mean(dim=(1, 2, 3)).tolist(), abs=1e-4)


def test_ssim_is_the_mean_over_objects():
    generated, truth = random_views(0), random_views(1)
    alone = [metrics.ssim_per_view(generated[b : b + 1], truth[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(metrics.ssim_per_view(generated, truth), torch.stack(alone).mean(dim=0))


@pytest.mark.parametrize("mask", [None, square_mask()])
def test_identical_pictures_reach_the_top_of_both_scales(mask):
    views = random_views(0)
    assert metrics.psnr_per_view(views, views, mask).tolist() == [metrics.MAX_PSNR] * 3
    assert metrics.ssim_per_view(views, views, mask).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    other = views.clone()
    other[1, 2] = 1 - other[1, 2]
    psnr = metrics.psnr_per_view(other, views, mask)
    assert psnr[:2].tolist() == [metrics.MAX_PSNR] * 2
    assert metrics.MAX_PSNR / 2 < psnr[2] < metrics.MAX_PSNR, "one of two objects is still identical"


@pytest.mark.parametrize("metric", [metrics.psnr_per_view, metrics.ssim_per_view])
def test_picture_without_foreground_is_an_error(metric):
    mask = square_mask()
    mask[1, 2] = 0
    with pytest.raises(ValueError, match=r"mask: object 1, view 2 has no foreground"):
        metric(random_views(0), random_views(1), mask)


def test_half_precision_pictures_are_measured_in_float32():
    generated, truth, mask = random_views(0).bfloat16(), random_views(1).bfloat16(), square_mask()
    for metric in (metrics.psnr_per_view, metrics.ssim_per_view):
        torch.testing.assert_close(metric(generated, truth), metric(generated.float(), truth.float()))
        torch.testing.assert_close(metric(generated, truth, mask), metric(generated.float(), truth.float(), mask))


def test_broken_pictures_are_not_hidden():
    generated = random_views(0)
    generated[0, 1] = float("nan")
    for mask in (None, square_mask()):
        assert metrics.psnr_per_view(generated, random_views(1), mask).isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------- separation, copies


def test_view_separation_matches_a_loop_over_pairs():
    views = random_views(0, b=3, v=4)
    pairs = [
        float((views[b, i] - views[b, j]).square().mean().sqrt())
        for b in range(3)
        for i, j in itertools.combinations(range(4), 2)
    ]
    assert metrics.view_separation(views) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_view_separation_spans_its_range():
    same = random_views(0)[:, :1].expand(-1, 3, -1, -1, -1)
    assert metrics.view_separation(same) == 0
    apart = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])[None]
    assert metrics.view_separation(apart) == pytest.approx(1)


def test_separation_ratio_is_one_for_the_truth_and_zero_for_collapsed_views():
    truth = random_views(0)
    collapsed = truth[:, :1].expand_as(truth)
    halfway = truth.mean(dim=1, keepdim=True).lerp(truth, 0.5)
    assert metrics.separation_ratio(truth, truth) == 1
    assert metrics.separation_ratio(collapsed, truth) == 0
    assert metrics.separation_ratio(halfway, truth) == pytest.approx(0.5, abs=1e-5)
    assert math.isnan(metrics.separation_ratio(truth, collapsed))


def test_copy_score_detects_a_copy():
    truth = random_views(0)
    pictures = truth[:, 0]
    copies = pictures[:, None].expand_as(truth)
    assert metrics.copy_score(copies, truth, pictures) == 1
    assert metrics.copy_score(truth, truth, pictures) == 0
    assert metrics.copy_score(copies.lerp(truth, 0.5), truth, pictures) == pytest.approx(0.75, abs=1e-5)
    assert metrics.copy_score(copies.lerp(truth, 2.0), truth, pictures) == pytest.approx(-3, abs=1e-4)


def test_copy_score_matches_a_loop_and_ignores_the_view_given():
    generated, truth, pictures = random_views(0), random_views(1), random_views(2)[:, 0]
    scores = []
    for b, v in itertools.product(range(2), range(1, 3)):
        generated_error = float((generated[b, v] - pictures[b]).square().mean())
        scores.append(1 - generated_error / float((truth[b, v] - pictures[b]).square().mean()))
    expected = sum(scores) / len(scores)
    assert metrics.copy_score(generated, truth, pictures) == pytest.approx(expected, abs=1e-5)
    generated[:, 0] = pictures
    assert metrics.copy_score(generated, truth, pictures) == pytest.approx(expected, abs=1e-5)


def test_copy_score_leaves_out_views_that_truly_look_like_the_picture():
    truth = random_views(0, b=1)
    truth[0, 1] = truth[0, 0]
    generated = random_views(1, b=1)
    generated[0, 2] = truth[0, 0]
    assert metrics.copy_score(generated, truth, truth[:, 0]) == 1
    alike = truth[:, :1].expand_as(truth)
    assert math.isnan(metrics.copy_score(generated, alike, truth[:, 0]))
