"""DomainStudio: adapting to a few objects must not make their pictures alike; their pairwise similarities stay those of the
source model.

    L = pairs * L_img + detail_pairs * L_hf + detail * L_hfmse

    p_i    = softmax_{j != i} cos(x_i, x_j)         x_i: the clean picture or latents that the adapted model predicts of item i
    L_img  = sum_i KL(p0_i || p_i) / (N (N - 1))    p0: the same of the source model's predictions on the same noisy latents
    L_hf   = the same of hf(x);  hf = LH + HL + HH of the Haar transform
    L_hfmse = mean |hf(x) - hf(target)|^2

Source: Zhu et al., DomainStudio (2306.14153) and DDPM-PA (2211.03264); bbzhu-jy16/DomainStudio cc69341, its unconditional
code, in which the source model is frozen and the target is that of the item: 4, 4 and 1 there. Its text-to-image code (100,
100, 0.1) takes the trained network under another prompt for the source, and other pictures for targets; it is not followed.
The paper's FID and Intra-LPIPS are not verified.

An item is one view of an object: the same view of N objects is compared, or the N views of one object.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def log_similarities(items: Tensor) -> Tensor:
    """log p. items: [N, ...], N at least 3. Returns: [N, N - 1], row i without i. Raises: ValueError below 3 items."""
    count = len(items)
    if count < 3:
        raise ValueError(f"{count} items; pairwise similarity needs 3 or more: of two, each has one other, at probability 1")
    unit = F.normalize(items.flatten(1), dim=1)
    cosines = unit @ unit.T
    others = torch.stack([torch.cat([row[:i], row[i + 1 :]]) for i, row in enumerate(cosines)])
    return others.log_softmax(dim=1)


def pair_loss(items: Tensor, source: Tensor) -> Tensor:
    """L_img, or L_hf of high frequencies. items, source: [N, ...]; source has no gradient. Returns: a scalar, at least 0."""
    log_p, log_p0 = log_similarities(items), log_similarities(source.detach())
    return F.kl_div(log_p, log_p0, log_target=True, reduction="none").mean()


def high_frequency(x: Tensor) -> Tensor:
    """hf(x): the three detail bands of a Haar step, summed. [..., H, W], even sides => [..., H / 2, W / 2]."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    across, down, diagonal = (b + d - a - c) / 2, (c + d - a - b) / 2, (a + d - b - c) / 2
    return across + down + diagonal


def detail_loss(items: Tensor, target: Tensor) -> Tensor:
    """L_hfmse. items, target: [..., H, W]. Returns: a scalar."""
    return (high_frequency(items) - high_frequency(target)).square().mean()
