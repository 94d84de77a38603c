"""What the tests of the main job share: a few mice on disk, and a configuration small enough to run."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from softprompt.data import write_source
from softprompt.micro.world import MicroWorld
from train.command_line import parse
from train.config import Config
from train.stop import StopSignal

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
    folder = tmp_path_factory.mktemp("mice")
    write_source(MicroWorld("mice", 0, 4, size=64), folder / "train")
    write_source(MicroWorld("mice", 10_000, 2, size=64), folder / "val")
    return folder


class StopAfter(StopSignal):
    """Ctrl-C at a chosen step, without a signal."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.looks_left = 2 * step  # before each step and after it

    def agreed(self, accelerator: object) -> bool:
        self.looks_left -= 1
        if self.looks_left == 0:
            self.number = signal.SIGINT
        return self.number is not None


@pytest.fixture
def stop_after() -> Callable[[int], StopSignal]:
    """`stop_after(step)`: a stop signal that comes at that step."""
    return StopAfter


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Config]:
    """`small_config(mice, **{"train.steps": 2})`: the smallest run, changed by options as the command line takes them."""

    def build(mice: Path, **overrides: object) -> Config:
        folders = {"data.train": mice / "train", "data.val": mice / "val", "data.cache": mice.parent / "cache"}
        options = {**folders, **SMALL, **overrides}
        return parse([f"--{name}={value}" for name, value in options.items()]).config

    return build


LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    pictures: images.length,
    drawn: images.filter(image => image.complete && image.naturalWidth > 0).length,
    figures: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 50).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
})</script>"""


@pytest.fixture
def open_in_browser(tmp_path: Path) -> Callable[[Path, int], dict[str, int]]:
    """`open_in_browser(page, width)`: a page from the disk as headless Chromium shows it, `width` pixels wide.

    Returns: how many pictures it has and how many are drawn, how many figures, and by how much it is wider than the window.
    Fails on an error in the console; the test is skipped where there is no Chromium.
    """
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium, to open a page as a reader does")

    def look(page: Path, width: int) -> dict[str, int]:
        watched = page.with_suffix(".watched.html")
        watched.write_text(page.read_text() + LOOK)
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        argv = ["chromium", *flags, f"--window-size={width},2000", "--virtual-time-budget=5000", "--dump-dom", watched.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title is not None
        seen: dict[str, int] = json.loads(title.group(1))
        return seen

    return look
