"""A step whose numbers were not finite, written down so that it can be done again: `python -m train.replay`."""

import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from softprompt.files import remove_folder, write_json
from train.batches import Wanted
from train.checkpoint import write_state
from train.run import Run

FILE = "incident.json"
KEPT = 5
"""Newest incidents of a run."""


def list_incidents(run: Path) -> list[Path]:
    """A run's incidents, oldest first."""
    found = [p for p in (run / "incidents").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def write_incident(run: Run, step: int, what: str) -> Path:
    """Keep what step number `step` was done with: weights, samples, timesteps. Every process calls it; the first one writes.

    what: was not finite. The weights are those of before the step, which it did not change.
    """
    job = run.job
    lowest = run.lowest_timestep
    batches = gather_object([_describe(run, wanted) for wanted in job.batches.of_step(step, lowest)])
    folder = run.folder / "incidents" / f"step-{step:06d}"
    if not job.accelerator.is_main_process:
        return folder
    if folder.is_dir():
        remove_folder(folder)  # of the same step, before the run was resumed
    write_state(folder, progress=run.progress() | {"step": step}, **run.state())
    incident = {
        "step": step,
        "not_finite": what,
        "position": run.position,
        "lowest_timestep": lowest,
        "kl_weight": run.pace.kl_weight,
        "processes": job.accelerator.num_processes,
        "precision": job.accelerator.mixed_precision,
        "batches": batches,
        "again": f"python -m train.replay {folder}",
    }
    write_json(folder / FILE, incident)
    for old in list_incidents(run.folder)[:-KEPT]:
        remove_folder(old)
    return folder


def _describe(run: Run, wanted: Wanted) -> dict[str, Any]:
    batch = run.job.batches.make(wanted)
    return {
        "process": run.job.accelerator.process_index,
        "part": wanted.part,
        "domain": "original" if wanted.original else "new",
        "samples": run.job.batches.names(wanted),
        "timesteps": batch.timesteps.tolist(),
        "references": batch.order[:, 0].tolist(),
    }


def read_incident(folder: Path) -> dict[str, Any]:
    """What `write_incident` wrote. Raises: OSError, ValueError."""
    incident: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return incident
