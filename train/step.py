"""One optimizer step: batch, losses, gradients, update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.batch import Batch, seed_of
from softprompt.losses import denoising_loss, kl_to_reference, kl_weights, separation_hinge, snr, snr_weights
from softprompt.model import noisy_and_target
from train.batches import kl_domains
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
    kl_sums: list[list[float]]
    """[2][V + KL_TIMESTEP_GROUPS]: sums of the KL by view and by range of timesteps, and their counts."""
    grad_norms: dict[str, float]
    """By group, before clipping; 0 for a group that does not train at this step."""
    skipped: bool
    """Nothing trained: a number was not finite, or fp16's gradient scaler found that a gradient overflowed."""
    not_finite: str | None
    """What was not finite, in words; None where all was. An overflow that the scaler answers for is not counted."""
    spike: bool = False
    """Whether the loss stood out of its running mean."""


def training_step(job: Job, step: int, pace: Pace | None = None) -> StepResult:
    """Forward, backward and update for step number `step` (counted from 0).

    pace: what the curricula have come to; None: nothing yet, as at step 0.
    Where a loss or a gradient is not finite the weights stay as they are.
    """
    accelerator = job.accelerator
    pace = pace or Pace.start(job.config)
    position = position_of(job.config, pace, step)
    torch.manual_seed(seed_of(job.config.train.seed, "dropout", step, accelerator.process_index))
    measured = _backward(job, step, pace, position)
    norms = _clip_gradients(job, step)
    denoising, kls, kl_sums, grad_norms = _fetch(job, measured, norms)
    not_finite = _what_is_not_finite(job, denoising, kls, grad_norms)
    if not_finite is not None:
        # The step is taken all the same: without gradients it moves nothing, and fp16's scaler has to be told of it.
        job.optimizer.zero_grad(set_to_none=True)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    skipped = not_finite is not None or accelerator.optimizer_step_was_skipped
    if not skipped:
        _regularise_prompt(job, step, position)
    return StepResult(
        denoising=denoising,
        kl=sum(kls.values()) / len(kls) if kls else None,
        kl_on_original=kls.get("original"),
        kl_sums=kl_sums,
        grad_norms=grad_norms,
        skipped=skipped,
        not_finite=not_finite,
    )


@dataclass(frozen=True)
class _Measured:
    """Of one step's batches on this process, still on the device."""

    denoising: Tensor
    kl_by_domain: dict[str, Tensor]
    kl_sums: Tensor


def _backward(job: Job, step: int, pace: Pace, position: float) -> _Measured:
    """Gradients of a step: of the denoising loss, of the KL where it is due, and of the prompts' separation."""
    config, accelerator, device = job.config, job.accelerator, job.accelerator.device
    lowest = lowest_timestep_of(config, pace, job.pipeline.scheduler.alphas_cumprod)
    wanted = job.batches.of_step(step, lowest)
    job.batches.make_ahead(wanted + job.batches.of_step(step + 1, lowest))
    domains, parts = kl_domains(config, step), config.train.accumulation
    kl_share = pace.kl_weight * config.kl.every / max(1, len(domains)) / parts

    denoising = torch.zeros((), device=device)
    kls = {domain: torch.zeros((), device=device) for domain in domains}
    kl_sums = torch.zeros(2, job.pipeline.num_views + KL_TIMESTEP_GROUPS, device=device)
    for one in wanted:
        batch, domain = job.batches.take(one), "original" if one.original else "new"
        last = one is wanted[-1]
        # Processes share out gradients once a step, at its last batch.
        with torch.enable_grad() if last else accelerator.no_sync(job.model):
            fit, kl = losses(job, batch, position, with_kl=domain in domains)
            loss = fit.new_zeros(()) if one.original else fit / parts
            if domain in domains:
                loss = loss + kl_share * kl.mean()
                kls[domain] += kl.detach().mean() / parts
                kl_sums += _kl_sums(job, batch, kl)
            if config.prompt.separation and last:
                prompt = job.adapted.prompt
                loss = loss + config.prompt.separation * separation_hinge(prompt(position), prompt.start)
            accelerator.backward(loss)
        if not one.original:
            denoising += fit.detach() / parts
    return _Measured(denoising, kls, kl_sums)


def _fetch(
    job: Job, measured: _Measured, norms: Mapping[str, Tensor]
) -> tuple[float, dict[str, float], list[list[float]], dict[str, float]]:
    """The numbers of a step from the device, averaged over processes, at once: each fetch waits for all that was begun."""
    losses = torch.stack([measured.denoising, *measured.kl_by_domain.values()])
    own = job.accelerator.reduce(torch.cat([losses, measured.kl_sums.flatten()]), reduction="mean")
    numbers = torch.cat([own, torch.stack(list(norms.values()))]).tolist()
    kls = dict(zip(measured.kl_by_domain, numbers[1 : len(losses)], strict=True))
    places = measured.kl_sums.shape[1]
    sums = [numbers[first : first + places] for first in (len(losses), len(losses) + places)]
    return numbers[0], kls, sums, dict(zip(norms, numbers[len(own) :], strict=True))


def _what_is_not_finite(job: Job, denoising: float, kls: Mapping[str, float], norms: Mapping[str, float]) -> str | None:
    # Under fp16 an infinite gradient is normal: the scaler leaves that step out and lowers its scale.
    numbers = [denoising, *kls.values()]
    numbers += norms.values() if job.accelerator.scaler is None else ()
    if all(math.isfinite(number) for number in numbers):
        return None
    kl = ", ".join(f"{kl:.3g}" for kl in kls.values()) or "not measured"
    gradients = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
    return f"denoising loss {denoising:.3g}, KL {kl}, gradient norms {gradients}"


def _clip_gradients(job: Job, step: int) -> dict[str, Tensor]:
    """Clip each group's gradient; drop that of a group that does not train at this step. Returns the norms before."""
    config, norms = job.config, {}
    job.accelerator.unscale_gradients(job.optimizer)
    for name, parameters in job.adapted.trainable().items():
        first, end = config.window(name)
        if first <= step < end:
            norms[name] = torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.max_grad_norm)
            continue
        norms[name] = torch.zeros((), device=job.accelerator.device)
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
    kl, views = kl.detach().float(), kl.shape[1]
    group = batch.timesteps * KL_TIMESTEP_GROUPS // len(job.pipeline.scheduler.alphas_cumprod)
    places = torch.cat([batch.order.flatten(), views + group.repeat_interleave(views)])
    values = torch.stack([kl.flatten().repeat(2), torch.ones_like(places, dtype=kl.dtype)])
    return kl.new_zeros(2, views + KL_TIMESTEP_GROUPS).index_add_(1, places, values)


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
