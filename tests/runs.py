"""Short runs and commands in tests, and what is compared of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.batches import Wanted
from train.loop import train
from train.objectives.terms import StepBatch
from train.options.config import Config
from train.report.page import write_report
from train.report.read import read_story
from train.setup import prepare
from train.state.checkpoint import load_checkpoint
from train.state.run import Job, Run
from train.state.stop import StopSignal
from train.step import step_batch


def run_to_end(config: Config, folder: Path, *, resume: bool = False, stop: StopSignal | None = None) -> Run:
    """A run in this process, from step 0 or from its newest checkpoint on, with its report if that is asked for."""
    state = load_checkpoint(folder) if resume else None
    run = train(prepare(config), folder, state=state, stop=stop or StopSignal())
    if config.export.report:
        write_report(read_story(folder))
    return run


def series(folder: Path) -> list[dict[str, float]]:
    """The points of metrics.jsonl, without the series that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def exit_code(main: Callable[[list[str]], int], argv: Sequence[object]) -> object:
    """The exit code of a command run in this process, whether it returns the code or raises SystemExit."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stopped:
        return stopped.code


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, the tensors in them bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def scene_of(job: Job, step: int = 0) -> StepBatch:
    """The first batch of a step, as its loss terms get it."""
    wanted = Wanted(step, 0, lowest=0)
    return step_batch(job.trainer, wanted, job.trainer.batches.make(wanted), step=step, position=0.0)


def weights(job: Job) -> dict[str, Tensor]:
    """Copies of all trained parameters."""
    return {name: p.detach().clone() for name, p in job.adapted.all_trainable().items()}
