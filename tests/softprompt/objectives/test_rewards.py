"""Rewards against slow, obvious versions in float64, their gradients, and what they prefer."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from softprompt.metrics import psnr_per_view, ssim_per_view
from softprompt.objectives import rewards
from softprompt.objectives.rewards import REWARDS
from train.options import checks as objective_options

SIZE = 8


def scene(size: int = SIZE, objects: int = 2, views: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Generated and true views and masks: a coloured block on white, elsewhere in each view."""
    generator = torch.Generator().manual_seed(0)
    truth, masks = torch.ones(objects, views, 3, size, size).double(), torch.zeros(objects, views, 1, size, size).double()
    for b in range(objects):
        for v in range(views):
            block = (b, v, slice(None), slice(1, size - 2), slice(1 + v % 2, size - 2))
            truth[block] = 0.1 + 0.7 * torch.rand(truth[block].shape, generator=generator).double()
            masks[block] = 1
    views_ = (truth + 0.1 * torch.randn(truth.shape, generator=generator).double()).clamp(0.01, 0.99)
    return views_, truth, masks


def pixels(picture: Tensor) -> list[tuple[float, ...]]:
    """[3, S, S] => colours, row by row."""
    return [tuple(float(c) for c in picture[:, y, x]) for y in range(picture.shape[1]) for x in range(picture.shape[2])]


def slow_background(truth: Tensor, masks: Tensor) -> tuple[float, ...]:
    colours = [
        c for v in range(len(truth)) for c, m in zip(pixels(truth[v]), masks[v].flatten().tolist(), strict=True) if m == 0
    ]
    return tuple(sum(c[i] for c in colours) / len(colours) for i in range(3))


def slow_soft(picture: Tensor, background: tuple[float, ...]) -> list[float]:
    return [
        1 - math.exp(-sum((c - b) ** 2 for c, b in zip(colour, background, strict=True)) / 0.01) for colour in pixels(picture)
    ]


