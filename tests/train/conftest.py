"""Shared by the tests of the commands: a few mice on disk, and a configuration small enough to run."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.browser import MISSING, PROGRAM, Browser, Seen, check
from tests.models import write_mice, write_smallest_model
from tests.runs import exit_code
from train import callbacks
from train.options.command_line import parse
from train.options.config import Config
from train.setup import prepare
from train.state.run import Job
from train.state.stop import StopSignal

SMALL = {
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
    "export.report": "false",
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
    return write_mice(tmp_path_factory.mktemp("mice"), train=4, val=2)


class StopAfter(StopSignal):
    """As Ctrl-C at a chosen step, without a signal."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.looks_left = step + 1  # before the first step and after each

    def agree(self, accelerator: object) -> tuple[bool, bool]:
        self.looks_left -= 1
        if self.looks_left == 0:
            self.number = signal.SIGINT
        return self.number is not None, False


@pytest.fixture
def stop_after() -> Callable[[int], StopSignal]:
    """`stop_after(step)`: a stop signal that comes at that step."""
    return StopAfter


@pytest.fixture(scope="session")
def smallest_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline folder of `tests.models`; nothing may change it."""
    return write_smallest_model(tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="session")
def small_config(smallest_model: Path) -> Callable[..., Config]:
    """`small_config(mice, **{"train.steps": 2})`: the smallest run, changed by options as the command line takes them.

    Its model is the smallest; tests of numbers or pictures take `model="micro"`, the embedded one.
    """

    def build(mice: Path, **overrides: object) -> Config:
        folders: dict[str, object] = {"data.train": mice / "train", "data.val": mice / "val"}
        folders |= {"data.cache": mice.parent / "cache", "model": smallest_model}
        options = {**folders, **SMALL, **overrides}
        return parse([f"--{name}={value}" for name, value in options.items()]).config

    return build


@pytest.fixture(scope="module")
def small(small_config: Callable[..., Config], mice: Path) -> Callable[..., Config]:
    """`small(**{"train.steps": 2})`: the smallest run on the mice; the value `VAL` stands for their folder `val`.

    A module about numbers or pictures has a `small_config` of its own, which takes the embedded model.
    """
    return lambda **options: small_config(mice, **{k: mice / "val" if v == "VAL" else v for k, v in options.items()})


@pytest.fixture(scope="module")
def make_job(small: Callable[..., Config]) -> Callable[..., Job]:
    """`make_job(**{"train.steps": 2})`: the smallest run, prepared."""
    return lambda **options: prepare(small(**options))


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`error_of(main, *argv)`: the one line with which a command refuses its options or files, with exit code 2."""

    def call(main: Callable[[list[str]], int], *argv: object) -> str:
        assert exit_code(main, argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        return error.removesuffix("\n")

    return call


@pytest.fixture
def without_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without an export, which takes half of a short run's time."""
    monkeypatch.setattr(callbacks, "export", lambda run, folder: None)


@pytest.fixture(scope="session")
def check_page() -> Iterator[Callable[[Path], Seen]]:
    """`check_page(page)`: opens a page from the disk at the width of a desk and of a telephone, asserts that nothing is wrong
    with it, and returns its observations (see tests/browser.py); the test is skipped where there is no Chromium."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with Browser() as browser:
        yield partial(check, browser)
