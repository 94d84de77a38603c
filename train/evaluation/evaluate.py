"""Held-out objects: a loss that is the same at every evaluation, and sampled views beside the true ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from softprompt.data.batch import draw, rotate_views, seeded, spread_timesteps, view_order
from softprompt.data.cache import EncodedObjects
from softprompt.metrics import copy_score, psnr_per_view, separation_ratio, ssim_per_view
from softprompt.model.adapted import adapters_off, predict
from softprompt.model.conditioning import make_batch, noisy_and_target
from softprompt.model.sampling import sample_views
from softprompt.prompt.path import point_on_path
from softprompt.prompt.templates import view_names
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
    parameters = list(job.adapted.all_trainable().values())
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
def validation_losses(job: Job, position: float, objects: EncodedObjects, *, reference: int) -> Tensor:
    """Mean squared error of the prediction of each view, at fixed noise and timesteps, unweighted.

    No condition is dropped and every view counts: whatever the training was, the losses of two runs on the same objects can be
    compared. Each process takes its share of the objects; all get the mean.
    reference: the view that is given.
    Returns: [V], float64, on the CPU.
    """
    config, accelerator = job.config, job.accelerator
    schedule_length, views = len(job.pipeline.scheduler.alphas_cumprod), job.pipeline.num_views
    timesteps = spread_timesteps(config.monitor.validation_timesteps, schedule_length)
    total = torch.zeros(views, dtype=torch.float64, device=accelerator.device)
    looks = [(i, t) for i in range(len(objects)) for t in timesteps]
    mine = looks[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), config.train.batch_size):
        encoded, draws = [], []
        for index, timestep in mine[start : start + config.train.batch_size]:
            generator = seeded("validation", index, timestep)
            encoded.append(objects.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=encoded[-1],
                    num_timesteps=schedule_length,
                    references=[reference],
                    timestep=timestep,
                )
            )
        batch = make_batch(job.pipeline, encoded, draws)
        noisy, target = noisy_and_target(job.pipeline.scheduler, batch)
        with accelerator.autocast():
            prediction = job.adapted(noisy, batch.given, batch.timesteps, batch.labels, batch.order, position)
        errors = (prediction.float() - target.float()).square().mean(dim=(2, 3, 4)).double()  # B V, by slot
        total.index_add_(0, batch.order.flatten(), errors.flatten())
    return accelerator.reduce(total, reduction="sum").cpu() / len(looks)


def validation_series(job: Job, position: float, *, with_original: bool) -> dict[str, float]:
    """The loss on held-out objects and of each of their views; where asked for, on the pretrained model's own domain too."""
    losses = validation_losses(job, position, job.held_out, reference=job.config.data.first_reference)
    series = {"loss/validation": float(losses.mean())}
    if with_original and job.original is not None:
        series["loss/original"] = original_loss(job, position)
    names = view_names(job.pipeline.num_views)
    return series | {f"loss_view/{name}": float(loss) for name, loss in zip(names, losses, strict=True)}


def original_loss(job: Job, position: float) -> float:
    """The loss on the pretrained model's own domain, under the prompt E(position) that the run would leave with; view 0 is
    given, as in its pretraining. Job.original must be there."""
    assert job.original is not None
    return float(validation_losses(job, position, job.original.held_out, reference=0).mean())


@torch.no_grad()
def pretrained_original_loss(job: Job) -> float:
    """The same of the untouched model, whatever this one has learned or began with."""
    prompt = job.adapted.prompt
    learned = prompt.learned.detach().clone()
    prompt.learned.copy_(prompt.start)
    try:
        with adapters_off(job.pipeline.unet):
            return original_loss(job, 0.0)
    finally:
        prompt.learned.copy_(learned)


@torch.no_grad()
def learned_effect(job: Job, position: float) -> float | None:
    """How much the prediction depends on what the prompt has learned: its root mean square difference to that under the path
    alone, as a share of itself; on one held-out object, at the middle timestep. None where nothing learned is in E(position).
    """
    prompt = job.adapted.prompt
    if prompt.share(position) == 0:
        return None
    generator = seeded("effect")
    encoded, length = job.held_out.get(0, generator), len(job.pipeline.scheduler.alphas_cumprod)
    batch = make_batch(job.pipeline, [encoded], [draw(generator, encoded=encoded, num_timesteps=length, timestep=length // 2)])
    noisy, _ = noisy_and_target(job.pipeline.scheduler, batch)
    path = point_on_path(prompt.waypoints, position, prompt.interpolation)
    with job.accelerator.autocast():
        ours, plain = (
            predict(job.adapted.unet, one, noisy, batch.given, batch.timesteps, batch.labels, batch.order).float()
            for one in (prompt(position), path)
        )
    return float((ours - plain).square().mean().sqrt() / ours.square().mean().sqrt())


@torch.no_grad()
def preview(job: Job, prompt: Tensor, pretrained: Tensor | None) -> Preview:
    """Sample the first held-out objects at a fixed seed.

    prompt: E [V, T, D]. pretrained: the untouched model's views of an earlier preview, which never change.
    """
    config = job.config
    count = min(config.monitor.preview_objects, len(job.held_out))
    reference = config.data.first_reference
    truth = torch.stack([rotate_views(job.held_out.pictures(i, seeded("preview", i)), reference) for i in range(count)]).to(
        job.pipeline.device
    )
    order = view_order(reference, job.pipeline.num_views)

    with job.pipeline.encoders_on_device():  # once there and back for all of them
        if pretrained is None:
            with adapters_off(job.pipeline.unet):
                pretrained = sample_held_out(job, job.adapted.prompt.start[order.to(prompt.device)], truth[:, 0])
        now = sample_held_out(job, prompt[order.to(prompt.device)], truth[:, 0])
    names = view_names(job.pipeline.num_views)
    masks = torch.stack([rotate_views(job.held_out.masks(i), reference) for i in range(count)]).to(truth)
    return Preview(truth[:, 0], truth, masks, pretrained, now, tuple(names[int(i)] for i in order))


def sample_held_out(job: Job, prompt: Tensor, pictures: Tensor) -> Tensor:
    """Views of each picture as the previews are sampled.

    prompt: [V, T, D], in slot order. pictures: [B, 3, S, S]. Returns: [B, V, 3, S, S].
    """
    config = job.config
    views = [
        sample_views(
            job.pipeline,
            prompt,
            picture,
            steps=config.monitor.preview_steps,
            guidance_scale=config.monitor.guidance_scale,
            eta=config.monitor.eta,
            seed=config.train.seed,
        )
        for picture in pictures  # one by one, to need no more memory than training does
    ]
    return torch.cat(views)


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
