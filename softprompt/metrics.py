"""Quality of generated views, and how far apart they stay.

Pictures are floats in [0, 1]. Pure functions: no randomness, no files, no logging.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR = 100.0
"""PSNR in dB of identical pictures, for which the formula gives infinity."""
MIN_DIFFERENCE = 1e-6
"""Mean squared error below which two pictures count as equal: a quarter of one 8-bit step, everywhere."""


def psnr_per_view(generated: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio, peak 1, of each picture; then the mean over objects.

    generated, truth: [B, V, 3, S, S]. mask: foreground alpha [B, V, 1, S, S] in [0, 1]; with it, the squared error is
    averaged over the foreground alone, each pixel weighted by its alpha.
    Returns: [V] in dB, at most MAX_PSNR; higher is better.
    Raises: ValueError when a picture has no foreground.
    Source: 10 log10(1 / MSE), https://en.wikipedia.org/wiki/Peak_signal-to-noise_ratio; foreground: ours.
    """
    if mask is None:
        pictures = (rearrange(views.float(), "b v c h w -> (b v) c h w") for views in (generated, truth))
        psnr = peak_signal_noise_ratio(*pictures, data_range=1.0, reduction="none", dim=(1, 2, 3))
        psnr = rearrange(psnr, "(b v) -> b v", v=generated.shape[1])
    else:
        psnr = -10 * torch.log10(_foreground_mean((generated.float() - truth.float()).square(), mask))
    return psnr.clamp(max=MAX_PSNR).mean(dim=0)


def ssim_per_view(generated: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity (Gaussian window of 11 pixels, data range 1) of each picture; then the mean over objects.

    generated, truth: [B, V, 3, S, S], S at least 6. mask: as of `psnr_per_view`, for the SSIM map.
    Returns: [V], at most 1 (identical); higher is better.
    Raises: ValueError when a picture has no foreground.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13;
    foreground: ours.
    """
    # Object by object: the map takes about ten times the memory of the pictures.
    maps = torch.stack([ssim_map(*views) for views in zip(generated.float(), truth.float(), strict=True)])
    ssim = reduce(maps, "b v c h w -> b v", "mean") if mask is None else _foreground_mean(maps, mask)
    return ssim.mean(dim=0)


def ssim_map(generated: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity around each pixel, differentiable. [V, 3, S, S] twice => [V, 3, S, S]."""
    _, full = structural_similarity_index_measure(generated, truth, data_range=1.0, reduction="none", return_full_image=True)
    return full


def view_separation(views: Tensor) -> float:
    """How much the views of an object differ: root mean squared difference of every two of them; mean over objects.

    views: [B, V, 3, S, S], V at least 2.
    Returns: in [0, 1]; 0 when all views are one picture.
    Source: ours.
    """
    flat = rearrange(views.float(), "b v c h w -> b v (c h w)")
    return float(torch.stack([torch.pdist(one) for one in flat]).mean()) / flat.shape[-1] ** 0.5


def separation_ratio(generated: Tensor, truth: Tensor) -> float:
    """View separation of the generated views, as a share of the true views'.

    generated, truth: [B, V, 3, S, S].
    Returns: at least 0; 1 when the views are as far apart as they should be, 0 when they have collapsed into one picture;
    NaN when the true views do not differ.
    Source: ours.
    """
    true_separation = view_separation(truth)
    return view_separation(generated) / true_separation if true_separation > 0 else float("nan")


def copy_score(generated: Tensor, truth: Tensor, pictures: Tensor) -> float:
    """How much closer the generated views are to the input picture than the true views are.

    generated, truth: [B, V, 3, S, S], view 0 the reference view. pictures: input pictures, [B, 3, S, S].
    Returns: mean over objects and views 1 .. V - 1 of 1 - MSE(generated, picture) / MSE(truth, picture): at most 1, an exact
    copy; 0 when as far away as the truth; negative when farther. Views whose true picture equals the input are left out
    (MIN_DIFFERENCE); NaN when that leaves none.
    Source: ours.
    """
    inputs = pictures.float()[:, None]
    generated_error, true_error = (
        reduce((views[:, 1:].float() - inputs).square(), "b v c h w -> b v", "mean") for views in (generated, truth)
    )
    differs = true_error >= MIN_DIFFERENCE
    return float((1 - generated_error[differs] / true_error[differs]).mean())


def _foreground_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each picture weighted by its mask: [B, V, C, S, S] and [B, V, 1, S, S] => [B, V].

    Raises: ValueError when a picture has no foreground.
    """
    weight = mask.to(values)
    total = reduce(weight, "b v 1 h w -> b v", "sum")
    if (total == 0).any():
        b, v = (total == 0).nonzero()[0].tolist()
        raise ValueError(f"mask: object {b}, view {v} has no foreground; expected some alpha above 0 in every picture")
    return reduce(values * weight, "b v c h w -> b v", "sum") / (total * values.shape[2])
