"""Short runs in tests, and what is compared of them."""

import json
from pathlib import Path

from torch import Tensor

from train.loop import train
from train.options.config import Config
from train.report.page import write_report
from train.report.read import read_story
from train.setup import prepare
from train.state.checkpoint import load_checkpoint
from train.state.run import Job, Run
from train.state.stop import StopSignal


def run_to_end(config: Config, folder: Path, *, resume: bool = False, stop: StopSignal | None = None) -> Run:
    """A run in this process, from step 0 or from its newest checkpoint on, with its report if that is asked for."""
    state = load_checkpoint(folder) if resume else None
    run = train(prepare(config), folder, state=state, stop=stop or StopSignal())
    if config.export.report:
        write_report(read_story(folder))
    return run


def series(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def weights(job: Job) -> dict[str, Tensor]:
    """All that trains, copied."""
    return {name: p.detach().clone() for name, p in job.adapted.all_trainable().items()}
