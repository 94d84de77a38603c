"""A step whose numbers were not finite, written down so that it can be done again: `python -m train.replay`."""

import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from softprompt.errors import InputError, RunError
from softprompt.files import remove_folder
from train.batches import Wanted
from train.state.checkpoint import DamagedError, verify, write_state
from train.state.folder import list_incidents
from train.state.run import Job, Run

KEPT = 5
"""Newest incidents of a run."""


def write_incident(run: Run, step: int, what: str) -> Path:
    """Keep what step number `step` was done with: weights, samples, timesteps. Every process calls it; the first one writes.

    what: was not finite. The weights are those of before the step, which it did not change.
    """
    job, trainer = run.job, run.job.trainer
    lowest = trainer.curriculum.lowest_timestep(run.curricula)
    wanted = trainer.batches.of_step(step, lowest, original="original" in trainer.kl_domains(step))
    batches = gather_object([_describe(job, one) for one in wanted])
    folder = run.folder / "incidents" / f"step-{step:06d}"
    if not job.accelerator.is_main_process:
        return folder
    incident = {
        "step": step,
        "not_finite": what,
        "position": run.position,
        "lowest_timestep": lowest,
        "kl_weight": run.curricula.kl_weight,
        "processes": job.accelerator.num_processes,
        "batch_size": job.config.train.batch_size,
        "accumulation": job.config.train.accumulation,
        "precision": job.accelerator.mixed_precision,
        "batches": batches,
        "again": f"python -m train.replay {folder}",
    }
    try:
        if folder.is_dir():
            remove_folder(folder)  # of the same step, before the run was resumed
        write_state(folder, run.parts, progress=run.progress() | {"incident": incident})
    except (RunError, OSError) as error:  # a full disk, say: no reason to end a run that goes on
        tqdm.write(f"WARNING step {step}: what was not finite could not be written down: {error}", file=sys.stderr)
    for old in list_incidents(run.folder)[:-KEPT]:
        remove_folder(old)
    return folder


def _describe(job: Job, wanted: Wanted) -> dict[str, Any]:
    batch = job.trainer.batches.make(wanted)
    return {
        "process": job.accelerator.process_index,
        "part": wanted.part,
        "domain": "original" if wanted.original else "new",
        "samples": job.trainer.batches.names(wanted),
        "timesteps": batch.timesteps.tolist(),
        "references": batch.order[:, 0].tolist(),
    }


def read_incident(folder: Path) -> dict[str, Any]:
    """Read an incident. Raises: InputError."""
    try:
        incident: dict[str, Any] = verify(folder)["incident"]
    except (DamagedError, KeyError) as error:
        raise InputError(f"{folder}: holds no incident ({error}); expected RUN/incidents/step-N, as a run leaves it") from error
    return incident
