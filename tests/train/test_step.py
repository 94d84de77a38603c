"""One optimizer step: which part of it trains, and where the KL to the pretrained model is measured."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softprompt.objectives.losses import separation_ratios
from softprompt.prompt.pacing import CurriculumState
from tests.runs import same
from train import step as step_module
from train.batches import Wanted
from train.objectives.terms import StepBatch
from train.state.run import Job
from train.step import KL_TIMESTEP_GROUPS, Trainer, denoising_and_kl, step_batch, training_step


@pytest.fixture
def make_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """The smallest run with the KL in each step, prepared."""
    return lambda **options: make_job(**{"kl.every": 1, **options})


def group(job: Job, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in job.adapted.trainable()[name].values()]


# ------------------------------------------------------------------------------------------------------- what trains when


@pytest.mark.parametrize(("first", "second"), [("prompt", "lora"), ("lora", "prompt")])
def test_a_group_moves_in_its_own_steps_and_not_by_momentum_after_them(
    make_job: Callable[..., Job], first: str, second: str
) -> None:
    job = make_job(**{f"{first}.train_until": 0.5, f"{second}.train_from": 0.5})
    start = {name: group(job, name) for name in (first, second)}
    results = [training_step(job.trainer, step) for step in range(2)]
    middle = {name: group(job, name) for name in (first, second)}
    assert same(middle[second], start[second]) and not same(middle[first], start[first])
    results += [training_step(job.trainer, step) for step in range(2, 4)]
    assert same(group(job, first), middle[first]) and not same(group(job, second), middle[second])
    norms = [(r.grad_norms[first] > 0, r.grad_norms[second] > 0) for r in results]
    assert norms == [(True, False), (True, False), (False, True), (False, True)]


# --------------------------------------------------------------------------------------------------------------------- KL


@pytest.mark.parametrize(("domain", "new", "original"), [("new", 1, 0), ("original", 0, 1), ("both", 1, 1)])
def test_the_kl_is_measured_where_it_is_asked_for(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, domain: str, new: int, original: int
) -> None:
    job = make_job(**{"kl.domain": domain, "data.original": "VAL"})
    asked: list[tuple[bool, bool]] = []

    def watched(trainer: Trainer, batch: StepBatch, *, with_kl: bool) -> tuple[Tensor, Tensor]:
        asked.append((with_kl, torch.is_grad_enabled()))
        return denoising_and_kl(trainer, batch, with_kl=with_kl)

    monkeypatch.setattr(step_module, "denoising_and_kl", watched)
    result = training_step(job.trainer, 0)
    assert asked == [(True, True)] * original + [(bool(new), True)]
    assert result.kl == 0, "nothing has moved before the first step"
    assert (result.kl_on_original == 0) if original else (result.kl_on_original is None)
    assert sum(result.kl_sums[1]) == 2 * 6 * (new + original), "each view once by view, once by timestep"
    later = training_step(job.trainer, 1)
    assert later.kl is not None and later.kl > 0


def test_the_kl_on_the_original_domain_holds_the_model_there(make_job: Callable[..., Job]) -> None:
    def kl_at_the_end(weight: float) -> float:
        job = make_job(
            **{"kl.domain": "original", "data.original": "VAL", "kl.weighting": "uniform", "kl.weight": weight},
            **{"prompt.learning_rate": 0.02, "lora.learning_rate": 0.001},
        )
        found = [training_step(job.trainer, step).kl_on_original for step in range(12)]
        return sum(kl for kl in found[-4:] if kl is not None)

    assert 0 < kl_at_the_end(100.0) < 0.8 * kl_at_the_end(1e-9)


def test_the_weight_is_the_one_that_was_adapted(make_job: Callable[..., Job]) -> None:
    def gradient(pace: CurriculumState | None, **options: object) -> Tensor:
        job = make_job(**{"kl.weighting": "uniform", "train.max_grad_norm": 1e9, **options})
        with torch.no_grad():
            job.adapted.prompt.learned.add_(0.5)  # so that there is a KL
        kept: list[Tensor] = []
        job.adapted.prompt.learned.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.clone()))
        training_step(job.trainer, 0, pace)
        return kept[-1]

    torch.testing.assert_close(gradient(CurriculumState(kl_weight=2.0)), gradient(None, **{"kl.weight": 2.0}))
    assert not torch.allclose(gradient(CurriculumState(kl_weight=2.0)), gradient(None, **{"kl.weight": 1.0}))


def test_the_kl_is_split_by_view_and_by_range_of_timesteps(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"data.reference_view": "4", "train.batch_size": 3})
    with torch.no_grad():
        job.adapted.prompt.learned.add_(0.5)
    wanted = Wanted(0, 0, lowest=0)
    batch = job.trainer.batches.take(wanted)
    _, kl = denoising_and_kl(job.trainer, step_batch(job.trainer, wanted, batch, step=0, position=0.0), with_kl=True)
    sums, counts = step_module._kl_sums(job.trainer, batch, kl)
    expected_sums, expected_counts = [0.0] * (6 + KL_TIMESTEP_GROUPS), [0.0] * (6 + KL_TIMESTEP_GROUPS)
    for b in range(3):
        for slot in range(6):
            for place in (int(batch.order[b, slot]), 6 + int(batch.timesteps[b]) // 250):
                expected_sums[place] += float(kl[b, slot])
                expected_counts[place] += 1
    assert counts.tolist() == expected_counts and sums.tolist() == pytest.approx(expected_sums)
    assert batch.order[0].tolist() == [4, 5, 0, 1, 2, 3], "views, not slots"


# -------------------------------------------------------------------------------------------------- timesteps, separation


def test_only_the_timesteps_of_the_stage_are_drawn(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"train.batch_size": 16})
    for lowest in (0, 900):
        timesteps = job.trainer.batches.take(Wanted(0, 0, lowest=lowest)).timesteps
        assert timesteps.min() >= lowest and timesteps.max() < 1000
    assert job.trainer.batches.take(Wanted(0, 0, lowest=0)).timesteps.min() < 900


def test_the_hinge_pulls_prompts_apart_that_have_come_too_near(make_job: Callable[..., Job]) -> None:
    def closest(weight: float) -> float:
        job = make_job(**{"prompt.separation": weight, "prompt.learning_rate": 0.05})
        prompt = job.adapted.prompt
        with torch.no_grad():
            prompt.learned.copy_(0.7 * prompt.learned + 0.3 * prompt.learned.mean(dim=0))
        for step in range(4):
            training_step(job.trainer, step)
        return float(separation_ratios(prompt(0.0).detach(), prompt.start).min())

    assert closest(100.0) > closest(0.0) + 0.02
