"""What prompt and LoRA do each alone, and whether the views follow the prompts: sampled once, at the end of a run."""

import torch
from torch import Tensor

from softprompt.data.batch import view_order
from softprompt.metrics import psnr_per_view, ssim_per_view
from softprompt.model.adapted import adapters_off
from train.evaluation.evaluate import Preview, sample_held_out
from train.log.series import ABLATION_PSNR, ABLATION_SSIM, HANDED_ON, VIEWS_FOLLOW
from train.setup import Job


@torch.no_grad()
def ablation(job: Job, prompt: Tensor, shown: Preview) -> dict[str, Tensor]:
    """Views of the previewed objects by what they are sampled with.

    prompt: E [V, T, D]. shown: its previews, which are two of the rows.
    Returns: [B, V, 3, S, S] each, by row; without a LoRA there is none of it alone, and `both` is `prompt`.
    """
    order = view_order(job.config.data.first_reference, job.pipeline.num_views).to(prompt.device)
    own, start = prompt[order], job.adapted.prompt.start[order]
    rows = {"pretrained": shown.pretrained}
    with job.pipeline.encoders_on_device():
        if job.config.lora.rank:
            with adapters_off(job.pipeline.unet):
                rows["prompt_alone"] = sample_held_out(job, own, shown.pictures)
            rows["lora_alone"] = sample_held_out(job, start, shown.pictures)
        rows["both" if job.config.lora.rank else "prompt"] = shown.now
        rows[HANDED_ON] = sample_held_out(job, own.roll(-1, dims=0), shown.pictures)
    return rows


def ablation_series(rows: dict[str, Tensor], shown: Preview) -> dict[str, float]:
    """How near each row is to the true views, and the share of views that follow a prompt to another place."""
    series: dict[str, float] = {}
    for name, views in rows.items():
        if name != HANDED_ON:
            series[f"{ABLATION_PSNR}/{name}"] = float(psnr_per_view(views, shown.truth).mean())
            series[f"{ABLATION_SSIM}/{name}"] = float(ssim_per_view(views, shown.truth).mean())
    return series | {VIEWS_FOLLOW: views_follow(rows[HANDED_ON], shown.truth)}


def views_follow(handed_on: Tensor, truth: Tensor) -> float:
    """Share of views that are nearer to the true view of the prompt they were given than to that of their own place.

    handed_on: views of which each was sampled with the next one's prompt; truth: [B, V, 3, S, S].
    Returns: 1 where the prompt decides the view, 0 where the place does.
    Source: ours.
    """
    to_prompt, to_place = (
        (handed_on.float() - true.float()).square().mean(dim=(2, 3, 4)) for true in (truth.roll(-1, dims=1), truth)
    )
    return float((to_prompt < to_place).float().mean())
