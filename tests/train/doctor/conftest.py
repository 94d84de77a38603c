"""Data sets to inspect, and the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.data.samples import picture_name, write_source
from softprompt.micro.world import MicroWorld
from train.doctor.__main__ import main
from train.doctor.checks import KINDS
from train.doctor.inspect import Picture, inspect_all

SIZE = 64
FILES = [picture_name(view) for view in range(6)]
Found = dict[str, list[tuple[list[str], list[str]]]]
"""Kind of finding => (samples, views) of each."""
Doctor = Callable[..., tuple[int, Found]]


def mouse(folder: Path, number: int = 7) -> Path:
    return folder / f"mice-{number:05d}"


def measured(folder: Path) -> list[list[Picture | None]]:
    samples = sorted(path for path in folder.iterdir() if path.is_dir())
    return inspect_all([[sample / name for name in FILES] for sample in samples])


def reorder(sample: Path, order: tuple[int, ...]) -> None:
    """View v becomes what view order[v] was."""
    pictures = [(sample / FILES[v]).read_bytes() for v in order]
    for name, content in zip(FILES, pictures, strict=True):
        (sample / name).write_bytes(content)


@pytest.fixture(scope="session")
def colony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 mice of 64x64; nothing may change it."""
    folder = tmp_path_factory.mktemp("doctor") / "colony"
    write_source(MicroWorld("mice", 0, 30, size=SIZE), folder)
    (folder / "samples.txt").unlink()
    return folder


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 heads of 64x64; nothing may change it."""
    folder = tmp_path_factory.mktemp("doctor") / "heads"
    write_source(MicroWorld("heads", 0, 12, size=SIZE), folder)
    return folder


@pytest.fixture
def herd(colony: Path, tmp_path: Path) -> Path:
    """Copies of twelve mice, to change."""
    for number in range(12):
        shutil.copytree(mouse(colony, number), mouse(tmp_path / "herd", number))
    return tmp_path / "herd"


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """`doctor(train, val)`: the command's exit code, and its findings by kind. The report is in tmp_path / "doctor"."""

    def run(train: Path, val: Path | None = None) -> tuple[int, Found]:
        argv = [f"--data.train={train}", f"--size={SIZE}", f"--output={tmp_path / 'doctor'}"]
        code = main([*argv, *([f"--data.val={val}"] if val else [])])
        printed = capsys.readouterr().out
        report = json.loads((tmp_path / "doctor" / "doctor.json").read_text())
        found: Found = {}
        for finding in report["findings"]:
            found.setdefault(finding["kind"], []).append((finding["samples"], finding["views"]))
            assert KINDS[finding["kind"]].title in printed
        assert report["would_run"] == (code == 0)
        return code, found

    return run
