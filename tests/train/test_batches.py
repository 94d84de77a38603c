"""A batch is the same whether it was made ahead or not."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch

from softprompt.data.batch import Batch
from train.batches import Batches, Wanted
from train.options.groups import KLConfig
from train.state.run import Job


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job(**{"kl.domain": "both", "kl.every": 2, "data.original": "VAL", "train.accumulation": 2})


def assert_same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_what_a_step_takes_and_in_which_order(job: Job) -> None:
    with_kl = [(part, original) for part in (0, 1) for original in (True, False)]
    assert [(w.part, w.original) for w in job.trainer.batches.of_step(2, 5, original=True)] == with_kl
    assert job.trainer.batches.of_step(3, 5, original=False) == [Wanted(3, 0, 5), Wanted(3, 1, 5)]


def test_made_ahead_or_not_it_is_the_same(job: Job) -> None:
    wanted = job.trainer.batches.of_step(0, 0, original=True) + job.trainer.batches.of_step(1, 0, original=False)
    plain = [job.trainer.batches.take(w) for w in wanted]
    job.trainer.batches._thread = ThreadPoolExecutor(1)
    job.trainer.batches.make_ahead(wanted)
    assert set(job.trainer.batches._ahead) == set(wanted)
    for one, expected in reversed(list(zip(wanted, plain, strict=True))):  # in another order, too
        assert_same(job.trainer.batches.take(one), expected)
    assert job.trainer.batches._ahead == {}
    assert not torch.equal(plain[0].noise, plain[2].noise)


def test_a_range_of_timesteps_that_moved_on_is_not_served_from_what_was_made_before(job: Job) -> None:
    job.trainer.batches._thread = ThreadPoolExecutor(1)
    job.trainer.batches.make_ahead(job.trainer.batches.of_step(1, 900, original=False))
    moved = Wanted(1, 0, lowest=0)
    expected = Batches.make(job.trainer.batches, moved)
    job.trainer.batches.make_ahead([moved])
    assert list(job.trainer.batches._ahead) == [moved], "what is not wanted any more is dropped"
    assert_same(job.trainer.batches.take(moved), expected)


def test_an_error_made_ahead_comes_when_its_batch_is_taken(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("gone")

    job.trainer.batches._thread = ThreadPoolExecutor(1)
    monkeypatch.setattr(job.train, "get", broken)
    job.trainer.batches.make_ahead([Wanted(0, 0, 0)])
    with pytest.raises(OSError, match="gone"):
        job.trainer.batches.take(Wanted(0, 0, 0))


@pytest.mark.parametrize(
    ("domain", "expected"), [("new", ("new",)), ("original", ("original",)), ("both", ("new", "original"))]
)
def test_the_kl_is_due_every_so_many_steps_where_it_has_a_weight(job: Job, domain: str, expected: tuple[str, ...]) -> None:
    trainer = replace(job.trainer, kl=KLConfig(domain=domain, every=3))  # type: ignore[arg-type]
    assert [trainer.kl_domains(step) for step in range(4)] == [expected, (), (), expected]
    assert replace(trainer, kl=KLConfig(weight=0)).kl_domains(0) == ()
