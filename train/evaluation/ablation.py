"""Ablation: prompt and LoRA each alone, and whether the views follow their prompts; sampled once, at the end of a run."""

from torch import Tensor

from softprompt.metrics import psnr_per_view, ssim_per_view
from train.log.series import ABLATION_PSNR, ABLATION_SSIM, HANDED_ON, VIEWS_FOLLOW


def ablation_series(rows: dict[str, Tensor], truth: Tensor) -> dict[str, float]:
    """Quality of each row of `Evaluator.ablation`, and the share of views that follow a prompt to another place.

    rows: row => views [B, V, 3, S, S]. truth: [B, V, 3, S, S].
    """
    series: dict[str, float] = {}
    for name, views in rows.items():
        if name != HANDED_ON:
            series[f"{ABLATION_PSNR}/{name}"] = float(psnr_per_view(views, truth).mean())
            series[f"{ABLATION_SSIM}/{name}"] = float(ssim_per_view(views, truth).mean())
    return series | {VIEWS_FOLLOW: views_follow(rows[HANDED_ON], truth)}


def views_follow(shifted: Tensor, truth: Tensor) -> float:
    """Share of views that are nearer to the true view of the prompt they were given than to that of their own place.

    shifted: views, each sampled with the next view's prompt; truth: both [B, V, 3, S, S].
    Returns: 1 where the prompt decides the view, 0 where the place does.
    Source: ours.
    """
    to_prompt, to_place = (
        (shifted.float() - true.float()).square().mean(dim=(2, 3, 4)) for true in (truth.roll(-1, dims=1), truth)
    )
    return float((to_prompt < to_place).float().mean())
