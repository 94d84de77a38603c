"""What the tests of the main job share: a few mice on disk, and a configuration small enough to run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from softprompt.data import write_source
from softprompt.micro.world import MicroWorld
from train.command_line import parse
from train.config import Config

SMALL = {
    "model": "micro",
    "train.batch_size": "1",
    "train.steps": "4",
    "train.warmup_steps": "0",
    "lora.rank": "2",
    "kl.domain": "new",
    "monitor.log_every": "1",
    "monitor.validate_every": "2",
    "monitor.validation_timesteps": "1",
    "monitor.preview_every": "4",
    "monitor.preview_objects": "1",
    "monitor.preview_steps": "2",
    "monitor.checkpoint_every": "2",
    "export.pipeline": "false",
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the device and precision of the first run in this process: each test starts without."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def mice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` (4 mice) and `val` (2 others), each a folder of PNG samples of 64x64; nothing may change it."""
    folder = tmp_path_factory.mktemp("mice")
    write_source(MicroWorld("mice", 0, 4, size=64), folder / "train")
    write_source(MicroWorld("mice", 10_000, 2, size=64), folder / "val")
    return folder


@pytest.fixture
def small_config() -> Callable[..., Config]:
    """`small_config(mice, **{"train.steps": 2})`: the smallest run, changed by options as the command line takes them."""

    def build(mice: Path, **overrides: object) -> Config:
        options = {"data.train": mice / "train", "data.val": mice / "val", **SMALL, **overrides}
        return parse([f"--{name}={value}" for name, value in options.items()]).config

    return build
