"""What happens between steps: points of the log, evaluations and diagnostics, checkpoints and exports.

The main process writes; the others wait for it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from softprompt.data.batch import seeded
from softprompt.errors import RunError
from softprompt.files import remove_folder
from softprompt.prompt.pacing import CurriculumState
from softprompt.prompt.templates import view_names
from train.evaluation.ablation import ablation_series
from train.evaluation.diagnostics import (
    OF_PREVIEWS,
    SIGNS,
    collapse_signs,
    moved_weights,
    prompt_signs,
    standing_still,
    worse_sign,
)
from train.evaluation.evaluator import averaged, preview_series
from train.evaluation.prompt_metrics import prompt_series
from train.export import write
from train.log.grids import preview_grid, preview_tiles
from train.log.series import FILE, display_name, is_ablation, read_series
from train.state.checkpoint import save_checkpoint, save_progress
from train.state.run import Job, Run
from train.step import KL_TIMESTEP_GROUPS, StepResult

# --------------------------------------------------------------------------------------------------------------------- log


def log(run: Run, *, steps: int, seconds: float) -> dict[str, float]:
    """Log means over the steps since the last point, over all processes, and the prompt as it is now.

    steps, seconds: of this process since then; a resumed run has done fewer of the steps itself.
    """
    trainer = run.job.trainer
    window = [result for result in run.window if result.not_finite is None]
    series = {"gradient/skipped_share": sum(r.skipped for r in run.window) / len(run.window)}
    if losses := [r.denoising for r in window if r.denoising is not None]:
        series |= {"loss/train": sum(losses) / len(losses), "loss/train_highest": max(losses)}
    series["loss/spikes_share"] = sum(r.spike for r in run.window) / len(run.window)
    series |= _kl_series(run, window)
    for name in dict.fromkeys(name for r in window for name in r.objectives):
        values = [r.objectives[name] for r in window if name in r.objectives]
        series[f"objective/{name}"] = sum(values) / len(values)
    for group in trainer.optimizer.param_groups:
        name = group["name"]
        series[f"learning_rate/{name}"] = group["lr"]
        if norms := [r.grad_norms[name] for r in window if not r.skipped]:
            series[f"gradient/norm_{name}"] = sum(norms) / len(norms)
            series[f"gradient/clipped_share_{name}"] = sum(n > trainer.max_grad_norm for n in norms) / len(norms)
    series["curriculum/position"] = run.position
    series["curriculum/lowest_timestep"] = trainer.curriculum.lowest_timestep(run.curricula)
    series["speed/steps_per_second"] = steps / max(1e-9, seconds)
    with averaged(run.job.adapted, run.ema), torch.no_grad():
        series |= prompt_series(run.job.adapted.prompt, run.position)
    run.logger.scalars(run.step, series)
    return series


def _kl_series(run: Run, window: list[StepResult]) -> dict[str, float]:
    """KL to the pretrained model and its weight: in all, by view and by range of timesteps. Without a measurement: nothing."""
    pipeline, measured = run.job.pipeline, [r.kl for r in window if r.kl is not None]
    if not measured:
        return {}
    series = {"loss/kl_to_pretrained": sum(measured) / len(measured), "kl/weight": run.curricula.kl_weight}
    if on_original := [r.kl_on_original for r in window if r.kl_on_original is not None]:
        series["kl/on_original"] = sum(on_original) / len(on_original)
    totals, counts = torch.tensor([r.kl_sums for r in window]).sum(dim=0).tolist()
    length = len(pipeline.scheduler.alphas_cumprod)
    bounds = [i * length // KL_TIMESTEP_GROUPS for i in range(KL_TIMESTEP_GROUPS + 1)]
    names = [f"kl_view/{name}" for name in view_names(pipeline.num_views)]
    names += [f"kl_timestep/{low:04d}_{high - 1:04d}" for low, high in pairwise(bounds)]
    return series | {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}


# -------------------------------------------------------------------------------------------------------------- evaluation


def evaluate_if_due(run: Run) -> None:
    """Evaluate: validation loss, previews if they are due, diagnostics, and the export of the best so far.

    Each step is evaluated once, whether the run was resumed or not.
    """
    job, evaluator, monitor = run.job, run.job.evaluator, run.job.config.monitor
    with_preview = run.is_due(monitor.preview_every)
    if run.is_evaluated or not (with_preview or run.is_due(monitor.validate_every)):
        return
    with averaged(job.adapted, run.ema):
        series = evaluator.validation(run.position, with_original=with_preview)
        if run.step == 0 and "loss/original" in series:
            is_pretrained = run.position == 0 and job.config.init_from is None
            series["loss/original_pretrained"] = (
                series["loss/original"] if is_pretrained else evaluator.pretrained_original_loss()
            )
        if with_preview and job.accelerator.is_main_process:
            series |= _preview(run)
        if job.accelerator.is_main_process:
            series |= _diagnose(run, series, with_preview=with_preview)
    _refuse_moved_weights(run)
    job.accelerator.wait_for_everyone()
    run.logger.scalars(run.step, series)
    advance(run, job.trainer.curriculum.after_validation(run.curricula, run.step, series["loss/validation"]))
    run.last = {**series, "step": run.step}
    run.first = run.first or run.last
    improved = run.best is None or series["loss/validation"] < run.best["loss"]
    if improved and export_best(run):
        run.best = {"step": run.step, "loss": series["loss/validation"]}
    if job.accelerator.is_main_process:
        save_progress(run.folder, run.progress())  # last: a run that is killed before evaluates and exports again


def _preview(run: Run) -> dict[str, float]:
    """Sample the previews, log them, and evaluate the objectives. Returns: their series."""
    job = run.job
    with torch.no_grad():
        pretrained = None if run.shown is None else run.shown.pretrained
        run.shown = shown = job.evaluator.preview(job.adapted.prompt(run.position), pretrained)
    rows = [("truth", shown.truth), ("pretrained", shown.pretrained), ("now", shown.now)]
    run.logger.picture(run.step, "held_out", preview_grid(rows, shown.pictures, shown.names))
    run.logger.tiles(run.step, "tiles", preview_tiles([views for _, views in rows], shown.pictures))
    return preview_series(shown) | job.trainer.objectives.evaluate(job.trainer.context, run.position, shown)


def _diagnose(run: Run, series: dict[str, float], *, with_preview: bool) -> dict[str, float]:
    """Print a warning once when a diagnostic appears, and once when it clears. series: of this evaluation.

    Nothing is printed at step 0: the pretrained model does not know the new subject yet.
    Returns: series of the diagnostics, 1 for each that stands, and what was measured for them.
    """
    job, found = run.job, {}
    has_learned = with_preview and _trained_since(run, "prompt", 0)
    if has_learned and (effect := job.evaluator.learned_effect(run.position)) is not None:
        found["prompt_effect/of_learned"] = effect
    seen = {**series, **prompt_series(job.adapted.prompt, run.position), **found}
    start = run.first or series
    run.worse = run.worse + 1 if series["loss/validation"] > start["loss/validation"] else 0
    moved = run.moved()
    signs = {
        **collapse_signs(seen, run.first or {}),
        **prompt_signs(seen, rounding=torch.finfo(job.pipeline.unet.dtype).eps),
        **worse_sign(run.worse, series["loss/validation"], start["loss/validation"]),
        **standing_still(moved, {name: _trained_since(run, name, run.evaluated_step) for name in moved}),
    }
    run.remember_weights()
    if not with_preview:  # the diagnostics of previews stay as they were
        signs |= {name: message for name, message in run.diagnostics.items() if name in OF_PREVIEWS}
    if run.step > 0:
        for name in signs.keys() - run.diagnostics.keys():
            tqdm.write(f"WARNING step {run.step}: {name}: {signs[name]}", file=sys.stderr)
        for name in run.diagnostics.keys() - signs.keys():
            tqdm.write(f"step {run.step}: {name}: cleared", file=sys.stderr)
        run.diagnostics = signs
    return found | {f"watch/{name}": float(name in signs) for name in SIGNS if with_preview or name not in OF_PREVIEWS}


def _trained_since(run: Run, group: str, since: int) -> bool:
    """Whether any step from `since` on trained a group."""
    first, end = run.job.trainer.windows[group]
    return group in run.job.adapted.trainable() and max(first, since) < min(end, run.step)


def _refuse_moved_weights(run: Run) -> None:
    """Raises: RunError where a frozen weight has changed: the KL would compare with another model."""
    if moved := moved_weights(run.frozen, run.job.adapted.frozen_sums()):
        raise RunError(
            f"step {run.step}: {len(moved)} frozen tensors changed since the start, e.g. {moved[0]}; expected none to. No "
            f"option causes this: likely a fault of the program or of the memory. The checkpoints hold only what trains"
        )


def advance(run: Run, curricula: CurriculumState) -> None:
    """Take over a new state of the curricula, and print each new stage."""
    before = run.curricula
    for name, old, new in (("path", before.stage, curricula.stage), ("timesteps", before.timesteps, curricula.timesteps)):
        if new.number != old.number and run.job.accelerator.is_main_process:
            tqdm.write(f"step {run.step}: {name}: stage {new.number + 1} begins", file=sys.stderr)
    run.curricula = curricula


# ----------------------------------------------------------------------------------------------- checkpoints and exports


def remove_results(folder: Path) -> None:
    """Remove the results of a run that was killed before its first checkpoint: it starts again at step 0."""
    for name in ("tensorboard", "previews", "export"):
        if (folder / name).is_dir():
            remove_folder(folder / name)
    (folder / FILE).unlink(missing_ok=True)


def checkpoint(run: Run) -> None:
    """Save the run as it is now in RUN/checkpoints."""
    if run.job.accelerator.is_main_process:
        save_checkpoint(run.folder, run.parts, progress=run.progress(), keep=run.job.config.monitor.checkpoints_kept)
    run.job.accelerator.wait_for_everyone()


@contextmanager
def _on_main(job: Job) -> Iterator[bool]:
    """Whether this process is the main one; after the block, also where it fails, the processes wait for each other."""
    try:
        yield job.accelerator.is_main_process
    finally:
        job.accelerator.wait_for_everyone()


def export(run: Run, folder: Path) -> None:
    """Export prompt and LoRA as they are now, verified. Raises: RunError where they do not read back."""
    job, config = run.job, run.job.config
    with _on_main(job) as is_main:
        if not is_main:
            return
        metadata = write.describe(config, position=run.position, step=run.step, last=run.last)
        with averaged(job.adapted, run.ema), torch.no_grad():
            run.exported = write.export(
                job.pipeline,
                job.adapted.prompt(run.position),
                folder,
                picture=_export_picture(job),
                metadata=metadata,
                tolerance=config.export.tolerance,
            )


def export_best(run: Run) -> bool:
    """Export the best so far; step 0, the pretrained model, needs no export. Returns: whether it succeeded, on any process."""
    if run.step == 0:
        return True
    succeeded = True
    try:
        export(run, run.folder / "export" / "best")
    except (RunError, OSError) as error:  # a later export may succeed, and the checkpoint of this step is sound
        tqdm.write(f"WARNING: {error}", file=sys.stderr)
        succeeded = False
    return bool(broadcast_object_list([succeeded])[0])


def export_pipeline(run: Run, folder: Path) -> None:
    """Add FaceLift's pipeline folder with the LoRA merged to an export. Raises: RunError."""
    job = run.job
    with _on_main(job) as is_main:
        if not is_main:
            return
        try:
            run.merged = write.export_pipeline(
                job.pipeline, folder, picture=_export_picture(job), tolerance=job.config.export.tolerance
            )
        except (RunError, OSError, torch.OutOfMemoryError) as error:
            raise RunError(
                f"prompt and LoRA are exported and verified in {folder}, the merged pipeline folder is not: {error}. To leave "
                f"it out: --resume {run.folder} --export.pipeline false"
            ) from error


