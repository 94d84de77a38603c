"""Kill a run at a random moment, resume it, and compare its results with those of a run that was never killed.

Children are forked from a process that has imported everything but computed nothing, so that a round takes seconds.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
"""Audit events that change files, and `open`, for writing."""
OPTIONS = {
    "train.steps": "6",
    "train.batch_size": "1",
    "train.warmup_steps": "0",
    "train.ema_decay": "0.9",
    "train.device": "cpu",
    "lora.rank": "2",
    "lora.dropout": "0.1",
    "kl.domain": "new",
    "kl.every": "2",
    "kl.target": "0.01",
    "draft.weight": "0.1",
    "draft.steps": "1",
    "draft.every": "3",
    "spin.weight": "0.001",
    "spin.iterations": "2",
    "spin.start": "0.2",
    "spin.sample_steps": "1",
    "spin.objects": "2",
    "spin.held_out_objects": "1",
    "dpo.weight": "0.001",
    "dpo.samples": "2",
    "dpo.sample_steps": "1",
    "dpo.objects": "2",
    "dpo.held_out_objects": "1",
    "custom.weight": "0.1",
    "custom.function": f"{__name__}:smooth",
    "studio.weight": "0.1",
    "studio.over": "views",
    "separate.weight": "0.1",
    "separate.side": "8",
    "curriculum.pacing": "plateau",
    "curriculum.watch": "train",
    "curriculum.patience": "1",
    "monitor.log_every": "4",
    "monitor.validate_every": "2",
    "monitor.validation_timesteps": "1",
    "monitor.preview_every": "3",
    "monitor.preview_objects": "1",
    "monitor.preview_steps": "2",
    "monitor.checkpoint_every": "2",
    "monitor.checkpoints_kept": "2",
    "export.pipeline": "false",
    "export.report": "false",
}
"""The smallest run that has everything a checkpoint must keep: an average, a curriculum, a KL weight that adapts, objectives
with their state."""


@dataclass(frozen=True)
class Kill:
    """When a process is killed."""

    event: int | None = None
    """After this many changes of files."""
    seconds: float | None = None
    """After this many seconds."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code; -9 where it was killed."""
    events: int
    """The number of its changes of files."""
    seconds: float
    said: str


def smooth(seen: Any) -> Any:
    """A custom objective."""
    return seen.clean.diff(dim=-1).square().mean()


def import_everything() -> None:
    """Import all modules of a run in the process that children are forked from; it must not compute anything."""
    import train.loop
    import train.softprompt

    del train


def fork(argv: Sequence[str], folder: Path, kill: Kill | None = None) -> Ended:
    """Run `python -m train.softprompt` with `argv` in a child process. folder: changes of files below it are counted."""
    said, counted = folder / "said.txt", folder / "events"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(argv, folder, said, counted, kill)
    if kill is not None and kill.seconds is not None:
        while time.monotonic() - began < kill.seconds and not _has_ended(child):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    events = len(counted.read_bytes()) if counted.exists() else 0
    text = said.read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), events, time.monotonic() - began, text)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _child(argv: Sequence[str], folder: Path, said: Path, counted: Path, kill: Kill | None) -> None:
    code = 70
    try:
        os.setsid()
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        counter = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        root, at, done = str(folder), kill.event if kill else None, 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event not in WATCHED or not str(arguments[0]).startswith(root):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            done += 1
            os.write(counter, b".")
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        import torch

        from train.softprompt import main

        torch.set_num_threads(1)
        code = main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def whole_run(mice: Path, folder: Path) -> Ended:
    """A run that is not killed."""
    ended = fork(_new(mice, folder), folder)
    if ended.code != 0:
        raise AssertionError(f"the run that is never killed ended with {ended.code}:\n{ended.said}")
    return ended


def killed_run(mice: Path, folder: Path, whole: Ended, chance: random.Random, *, most_kills: int = 4) -> list[str]:
    """A run that is killed at random moments, up to `most_kills` times, and restarted by the same command until it ends.

    Returns: a line about each start.
    """
    story, kills = [], chance.randint(1, most_kills)
    while True:
        kill = None
        if len(story) < kills:
            by_event = chance.random() < 0.7
            # The later runs of a round are shorter.
            share = chance.random() / (1 + len(story))
            kill = Kill(event=1 + int(share * whole.events)) if by_event else Kill(seconds=share * whole.seconds)
        ended = fork([*_new(mice, folder), "--resume-or-start"], folder, kill)
        story.append(f"{kill or 'left alone'}: {ended.code}")
        if ended.code == 0:
            return story
        if ended.code != -signal.SIGKILL:
            raise AssertionError(f"{'; '.join(story)}:\n{ended.said}")


def differences(folder: Path, whole: Path) -> list[str]:
    """The files and series in which a run differs from one that was never killed."""
    ours, theirs = folder / "run", whole / "run"
    from tests.runs import same, series
    from train.state.checkpoint import load_checkpoint

    exports = ours / "export", theirs / "export"
    found = [f"export/{name}" for name in _files(exports[1]) if not same(*(_content(folder, name) for folder in exports))]
    for name, read in (("metrics.jsonl", series), ("tensorboard", _tensorboard), ("checkpoint", load_checkpoint)):
        if not same(read(ours), read(theirs)):
            found.append(name)
    return found + sorted(f"file {name}" for name in _files(ours) ^ _files(theirs))


def _new(mice: Path, folder: Path) -> list[str]:
    paths = {"data.train": mice / "train", "data.val": mice / "val", "data.cache": folder / "cache", "output": folder / "run"}
    paths["model"] = mice / "model"
    return [f"--{name}={value}" for name, value in {**OPTIONS, **paths}.items()]


def _files(folder: Path) -> set[str]:
    """Paths of all files but TensorBoard's, whose names contain the time."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}


def _content(folder: Path, name: str) -> Any:
    """The content of a file or None; for safetensors the tensors, since the library writes its metadata in any order."""
    from safetensors.torch import load_file

    file = folder / name
    if not file.exists():
        return None
    return load_file(file) if file.suffix == ".safetensors" else file.read_bytes()


def _tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The series of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "speed/" not in tag]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
