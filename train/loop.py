"""The training loop, and one step of it.

All randomness is a function of (seed, step, position in the global batch), and so is the order of the data: a step is the same
whether the run was interrupted before it or not, and however its objects are shared out between batches and processes.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from softprompt.batch import seeded
from softprompt.curriculum import learning_rate_factor
from softprompt.embeddings import view_names
from softprompt.errors import RunError
from softprompt.files import new_file, remove_partial
from train.ablation import ablation, ablation_series
from train.checkpoint import list_checkpoints, restore, save_checkpoint, save_progress, set_aside_newer
from train.config import Config, option_values, to_yaml
from train.evaluate import averaged, learned_effect, pretrained_original_loss, preview, preview_series, validation_series
from train.export.write import describe, export, export_pipeline
from train.incidents import write_incident
from train.monitor import Monitor, preview_grid, preview_tiles, prompt_series
from train.pacing import Pace, after_step, after_validation
from train.report.page import write_report
from train.run import Run
from train.series import is_ablation, read_series
from train.setup import Job
from train.step import KL_TIMESTEP_GROUPS, StepResult, training_step
from train.stop import StopSignal
from train.watch import (
    OF_PREVIEWS,
    SIGNS,
    collapse_signs,
    is_spike,
    moved_weights,
    prompt_signs,
    standing_still,
    worse_sign,
)

SMOOTHING = 0.98
"""Share of the training loss's running mean that a step leaves in place."""


def train(job: Job, folder: Path, *, state: Mapping[str, Any] | None, stop: StopSignal) -> Run:
    """Train until `train.steps` or until `stop` is set, whichever comes first; then export.

    state: a checkpoint to go on from, or None.
    Returns: the run; `run.step` says how far it came.
    Raises: RunError when numbers are not finite for `train.max_skipped` steps in a row, when weights that are frozen have
    moved, or when an export is not what is in memory.
    """
    config, main = job.config, job.accelerator.is_main_process
    run = _start(job, folder, state)
    if main and job.skipped:
        with new_file(folder / "skipped_samples.txt") as partial:
            partial.write_text("".join(f"{one}\n" for one in job.skipped), encoding="utf-8")
    if state is None:
        run.monitor.text("config", f"```\n{to_yaml(config)}\n```")
    _begin_objectives(run, stop)
    _evaluate_if_due(run)

    with tqdm(
        total=config.train.steps,
        initial=run.step,
        unit="step",
        disable=not main,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
    ) as bar:
        _train(run, stop, bar)
    _checkpoint(run)
    _export(run, folder / "export")
    if config.export.pipeline and run.step >= config.train.steps:
        _export_pipeline(run, folder / "export")
    run.monitor.hparams(option_values(config), run.last or {})
    if main:
        _report(run)
    run.monitor.close()
    job.accelerator.wait_for_everyone()
    return run


def _train(run: Run, stop: StopSignal, bar: tqdm) -> None:
    """Steps, and what is due after each."""
    job, config = run.job, run.job.config
    since = time.monotonic()
    while run.step < config.train.steps and not stop.agreed(job.accelerator):
        try:
            result = training_step(job, run.step, run.pace)
        except torch.OutOfMemoryError:
            if not _save_memory(job):
                raise
            tqdm.write(
                f"step {run.step}: out of GPU memory; done again with gradient checkpointing, which stays on: a step takes a "
                f"third longer. train.gradient_checkpointing always begins with it",
                file=sys.stderr,
            )
            continue
        if result.skipped:
            _skipped(run, result)
        run.schedule.step()
        if run.ema is not None and not result.skipped:
            run.ema.step(job.adapted.all_trainable().values())
        run.step += 1
        run.window.append(_taken(run, result))
        bar.update()

        if _due(run, config.monitor.log_every):
            bar.set_postfix_str(_postfix(_log(run, since)))
            run.window, since = [], time.monotonic()
        if stop.save_agreed(job.accelerator) or _due(run, config.monitor.checkpoint_every):
            _checkpoint(run)
        if stop.agreed(job.accelerator) and run.step < config.train.steps:
            break  # whoever stops it does not wait for an evaluation
        began = time.monotonic()
        _begin_objectives(run, stop)
        _evaluate_if_due(run)
        since += time.monotonic() - began


