"""The training loop, and one step of it.

All randomness is a function of (seed, step, position in the global batch), and so is the order of the data: a step is the same
whether the run was interrupted before it or not, and however its objects are shared out between batches and processes.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from softprompt.batch import Batch, draw, make_batch, seeded
from softprompt.curriculum import position_at
from softprompt.errors import RunError
from softprompt.losses import denoising_loss, kl_to_reference, kl_weights, snr, snr_weights
from softprompt.model import noisy_and_target
from train.checkpoint import restore, save_checkpoint
from train.config import Config, to_yaml
from train.evaluate import averaged, preview, preview_series, validation_loss, view_weights
from train.export import Exported, export
from train.monitor import Monitor, preview_grid, prompt_series
from train.setup import Job
from train.stop import StopSignal

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}  # diffusers' names


@dataclass
class Run:
    """A run and its state: what changes is saved whole in a checkpoint."""

    job: Job
    folder: Path
    schedule: LRScheduler
    ema: EMAModel | None
    monitor: Monitor
    step: int = 0
    """Optimizer steps done."""
    first: dict[str, float] | None = None
    """Series at step 0: what the pretrained model gives."""
    last: dict[str, float] | None = None
    """Series of the newest evaluation."""
    best: dict[str, float] | None = None
    """{"step", "loss"} of the lowest validation loss so far."""
    pretrained_views: Tensor | None = None
    """The untouched model's previews."""
    exported: Exported | None = None

    @property
    def position(self) -> float:
        """s at the present step."""
        return position_of(self.job.config, self.step)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over its objects on this process."""

    denoising: float
    kl: float | None
    """Nats per latent element; None on a step that leaves the term out."""
    grad_norms: dict[str, float]
    """By group, before clipping."""


def position_of(config: Config, step: int) -> float:
    """s at a step, by the curriculum."""
    curriculum = config.curriculum
    when = step / config.train.steps if curriculum.unit == "run" else step
    return position_at(when, curriculum.at, curriculum.position, curriculum.easing)


def train(job: Job, folder: Path, *, state: Mapping[str, Any] | None, stop: StopSignal) -> Run:
    """Train until `train.steps` or until `stop` is set, whichever comes first; then checkpoint and export.

    state: a checkpoint to go on from, or None.
    Returns: the run; `run.step` says how far it came.
    Raises: RunError on a loss or gradient that is not finite, or when an export is not what is in memory.
    """
    config, main = job.config, job.accelerator.is_main_process
    run = _start(job, folder, state)
    if state is None:
        run.monitor.text("config", f"```\n{to_yaml(config)}\n```")
    _evaluate_if_due(run)

    bar = tqdm(
        total=config.train.steps,
        initial=run.step,
        unit="step",
        disable=not main,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
    )
    window: list[StepResult] = []
    since = time.monotonic()
    while run.step < config.train.steps:
        result = training_step(job, run.step)
        run.schedule.step()
        if run.ema is not None:
            run.ema.step(_parameters(job))
        run.step += 1
        window.append(result)
        bar.update()

        if _due(run, config.monitor.log_every):
            series = _log(run, window, since)
            bar.set_postfix_str(_postfix(series))
            window, since = [], time.monotonic()
        if stop.agreed(job.accelerator) and run.step < config.train.steps:
            break  # whoever stops it does not wait for an evaluation
        began = time.monotonic()
        _evaluate_if_due(run)
        since += time.monotonic() - began
        if _due(run, config.monitor.checkpoint_every):
            _checkpoint(run)
    bar.close()

    _checkpoint(run)
    _export(run, folder / "export", with_pipeline=config.export.pipeline and run.step >= config.train.steps)
    run.monitor.close()
    return run


def _start(job: Job, folder: Path, state: Mapping[str, Any] | None) -> Run:
    config = job.config
    run = Run(
        job=job,
        folder=folder,
        schedule=get_scheduler(
            _SCHEDULES[config.train.schedule],
            job.optimizer,
            num_warmup_steps=config.train.warmup_steps,
            num_training_steps=config.train.steps,
        ),
        ema=None if config.train.ema_decay is None else EMAModel(_parameters(job), decay=config.train.ema_decay),
        monitor=Monitor(folder, active=job.accelerator.is_main_process, resumed_step=None if state is None else state["step"]),
    )
    if state is not None:
        restore(
            state,
            adapted=job.adapted,
            optimizer=job.optimizer,
            schedule=run.schedule,
            ema=run.ema,
            scaler=job.accelerator.scaler,
        )
        run.step, run.best, run.first, run.last = (state[key] for key in ("step", "best", "first", "last"))
    return run


def _parameters(job: Job) -> list[torch.nn.Parameter]:
    return [p for group in job.adapted.trainable().values() for p in group.values()]


def _due(run: Run, every: int) -> bool:
    return run.step % every == 0 or run.step == run.job.config.train.steps


# ----------------------------------------------------------------------------------------------------------- one step


def training_step(job: Job, step: int) -> StepResult:
    """Forward, backward and update for step number `step` (counted from 0)."""
    config, accelerator = job.config, job.accelerator
    position = position_of(config, step)
    with_kl = config.kl.weight > 0 and step % config.kl.every == 0
    torch.manual_seed(int(seeded(config.train.seed, "dropout", step, accelerator.process_index).initial_seed()))

    denoising, kl = 0.0, 0.0
    for part in range(config.train.accumulation):
        batch = _batch(job, step, part)
        last = part == config.train.accumulation - 1
        with torch.enable_grad() if last else accelerator.no_sync(job.model):
            fit, anchor = losses(job, batch, position, with_kl=with_kl)
            loss = fit + config.kl.weight * config.kl.every * anchor if with_kl else fit
            accelerator.backward(loss / config.train.accumulation)
        denoising += fit.item() / config.train.accumulation
        kl += float(anchor) / config.train.accumulation

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
    _regularise_prompt(job)
    return StepResult(denoising, kl if with_kl else None, norms)


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


def _regularise_prompt(job: Job) -> None:
    settings, prompt = job.config.prompt, job.adapted.prompt
    if not settings.learn:
        return
    if settings.decay:
        rate = next(g["lr"] for g in job.optimizer.param_groups if g["name"] == "prompt")
        prompt.decay_toward_start(min(1.0, rate * settings.decay))
    if settings.norm_band is not None:
        prompt.clamp_norms(settings.norm_band)


# ------------------------------------------------------------------------------------------------- looking and keeping


def _log(run: Run, window: list[StepResult], since: float) -> dict[str, float]:
    """Means over the steps since the last log, over all processes; the prompt as it is now."""
    job = run.job
    limit = job.config.train.max_grad_norm
    measured = [r.kl for r in window if r.kl is not None]
    sums = {"loss/train": sum(r.denoising for r in window) / len(window)}
    if measured:
        sums["loss/kl_to_pretrained"] = sum(measured) / len(measured)
    means = job.accelerator.reduce(torch.tensor(list(sums.values()), device=job.accelerator.device), reduction="mean")
    series = dict(zip(sums, means.tolist(), strict=True))
    for group in job.optimizer.param_groups:
        name = group["name"]
        norms = [r.grad_norms[name] for r in window]
        series |= {
            f"learning_rate/{name}": group["lr"],
            f"gradient/norm_{name}": sum(norms) / len(norms),
            f"gradient/clipped_share_{name}": sum(n > limit for n in norms) / len(norms),
        }
    series["curriculum/position"] = run.position
    series["speed/steps_per_second"] = len(window) / max(1e-9, time.monotonic() - since)
    with torch.no_grad():
        series |= prompt_series(job.adapted.prompt, job.adapted.prompt(run.position))
    run.monitor.scalars(run.step, series)
    return series


def _postfix(series: Mapping[str, float]) -> str:
    shown = {
        "loss": series["loss/train"],
        "KL": series.get("loss/kl_to_pretrained"),
        "s": series["curriculum/position"],
        "lr prompt": series.get("learning_rate/prompt"),
        "lr lora": series.get("learning_rate/lora"),
    }
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if value is not None)


def _evaluate_if_due(run: Run) -> None:
    """Validation loss, the previews if due, and the export of the best so far; at each step once, resumed or not."""
    job, monitor = run.job, run.job.config.monitor
    with_preview = _due(run, monitor.preview_every)
    done = run.last is not None and run.last["step"] == run.step
    if done or not (with_preview or _due(run, monitor.validate_every)):
        return
    with averaged(job, run.ema):
        series = {"loss/validation": validation_loss(job, run.position)}
        if with_preview and job.accelerator.is_main_process:
            with torch.no_grad():
                shown = preview(job, job.adapted.prompt(run.position), run.pretrained_views)
            run.pretrained_views = shown.pretrained
            rows = [("truth", shown.truth), ("pretrained", shown.pretrained), ("now", shown.now)]
            run.monitor.picture(run.step, "held_out", preview_grid(rows, shown.pictures, shown.names))
            series |= preview_series(shown)
    job.accelerator.wait_for_everyone()
    run.monitor.scalars(run.step, series)
    run.last = {**series, "step": run.step}
    run.first = run.first or run.last
    if run.best is None or series["loss/validation"] < run.best["loss"]:
        run.best = {"step": run.step, "loss": series["loss/validation"]}
        if 0 < run.step < job.config.train.steps:
            _export(run, run.folder / "export" / "best", with_pipeline=False)


def _checkpoint(run: Run) -> None:
    if run.job.accelerator.is_main_process:
        save_checkpoint(
            run.folder,
            adapted=run.job.adapted,
            optimizer=run.job.optimizer,
            schedule=run.schedule,
            ema=run.ema,
            scaler=run.job.accelerator.scaler,
            progress={"step": run.step, "first": run.first, "last": run.last, "best": run.best},
            keep=run.job.config.monitor.checkpoints_kept,
        )
    run.job.accelerator.wait_for_everyone()


def _export(run: Run, folder: Path, *, with_pipeline: bool) -> None:
    job, config = run.job, run.job.config
    if job.accelerator.is_main_process:
        metadata = {
            "origin": "softprompt",
            "waypoints": config.prompt.waypoints,
            "position": run.position,
            "carry": config.prompt.carry,
            "steps": run.step,
            "model": config.model,
            "validation": {"loss": (run.last or {}).get("loss/validation"), "step": (run.last or {}).get("step")},
        }
        with averaged(job, run.ema), torch.no_grad():
            run.exported = export(
                job.pipeline,
                job.adapted.prompt(run.position),
                folder,
                picture=job.held_out.pictures(0, seeded("preview", 0))[0],
                metadata=metadata,
                tolerance=config.export.tolerance,
                with_pipeline=with_pipeline,
            )
    job.accelerator.wait_for_everyone()
