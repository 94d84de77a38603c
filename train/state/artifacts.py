"""What a run keeps: checkpoints, exports, its report. The main process writes, the others wait for it."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.batch import seeded
from softprompt.errors import RunError
from softprompt.files import remove_folder
from train.evaluation.ablation import ablation, ablation_series
from train.evaluation.evaluate import averaged, preview
from train.export import write
from train.log.logger import preview_grid, preview_tiles
from train.log.series import FILE, is_ablation, read_series
from train.report.charts import in_words
from train.report.page import write_report
from train.report.read import read_story
from train.setup import Job
from train.state.checkpoint import save_checkpoint
from train.state.run import Run


def remove_results(folder: Path) -> None:
    """Remove what a run that was killed before its first checkpoint has written: it begins again at step 0."""
    for name in ("tensorboard", "previews", "export"):
        if (folder / name).is_dir():
            remove_folder(folder / name)
    (folder / FILE).unlink(missing_ok=True)


def checkpoint(run: Run) -> None:
    """The run as it is now, in RUN/checkpoints."""
    if run.job.accelerator.is_main_process:
        kept = run.job.config.monitor.checkpoints_kept
        save_checkpoint(run.folder, run.parts, progress=run.progress(), keep=kept)
    run.job.accelerator.wait_for_everyone()


def export(run: Run, folder: Path) -> None:
    """Prompt and LoRA as they are now, verified. Raises: RunError where they do not read back."""
    job, config = run.job, run.job.config
    try:
        if job.accelerator.is_main_process:
            metadata = write.describe(config, position=run.position, step=run.step, last=run.last)
            with averaged(job, run.ema), torch.no_grad():
                run.exported = write.export(
                    job.pipeline,
                    job.adapted.prompt(run.position),
                    folder,
                    picture=_export_picture(job),
                    metadata=metadata,
                    tolerance=config.export.tolerance,
                )
    finally:
        job.accelerator.wait_for_everyone()  # also where it fails: the others wait, and the run may go on


def best(run: Run) -> bool:
    """Export the best so far. Returns: whether that stands; step 0, the pretrained model, needs none."""
    if run.step == 0:
        return True
    try:
        export(run, run.folder / "export" / "best")
    except RunError as error:  # the run goes on: a later export may be sound, and the checkpoint of this step is
        tqdm.write(f"WARNING: {error}", file=sys.stderr)
        return False
    return True


def export_pipeline(run: Run, folder: Path) -> None:
    """Add FaceLift's pipeline folder with the LoRA merged to an export. Raises: RunError."""
    job = run.job
    if job.accelerator.is_main_process:
        try:
            run.merged = write.export_pipeline(
                job.pipeline, folder, picture=_export_picture(job), tolerance=job.config.export.tolerance
            )
        except (RunError, OSError, torch.OutOfMemoryError) as error:
            raise RunError(
                f"prompt and LoRA are exported and verified in {folder}, the merged pipeline folder is not: {error}. To leave "
                f"it out: --resume {run.folder} --export.pipeline false"
            ) from error
    job.accelerator.wait_for_everyone()


def report(run: Run) -> None:
    """The prompts in TensorBoard's projector, and where it is wanted the report, of a finished run with its ablation. On the
    main process alone."""
    job, config = run.job, run.job.config
    with averaged(job, run.ema), torch.no_grad():
        prompt = job.adapted.prompt(run.position)
        run.monitor.projector(run.step, prompt, job.adapted.prompt.waypoints, config.prompt.waypoints)
        if not config.export.report:
            return
        if run.step >= config.train.steps and not _ablated(run):
            shown = run.shown or preview(job, prompt, run.pretrained_views)
            rows = ablation(job, prompt, shown)
            labelled = [("truth", shown.truth), *((in_words(name), views) for name, views in rows.items())]
            run.monitor.picture(run.step, "ablation", preview_grid(labelled, shown.pictures, shown.names))
            run.monitor.tiles(run.step, "ablation-tiles", preview_tiles([views for _, views in labelled], shown.pictures))
            run.monitor.scalars(run.step, ablation_series(rows, shown))
    write_report(read_story(run.folder))


def _ablated(run: Run) -> bool:
    """Whether this step has its ablation already: a finished run is gone on with."""
    return any(point["step"] == run.step and is_ablation(point) for point in read_series(run.folder))


def _export_picture(job: Job) -> Tensor:
    """[3, S, S]: what exports are compared on."""
    return job.held_out.pictures(0, seeded("preview", 0))[0]
