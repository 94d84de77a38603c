"""One optimizer step: batch, losses, gradients, update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.batch import Batch, draw, make_batch, seed_of, seeded
from softprompt.cache import EncodedObjects
from softprompt.errors import RunError
from softprompt.losses import denoising_loss, kl_to_reference, kl_weights, separation_hinge, snr, snr_weights
from softprompt.model import noisy_and_target
from train.evaluate import view_weights
from train.pacing import Pace, lowest_timestep_of, position_of
from train.setup import Job

KL_TIMESTEP_GROUPS = 4
"""Into so many equal ranges of timesteps the KL is split in the log."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over its objects on all processes."""

    denoising: float
    kl: float | None
    """Nats per latent element, where `kl.domain` measures it; None on a step that leaves the term out."""
    kl_on_original: float | None
    """The same on the pretrained model's own domain alone."""
    kl_sums: Tensor
    """[2, V + KL_TIMESTEP_GROUPS] on this process: sums of the KL by view and by range of timesteps, and their counts."""
    grad_norms: dict[str, float]
    """By group, before clipping; 0 for a group that does not train at this step."""
    skipped: bool
    """Left out by fp16's gradient scaler, since a gradient overflowed."""


def training_step(job: Job, step: int, pace: Pace | None = None) -> StepResult:
    """Forward, backward and update for step number `step` (counted from 0).

    pace: what the curricula have come to; None: nothing yet, as at step 0.
    """
    accelerator = job.accelerator
    pace = pace or Pace.start(job.config)
    position = position_of(job.config, pace, step)
    torch.manual_seed(seed_of(job.config.train.seed, "dropout", step, accelerator.process_index))
    measured = _backward(job, step, pace, position)
    norms = _clip_gradients(job, step)
    _refuse_what_is_not_finite(job, step, measured, norms)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    _regularise_prompt(job, step, position)
    kls = measured.kl_by_domain
    return StepResult(
        denoising=measured.denoising,
        kl=sum(kls.values()) / len(kls) if kls else None,
        kl_on_original=kls.get("original"),
        kl_sums=measured.kl_sums,
        grad_norms=norms,
        skipped=accelerator.optimizer_step_was_skipped,
    )


@dataclass(frozen=True)
class _Measured:
    """Of one step's batches."""

    denoising: float
    kl_by_domain: dict[str, float]
    kl_sums: Tensor


def _backward(job: Job, step: int, pace: Pace, position: float) -> _Measured:
    """Gradients of a step: of the denoising loss, of the KL where it is due, and of the prompts' separation."""
    config, accelerator, parts = job.config, job.accelerator, job.config.train.accumulation
    lowest = lowest_timestep_of(config, pace, job.pipeline.scheduler.alphas_cumprod)
    due = config.kl.weight > 0 and step % config.kl.every == 0
    domains = {"new": ("new",), "original": ("original",), "both": ("new", "original")}[config.kl.domain] if due else ()
    kl_share = pace.kl_weight * config.kl.every / max(1, len(domains)) / parts

    denoising, kls = 0.0, dict.fromkeys(domains, 0.0)
    kl_sums = torch.zeros(2, job.pipeline.num_views + KL_TIMESTEP_GROUPS)
    for part in range(parts):
        if "original" in domains:
            batch = _batch(job, step, part, lowest, original=True)
            with accelerator.no_sync(job.model):  # processes share out gradients once a step, at its last batch
                _, kl = losses(job, batch, position, with_kl=True)
                accelerator.backward(kl_share * kl.mean())
            kls["original"] += kl.mean().item() / parts
            kl_sums += _kl_sums(job, batch, kl)
        batch = _batch(job, step, part, lowest)
        last = part == parts - 1
        with torch.enable_grad() if last else accelerator.no_sync(job.model):
            fit, kl = losses(job, batch, position, with_kl="new" in domains)
            loss = fit / parts
            if "new" in domains:
                loss = loss + kl_share * kl.mean()
                kls["new"] += kl.mean().item() / parts
                kl_sums += _kl_sums(job, batch, kl)
            if config.prompt.separation and last:
                prompt = job.adapted.prompt
                loss = loss + config.prompt.separation * separation_hinge(prompt(position), prompt.start)
            accelerator.backward(loss)
        denoising += fit.item() / parts

    own = torch.tensor([denoising, *kls.values()], device=accelerator.device)
    means = accelerator.reduce(own, reduction="mean").tolist()
    return _Measured(means[0], dict(zip(domains, means[1:], strict=True)), kl_sums)


