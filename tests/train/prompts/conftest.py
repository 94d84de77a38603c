"""The command, and prompts to give it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softprompt.prompt.templates import VIEWS
from train.prompts.__main__ import main
from train.prompts.sources import Encoder, Source, fill_in, open_encoder

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("show", file, ...)`: what it prints, in one line; its exit code must be 0."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv: object) -> str:
        assert main([str(argument) for argument in argv]) == 0
        return " ".join(capsys.readouterr().out.split())

    return call


@pytest.fixture
def refused(error_of: Callable[..., str]) -> Run:
    """`refused("show", file, ...)`: its error; see `error_of`."""
    return partial(error_of, main)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The embedded model's text encoder."""
    return open_encoder("micro")


@pytest.fixture(scope="session")
def facelift_texts(encoder: Encoder) -> Source:
    """FaceLift's six texts by the embedded model's encoder."""
    return encoder.encode("facelift", fill_in("facelift", subject="", angles=""), VIEWS)


def random_prompt(views: int = 6, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(views, 77, width, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, prompt: torch.Tensor) -> Path:
    """Write a prompt as FaceLift has it: a bare tensor, without a JSON file beside it."""
    if path.suffix == ".pt":
        torch.save(prompt.half(), path)
    else:
        save_file({"prompt": prompt}, path)
    return path
