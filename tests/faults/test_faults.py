"""A run that is killed at any moments ends with the same results as one that is not: two rounds of `python -m tests.faults`."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_that_are_killed_end_as_one_that_was_not() -> None:
    # In a process of its own: children are forked from one that has computed nothing.
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--rounds=2", "--seed=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rounds" in done.stdout and "0 runs lost, 0 that differ" in done.stdout