def _begin_objectives(run: Run, stop: StopSignal) -> None:
    """Let objectives make what they need of the model as it is now."""
    job = run.job
    if job.objectives.begins(run.step):
        _checkpoint(run)  # what follows may take long; a killed run then goes on from here
        job.objectives.begin(job, run.folder, run.step, run.position, stopped=lambda: stop.number is not None)


def _start(job: Job, folder: Path, state: Mapping[str, Any] | None) -> Run:
    config, decay = job.config, job.config.train.ema_decay
    run = Run(
        job=job,
        folder=folder,
        schedule=make_schedule(config, job.optimizer),
        pace=Pace.start(config),
        ema=None if decay is None else EMAModel(job.adapted.all_trainable().values(), decay=decay),
        monitor=Monitor(folder, active=job.accelerator.is_main_process),
    )
    if state is not None:
        restore(state, **run.state())
        run.go_on_from(state)
        if config.kl.target is None:
            run.pace = replace(run.pace, kl_weight=config.kl.weight)  # which --resume-override may have changed
        if job.accelerator.is_main_process:
            remove_partial(folder)
            set_aside_newer(folder, run.step)
    if job.accelerator.is_main_process:
        with new_file(folder / "config.yaml") as partial:
            partial.write_text(to_yaml(config), encoding="utf-8")
    run.frozen = job.adapted.frozen_sums()
    run.remember_weights()
    run.monitor.open(resumed_step=None if state is None else run.step, evaluated=_evaluated(run))
    return run


def make_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Each group's learning rate: warm-up and decay within the steps in which it trains."""

    def factor(group: str) -> Callable[[int], float]:
        first, end = config.window(group)
        return lambda step: learning_rate_factor(
            step, first=first, end=end, warmup=config.train.warmup_steps, schedule=config.train.schedule
        )

    return LambdaLR(optimizer, [factor(group["name"]) for group in optimizer.param_groups])


def _move_on(run: Run, pace: Pace) -> None:
    """Take over what the curricula have come to; say when one of them has entered a new stage."""
    for name, before, now in (("path", run.pace.stage, pace.stage), ("timesteps", run.pace.timesteps, pace.timesteps)):
        if now.number != before.number and run.job.accelerator.is_main_process:
            tqdm.write(f"step {run.step}: {name}: stage {now.number + 1} begins", file=sys.stderr)
    run.pace = pace


def _save_memory(job: Job) -> bool:
    """Switch gradient checkpointing on where it is left to need. Returns: whether that is a change."""
    unet, by_need = job.pipeline.unet, job.config.train.gradient_checkpointing == "auto"
    if not by_need or unet.is_gradient_checkpointing or job.accelerator.num_processes > 1:  # the others would not know
        return False
    job.optimizer.zero_grad(set_to_none=True)
    unet.enable_gradient_checkpointing()
    torch.cuda.empty_cache()
    return True


def _due(run: Run, every: int) -> bool:
    return run.step % every == 0 or run.step == run.job.config.train.steps


def _taken(run: Run, result: StepResult) -> StepResult:
    """Take in what a step gave. Returns: it, marked where its loss was a spike."""
    if result.not_finite is not None:
        return result
    spike = False
    if result.denoising is not None:
        spike = is_spike(result.denoising, run.running_loss)
        before = result.denoising if run.running_loss is None else run.running_loss
        run.running_loss = SMOOTHING * before + (1 - SMOOTHING) * result.denoising
    if not result.skipped:
        run.skipped_in_a_row = 0
    _move_on(run, after_step(run.job.config, run.pace, run.step, denoising=result.denoising, kl=result.kl))
    return replace(result, spike=spike)


