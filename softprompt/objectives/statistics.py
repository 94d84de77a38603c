"""What a picture is like in three numbers, to see a reward that is gamed: edges, colours and object go before a score does.

Pictures are floats in [0, 1]. Source: ours; what to watch is from reports of collapse under a reward, in which edges had
fallen by 60 % and the entropy of colours by 54 % while the score rose (Tencent-Hunyuan/UniRL#407), which was seen by eye
alone.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

SIZE = 64
"""Pixels of the side that pictures are brought down to first: whether an edge is one must not depend on how soft it is at the
resolution given."""

EDGE = 0.1
"""Difference of brightness between neighbouring pixels from which on there is an edge."""
LEVELS = 8
"""Of each colour channel, in the histogram."""
DISTINCT = 0.1
"""Distance to the background's colour, of a pixel's three channels, from which on it is the object."""
LEAST = {"edges": 0.01, "colours": 0.1, "foreground": 0.01}
"""Added to both sides of a ratio: where the true views have next to nothing of it, a little more or less is no news."""


def edge_density(views: Tensor) -> Tensor:
    """Share of pixels at an edge. views: [..., 3, S, S]. Returns: [...]."""
    grey = views.float().mean(dim=-3)
    across = (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs()
    down = (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()
    return (torch.maximum(across, down) > EDGE).float().mean(dim=(-2, -1))


def colour_entropy(views: Tensor) -> Tensor:
    """Entropy of the histogram of colours, 8 levels a channel, in bits. views: [..., 3, S, S]. Returns: [...]."""
    known = views.float().nan_to_num()  # what is not finite is said of the reward
    levels = (known.clamp(0, 1) * LEVELS).long().clamp(max=LEVELS - 1)
    colours = (levels[..., 0, :, :] * LEVELS + levels[..., 1, :, :]) * LEVELS + levels[..., 2, :, :]
    flat = colours.reshape(-1, colours.shape[-2] * colours.shape[-1])
    counts = torch.zeros(len(flat), LEVELS**3, device=views.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    shares = counts / flat.shape[1]
    return -(shares * shares.clamp(min=1e-12).log2()).sum(dim=1).reshape(views.shape[:-3])


def background_colour(truth: Tensor, masks: Tensor) -> Tensor:
    """The colour behind an object: the mean of its true pictures where its masks are 0; where none is, weighed by 1 - mask.

    truth: [B, V, 3, S, S]. masks: [B, V, 1, S, S] in [0, 1]. Returns: [B, 3].
    Raises: ValueError where an object's masks leave no background, as those of pictures without transparency.
    """
    if not has_background(masks):
        raise ValueError(
            "masks leave no background: the pictures have no transparency, so the object cannot be told from it; expected an "
            "alpha channel, or a reward that needs none: psnr, ssim, sharpness or clip"
        )
    empty = (masks == 0).to(truth)
    outside = torch.where(reduce(empty, "b v 1 h w -> b 1 1 1 1", "max") > 0, empty, 1 - masks.to(truth))
    return reduce(truth * outside, "b v c h w -> b c", "sum") / reduce(outside, "b v 1 h w -> b 1", "sum")


def has_background(masks: Tensor) -> bool:
    """Whether the masks, [B, V, 1, S, S], leave one to every object; those of pictures without transparency do not."""
    return bool(_with_background(masks).all())


def _with_background(masks: Tensor) -> Tensor:
    return (masks < 1).flatten(1).any(dim=1)


def foreground_share(views: Tensor, background: Tensor) -> Tensor:
    """Share of pixels that are not the background. views: [B, V, 3, S, S]; background: [B, 3]. Returns: [B, V]."""
    distance = (views.float() - rearrange(background, "b c -> b 1 c 1 1")).norm(dim=2)
    return (distance > DISTINCT).float().mean(dim=(-2, -1))


@torch.no_grad()
def statistics_of_truth(views: Tensor, truth: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Edges, colours and object of pictures as a share of those of the true ones; 1 where they are alike.

    views, truth: [B, V, 3, S, S]. masks: [B, V, 1, S, S].
    Returns: `edges`, `colours`, and `foreground`, each a scalar: the ratio of means over objects and views. `foreground` is
    over the objects that have a background, and 1 where none has.
    """
    both, seen = [_small(p) for p in (views, truth)], _with_background(masks)
    found = {"edges": [edge_density(p).mean() for p in both], "colours": [colour_entropy(p).mean() for p in both]}
    found["foreground"] = [views.new_zeros(())] * 2
    if seen.any():
        background = background_colour(truth[seen], masks[seen])
        found["foreground"] = [foreground_share(p[seen], background).mean() for p in both]
    return {name: (ours + LEAST[name]) / (true + LEAST[name]) for name, (ours, true) in found.items()}


def _small(views: Tensor) -> Tensor:
    """[B, V, 3, S, S] => [B, V, 3, 64, 64], means over areas; smaller pictures stay as they are."""
    if views.shape[-1] <= SIZE:
        return views.float()
    small = F.interpolate(rearrange(views.float(), "b v c h w -> (b v) c h w"), size=(SIZE, SIZE), mode="area")
    return rearrange(small, "(b v) c h w -> b v c h w", b=len(views))
