"""One optimizer step: batch, losses, gradients, update."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.data.batch import Batch, seed_of
from softprompt.objectives.losses import denoising_loss, kl_to_reference, kl_weights, separation_hinge, snr, snr_weights
from train.batches import kl_domains
from train.objectives.terms import Scene, Term, view_weights
from train.options.config import Config
from train.setup import Job
from train.state.pacing import Pace, lowest_timestep_of, position_of

KL_TIMESTEP_GROUPS = 4
"""Into so many equal ranges of timesteps the KL is split in the log."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over its objects on all processes."""

    denoising: float | None
    """None on a step without it (`loss.weight` 0)."""
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
    objectives: dict[str, float] = field(default_factory=dict)
    """Of the other objectives, by the names of their series."""


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
    denoising, kls, kl_sums, objectives, grad_norms = _fetch(job, measured, norms)
    not_finite = _what_is_not_finite(job, denoising, kls, objectives, grad_norms)
    if not_finite is None:
        job.objectives.look(step, objectives)
    else:
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
        objectives=objectives,
    )


@dataclass(frozen=True)
class _Measured:
    """Of one step's batches on this process, still on the device."""

    denoising: Tensor | None
    kl_by_domain: dict[str, Tensor]
    kl_sums: Tensor
    objectives: dict[str, Tensor]


def _backward(job: Job, step: int, pace: Pace, position: float) -> _Measured:
    """Gradients of a step: of the denoising loss and the other objectives, of the KL where it is due, and of the prompts'
    separation."""
    config, accelerator, device = job.config, job.accelerator, job.accelerator.device
    lowest = lowest_timestep_of(config, pace, job.pipeline.scheduler.alphas_cumprod)
    wanted = job.batches.of_step(step, lowest)
    job.batches.make_ahead(wanted + job.batches.of_step(step + 1, lowest))
    domains, parts = kl_domains(config, step), config.train.accumulation
    kl_share = pace.kl_weight * config.kl.every / max(1, len(domains)) / parts
    sharing = job.objectives.trained(step, own_passes=False)

    fits: list[Tensor] = []
    kls = {domain: torch.zeros((), device=device) for domain in domains}
    kl_sums = torch.zeros(2, job.pipeline.num_views + KL_TIMESTEP_GROUPS, device=device)
    series: dict[str, Tensor] = {}
    for one in wanted:
        batch, domain = job.batches.take(one), "original" if one.original else "new"
        last = one is wanted[-1]
        scene = Scene(job, one, batch, step, position)
        if not one.original:
            _own_passes(job, scene, parts)
        terms = [] if one.original else sharing
        loss = batch.latents.new_zeros(())
        with ExitStack() as around:
            # Processes share out gradients once a step, at its last batch.
            around.enter_context(torch.enable_grad() if last else accelerator.no_sync(job.model))
            for term in terms:
                around.enter_context(term.around(scene))
            if one.original or domain in domains or terms or _needs_denoising(config, accelerator.num_processes):
                fit, kl = losses(scene, with_kl=domain in domains)
                loss = loss + (fit.new_zeros(()) if one.original else config.loss.weight * fit / parts)
                if domain in domains:
                    loss = loss + kl_share * kl.mean()
                    kls[domain] += kl.detach().mean() / parts
                    kl_sums += _kl_sums(job, batch, kl)
                if not one.original:
                    fits.append(fit.detach() / parts)
            for term in terms:
                loss = loss + term.weight * _logged(scene, term) / parts
            if config.prompt.separation and last:
                prompt = job.adapted.prompt
                loss = loss + config.prompt.separation * separation_hinge(prompt(position), prompt.start)
            if loss.requires_grad:
                accelerator.backward(loss)
        for name, value in scene.series.items():
            series[name] = series.get(name, 0) + value / parts
    denoising = sum(fits, torch.zeros((), device=device)) if fits else None
    return _Measured(denoising, kls, kl_sums, series)


def _own_passes(job: Job, scene: Scene, parts: int) -> None:
    """Gradients of the objectives that run the model themselves, each part at once."""
    for term in job.objectives.trained(scene.step, own_passes=True):
        total = scene.batch.latents.new_zeros(())
        with job.accelerator.no_sync(job.model):
            for part in term.losses(scene):
                total += part.detach()
                job.accelerator.backward(term.weight * part / parts)
        scene.log(term.name, total)


