"""Separate-and-Enhance: the attention to two parts of a prompt must neither overlap nor vanish.

    L = L_sep + presence * L_enh
    L_sep = max_{h, y, x}  A_1 A_2 / (A_1 + A_2)
    L_enh = 1 - min_k max_{h, y, x} G(A_k)            G: 3 x 3 Gaussian, deviation 0.5, reflected at the border

A_k(h, y, x): the share of its attention that a head gives to part k at a pixel; heads kept apart, mean over the layers of one
resolution. L_enh has a gradient for the weaker part alone.
Source: Separate-and-Enhance (2312.06712); adobe/SeperateAndEnhance 2ddc822, with presence 0.5 and maps of 16 x 16.
Its code reshapes half of a batch into heads, as though there were guidance in training, which is not followed, and divides by
A_1 + A_2 with nothing added. Its published scores are not verified.

The paper's parts are two objects of one text ("a cat and a dog"). A view prompt has one object; its parts here are the tokens
that name the view and the other words (`view_and_other_words`), each with the sum of its tokens' attention. Its
single-concept term is left out: the KL to the pretrained model does that. It trains the keys of cross-attention alone
(lora.targets [attn2.to_k]).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-6
"""Added to A_1 + A_2, which is 0 where neither part gets attention."""
DEVIATION = 0.5
"""Standard deviation of G, in pixels of the map."""


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """L_sep of each picture. first, second: A_1 and A_2, [N, heads, H, W]. Returns: [N], 0 to 1/2."""
    return (first * second / (first + second + TINY)).flatten(1).amax(dim=1)


def absence(maps: Tensor) -> Tensor:
    """L_enh of each picture. maps: A_k, [K, N, heads, H, W]. Returns: [N], 0 to 1."""
    peaks = torch.stack([smoothed(part).flatten(1).amax(dim=1) for part in maps])  # K N
    return 1 - peaks.amin(dim=0)


def smoothed(maps: Tensor) -> Tensor:
    """G(A) of each map. maps: [N, heads, H, W], sides of 2 or more."""
    along = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * DEVIATION**2)).to(maps)
    kernel = torch.outer(along, along) / along.sum() ** 2
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).reshape(maps.shape)