def _skipped(run: Run, result: StepResult) -> None:
    """Say and write down what stopped a step; stop where too many did. An overflow now and then is how fp16 finds its scale.

    Raises: RunError.
    """
    run.skipped_in_a_row += 1
    most, main = run.job.config.train.max_skipped, run.job.accelerator.is_main_process
    given_up = run.skipped_in_a_row >= most
    what = result.not_finite or "gradients overflowed in fp16"
    incident = None
    if (result.not_finite and run.skipped_in_a_row == 1) or given_up:
        incident = write_incident(run, run.step, what)
    if result.not_finite and main:
        tqdm.write(f"WARNING step {run.step}: not finite: {what}; the step is skipped, the weights stay", file=sys.stderr)
    if given_up:
        checkpoints = list_checkpoints(run.folder)
        sound = f"{checkpoints[-1]} is sound" if checkpoints else "there is no checkpoint yet"
        raise RunError(
            f"step {run.step}: not finite in {run.skipped_in_a_row} steps in a row (train.max_skipped), nothing trained in "
            f"them: {what}. {sound}. Likely a learning rate is too high, or fp16 overflows (try train.precision bf16); see "
            f"which sample and layer it comes from: python -m train.replay {incident}"
        )


# ------------------------------------------------------------------------------------------------- looking and keeping


def _log(run: Run, since: float) -> dict[str, float]:
    """Means over the steps since the last log, over all processes; the prompt as it is now."""
    job, config = run.job, run.job.config
    limit = config.train.max_grad_norm
    window = [result for result in run.window if result.not_finite is None]
    series = {"gradient/skipped_share": sum(r.skipped for r in run.window) / len(run.window)}
    if losses := [r.denoising for r in window if r.denoising is not None]:
        series |= {"loss/train": sum(losses) / len(losses), "loss/train_highest": max(losses)}
    series["loss/spikes_share"] = sum(r.spike for r in run.window) / len(run.window)
    series |= _kl_series(run, window)
    for name in dict.fromkeys(name for r in window for name in r.objectives):
        values = [r.objectives[name] for r in window if name in r.objectives]
        series[f"objective/{name}"] = sum(values) / len(values)
    for group in job.optimizer.param_groups:
        name = group["name"]
        series[f"learning_rate/{name}"] = group["lr"]
        if norms := [r.grad_norms[name] for r in window if not r.skipped]:
            series[f"gradient/norm_{name}"] = sum(norms) / len(norms)
            series[f"gradient/clipped_share_{name}"] = sum(n > limit for n in norms) / len(norms)
    series["curriculum/position"] = run.position
    series["curriculum/lowest_timestep"] = run.lowest_timestep
    series["speed/steps_per_second"] = len(run.window) / max(1e-9, time.monotonic() - since)
    with averaged(job, run.ema), torch.no_grad():
        series |= prompt_series(job.adapted.prompt, run.position)
    run.monitor.scalars(run.step, series)
    return series