def slow_psnr(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    del masks
    errors = [
        sum((a - b) ** 2 for a, b in zip(v.flatten().tolist(), t.flatten().tolist(), strict=True)) / v.numel()
        for v, t in zip(views, truth, strict=True)
    ]
    return sum(-math.log10(e) for e in errors) / len(errors)


def slow_silhouette(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    background, shares = slow_background(truth, masks), []
    for v, t in zip(views, truth, strict=True):
        ours, true = slow_soft(v, background), slow_soft(t, background)
        shares.append(sum(map(min, ours, true)) / sum(map(max, ours, true)))
    return sum(shares) / len(shares)


def slow_description(picture: Tensor, background: tuple[float, ...]) -> list[float]:
    soft, colours, size = slow_soft(picture, background), pixels(picture), picture.shape[1]
    total = sum(soft)
    mean = [sum(m * c[i] for m, c in zip(soft, colours, strict=True)) / total for i in range(3)]
    deviation = [
        math.sqrt(sum(m * (c[i] - mean[i]) ** 2 for m, c in zip(soft, colours, strict=True)) / total + 1e-6) for i in range(3)
    ]
    rows = [sum(soft[y * size : (y + 1) * size]) for y in range(size)]
    each = size // 8
    return mean + deviation + [sum(rows[k * each : (k + 1) * each]) / total for k in range(8)]


def slow_consistency(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    background = slow_background(truth, masks)
    ours, true = ([slow_description(p, background) for p in kind] for kind in (views, truth))
    errors = [
        ((ours[i][k] - ours[j][k]) - (true[i][k] - true[j][k])) ** 2
        for i in range(len(ours))
        for j in range(i + 1, len(ours))
        for k in range(len(ours[0]))
    ]
    return -sum(errors) / len(errors)


def slow_sharpness(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    del truth, masks
    found = []
    for step in ((0, 1), (1, 0)):
        differences = [
            abs(float(p[c, y + step[0], x + step[1]] - p[c, y, x]))
            for p in views
            for c in range(3)
            for y in range(p.shape[1] - step[0])
            for x in range(p.shape[2] - step[1])
        ]
        found.append(sum(differences) / len(differences))
    return sum(found) / 2


SLOW = {
    "psnr": slow_psnr,
    "silhouette": slow_silhouette,
    "consistency": slow_consistency,
    "sharpness": slow_sharpness,
    "ssim": lambda views, truth, masks: float(ssim_per_view(views[None], truth[None]).mean()),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_equals_its_slow_version(name: str) -> None:
    views, truth, masks = scene()
    expected = [SLOW[name](*(x[b] for x in (views, truth, masks))) for b in range(2)]
    found = REWARDS[name](views.float(), truth.float(), masks.float())
    assert found.shape == (2,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", REWARDS)
def test_the_gradient_of_a_reward_is_that_of_finite_differences(name: str) -> None:
    views, truth, masks = scene(size=8, objects=1, views=2)
    assert torch.autograd.gradcheck(lambda v: REWARDS[name](v, truth, masks), (views.requires_grad_(),))


@pytest.mark.parametrize("name", ["psnr", "ssim", "silhouette", "consistency"])
def test_no_views_are_judged_better_than_the_true_ones(name: str) -> None:
    views, truth, masks = scene()
    best = {"psnr": 10.0, "ssim": 1.0, "silhouette": 1.0, "consistency": 0.0}[name]
    assert REWARDS[name](truth, truth, masks).tolist() == pytest.approx([best] * 2, abs=1e-6)
    assert (REWARDS[name](views, truth, masks) < best).all()


def test_psnr_is_a_tenth_of_the_decibels_of_the_metrics() -> None:
    views, truth, masks = scene(objects=1)
    expected = float(psnr_per_view(views, truth).mean()) / 10
    assert float(rewards.psnr(views, truth, masks)) == pytest.approx(expected, rel=1e-5)


def test_the_silhouette_takes_no_notice_of_what_is_inside_it_and_consistency_none_of_what_all_views_share() -> None:
    _, truth, masks = scene()
    recoloured = torch.where(masks > 0, torch.tensor([0.1, 0.2, 0.4]).double()[:, None, None], truth)
    assert rewards.silhouette(recoloured, truth, masks).min() > 0.9 > rewards.ssim(recoloured, truth, masks).max()
    darker = torch.where(masks > 0, truth - 0.05, truth)
    one_darker = torch.where((masks > 0) & (torch.arange(3) == 0)[:, None, None, None], truth - 0.05, truth)
    assert rewards.consistency(darker, truth, masks).min() > 0.2 * rewards.consistency(one_darker, truth, masks).max()


@pytest.mark.parametrize("name", ["silhouette", "consistency"])
def test_pictures_without_transparency_are_refused_where_the_background_must_be_known(name: str) -> None:
    views, truth, masks = scene()
    with pytest.raises(ValueError, match="masks leave no background: the pictures have no transparency"):
        REWARDS[name](views, truth, torch.ones_like(masks))


def test_clip_similarity_is_the_mean_cosine_of_the_encoders_embeddings() -> None:
    projection = torch.randn(3 * 16, 5, generator=torch.Generator().manual_seed(0))
    encoder = lambda pixels: SimpleNamespace(image_embeds=pixels.flatten(1) @ projection)  # noqa: E731
    similarity = rewards.clip_similarity(encoder, 4)
    views, truth, masks = (x.float() for x in scene())
    expected = []
    for b in range(2):
        cosines = []
        for v in range(3):
            embeds = []
            for picture in (views[b, v], truth[b, v]):
                scaled = torch.nn.functional.interpolate(picture[None], size=(4, 4), mode="bicubic", antialias=True).clamp(0, 1)
                mean, deviation = torch.tensor(rewards.CLIP_MEAN), torch.tensor(rewards.CLIP_DEVIATION)
                embeds.append(((scaled[0] - mean[:, None, None]) / deviation[:, None, None]).flatten() @ projection)
            cosines.append(float(embeds[0] @ embeds[1] / embeds[0].norm() / embeds[1].norm()))
        expected.append(sum(cosines) / 3)
    assert similarity(views, truth, masks).tolist() == pytest.approx(expected, rel=1e-5)
    assert similarity(truth, truth, masks).tolist() == pytest.approx([1, 1])
    views.requires_grad_()
    similarity(views, truth, masks).sum().backward()
    assert views.grad is not None and views.grad.any()


def test_the_names_that_the_option_takes_are_those_there_are() -> None:
    assert {*REWARDS, "clip"} == set(objective_options.REWARD_NAMES)
