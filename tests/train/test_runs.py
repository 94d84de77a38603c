"""The table of runs shows the progress of each, its error and how to resume it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from train.options.config import Config, to_yaml
from train.runs import main, read_runs, table

EVALUATIONS = [{"step": 0, "loss/validation": 0.4, "views/psnr": 12.5}, {"step": 100, "loss/validation": 0.1}]


def run_folder(root: Path, name: str, points: list[dict[str, float]]) -> Path:
    run = root / name
    run.mkdir()
    (run / ".lock").touch()
    (run / "config.yaml").write_text(to_yaml(Config()))
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    done = run_folder(tmp_path, "micro-001", [*EVALUATIONS, {"step": 150, "loss/validation": 0.2, "views/psnr": 22.0}])
    (done / "export").mkdir()
    (done / "export" / "clr_embeds.pt").touch()
    run_folder(tmp_path, "micro-002", EVALUATIONS)
    failed = run_folder(tmp_path, "micro-003", [*EVALUATIONS, {"step": 120, "loss/train": 0.5}])
    (failed / "error.txt").write_text("step 120: not finite\n")
    run_folder(tmp_path, "micro-004", [])
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_row_shows_the_state_of_a_run(runs: Path) -> None:
    rows = {row.folder.name: row for row in read_runs(runs)}
    assert {name: row.state for name, row in rows.items()} == {
        "micro-001": "finished",
        "micro-002": "stopped",
        "micro-003": "failed",
        "micro-004": "stopped",
    }
    done = rows["micro-001"]
    assert (done.step, done.steps, done.best, done.last, done.psnr) == (150, 150, (0.1, 100), 0.2, 22.0)
    assert rows["micro-003"].error == "step 120: not finite" and rows["micro-003"].step == 120
    assert rows["micro-004"].best is None
    assert [row.folder.name for row in read_runs(runs / "micro-002")] == ["micro-002"]


def test_the_table_shows_how_to_resume_unfinished_runs(runs: Path) -> None:
    (runs / "micro-005").mkdir()
    (runs / "micro-005" / ".lock").touch()
    for run in runs.glob("micro-00[1-4]"):
        os.utime(run / "metrics.jsonl", (1000, 1000))
    printed = table(read_runs(runs), now=1000 + 3 * 3600)
    assert "0.1 at 100" in printed and "3 h ago" in printed and "\nmicro-003: step 120: not finite" in printed
    commands = printed.split("resume with\n")[1].split("\n\n")[0].splitlines()
    assert commands == [
        f"  python -m train.softprompt --resume {runs / name}" for name in ("micro-002", "micro-003", "micro-004")
    ]
    assert printed.endswith("stopped before anything was written, start again: micro-005")


def test_a_run_in_training_is_recognised_by_its_lock(runs: Path) -> None:
    with FileLock(runs / "micro-002" / ".lock"):
        (row,) = read_runs(runs / "micro-002")
        assert row.state == "running" and "resume with" not in table([row], now=0)
    assert read_runs(runs / "micro-002")[0].state == "stopped"


def test_a_damaged_run_is_named_beside_the_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "micro-002" / "config.yaml").write_text("train: 3\n")
    assert main([str(runs)]) == 0
    assert "config.yaml: train.steps cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no such folder"), ("notes", "holds no run")])
def test_a_folder_without_runs_is_refused(runs: Path, error_of: Callable[..., str], name: str, message: str) -> None:
    assert error_of(main, runs / name).startswith(f"error: {runs / name}: {message}")
