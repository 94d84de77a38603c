"""Checkpoints: complete or absent, verified when written and when read, and only what trains, so a few MB each."""

import io
import json
import pickle
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from softprompt.errors import InputError, RunError
from softprompt.files import load_pickle, new_folder, remove_folder, write_json
from softprompt.model.adapted import AdaptedModel
from train.objectives.terms import Objectives
from train.state.folder import checkpoint_folder, list_checkpoints, step_of

STATE = "state.pt"
MANIFEST = "manifest.json"
"""Last file of a checkpoint: size and checksum of its state, the run's progress, and a checksum of all that."""
_STATE = {"trainable", "waypoints", "optimizer", "schedule", "ema", "scaler", "objectives"}
_PROGRESS = {
    "step",
    "first",
    "last",
    "best",
    "pace",
    "warned",
    "worse",
    "running_loss",
    "window",
    "skipped_in_a_row",
    "objects_per_step",
    "data",
}


@dataclass(frozen=True)
class Parts:
    """The objects whose state a checkpoint holds, beside the run's progress; `restore` loads it into them."""

    adapted: AdaptedModel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: EMAModel | None
    scaler: Any | None
    """fp16's gradient scaler, if any."""
    objectives: Objectives = field(default_factory=Objectives)


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def save_checkpoint(run: Path, parts: Parts, *, progress: Mapping[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step-N, read it back, then remove all but the newest `keep` and that of the best validation.

    The order of the data and all random numbers are functions of (seed, step, position in the batch), so the step is their
    state. progress: of `train.state.run.Run.progress`.
    Raises: RunError where the disk is too full, or gives back something else; the checkpoints before stay.
    """
    target = checkpoint_folder(run, int(progress["step"]))
    if not _is_sound(target):  # else a finished run that is exported again, or one that was killed before it removed old ones
        if target.is_dir():
            remove_folder(target)
        write_state(target, parts, progress=progress)
    best = progress["best"] and checkpoint_folder(run, int(progress["best"]["step"]))
    for old in list_checkpoints(run)[:-keep]:
        if old != best:
            remove_folder(old)
    return target


def _is_sound(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedError:
        return False
    return True


def write_state(target: Path, parts: Parts, *, progress: Mapping[str, Any]) -> None:
    """A checkpoint in a folder of any name; see `save_checkpoint`."""
    buffer = io.BytesIO()
    torch.save(
        {
            "trainable": {name: parameter.detach().cpu() for name, parameter in parts.adapted.all_trainable().items()},
            "waypoints": parts.adapted.prompt.waypoints.cpu(),
            "optimizer": parts.optimizer.state_dict(),
            "schedule": parts.schedule.state_dict(),
            "ema": None if parts.ema is None else parts.ema.state_dict(),
            "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
            "objectives": parts.objectives.state(),
        },
        buffer,
    )
    content = buffer.getbuffer()
    _refuse_a_full_disk(target, len(content))
    with new_folder(target) as partial:
        (partial / STATE).write_bytes(content)
        _write_manifest(partial, {"bytes": len(content), "blake2b": _digest(content)}, progress)
    try:
        verify(target)
    except DamagedError as error:
        raise RunError(f"{target}: was read back damaged ({error}); likely the disk is failing; the others stay") from error


def save_progress(run: Path, progress: Mapping[str, Any]) -> None:
    """Bring the series of this step's checkpoint, where there is one, up to date: it is saved before the step is evaluated."""
    folder = checkpoint_folder(run, int(progress["step"]))
    if not folder.is_dir():
        return
    try:
        _write_manifest(folder, _manifest(folder)["state"], progress)
    except DamagedError as error:
        raise RunError(f"{folder}: {error}, moments after it was written; likely the disk is failing") from error


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The newest sound checkpoint of a run; `damaged` lists what was wrong with newer ones.

    Raises: InputError when there is none.
    """
    checkpoints = list_checkpoints(run)
    damaged: list[str] = []
    for folder in reversed(checkpoints):
        state = _read_if_sound(folder, damaged)
        if state is not None:
            return state | {"damaged": damaged}
    if not checkpoints:
        raise InputError(f"{run / 'checkpoints'}: holds no checkpoint to resume from; the run stopped before its first one")
    raise InputError(f"{run / 'checkpoints'}: holds no sound checkpoint to resume from: {'; '.join(damaged)}")


def set_aside_newer(run: Path, step: int) -> None:
    """Give checkpoints newer than the one that is gone on with, which are damaged, names that are no checkpoint's."""
    for folder in list_checkpoints(run):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)


def _read_if_sound(folder: Path, damaged: list[str]) -> dict[str, Any] | None:
    try:
        return read_state(folder)
    except DamagedError as error:
        damaged.append(f"{folder}: {error}")
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint whole. Raises: DamagedError; InputError for one of another version."""
    progress = verify(folder)
    if missing := _PROGRESS - progress.keys():
        raise _of_another_version(folder / MANIFEST, missing)
    try:
        state: dict[str, Any] = load_pickle(folder / STATE)
    except (pickle.UnpicklingError, ValueError) as error:
        reason = "it holds something else" if isinstance(error, pickle.UnpicklingError) else error
        raise DamagedError(f"{STATE} cannot be read ({reason})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{STATE} cannot be read (it holds something else)")
    if missing := _STATE - state.keys():
        raise _of_another_version(folder / STATE, missing)
    return state | progress


def _of_another_version(file: Path, missing: Set[str]) -> InputError:
    return InputError(
        f"{file}: has no {', '.join(sorted(missing))}; likely another version of softprompt wrote it, and that version can "
        f"resume it"
    )


def verify(folder: Path) -> dict[str, Any]:
    """Look whether a checkpoint is what was written. Returns: its progress. Raises: DamagedError."""
    manifest = _manifest(folder)
    try:
        content = (folder / STATE).read_bytes()
    except OSError as error:
        raise DamagedError(f"{STATE} cannot be read ({error.strerror})") from error
    found = {"bytes": len(content), "blake2b": _digest(content)}
    if found != manifest["state"]:
        raise DamagedError(f"{STATE} has {found['bytes']} bytes, {manifest['state']['bytes']!r} were written, or others")
    progress: dict[str, Any] = manifest["progress"]
    return progress


def _manifest(folder: Path) -> dict[str, Any]:
    """Raises: DamagedError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body = {name: manifest[name] for name in ("state", "progress")}
        sound = manifest["blake2b"] == _digest(json.dumps(body).encode())
        sound = sound and body["state"].keys() == {"bytes", "blake2b"} and isinstance(body["progress"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is missing or cannot be read ({type(error).__name__})") from error
    if not sound:
        raise DamagedError(f"{MANIFEST} is not what was written")
    return body


def _write_manifest(folder: Path, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    body = json.loads(json.dumps({"state": state, "progress": progress}))  # as it will be read: NaN, numbers, order
    write_json(folder / MANIFEST, body | {"blake2b": _digest(json.dumps(body).encode())})


def _digest(content: bytes | memoryview) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _refuse_a_full_disk(target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed + 2**20:
        raise RunError(
            f"{target}: not saved: it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; the checkpoints before "
            f"are sound. Make room, and go on with --resume"
        )


def restore_trained(state: Mapping[str, Any], *, adapted: AdaptedModel, ema: EMAModel | None, option: str) -> None:
    """Put back what trains, its moving average, and the path it was trained on. option: named in errors.

    Raises: InputError when the model is another: other trained parts, ranks or waypoints.
    """
    parameters = adapted.all_trainable()
    saved = state["trainable"]
    differing = sorted(set(parameters) ^ set(saved)) or [n for n in saved if saved[n].shape != parameters[n].shape]
    if differing:
        raise InputError(
            f"{option}: the checkpoint's trained parameters are not this configuration's ({len(differing)} differ, e.g. "
            f"{differing[0]}); likely lora.rank, lora.targets or prompt.learn was changed, or the model"
        )
    if state["waypoints"].shape != adapted.prompt.waypoints.shape:
        raise InputError(f"{option}: the checkpoint's path has another number of waypoints than prompt.waypoints")
    if (ema is None) != (state["ema"] is None):
        raise InputError(f"{option}: train.ema_decay was switched on or off since the checkpoint")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
        adapted.prompt.waypoints.copy_(state["waypoints"])
    if ema is not None:
        decay = ema.decay
        ema.load_state_dict(state["ema"])
        ema.decay = decay
        ema.to(adapted.prompt.waypoints.device)


def restore(state: Mapping[str, Any], parts: Parts) -> None:
    """Put a checkpoint's state into a freshly prepared run. Learning rates and decay are the configuration's, not the state's.

    Raises: InputError when the run is another: other trained parts, ranks or waypoints.
    """
    restore_trained(state, adapted=parts.adapted, ema=parts.ema, option="resume")
    optimizer, schedule = parts.optimizer, parts.schedule
    asked = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = [rate for rate, _ in asked]
    for group, (rate, decay) in zip(optimizer.param_groups, asked, strict=True):
        group["initial_lr"], group["weight_decay"] = rate, decay
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
    if parts.scaler is not None and state["scaler"] is not None:
        parts.scaler.load_state_dict(state["scaler"])
    parts.objectives.load_state(state["objectives"])
