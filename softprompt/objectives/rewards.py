"""Rewards, and the statistics of pictures that show when a reward is gamed. Pictures are floats in [0, 1].

A reward takes `views` and `truth`, [B, V, 3, S, S], and `masks`, [B, V, 1, S, S] in [0, 1], where the object is in the true
views (1 throughout for pictures without transparency), and returns [B], higher is better; a gradient goes through it. A
user's own reward has the same signature.
None is from a paper: DRaFT+ maximised scores of text and taste, which say nothing of six views of one object.
"""

from collections.abc import Callable, Mapping

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from softprompt.metrics import ssim_map

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]

MIN_ERROR = 1e-10
"""Mean squared error below which two pictures count as equal."""
SOFTNESS = 0.1
"""Distance to the background's colour at which a pixel's soft mask is 0.63."""
BANDS = 8
"""Bands of height in which the views of an object are compared."""
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation, by channel, of the pictures that OpenAI's CLIP was trained on."""
NEED_BACKGROUND = ("silhouette", "consistency")
"""Rewards that separate the object from the background, so the pictures must have transparency."""
SIZE = 64
"""Side in pixels to which pictures are reduced for the statistics: whether an edge is counted must not depend on how soft it
is at the original resolution."""
EDGE = 0.1
"""Smallest difference of brightness between neighbouring pixels that is an edge."""
LEVELS = 8
"""Levels of each colour channel in the histogram."""
DISTINCT = 0.1
"""Smallest distance to the background's colour, over three channels, of a pixel of the object."""
LEAST = {"edges": 0.01, "colours": 0.1, "foreground": 0.01}
"""Added to both sides of a ratio: where the true views have next to none, a small difference means nothing."""


# ------------------------------------------------------------------------------------------------------------ rewards


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
    """Agreement of outlines, whatever is inside: sum min(m, m*) / sum max(m, m*) of the soft masks; mean over views; at most 1.

    A pixel's soft mask is 1 - exp(-(d / 0.1)^2), d its distance to the background's colour, in both pictures.
    Raises: ValueError for pictures without transparency, whose background is not known.
    """
    background = background_colour(truth, masks)
    ours, true = (_soft_masks(p, background) for p in (views, truth))
    both, either = (reduce(f(ours, true), "b v h w -> b v", "sum") for f in (torch.minimum, torch.maximum))
    return (both / either.clamp(min=1e-6)).mean(dim=1)


