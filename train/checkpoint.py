"""Checkpoints: complete or absent, and only what trains, so a few MB each."""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler

from softprompt.errors import InputError
from softprompt.files import new_folder, read_json, write_json
from softprompt.model import AdaptedModel

STATE = "state.pt"
PROGRESS = "progress.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-N."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One being written has another name."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdecimal() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save_checkpoint(
    run: Path,
    *,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    ema: EMAModel | None,
    scaler: Any | None,
    progress: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write RUN/checkpoints/step-N under a temporary name, rename it, then remove all but the newest `keep`.

    The order of the data and all random numbers are functions of (seed, step, position in the batch), so the step is their
    state. progress: {"step", "first", "last", "best", "pace", "warned"}: the step, the series of the first, newest
    and best validation, what the curricula have come to, and the warnings that stand.
    scaler: of fp16's gradients, where there is one.
    """
    state = {
        "trainable": {name: parameter.detach().cpu() for name, parameter in adapted.all_trainable().items()},
        "waypoints": adapted.prompt.waypoints.cpu(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    target = checkpoint_folder(run, int(progress["step"]))
    if not (target / STATE).is_file():  # else a finished run that is exported again
        with new_folder(target) as partial:
            torch.save(state, partial / STATE)
            write_json(partial / PROGRESS, progress)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return target


def save_progress(run: Path, progress: Mapping[str, Any]) -> None:
    """Bring the series of this step's checkpoint, where there is one, up to date: it is saved before the step is evaluated."""
    folder = checkpoint_folder(run, int(progress["step"]))
    if folder.is_dir():
        write_json(folder / PROGRESS, progress)


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run.

    Raises: InputError when there is none, or it cannot be read.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise InputError(f"{run / 'checkpoints'}: holds no checkpoint to resume from; the run stopped before its first one")
    try:
        state: dict[str, Any] = torch.load(checkpoints[-1] / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = "it holds something else" if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split())
        raise InputError(f"{checkpoints[-1]}: cannot be read ({reason}); move it away to resume from the one before") from error
    progress = read_json(checkpoints[-1] / PROGRESS, what="the checkpoint's step and series")
    if missing := {"step", "first", "last", "best", "pace", "warned"} - progress.keys():
        raise InputError(
            f"{checkpoints[-1] / PROGRESS}: has no {', '.join(sorted(missing))}; likely an older version of softprompt wrote "
            f"it, and that version can resume it"
        )
    return state | progress


def restore(
    state: Mapping[str, Any],
    *,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    ema: EMAModel | None,
    scaler: Any | None,
) -> None:
    """Put a checkpoint's state into a freshly prepared run.

    Raises: InputError when the run is another: other trained parts, ranks or waypoints.
    """
    parameters = adapted.all_trainable()
    saved = state["trainable"]
    differing = sorted(set(parameters) ^ set(saved)) or [n for n in saved if saved[n].shape != parameters[n].shape]
    if differing:
        raise InputError(
            f"resume: the checkpoint's trained parameters are not this configuration's ({len(differing)} differ, e.g. "
            f"{differing[0]}); likely lora.rank, lora.targets or prompt.learn was changed"
        )
    if state["waypoints"].shape != adapted.prompt.waypoints.shape:
        raise InputError("resume: the checkpoint's path has another number of waypoints than prompt.waypoints")
    if (ema is None) != (state["ema"] is None):
        raise InputError("resume: train.ema_decay was switched on or off since the checkpoint")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
        adapted.prompt.waypoints.copy_(state["waypoints"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
        ema.to(adapted.prompt.waypoints.device)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