def log_summary(run: Run, options: Mapping[str, object]) -> None:
    """Log what a run ends with: its hyper-parameters, the prompts for TensorBoard's projector, and the ablation of a finished
    run. options: by dotted name."""
    job, config = run.job, run.job.config
    run.logger.hparams(options, run.last or {})
    if not job.accelerator.is_main_process:
        return
    with averaged(job.adapted, run.ema), torch.no_grad():
        prompt = job.adapted.prompt(run.position)
        run.logger.projector(run.step, prompt, job.adapted.prompt.waypoints, config.prompt.waypoints)
        if not config.export.report or run.step < config.train.steps or _has_ablation(run):
            return
        shown = run.shown or job.evaluator.preview(prompt, None)
        rows = job.evaluator.ablation(prompt, shown)
    labelled = [("truth", shown.truth), *((display_name(name), views) for name, views in rows.items())]
    run.logger.picture(run.step, "ablation", preview_grid(labelled, shown.pictures, shown.names))
    run.logger.tiles(run.step, "ablation-tiles", preview_tiles([views for _, views in labelled], shown.pictures))
    run.logger.scalars(run.step, ablation_series(rows, shown.truth))


def _has_ablation(run: Run) -> bool:
    """Whether this step's ablation is in the log: a finished run was resumed."""
    return any(point["step"] == run.step and is_ablation(point) for point in read_series(run.folder))


def _export_picture(job: Job) -> Tensor:
    """[3, S, S]: the picture on which exports are compared."""
    return job.held_out.pictures(0, seeded("preview", 0))[0]
