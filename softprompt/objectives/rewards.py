"""Rewards: plain functions of an object's views and its true ones, that a gradient goes through. Higher is better.

Each takes `views` and `truth`, [B, V, 3, S, S] in [0, 1], and `masks`, [B, V, 1, S, S] in [0, 1], where the object is in the
true views (1 throughout for pictures without transparency), and returns [B]. A reward of one's own has the same signature.
None is from a paper: DRaFT+ maximised scores of text and taste, which say nothing of six views of one object.
"""

from collections.abc import Callable, Mapping

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from softprompt.metrics import ssim_map
from softprompt.objectives.statistics import background_colour

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]

MIN_ERROR = 1e-10
"""Mean squared error below which two pictures count as equal."""
SOFTNESS = 0.1
"""Distance to the background's colour at which a pixel is taken for the object by 63 %."""
BANDS = 8
"""Heights at which the views of an object are compared."""


def psnr(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Closeness to the true views: their mean PSNR in units of 10 dB, -log10 MSE."""
    del masks
    error = reduce((views - truth).square(), "b v c h w -> b v", "mean")
    return -error.clamp(min=MIN_ERROR).log10().mean(dim=1)


def ssim(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Closeness to the true views: their mean structural similarity, at most 1."""
    del masks
    return torch.stack([ssim_map(v, t).mean() for v, t in zip(views, truth, strict=True)])


def silhouette(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Agreement of outlines, whatever is inside: sum min(m, m*) / sum max(m, m*) of the soft masks; mean over views; at most
    1.

    A pixel's soft mask is 1 - exp(-(d / 0.1)^2), d its distance to the background's colour, in both pictures alike.
    Raises: ValueError for pictures without transparency, whose background is not known.
    """
    background = background_colour(truth, masks)
    ours, true = (soft_masks(p, background) for p in (views, truth))
    both, either = (reduce(f(ours, true), "b v h w -> b v", "sum") for f in (torch.minimum, torch.maximum))
    return (both / either.clamp(min=1e-6)).mean(dim=1)


def soft_masks(views: Tensor, background: Tensor) -> Tensor:
    """[B, V, 3, S, S] and [B, 3] => [B, V, S, S] in [0, 1]: how far each pixel is the object."""
    squared = (views - rearrange(background, "b c -> b 1 c 1 1")).square().sum(dim=2)
    return 1 - torch.exp(-squared / SOFTNESS**2)


def consistency(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Whether the views are of one object: minus the mean squared error of how they differ from each other; at most 0.

    A view is described by mean and deviation of its object's colour, and by its share of the object in 8 bands of height,
    which cameras on a circle see alike. The differences of every two views' descriptions are compared with those of the true
    views: a change that all views share costs nothing.
    Raises: ValueError for pictures without transparency.
    """
    background = background_colour(truth, masks)
    ours, true = (_described(p, soft_masks(p, background)) for p in (views, truth))
    first, second = torch.triu_indices(views.shape[1], views.shape[1], offset=1, device=views.device)

    def differences(described: Tensor) -> Tensor:
        return described.index_select(1, first) - described.index_select(1, second)

    return -(differences(ours) - differences(true)).square().mean(dim=(1, 2))


def _described(views: Tensor, soft: Tensor) -> Tensor:
    """[B, V, 3, S, S], [B, V, S, S] => [B, V, 6 + BANDS]."""
    total = reduce(soft, "b v h w -> b v 1", "sum").clamp(min=1e-6)
    weight = soft[:, :, None]
    mean = reduce(views * weight, "b v c h w -> b v c", "sum") / total
    squares = (views - mean[..., None, None]).square()
    deviation = (reduce(squares * weight, "b v c h w -> b v c", "sum") / total + 1e-6).sqrt()
    bands = F.adaptive_avg_pool2d(soft, (BANDS, 1))[..., 0] * soft.shape[-2] * soft.shape[-1] / BANDS / total
    return torch.cat([mean, deviation, bands], dim=-1)


def sharpness(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels: crisp pictures, and noise. Alone it is soon gamed."""
    del truth, masks
    across, down = (views.diff(dim=dim).abs().mean(dim=(1, 2, 3, 4)) for dim in (-1, -2))
    return (across + down) / 2


REWARDS: Mapping[str, Reward] = {
    "psnr": psnr,
    "ssim": ssim,
    "silhouette": silhouette,
    "consistency": consistency,
    "sharpness": sharpness,
}
"""By the names that `draft.reward` takes, but for `clip`, which needs an encoder (`clip_similarity`)."""
NEED_BACKGROUND = ("silhouette", "consistency")
"""Those that tell the object from the background, which pictures without transparency do not show."""
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that OpenAI's CLIP was trained on, by channel."""


def clip_similarity(encoder: nn.Module, size: int) -> Reward:
    """The reward `clip`: mean cosine between the CLIP image embeddings of each view and its true one.

    encoder: pictures [N, 3, size, size], normalised as CLIP's, => `.image_embeds`. size: in pixels.
    """
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))

    def embed(pictures: Tensor) -> Tensor:
        scaled = F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        embeds: Tensor = encoder((scaled - mean.to(scaled)) / deviation.to(scaled)).image_embeds
        return embeds.float()

    def similarity(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
        del masks
        count = views.shape[1]
        with torch.no_grad():
            wanted = embed(rearrange(truth, "b v c h w -> (b v) c h w"))
        found = F.cosine_similarity(embed(rearrange(views, "b v c h w -> (b v) c h w")), wanted, dim=-1)
        return rearrange(found, "(b v) -> b v", v=count).mean(dim=1)

    return similarity
