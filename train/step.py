"""One optimizer step: batch, losses, gradients, update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.batch import Batch, draw, make_batch, seed_of, seeded
from softprompt.curriculum import position_at
from softprompt.errors import RunError
from softprompt.losses import denoising_loss, kl_to_reference, kl_weights, snr, snr_weights
from softprompt.model import noisy_and_target
from train.config import Config
from train.evaluate import view_weights
from train.setup import Job


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over its objects on this process."""

    denoising: float
    kl: float | None
    """Nats per latent element; None on a step that leaves the term out."""
    grad_norms: dict[str, float]
    """By group, before clipping."""
    skipped: bool
    """Left out by fp16's gradient scaler, since a gradient overflowed."""


def position_of(config: Config, step: int) -> float:
    """s at a step, by the curriculum."""
    curriculum = config.curriculum
    when = step / config.train.steps if curriculum.unit == "run" else step
    return position_at(when, curriculum.at, curriculum.position, curriculum.easing)


def training_step(job: Job, step: int) -> StepResult:
    """Forward, backward and update for step number `step` (counted from 0)."""
    config, accelerator = job.config, job.accelerator
    position = position_of(config, step)
    with_kl = config.kl.weight > 0 and step % config.kl.every == 0
    torch.manual_seed(seed_of(config.train.seed, "dropout", step, accelerator.process_index))

    denoising, kl = 0.0, 0.0
    for part in range(config.train.accumulation):
        batch = _batch(job, step, part)
        last = part == config.train.accumulation - 1
        with torch.enable_grad() if last else accelerator.no_sync(job.model):
            fit, anchor = losses(job, batch, position, with_kl=with_kl)
            loss = fit + config.kl.weight * config.kl.every * anchor if with_kl else fit
            accelerator.backward(loss / config.train.accumulation)
        denoising += fit.item() / config.train.accumulation
        kl += anchor.item() / config.train.accumulation

    norms = {}
    accelerator.unscale_gradients(job.optimizer)
    for name, parameters in job.adapted.trainable().items():
        norms[name] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.max_grad_norm))
    # Under fp16 an infinite gradient is normal: the scaler leaves that step out and lowers its scale.
    sound = math.isfinite(denoising + kl) and (accelerator.scaler is not None or math.isfinite(sum(norms.values())))
    if not sound:
        raise RunError(
            f"step {step}: not finite: denoising loss {denoising:.3g}, KL {kl:.3g}, gradient norms {norms}; stopped before it "
            f"reached the weights, so the checkpoints are sound. Likely a learning rate is too high, or fp16 overflows (try "
            f"train.precision bf16)"
        )
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    _regularise_prompt(job, position)
    return StepResult(denoising, kl if with_kl else None, norms, skipped=accelerator.optimizer_step_was_skipped)


def losses(job: Job, batch: Batch, position: float, *, with_kl: bool) -> tuple[Tensor, Tensor]:
    """The denoising loss and the KL to the pretrained model (0 where left out), both scalars of this process's objects."""
    config, accelerator, scheduler = job.config, job.accelerator, job.pipeline.scheduler
    noisy, target = noisy_and_target(scheduler, batch)
    inputs = (noisy, batch.given, batch.timesteps, batch.labels, batch.order)
    with accelerator.autocast():
        prediction = job.model(*inputs, position)
        reference = job.adapted.reference(*inputs) if with_kl else None
    weights = snr_weights(
        snr(scheduler.alphas_cumprod, batch.timesteps), config.loss.snr_weighting, gamma=config.loss.snr_gamma
    )
    fit = denoising_loss(prediction, target, weights, view_weights(job, len(noisy)))
    if reference is None:
        return fit, torch.zeros_like(fit)
    anchor_weights = kl_weights(
        scheduler.alphas_cumprod,
        batch.timesteps,
        prediction_type=scheduler.config["prediction_type"],
        weighting=config.kl.weighting,
        clip=config.kl.clip,
    )
    return fit, kl_to_reference(prediction, reference, anchor_weights).mean()


def _batch(job: Job, step: int, part: int) -> Batch:
    """This process's objects of one part of a step, by their position in the global batch."""
    config, accelerator = job.config, job.accelerator
    size, processes = config.train.batch_size, accelerator.num_processes
    first = (part * processes + accelerator.process_index) * size
    objects, draws = [], []
    for position in range(first, first + size):
        generator = seeded(config.train.seed, step, position)
        index = object_at(step * size * processes * config.train.accumulation + position, len(job.train), config.train.seed)
        objects.append(job.train.get(index, generator))
        draws.append(
            draw(
                generator,
                encoded=objects[-1],
                num_timesteps=len(job.pipeline.scheduler.alphas_cumprod),
                references=config.data.references(job.pipeline.num_views),
                drop_rate=config.loss.condition_drop_rate,
            )
        )
    return make_batch(job.pipeline, objects, draws)


def object_at(place: int, count: int, seed: int) -> int:
    """Which of `count` objects stands at a place of the endless training order: each epoch a new permutation."""
    epoch, within = divmod(place, count)
    return int(torch.randperm(count, generator=seeded(seed, "epoch", epoch))[within])


def _regularise_prompt(job: Job, position: float) -> None:
    settings, prompt = job.config.prompt, job.adapted.prompt
    if not settings.learn:
        return
    if settings.decay:
        rate = next(g["lr"] for g in job.optimizer.param_groups if g["name"] == "prompt")
        prompt.decay_toward_start(min(1.0, rate * settings.decay))
    if settings.norm_band is not None:
        prompt.clamp_norms(settings.norm_band, position)