def _refuse_what_is_not_finite(job: Job, step: int, measured: _Measured, norms: Mapping[str, float]) -> None:
    """Raises: RunError before what is not finite reaches the weights."""
    # Under fp16 an infinite gradient is normal: the scaler leaves that step out and lowers its scale.
    numbers = [measured.denoising, *measured.kl_by_domain.values()]
    numbers += norms.values() if job.accelerator.scaler is None else ()
    if all(math.isfinite(number) for number in numbers):
        return
    kl = ", ".join(f"{kl:.3g}" for kl in measured.kl_by_domain.values()) or "not measured"
    raise RunError(
        f"step {step}: not finite: denoising loss {measured.denoising:.3g}, KL {kl}, gradient norms {norms}; stopped before it "
        f"reached the weights, so the checkpoints are sound. Likely a learning rate is too high, or fp16 overflows (try "
        f"train.precision bf16)"
    )


def _clip_gradients(job: Job, step: int) -> dict[str, float]:
    """Clip each group's gradient; drop that of a group that does not train at this step. Returns the norms before."""
    config, norms = job.config, {}
    job.accelerator.unscale_gradients(job.optimizer)
    for name, parameters in job.adapted.trainable().items():
        first, end = config.window(name)
        if first <= step < end:
            norms[name] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.max_grad_norm))
            continue
        norms[name] = 0.0
        for parameter in parameters.values():
            parameter.grad = None  # a zero gradient would still move it, by Adam's momentum
    return norms


def losses(job: Job, batch: Batch, position: float, *, with_kl: bool) -> tuple[Tensor, Tensor]:
    """The denoising loss, a scalar, and the KL to the pretrained model, [B, V] (0 where left out)."""
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
        return fit, fit.new_zeros(batch.order.shape)
    anchor_weights = kl_weights(
        scheduler.alphas_cumprod,
        batch.timesteps,
        prediction_type=scheduler.config["prediction_type"],
        weighting=config.kl.weighting,
        clip=config.kl.clip,
    )
    return fit, kl_to_reference(prediction, reference, anchor_weights)


def _kl_sums(job: Job, batch: Batch, kl: Tensor) -> Tensor:
    """[2, V + KL_TIMESTEP_GROUPS]: sums of kl [B, V] by view and by range of timesteps, and how many there were of each."""
    kl, views = kl.detach().float().cpu(), kl.shape[1]
    group = batch.timesteps.cpu() * KL_TIMESTEP_GROUPS // len(job.pipeline.scheduler.alphas_cumprod)
    places = torch.cat([batch.order.cpu().flatten(), views + group.repeat_interleave(views)])
    values = torch.stack([kl.flatten().repeat(2), torch.ones(len(places))])
    return torch.zeros(2, views + KL_TIMESTEP_GROUPS).index_add_(1, places, values)


def _batch(job: Job, step: int, part: int, lowest: int, *, original: bool = False) -> Batch:
    """This process's objects of one part of a step, by their position in the global batch.

    lowest: the least noisy timestep. original: of the pretrained model's own domain instead, always given view 0.
    """
    config, accelerator = job.config, job.accelerator
    source = _original(job) if original else job.train
    key: tuple[int | str, ...] = (config.train.seed, "original", step) if original else (config.train.seed, step)
    references = [0] if original else config.data.references(job.pipeline.num_views)
    size, processes = config.train.batch_size, accelerator.num_processes
    first = (part * processes + accelerator.process_index) * size
    objects, draws = [], []
    for position in range(first, first + size):
        generator = seeded(*key, position)
        index = object_at(step * size * processes * config.train.accumulation + position, len(source), config.train.seed)
        objects.append(source.get(index, generator))
        draws.append(
            draw(
                generator,
                encoded=objects[-1],
                num_timesteps=len(job.pipeline.scheduler.alphas_cumprod),
                references=references,
                drop_rate=config.loss.condition_drop_rate,
                lowest=lowest,
            )
        )
    return make_batch(job.pipeline, objects, draws)


def _original(job: Job) -> EncodedObjects:
    assert job.original is not None, "kl.domain is checked against data.original when the configuration is read"
    return job.original.replay


def object_at(place: int, count: int, seed: int) -> int:
    """Which of `count` objects stands at a place of the endless training order: each epoch a new permutation."""
    epoch, within = divmod(place, count)
    return int(torch.randperm(count, generator=seeded(seed, "epoch", epoch))[within])


def _regularise_prompt(job: Job, step: int, position: float) -> None:
    settings, prompt = job.config.prompt, job.adapted.prompt
    first, end = job.config.window("prompt")
    if not (settings.learn and first <= step < end):
        return
    if settings.decay:
        rate = next(g["lr"] for g in job.optimizer.param_groups if g["name"] == "prompt")
        prompt.decay_toward_start(min(1.0, rate * settings.decay))
    if settings.norm_band is not None:
        prompt.clamp_norms(settings.norm_band, position)
