"""Whatever is switched on for speed or memory, the losses are those of the plain path, within what is stated here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from softprompt.model import adapted as model
from train import setup
from train.options.config import Config
from train.setup import prepare
from train.state.run import Job
from train.step import training_step

STEPS = 3
PLAIN = {
    "train.gradient_checkpointing": "never",
    "data.cache": "null",
    "kl.every": 1,
    "train.batch_size": 2,
    "train.steps": STEPS,
}
Change = Callable[[Job], None]


def as_it_is(job: Job) -> None:
    """Nothing that an option does not do."""


def channels_last(job: Job) -> None:
    job.pipeline.unet.to(memory_format=torch.channels_last)
    assert not job.pipeline.unet.conv_in.weight.is_contiguous()


def made_ahead(job: Job) -> None:
    job.trainer.batches._thread = ThreadPoolExecutor(1)


def fused(job: Job) -> None:
    for group in job.trainer.optimizer.param_groups:
        group["foreach"], group["fused"] = False, True


def losses(config: Config, change: Change = as_it_is) -> list[float]:
    job = prepare(config)
    change(job)
    results = [training_step(job.trainer, step) for step in range(STEPS)]
    return [number for r in results for number in (r.denoising, r.kl or 0.0, *r.grad_norms.values())]


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: rounding has something to round."""
    return partial(small_config, model="micro")


@pytest.fixture(scope="module")
def plain(small: Callable[..., Config]) -> list[float]:
    found = losses(small(**PLAIN))
    assert len(set(found)) == len(found), "numbers that differ from step to step"
    return found


@pytest.mark.parametrize(
    ("options", "change", "tolerance"),
    [
        pytest.param({}, as_it_is, 0, id="the plain path again"),
        pytest.param({"data.cache": "CACHE"}, as_it_is, 0, id="encoded pictures on disk"),
        pytest.param({}, made_ahead, 0, id="batches made ahead"),
        pytest.param({"train.gradient_checkpointing": "always"}, as_it_is, 1e-4, id="gradient checkpointing"),
        pytest.param({}, channels_last, 1e-4, id="channels last"),
        pytest.param({}, fused, 1e-4, id="fused AdamW"),
        pytest.param({"train.precision": "bf16"}, as_it_is, 0.05, id="bf16"),
    ],
)
def test_the_losses_are_those_of_the_plain_path(
    small: Callable[..., Config],
    tmp_path: Path,
    plain: list[float],
    options: dict[str, object],
    change: Change,
    tolerance: float,
) -> None:
    options = {name: tmp_path / "cache" if value == "CACHE" else value for name, value in options.items()}
    found = losses(small(**PLAIN | options), change)
    assert found == pytest.approx(plain, rel=tolerance, abs=1e-7 if tolerance else 0)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_are_compiled_once_each(
    make_job: Callable[..., Job], smallest_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # aot_eager: the same graphs and guards, without a minute of compiling them and without the need for a compiler.
    monkeypatch.setattr(setup, "compile_blocks", partial(model.compile_blocks, backend="aot_eager"))
    torch._dynamo.reset()  # of graphs that another test has left in this process
    torch._dynamo.utils.counters.clear()
    options = PLAIN | {"model": smallest_model}
    job, plain = (make_job(**options | {"train.compile": on}) for on in ("true", "false"))
    graphs = []
    for step in range(STEPS):  # each with the adapters on and off, and under two prompts
        found, expected = training_step(job.trainer, step), training_step(plain.trainer, step)
        assert found.denoising == pytest.approx(expected.denoising, rel=1e-4)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-7)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * STEPS, "switching adapters and prompt compiles nothing anew"
    assert not torch._dynamo.utils.counters["graph_break"]
