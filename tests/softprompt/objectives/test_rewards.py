"""Rewards and statistics against slow, obvious versions, their gradients, and what they prefer."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from softprompt.metrics import psnr_per_view, ssim_per_view
from softprompt.objectives import rewards
from softprompt.objectives.rewards import (
    REWARDS,
    background_colour,
    colour_entropy,
    edge_density,
    foreground_share,
    statistics_of_truth,
)
from train.options import checks as objective_options

Views = tuple[Tensor, Tensor, Tensor]


def scene(size: int = 8, objects: int = 2, views: int = 3) -> Views:
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


def random_views(size: int = 6) -> Tensor:
    return torch.rand(1, 2, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------- slow versions, of one object's pictures


def slow_soft(pictures: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """[V, S, S]"""
    colour = torch.cat([t[:, m[0] == 0] for t, m in zip(truth, masks, strict=True)], dim=1).mean(dim=1)
    return torch.stack([1 - (-sum((p[c] - colour[c]) ** 2 for c in range(3)) / 0.01).exp() for p in pictures])


def slow_psnr(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    return -sum(math.log10(((v - t) ** 2).mean()) for v, t in zip(views, truth, strict=True)) / len(views)


def slow_silhouette(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    pairs = zip(slow_soft(views, truth, masks), slow_soft(truth, truth, masks), strict=True)
    return sum(float(torch.minimum(*pair).sum() / torch.maximum(*pair).sum()) for pair in pairs) / len(views)


def slow_description(picture: Tensor, soft: Tensor) -> Tensor:
    total = soft.sum()
    mean = [(soft * channel).sum() / total for channel in picture]
    deviation = [((soft * (channel - m) ** 2).sum() / total + 1e-6).sqrt() for channel, m in zip(picture, mean, strict=True)]
    return torch.stack(mean + deviation + [band.sum() / total for band in soft.chunk(8)])


def slow_consistency(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    ours, true = (list(map(slow_description, kind, slow_soft(kind, truth, masks))) for kind in (views, truth))
    pairs = [(i, j) for i in range(len(ours)) for j in range(i + 1, len(ours))]
    return -sum(float((((ours[i] - ours[j]) - (true[i] - true[j])) ** 2).mean()) for i, j in pairs) / len(pairs)


def slow_sharpness(views: Tensor, truth: Tensor, masks: Tensor) -> float:
    across, down = views[..., 1:] - views[..., :-1], views[..., 1:, :] - views[..., :-1, :]
    return float(across.abs().mean() + down.abs().mean()) / 2


SLOW = {
    "psnr": slow_psnr,
    "silhouette": slow_silhouette,
    "consistency": slow_consistency,
    "sharpness": slow_sharpness,
    "ssim": lambda views, truth, masks: float(ssim_per_view(views[None], truth[None]).mean()),
}

# ------------------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_equals_its_slow_version(name: str) -> None:
    views, truth, masks = scene()
    expected = [SLOW[name](*one) for one in zip(views, truth, masks, strict=True)]
    found = REWARDS[name](views.float(), truth.float(), masks.float())
    assert found.shape == (2,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", REWARDS)
def test_the_gradient_of_a_reward_is_that_of_finite_differences(name: str) -> None:
    views, truth, masks = scene(objects=1, views=2)
    assert torch.autograd.gradcheck(lambda v: REWARDS[name](v, truth, masks), (views.requires_grad_(),))


@pytest.mark.parametrize(("name", "best"), [("psnr", 10.0), ("ssim", 1.0), ("silhouette", 1.0), ("consistency", 0.0)])
def test_no_views_are_judged_better_than_the_true_ones(name: str, best: float) -> None:
    views, truth, masks = scene()
    assert REWARDS[name](truth, truth, masks).tolist() == pytest.approx([best] * 2, abs=1e-6)
    assert (REWARDS[name](views, truth, masks) < best).all()


def test_psnr_is_a_tenth_of_the_decibels_of_the_metrics() -> None:
    views, truth, masks = scene(objects=1)
    assert float(rewards.psnr(views, truth, masks)) == pytest.approx(float(psnr_per_view(views, truth).mean()) / 10, rel=1e-5)


def test_the_silhouette_ignores_the_inside_and_consistency_what_all_views_share() -> None:
    _, truth, masks = scene()
    recoloured = torch.where(masks > 0, torch.tensor([0.1, 0.2, 0.4]).double()[:, None, None], truth)
    assert rewards.silhouette(recoloured, truth, masks).min() > 0.9 > rewards.ssim(recoloured, truth, masks).max()
    darker = torch.where(masks > 0, truth - 0.05, truth)
    one_darker = torch.where((masks > 0) & (torch.arange(3) == 0)[:, None, None, None], truth - 0.05, truth)
    assert rewards.consistency(darker, truth, masks).min() > 0.2 * rewards.consistency(one_darker, truth, masks).max()


@pytest.mark.parametrize("name", rewards.NEED_BACKGROUND)
def test_pictures_without_transparency_are_refused_where_the_background_must_be_known(name: str) -> None:
    views, truth, masks = scene()
    with pytest.raises(ValueError, match="masks leave no background: the pictures have no transparency"):
        REWARDS[name](views, truth, torch.ones_like(masks))


def test_clip_similarity_is_the_mean_cosine_of_the_encoders_embeddings() -> None:
    projection = torch.randn(3 * 16, 5, generator=torch.Generator().manual_seed(0))
    encoder = lambda pixels: SimpleNamespace(image_embeds=pixels.flatten(1) @ projection)  # noqa: E731
    similarity = rewards.clip_similarity(encoder, 4)
    views, truth, masks = (x.float() for x in scene())
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (rewards.CLIP_MEAN, rewards.CLIP_DEVIATION))

    def slow(picture: Tensor) -> Tensor:
        scaled = torch.nn.functional.interpolate(picture[None], size=(4, 4), mode="bicubic", antialias=True)[0].clamp(0, 1)
        return torch.nn.functional.normalize(((scaled - mean) / deviation).flatten() @ projection, dim=0)

    expected = [sum(float(slow(views[b, v]) @ slow(truth[b, v])) for v in range(3)) / 3 for b in range(2)]
    assert similarity(views, truth, masks).tolist() == pytest.approx(expected, rel=1e-5)
    assert similarity(truth, truth, masks).tolist() == pytest.approx([1, 1])
    views.requires_grad_()
    similarity(views, truth, masks).sum().backward()
    assert views.grad is not None and views.grad.any()


def test_the_names_that_the_option_takes_are_those_there_are() -> None:
    assert {*REWARDS, "clip"} == set(objective_options.REWARD_NAMES)


# --------------------------------------------------------------------------------------------------------- statistics


def test_the_statistics_equal_their_slow_versions() -> None:
    views = random_views()
    edges, entropies, shares = edge_density(views), colour_entropy(views), foreground_share(views, torch.ones(1, 3))
    for v, picture in enumerate(views[0]):
        grey, pixels = picture.mean(dim=0).tolist(), picture.flatten(1).T.tolist()
        at_edge = [
            max(abs(grey[y][x + 1] - grey[y][x]), abs(grey[y + 1][x] - grey[y][x])) > 0.1 for y in range(5) for x in range(5)
        ]
        assert float(edges[0, v]) == pytest.approx(sum(at_edge) / 25)
        colours = Counter(tuple(min(7, int(8 * c)) for c in pixel) for pixel in pixels)
        entropy = -sum(n / 36 * math.log2(n / 36) for n in colours.values())
        assert float(entropies[0, v]) == pytest.approx(entropy, rel=1e-5)
        assert float(shares[0, v]) == pytest.approx(sum(math.dist(pixel, (1, 1, 1)) > 0.1 for pixel in pixels) / 36)


def test_pictures_that_are_not_finite_have_statistics() -> None:
    views = torch.full((1, 2, 3, 6, 6), float("nan"))
    assert colour_entropy(views).isfinite().all() and edge_density(views).isfinite().all()


def test_the_background_is_the_mean_colour_where_the_masks_are_zero() -> None:
    truth, masks = torch.full((1, 2, 3, 4, 4), 0.5), torch.zeros(1, 2, 1, 4, 4)
    truth[0, 0, :, :2], masks[0, 0, :, :2] = 0.9, 1
    assert background_colour(truth, masks).tolist() == [pytest.approx([0.5, 0.5, 0.5])]


def test_half_transparent_fur_does_not_darken_the_background() -> None:
    truth, masks = torch.ones(1, 1, 3, 4, 4), torch.zeros(1, 1, 1, 4, 4)
    truth[..., :2], masks[..., :2] = 0.5, 0.5
    assert background_colour(truth, masks).tolist() == [[1, 1, 1]]
    assert background_colour(truth, masks.clamp(min=0.1))[0, 0] < 1, "without an empty pixel, the emptiest count most"


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
    assert float(opaque["foreground"]) == 1, "without a background, nothing is known"
    both = [torch.cat(pair) for pair in ((torch.ones_like(truth), truth), (truth, truth), (masks, torch.ones_like(masks)))]
    assert float(statistics_of_truth(*both)["foreground"]) == pytest.approx(0.01 / 0.26), "of the objects that have one"


def test_soft_pictures_of_many_pixels_have_edges_and_a_little_more_of_them_changes_little() -> None:
    ramp = torch.linspace(-1, 1, 512)
    radius = (ramp[:, None] ** 2 + ramp[None] ** 2).sqrt()
    soft, softer, ruined = (torch.sigmoid((radius - 0.5) * k).expand(1, 2, 3, 512, 512) for k in (48, 40, 6))
    masks = (soft < 0.999).float()[:, :, :1]
    assert not edge_density(soft).any(), "at its own size, no two neighbours differ by a tenth"
    found = statistics_of_truth(softer, soft, masks)
    assert found["edges"] == pytest.approx(1, abs=0.1) and found["foreground"] == pytest.approx(1, abs=0.1)
    assert statistics_of_truth(ruined, soft, masks)["edges"] < 0.5
    flat = torch.full_like(soft, 0.9)
    assert 1 < statistics_of_truth(soft, flat, masks)["edges"] < 20, "true pictures without an edge: finite, no hundreds"
