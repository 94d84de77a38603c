"""A batch is the same whether it was made ahead or not."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from softprompt.data.batch import Batch
from train.batches import Batches, Wanted, kl_domains, object_at
from train.options.config import Config
from train.options.groups import KLConfig
from train.setup import Job, prepare


@pytest.fixture
def job(mice: Path, small_config: Callable[..., Config]) -> Job:
    both = {"kl.domain": "both", "kl.every": 2, "data.original": mice / "val", "train.accumulation": 2}
    return prepare(small_config(mice, **both))


def assert_same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_what_a_step_takes_and_in_which_order(job: Job) -> None:
    with_kl = [(part, original) for part in (0, 1) for original in (True, False)]
    assert [(w.part, w.original) for w in job.batches.of_step(2, 5)] == with_kl
    assert job.batches.of_step(3, 5) == [Wanted(3, 0, 5), Wanted(3, 1, 5)]


def test_made_ahead_or_not_it_is_the_same(job: Job) -> None:
    wanted = job.batches.of_step(0, 0) + job.batches.of_step(1, 0)
    plain = [job.batches.take(w) for w in wanted]
    job.batches._thread = ThreadPoolExecutor(1)
    job.batches.make_ahead(wanted)
    assert set(job.batches._ahead) == set(wanted)
    for one, expected in reversed(list(zip(wanted, plain, strict=True))):  # in another order, too
        assert_same(job.batches.take(one), expected)
    assert job.batches._ahead == {}
    assert not torch.equal(plain[0].noise, plain[2].noise)


def test_a_range_of_timesteps_that_moved_on_is_not_served_from_what_was_made_before(job: Job) -> None:
    job.batches._thread = ThreadPoolExecutor(1)
    job.batches.make_ahead(job.batches.of_step(1, 900))
    moved = Wanted(1, 0, lowest=0)
    expected = Batches.make(job.batches, moved)
    job.batches.make_ahead([moved])
    assert list(job.batches._ahead) == [moved], "what is not wanted any more is dropped"
    assert_same(job.batches.take(moved), expected)


def test_an_error_made_ahead_comes_when_its_batch_is_taken(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("gone")

    job.batches._thread = ThreadPoolExecutor(1)
    monkeypatch.setattr(job.train, "get", broken)
    job.batches.make_ahead([Wanted(0, 0, 0)])
    with pytest.raises(OSError, match="gone"):
        job.batches.take(Wanted(0, 0, 0))


@pytest.mark.parametrize(
    ("domain", "expected"), [("new", ("new",)), ("original", ("original",)), ("both", ("new", "original"))]
)
def test_the_kl_is_due_every_so_many_steps_where_it_has_a_weight(domain: str, expected: tuple[str, ...]) -> None:
    config = replace(Config(), kl=KLConfig(domain=domain, every=3))  # type: ignore[arg-type]
    assert [kl_domains(config, step) for step in range(4)] == [expected, (), (), expected]
    assert kl_domains(replace(config, kl=KLConfig(weight=0)), 0) == ()


def test_an_epoch_is_a_permutation_and_each_its_own() -> None:
    epochs = [[object_at(place, 50, 3) for place in range(first, first + 50)] for first in (0, 50)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
