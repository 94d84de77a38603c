"""What is looked at while a run trains: points of its log, evaluations, signs that it goes wrong."""

import sys
import time
from itertools import pairwise

import torch
from tqdm import tqdm

from softprompt.errors import RunError
from softprompt.prompt.templates import view_names
from train.evaluation.diagnostics import (
    OF_PREVIEWS,
    SIGNS,
    collapse_signs,
    moved_weights,
    prompt_signs,
    standing_still,
    worse_sign,
)
from train.evaluation.evaluate import (
    averaged,
    learned_effect,
    pretrained_original_loss,
    preview,
    preview_series,
    validation_series,
)
from train.log.logger import preview_grid, preview_tiles, prompt_series
from train.state import artifacts as keep
from train.state.checkpoint import save_progress
from train.state.pacing import Pace, after_validation
from train.state.run import Run
from train.step import KL_TIMESTEP_GROUPS, StepResult


def log(run: Run, since: float) -> dict[str, float]:
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


def evaluate_if_due(run: Run) -> None:
    """Validation loss, the previews if due, and the export of the best so far; at each step once, resumed or not."""
    job, monitor = run.job, run.job.config.monitor
    with_preview = due(run, monitor.preview_every)
    if evaluated(run) or not (with_preview or due(run, monitor.validate_every)):
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
            run.monitor.tiles(run.step, "tiles", preview_tiles([views for _, views in rows], shown.pictures))
            series |= preview_series(shown) | job.objectives.measure(job, run.position, shown)
        if job.accelerator.is_main_process:
            series |= _watch(run, series, with_preview=with_preview)
    _refuse_moved_weights(run)
    job.accelerator.wait_for_everyone()
    run.monitor.scalars(run.step, series)
    move_on(run, after_validation(job.config, run.pace, run.step, series["loss/validation"]))
    run.last = {**series, "step": run.step}
    run.first = run.first or run.last
    improved = run.best is None or series["loss/validation"] < run.best["loss"]
    if improved and keep.best(run):
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


def evaluated(run: Run) -> bool:
    """Whether this step has been evaluated already."""
    return run.last is not None and run.last["step"] == run.step


def due(run: Run, every: int) -> bool:
    """Whether something that is done every so many steps, and at the end, has its turn."""
    return run.step % every == 0 or run.step == run.job.config.train.steps


def move_on(run: Run, pace: Pace) -> None:
    """Take over what the curricula have come to; say when one of them has entered a new stage."""
    for name, before, now in (("path", run.pace.stage, pace.stage), ("timesteps", run.pace.timesteps, pace.timesteps)):
        if now.number != before.number and run.job.accelerator.is_main_process:
            tqdm.write(f"step {run.step}: {name}: stage {now.number + 1} begins", file=sys.stderr)
    run.pace = pace