def _logged(scene: Scene, term: Term) -> Tensor:
    """The loss of an objective that reads the step's prediction."""
    total = sum(term.losses(scene), scene.batch.latents.new_zeros(()))
    scene.log(term.name, total)
    return total


def other_objectives(scene: Scene) -> dict[str, float]:
    """The series of a batch's other objectives, their gradients added as `training_step` adds them, but by themselves."""
    job = scene.job
    _own_passes(job, scene, parts=1)
    sharing = job.objectives.trained(scene.step, own_passes=False)
    with ExitStack() as around:
        for term in sharing:
            around.enter_context(term.around(scene))
        if sharing:
            losses(scene, with_kl=False)
            job.accelerator.backward(sum(term.weight * _logged(scene, term) for term in sharing))
    return {name: float(value) for name, value in scene.series.items()}


def _needs_denoising(config: Config, processes: int) -> bool:
    """Whether a step needs the plain loss, be it only to be looked at; several processes share out gradients at its pass."""
    watched = config.curriculum.pacing == "plateau" and config.curriculum.watch == "train"
    return config.loss.weight > 0 or processes > 1 or config.timesteps.clusters > 1 or watched


def _fetch(
    job: Job, measured: _Measured, norms: Mapping[str, Tensor]
) -> tuple[float | None, dict[str, float], list[list[float]], dict[str, float], dict[str, float]]:
    """The numbers of a step from the device, averaged over processes, at once: each fetch waits for all that was begun."""
    denoising = [] if measured.denoising is None else [measured.denoising]
    scalars = [*denoising, *measured.kl_by_domain.values(), *measured.objectives.values()]
    own = job.accelerator.reduce(torch.cat([*(s.reshape(1) for s in scalars), measured.kl_sums.flatten()]), reduction="mean")
    numbers = torch.cat([own, torch.stack(list(norms.values()))]).tolist()
    kls = dict(zip(measured.kl_by_domain, numbers[len(denoising) :], strict=False))
    objectives = dict(zip(measured.objectives, numbers[len(denoising) + len(kls) :], strict=False))
    places, first = measured.kl_sums.shape[1], len(scalars)
    sums = [numbers[first : first + places], numbers[first + places : first + 2 * places]]
    grad_norms = dict(zip(norms, numbers[len(own) :], strict=True))
    return numbers[0] if denoising else None, kls, sums, objectives, grad_norms


def _what_is_not_finite(
    job: Job,
    denoising: float | None,
    kls: Mapping[str, float],
    objectives: Mapping[str, float],
    norms: Mapping[str, float],
) -> str | None:
    # Under fp16 an infinite gradient is normal: the scaler leaves that step out and lowers its scale.
    numbers = [*([] if denoising is None else [denoising]), *kls.values(), *objectives.values()]
    numbers += norms.values() if job.accelerator.scaler is None else ()
    if all(math.isfinite(number) for number in numbers):
        return None
    fit = "not measured" if denoising is None else f"{denoising:.3g}"
    kl = ", ".join(f"{kl:.3g}" for kl in kls.values()) or "not measured"
    others = "".join(f"{name} {value:.3g}, " for name, value in objectives.items())
    gradients = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
    return f"denoising loss {fit}, KL {kl}, {others}gradient norms {gradients}"


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


def losses(scene: Scene, *, with_kl: bool) -> tuple[Tensor, Tensor]:
    """The denoising loss, a scalar, and the KL to the pretrained model, [B, V] (0 where left out); the scene gets the
    prediction."""
    job, batch = scene.job, scene.batch
    config, scheduler = job.config, job.pipeline.scheduler
    with job.accelerator.autocast():
        prediction = job.model(*scene.inputs, scene.position)
    scene.prediction = prediction
    weights = snr_weights(
        snr(scheduler.alphas_cumprod, batch.timesteps), config.loss.snr_weighting, gamma=config.loss.snr_gamma
    )
    fit = denoising_loss(prediction, scene.target, weights, view_weights(job, len(scene.noisy)))
    if not with_kl:
        return fit, fit.new_zeros(batch.order.shape)
    anchor_weights = kl_weights(
        scheduler.alphas_cumprod,
        batch.timesteps,
        prediction_type=scheduler.config["prediction_type"],
        weighting=config.kl.weighting,
        clip=config.kl.clip,
    )
    return fit, kl_to_reference(prediction, scene.reference, anchor_weights)


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