def _kl_series(run: Run, window: list[StepResult]) -> dict[str, float]:
    """The KL to the pretrained model, and its weight: over all, by view, by range of timesteps; what was not measured is left
    out."""
    job = run.job
    measured = [r.kl for r in window if r.kl is not None]
    if not measured:
        return {}
    series = {"loss/kl_to_pretrained": sum(measured) / len(measured), "kl/weight": run.pace.kl_weight}
    if on_original := [r.kl_on_original for r in window if r.kl_on_original is not None]:
        series["kl/on_original"] = sum(on_original) / len(on_original)
    totals, counts = torch.tensor([r.kl_sums for r in window]).sum(dim=0).tolist()
    length = len(job.pipeline.scheduler.alphas_cumprod)
    bounds = [i * length // KL_TIMESTEP_GROUPS for i in range(KL_TIMESTEP_GROUPS + 1)]
    names = [f"kl_view/{name}" for name in view_names(job.pipeline.num_views)]
    names += [f"kl_timestep/{low:04d}_{high - 1:04d}" for low, high in pairwise(bounds)]
    return series | {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}


def _postfix(series: Mapping[str, float]) -> str:
    shown = {
        "loss": series.get("loss/train"),
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
    if _evaluated(run) or not (with_preview or _due(run, monitor.validate_every)):
        return
    with averaged(job, run.ema):
        series = validation_series(job, run.position, with_original=with_preview)
        if run.step == 0 and "loss/original" in series:
            untouched = run.position == 0 and job.config.init_from is None
            series["loss/original_pretrained"] = series["loss/original"] if untouched else pretrained_original_loss(job)
        if with_preview and job.accelerator.is_main_process:
            with torch.no_grad():
                shown = preview(job, job.adapted.prompt(run.position), run.pretrained_views)
            run.pretrained_views, run.shown = shown.pretrained, shown
            rows = [("truth", shown.truth), ("pretrained", shown.pretrained), ("now", shown.now)]
            run.monitor.picture(run.step, "held_out", preview_grid(rows, shown.pictures, shown.names))
            run.monitor.tiles(run.step, preview_tiles([views for _, views in rows], shown.pictures))
            series |= preview_series(shown) | job.objectives.measure(job, run.position, shown)
        if job.accelerator.is_main_process:
            series |= _watch(run, series, with_preview=with_preview)
    _refuse_moved_weights(run)
    job.accelerator.wait_for_everyone()
    run.monitor.scalars(run.step, series)
    _move_on(run, after_validation(job.config, run.pace, run.step, series["loss/validation"]))
    run.last = {**series, "step": run.step}
    run.first = run.first or run.last
    improved = run.best is None or series["loss/validation"] < run.best["loss"]
    if improved and _best_exported(run):
        run.best = {"step": run.step, "loss": series["loss/validation"]}
    if job.accelerator.is_main_process:
        save_progress(run.folder, run.progress())  # last: a run that is killed before evaluates and exports again


def _watch(run: Run, series: dict[str, float], *, with_preview: bool) -> dict[str, float]:
    """Say once when a sign that the run goes wrong appears, and when it is gone. series: of this evaluation.

    At step 0 nothing is said: the pretrained model does not know the new subject yet.
    Returns: series of the signs, 1 where there is one, and of what was measured for them.
    """
    job, prompt, found = run.job, run.job.adapted.prompt, {}
    if with_preview and _trained_in(run, "prompt", 0) and (effect := learned_effect(job, run.position)) is not None:
        found["prompt_effect/of_learned"] = effect
    seen = {**series, **prompt_series(prompt, run.position), **found}
    start = run.first or series
    run.worse = run.worse + 1 if series["loss/validation"] > start["loss/validation"] else 0
    moved = run.moved()
    signs = {
        **collapse_signs(seen, run.first or {}),
        **prompt_signs(seen, rounding=torch.finfo(job.pipeline.unet.dtype).eps),
        **worse_sign(run.worse, series["loss/validation"], start["loss/validation"]),
        **standing_still(moved, {name: _trained_in(run, name, run.evaluated_step) for name in moved}),
    }
    run.remember_weights()
    if not with_preview:  # what only pictures show is as it was
        signs |= {name: said for name, said in run.warned.items() if name in OF_PREVIEWS}
    if run.step > 0:
        for name in signs.keys() - run.warned.keys():
            tqdm.write(f"WARNING step {run.step}: {name}: {signs[name]}", file=sys.stderr)
        for name in run.warned.keys() - signs.keys():
            tqdm.write(f"step {run.step}: {name}: no longer so", file=sys.stderr)
        run.warned = signs
    return found | {f"watch/{name}": float(name in signs) for name in SIGNS if with_preview or name not in OF_PREVIEWS}


def _trained_in(run: Run, group: str, since: int) -> bool:
    """Whether a group had its turn in any step from `since` on."""
    first, end = run.job.config.window(group)
    return group in run.job.adapted.trainable() and max(first, since) < min(end, run.step)


def _refuse_moved_weights(run: Run) -> None:
    """Raises: RunError where what is frozen has moved: the model that the KL compares with would be another."""
    if moved := moved_weights(run.frozen, run.job.adapted.frozen_sums()):
        raise RunError(
            f"step {run.step}: {len(moved)} frozen tensors are not what they were at the start, e.g. {moved[0]}; this is no "
            f"setting of yours but a fault of the program or of the memory; the checkpoints hold only what trains"
        )


def _best_exported(run: Run) -> bool:
    """Export the best so far. Returns: whether that stands; step 0, the pretrained model, needs none."""
    if run.step == 0:
        return True
    try:
        _export(run, run.folder / "export" / "best")
    except RunError as error:  # the run goes on: a later export may be sound, and the checkpoint of this step is
        tqdm.write(f"WARNING: {error}", file=sys.stderr)
        return False
    return True


def _evaluated(run: Run) -> bool:
    """Whether this step has been evaluated already."""
    return run.last is not None and run.last["step"] == run.step


def _checkpoint(run: Run) -> None:
    if run.job.accelerator.is_main_process:
        kept = run.job.config.monitor.checkpoints_kept
        save_checkpoint(run.folder, **run.state(), progress=run.progress(), keep=kept)
    run.job.accelerator.wait_for_everyone()


def _export(run: Run, folder: Path) -> None:
    job, config = run.job, run.job.config
    if job.accelerator.is_main_process:
        metadata = describe(config, position=run.position, step=run.step, last=run.last)
        try:
            with averaged(job, run.ema), torch.no_grad():
                run.exported = export(
                    job.pipeline,
                    job.adapted.prompt(run.position),
                    folder,
                    picture=_export_picture(job),
                    metadata=metadata,
                    tolerance=config.export.tolerance,
                )
        finally:
            job.accelerator.wait_for_everyone()  # also where it fails: the others wait, and the run may go on
    else:
        job.accelerator.wait_for_everyone()


def _export_pipeline(run: Run, folder: Path) -> None:
    job = run.job
    if job.accelerator.is_main_process:
        try:
            run.merged = export_pipeline(
                job.pipeline, folder, picture=_export_picture(job), tolerance=job.config.export.tolerance
            )
        except (RunError, OSError, torch.OutOfMemoryError) as error:
            raise RunError(
                f"prompt and LoRA are exported and verified in {folder}, the merged pipeline folder is not: {error}. To leave "
                f"it out: --resume {run.folder} --export.pipeline false"
            ) from error
    job.accelerator.wait_for_everyone()


def _report(run: Run) -> None:
    """Leave the prompts to TensorBoard's projector, and the run's report."""
    job, config = run.job, run.job.config
    with averaged(job, run.ema), torch.no_grad():
        prompt = job.adapted.prompt(run.position)
        run.monitor.projector(run.step, prompt, job.adapted.prompt.waypoints, config.prompt.waypoints)
        if not config.export.report:
            return
        if run.step >= config.train.steps and not _ablated(run):
            shown = run.shown or preview(job, prompt, run.pretrained_views)
            rows = ablation(job, prompt, shown)
            labelled = [(name.replace("_", " "), views) for name, views in rows.items()]
            run.monitor.picture(run.step, "ablation", preview_grid(labelled, shown.pictures, shown.names))
            run.monitor.tiles(run.step, preview_tiles([shown.truth, *rows.values()], shown.pictures), "ablation-tiles")
            run.monitor.scalars(run.step, ablation_series(rows, shown))
    write_report(run.folder)


def _ablated(run: Run) -> bool:
    """Whether this step has its ablation already: a finished run is gone on with."""
    return any(point["step"] == run.step and is_ablation(point) for point in read_series(run.folder))


def _export_picture(job: Job) -> Tensor:
    """[3, S, S]: what exports are compared on."""
    return job.held_out.pictures(0, seeded("preview", 0))[0]
