"""The check of a GPU, tried on the CPU at the tiny size: all comes to its end, and what fails costs its own row alone."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from train.gpu import checks, results
from train.gpu.__main__ import main
from train.gpu.checks import CHECKS, SMALL, Check, Setting
from train.gpu.results import Row, judged, write_results

SAME = ("steps of 2 objects", "steps of 4 objects", "steps of 8 objects", "24 GB", "80 GB", "main job on the CPU")
"""Checks that differ from one that is tried in a number alone, or have nothing to do where there is one device."""
ON_A_GPU_ALONE = {name for name in CHECKS if "alone" in name and name != "ours alone"}
ON_A_GPU_ALONE |= {"fp16", "fp16's gradient scaler", "out of memory"}
"""Checks with nothing to measure on a CPU: they are skipped, and never pass."""
DONE: set[str] = set()
"""Checks that this process has done: the tests may be shared out between several."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, smallest_model: Path) -> Iterator[Setting]:
    """One for all checks of a process, which read each other's results; their runs are of the smallest model."""
    DONE.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, "model", str(smallest_model))
        yield Setting("tiny", "cpu", tmp_path_factory.mktemp("gpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SAME])
def test_every_check_comes_to_its_end_on_a_cpu(setting: Setting, name: str) -> None:
    for needed in {CHECKS[name].needs} - {""} - DONE:
        CHECKS[needed].run(setting)
    rows = CHECKS[name].run(setting)
    DONE.update({name, CHECKS[name].needs})
    assert rows and all(row.outcome != "fail" for row in rows), rows
    assert all(row.outcome == "skip" for row in rows) == (name in ON_A_GPU_ALONE)


def noted(setting: Setting) -> list[Row]:
    return [Row("device", setting.device), judged("a bound", 2.0, most=1.0)]


def broken(setting: Setting) -> list[Row]:
    raise RuntimeError("out of something")


def endless(setting: Setting) -> list[Row]:
    while True:
        pass


NAME = "tests.train.gpu.test_gpu"
MINE = {
    "noted": Check("right", 30, f"{NAME}:noted"),
    "broken": Check("right", 30, f"{NAME}:broken"),
    "endless": Check("main job", 3, f"{NAME}:endless"),
    "after": Check("main job", 30, f"{NAME}:noted", needs="broken"),
    "other": Check("memory", 30, f"{NAME}:noted"),
}


@pytest.mark.slow
def test_a_check_that_breaks_or_takes_too_long_costs_its_own_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # of the processes of the checks
    monkeypatch.setattr(checks, "CHECKS", MINE)
    out = tmp_path / "out"
    assert main(["--size=tiny", "--device=cpu", f"--output={out}", "--parts=right, main job"]) == 1
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    found = [(row["check"], row["name"], row["outcome"]) for row in rows]
    assert found == [
        ("noted", "device", "info"),
        ("noted", "a bound", "fail"),
        ("broken", "the check itself", "fail"),
        ("endless", "the check itself", "fail"),
        ("after", "after", "skip"),
    ]
    assert "RuntimeError: out of something" in rows[2]["found"] and rows[3]["found"].startswith("took more than 3 s")
    table = (out / "gpu.md").read_text()
    assert "| noted | device | cpu |" in table and "**FAIL**" in table
    assert "3 of the checks failed: broken, endless, noted" in capsys.readouterr().out


def test_no_check_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"noted": MINE["noted"]})
    assert main(["--device=cpu", f"--output={tmp_path / 'out'}", "--minutes=0.1", "--parts=right"]) == 0
    (row,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert row["outcome"] == "skip" and "no time was left" in row["found"]


def test_results_are_complete_after_each_check(tmp_path: Path) -> None:
    for count in (1, 2):
        rows = [Row(f"row {number}", "a|b\nc", check="one") for number in range(count)]
        write_results(rows, {"card": "none"}, tmp_path)
        assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == count
        assert (tmp_path / "gpu.md").read_text().count("a/b c") == count


def test_nan_passes_no_bound() -> None:
    assert judged("x", float("nan"), most=1).outcome == judged("x", float("nan"), least=1).outcome == "fail"
    assert judged("x", 1, most=1).outcome == judged("x", 1, least=1).outcome == "pass"
    assert judged("x", 1).outcome == "info" and set(results.MARKS) == {"pass", "fail", "skip", "info"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts=rihgt", "--device=cpu"], "error: --parts: 'rihgt' is no part; expected some of right, main job"),
        (["--device=cpu", "--output=."], "exists already and is not an empty folder"),
        (["--devcie=cpu"], "error: unknown option 'devcie'; did you mean 'device'?"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: list[str], message: str, error_of: Callable[..., str]) -> None:
    assert message in error_of(main, *options)
    assert sys.modules["train.gpu.checks"] is checks