def consistency(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Whether the views show one object: minus the mean squared error of how they differ from each other; at most 0.

    A view is described by mean and deviation of its object's colour, and by its share of the object in 8 bands of height,
    which cameras on a circle see alike. The differences of every two views' descriptions are compared with those of the true
    views: a change that all views share costs nothing.
    Raises: ValueError for pictures without transparency.
    """
    background = background_colour(truth, masks)
    ours, true = (_described(p, _soft_masks(p, background)) for p in (views, truth))
    first, second = torch.triu_indices(views.shape[1], views.shape[1], offset=1, device=views.device)

    def differences(described: Tensor) -> Tensor:
        return described.index_select(1, first) - described.index_select(1, second)

    return -(differences(ours) - differences(true)).square().mean(dim=(1, 2))


def sharpness(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels: high for crisp pictures and for noise. Alone it is soon gamed."""
    del truth, masks
    across, down = (views.diff(dim=dim).abs().mean(dim=(1, 2, 3, 4)) for dim in (-1, -2))
    return (across + down) / 2


REWARDS: Mapping[str, Reward] = {f.__name__: f for f in (psnr, ssim, silhouette, consistency, sharpness)}
"""Rewards by the names that `draft.reward` takes, except `clip`, which needs an encoder (`clip_similarity`)."""


def clip_similarity(encoder: nn.Module, size: int) -> Reward:
    """The reward `clip`: mean cosine between the CLIP image embeddings of each view and its true view.

    encoder: pictures [N, 3, size, size], normalised as CLIP's, => `.image_embeds`. size: in pixels.
    """
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))

    def embed(pictures: Tensor) -> Tensor:
        pictures = rearrange(pictures, "b v c h w -> (b v) c h w")
        scaled = F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        embeds: Tensor = encoder((scaled - mean.to(scaled)) / deviation.to(scaled)).image_embeds
        return embeds.float()

    def similarity(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
        del masks
        with torch.no_grad():
            wanted = embed(truth)
        return rearrange(F.cosine_similarity(embed(views), wanted, dim=-1), "(b v) -> b v", v=views.shape[1]).mean(dim=1)

    return similarity


def _soft_masks(views: Tensor, background: Tensor) -> Tensor:
    """[B, V, 3, S, S] and [B, 3] => [B, V, S, S] in [0, 1]: how far each pixel is from the background."""
    squared = (views - rearrange(background, "b c -> b 1 c 1 1")).square().sum(dim=2)
    return 1 - torch.exp(-squared / SOFTNESS**2)


def _described(views: Tensor, soft: Tensor) -> Tensor:
    """[B, V, 3, S, S], [B, V, S, S] => [B, V, 6 + BANDS]."""
    total = reduce(soft, "b v h w -> b v 1", "sum").clamp(min=1e-6)
    weight = soft[:, :, None]
    mean = reduce(views * weight, "b v c h w -> b v c", "sum") / total
    squares = (views - mean[..., None, None]).square()
    deviation = (reduce(squares * weight, "b v c h w -> b v c", "sum") / total + 1e-6).sqrt()
    bands = F.adaptive_avg_pool2d(soft, (BANDS, 1))[..., 0] * soft.shape[-2] * soft.shape[-1] / BANDS / total
    return torch.cat([mean, deviation, bands], dim=-1)


# --------------------------------------------------------------------------------------------------------- background


def background_colour(truth: Tensor, masks: Tensor) -> Tensor:
    """Mean colour of an object's true pictures where its masks are 0; where they are 0 nowhere, weighted by 1 - mask.

    truth: [B, V, 3, S, S]. masks: [B, V, 1, S, S] in [0, 1]. Returns: [B, 3].
    Raises: ValueError where an object's masks leave no background, as those of pictures without transparency.
    """
    if not has_background(masks):
        raise ValueError(
            "masks leave no background: the pictures have no transparency, so the object cannot be separated from it; expected "
            "an alpha channel, or a reward that needs none: psnr, ssim, sharpness or clip"
        )
    empty = (masks == 0).to(truth)
    outside = torch.where(reduce(empty, "b v 1 h w -> b 1 1 1 1", "max") > 0, empty, 1 - masks.to(truth))
    return reduce(truth * outside, "b v c h w -> b c", "sum") / reduce(outside, "b v 1 h w -> b 1", "sum")


def has_background(masks: Tensor) -> bool:
    """Whether the masks, [B, V, 1, S, S], leave a background to every object; without transparency they do not."""
    return bool(_with_background(masks).all())


def _with_background(masks: Tensor) -> Tensor:
    return (masks < 1).flatten(1).any(dim=1)


# --------------------------------------------------------------------------------------------------------- statistics


@torch.no_grad()
def statistics_of_truth(views: Tensor, truth: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Edges, colours and foreground of pictures as a share of those of the true pictures; 1 where they are alike.

    views, truth: [B, V, 3, S, S]. masks: [B, V, 1, S, S].
    Returns: `edges`, `colours`, and `foreground`, each a scalar: the ratio of means over objects and views. `foreground` is
    over the objects that have a background, and 1 where none has.
    Source: ours; what to watch is from reports of collapse under a reward, in which edges had fallen by 60 % and the entropy
    of colours by 54 % while the score rose (Tencent-Hunyuan/UniRL#407), which was seen by eye alone.
    """
    both, seen = [_small(p) for p in (views, truth)], _with_background(masks)
    found = {"edges": [edge_density(p).mean() for p in both], "colours": [colour_entropy(p).mean() for p in both]}
    found["foreground"] = [views.new_zeros(())] * 2
    if seen.any():
        background = background_colour(truth[seen], masks[seen])
        found["foreground"] = [foreground_share(p[seen], background).mean() for p in both]
    return {name: (ours + LEAST[name]) / (true + LEAST[name]) for name, (ours, true) in found.items()}


def edge_density(views: Tensor) -> Tensor:
    """Share of pixels at an edge. views: [..., 3, S, S]. Returns: [...]."""
    grey = views.float().mean(dim=-3)
    across = (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs()
    down = (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()
    return (torch.maximum(across, down) > EDGE).float().mean(dim=(-2, -1))


def colour_entropy(views: Tensor) -> Tensor:
    """Entropy of the histogram of colours, 8 levels a channel, in bits. views: [..., 3, S, S]. Returns: [...]."""
    known = views.float().nan_to_num()  # values that are not finite are reported of the reward
    levels = (known.clamp(0, 1) * LEVELS).long().clamp(max=LEVELS - 1)
    colours = (levels[..., 0, :, :] * LEVELS + levels[..., 1, :, :]) * LEVELS + levels[..., 2, :, :]
    flat = colours.reshape(-1, colours.shape[-2] * colours.shape[-1])
    counts = torch.zeros(len(flat), LEVELS**3, device=views.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    shares = counts / flat.shape[1]
    return -(shares * shares.clamp(min=1e-12).log2()).sum(dim=1).reshape(views.shape[:-3])


def foreground_share(views: Tensor, background: Tensor) -> Tensor:
    """Share of pixels that are not the background. views: [B, V, 3, S, S]; background: [B, 3]. Returns: [B, V]."""
    distance = (views.float() - rearrange(background, "b c -> b 1 c 1 1")).norm(dim=2)
    return (distance > DISTINCT).float().mean(dim=(-2, -1))


def _small(views: Tensor) -> Tensor:
    """[B, V, 3, S, S] => [B, V, 3, 64, 64], means over areas; smaller pictures stay as they are."""
    if views.shape[-1] <= SIZE:
        return views.float()
    small = F.interpolate(rearrange(views.float(), "b v c h w -> (b v) c h w"), size=(SIZE, SIZE), mode="area")
    return rearrange(small, "(b v) c h w -> b v c h w", b=len(views))
