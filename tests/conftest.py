"""Shared by all tests: FaceLift's real files, if they lie beside the repository, and a pipeline small enough to train."""

import os
import signal
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("SOFTPROMPT_SHARED", Path(__file__).parents[2] / "shared")) / "facelift"
"""FaceLift's prompts, a sample and numbers its own code computed; not part of this repository."""

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it would be ignored, and inherited so
THREADS = os.environ.get("SOFTPROMPT_TEST_THREADS", "1")
"""Number of torch's threads in tests. No test is large enough to gain from more than one; CI repeats some with two."""
torch.set_num_threads(int(THREADS))
os.environ["OMP_NUM_THREADS"] = THREADS  # the same for the commands that tests start


@pytest.fixture(scope="session")
def facelift() -> Path:
    """The folder of FaceLift's real files."""
    if not SHARED.is_dir():
        pytest.skip(f"FaceLift's reference files are not at {SHARED} (set SOFTPROMPT_SHARED to the folder above it)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(facelift: Path) -> Path:
    """A pipeline folder that FaceLift's own classes wrote, shrunk, with random weights."""
    return facelift / "tiny" / "pipeckpts"
