"""Held-out objects: a loss that is the same at every evaluation, and sampled views beside the true ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from softprompt.batch import draw, make_batch, seeded
from softprompt.data import rotate_views, view_order
from softprompt.embeddings import view_names
from softprompt.losses import denoising_loss
from softprompt.metrics import copy_score, psnr_per_view, separation_ratio, ssim_per_view
from softprompt.model import adapters_off, noisy_and_target
from softprompt.sampling import sample_views
from train.setup import Job


@dataclass(frozen=True)
class Preview:
    """Views of a few held-out objects; slot 0 of each is the picture given."""

    pictures: Tensor
    """[B, 3, S, S]: what the model was given."""
    truth: Tensor
    """[B, V, 3, S, S]."""
    masks: Tensor
    """[B, V, 1, S, S]: where the object is in the true views."""
    pretrained: Tensor
    """[B, V, 3, S, S]: of the untouched model."""
    now: Tensor
    """[B, V, 3, S, S]: of the adapted model."""
    names: tuple[str, ...]
    """Of the views, in slot order."""


@contextmanager
def averaged(job: Job, ema: EMAModel | None) -> Iterator[None]:
    """Inside the block prompt and LoRA are their moving average, where one is kept; the model is in evaluation mode."""
    parameters = [p for group in job.adapted.trainable().values() for p in group.values()]
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    job.adapted.eval()
    try:
        yield
    finally:
        job.adapted.train()
        if ema is not None:
            ema.restore(parameters)


@torch.no_grad()
def validation_loss(job: Job, position: float) -> float:
    """Mean squared error of the prediction on every held-out object at fixed noise and timesteps, unweighted.

    No condition is dropped. Each process takes its share of the objects; all get the mean.
    """
    config, accelerator = job.config, job.accelerator
    schedule_length = len(job.pipeline.scheduler.alphas_cumprod)
    count = config.monitor.validation_timesteps
    timesteps = [int((k + 0.5) / count * schedule_length) for k in range(count)]
    references = config.data.references(job.pipeline.num_views)
    total = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    looks = [(i, t) for i in range(len(job.held_out)) for t in timesteps]
    mine = looks[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), config.train.batch_size):
        objects, draws = [], []
        for index, timestep in mine[start : start + config.train.batch_size]:
            generator = seeded("validation", index, timestep)
            objects.append(job.held_out.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=objects[-1],
                    num_timesteps=schedule_length,
                    references=references,
                    timestep=timestep,
                )
            )
        batch = make_batch(job.pipeline, objects, draws)
        noisy, target = noisy_and_target(job.pipeline.scheduler, batch)
        with accelerator.autocast():
            prediction = job.adapted(noisy, batch.given, batch.timesteps, batch.labels, batch.order, position)
        ones = torch.ones(len(objects), device=accelerator.device)
        loss = denoising_loss(prediction, target, ones, view_weights(job, len(objects)))
        total += torch.stack([loss.double() * len(objects), ones.sum().double()])
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])


def view_weights(job: Job, num_objects: int) -> Tensor | None:
    """[B, V]: 0 for the reference's own view where `loss.own_view` is off; None where every view counts."""
    if job.config.loss.own_view:
        return None
    weights = torch.ones(num_objects, job.pipeline.num_views, device=job.accelerator.device)
    weights[:, 0] = 0
    return weights


@torch.no_grad()
def preview(job: Job, prompt: Tensor, pretrained: Tensor | None) -> Preview:
    """Sample the first held-out objects at a fixed seed.

    prompt: E [V, T, D]. pretrained: the untouched model's views of an earlier preview, which never change.
    """
    config = job.config
    count = min(config.monitor.preview_objects, len(job.held_out))
    reference = config.data.references(job.pipeline.num_views)[0]
    truth = torch.stack([rotate_views(job.held_out.pictures(i, seeded("preview", i)), reference) for i in range(count)]).to(
        job.pipeline.device
    )
    order = view_order(reference, job.pipeline.num_views)

    def sample(view_prompt: Tensor) -> Tensor:
        return torch.cat(
            [
                sample_views(
                    job.pipeline,
                    view_prompt[order.to(view_prompt.device)],
                    picture,
                    steps=config.monitor.preview_steps,
                    guidance_scale=config.monitor.guidance_scale,
                    eta=config.monitor.eta,
                    seed=config.train.seed,
                )
                for picture in truth[:, 0]  # one by one, to need no more memory than training does
            ]
        )

    if pretrained is None:
        with adapters_off(job.pipeline.unet):
            pretrained = sample(job.adapted.prompt.start)
    names = view_names(job.pipeline.num_views)
    masks = torch.stack([rotate_views(job.held_out.masks(i), reference) for i in range(count)]).to(truth)
    return Preview(truth[:, 0], truth, masks, pretrained, sample(prompt), tuple(names[int(i)] for i in order))


def preview_series(shown: Preview) -> dict[str, float]:
    """How good the previewed views are, per view, and whether they copy the input or collapse."""
    psnr, ssim = psnr_per_view(shown.now, shown.truth), ssim_per_view(shown.now, shown.truth)
    series = {f"views_psnr/{name}": float(p) for name, p in zip(shown.names, psnr, strict=True)}
    series |= {f"views_ssim/{name}": float(s) for name, s in zip(shown.names, ssim, strict=True)}
    return series | {
        "views/psnr": float(psnr.mean()),
        "views/ssim": float(ssim.mean()),
        "views/psnr_foreground": float(psnr_per_view(shown.now, shown.truth, shown.masks).mean()),
        "views/ssim_foreground": float(ssim_per_view(shown.now, shown.truth, shown.masks).mean()),
        "views/copy_score": copy_score(shown.now, shown.truth, shown.pictures),
        "views/separation_ratio": separation_ratio(shown.now, shown.truth),
    }
