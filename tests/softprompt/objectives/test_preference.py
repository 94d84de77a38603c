"""Preferences: each formula against a slow one in float64, its gradient, and the curriculum against tables."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from softprompt.objectives.preference import (
    RankedPair,
    dpo_loss,
    item_errors,
    open_pairs,
    preference,
    prefers_winner,
    ranked_pairs,
    share_won,
    stage_at,
    stages_by_rank,
    stages_by_reward,
)


def tensors(*shape: int, count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype))


def slow_error(prediction: Tensor, target: Tensor, factor: float) -> float:
    """One object's error as a loop over its numbers."""
    numbers = list(zip(prediction.double().flatten().tolist(), target.double().flatten().tolist(), strict=True))
    return factor * sum((x - y) ** 2 for x, y in numbers) / len(numbers)


def slow_dpo(winner: list[float], loser: list[float], ref_winner: list[float], ref_loser: list[float], beta: float) -> float:
    differences = [(w - x) - (rw - rx) for w, x, rw, rx in zip(winner, loser, ref_winner, ref_loser, strict=True)]
    return sum(-math.log(1 / (1 + math.exp(0.5 * beta * d))) for d in differences) / len(differences)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_an_object_is_that_of_a_loop_over_its_views(prediction_type: str, weighted: bool) -> None:
    prediction, target = tensors(3, 2, 4, 3, 5, count=2)
    alphabar = torch.tensor([0.9, 0.5, 0.01])
    kept = [[1], [0, 1], [0]] if weighted else [[0, 1]] * 3
    weights = torch.tensor([[float(view in views) for view in (0, 1)] for views in kept]) if weighted else None
    found = item_errors(prediction, target, alphabar, prediction_type=prediction_type, view_weights=weights)
    for b, views in enumerate(kept):
        factor = float(alphabar[b]) if prediction_type == "v_prediction" else 1.0
        expected = slow_error(prediction[b, views], target[b, views], factor)
        assert float(found[b]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_error_of_v_becomes_exactly_that_of_the_noise_it_stands_for() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    clean, noise, wrong = tensors(2, 6, 4, 3, 3, count=3, dtype=torch.float64)
    alphabar = scheduler.alphas_cumprod.double()[torch.tensor([20, 800])]
    a, s = (x.sqrt()[:, None, None, None, None] for x in (alphabar, 1 - alphabar))
    noisy, velocity = a * clean + s * noise, a * noise - s * clean
    predicted = velocity + 0.1 * wrong
    found = item_errors(predicted, velocity, alphabar)
    torch.testing.assert_close(found, item_errors(a * predicted + s * noisy, noise, alphabar, prediction_type="epsilon"))


def test_errors_of_half_precision_predictions_do_not_overflow() -> None:
    prediction = torch.full((1, 1, 4, 8, 8), 300.0).half()
    found = item_errors(prediction, torch.zeros_like(prediction), torch.ones(1))  # 300 squared is infinite in float16
    assert found.tolist() == [90_000]


@pytest.mark.parametrize("beta", [1.0, 200.0, 5000.0])
def test_the_loss_is_that_of_its_formula(beta: float) -> None:
    errors = [0.1 + 0.002 * x for x in tensors(7, count=4)]
    expected = slow_dpo(*(e.tolist() for e in errors), beta=beta)
    assert float(dpo_loss(*errors, beta=beta)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_loss_is_log_2_where_model_and_reference_are_one_and_nothing_is_preferred() -> None:
    winner, loser = tensors(5, count=2)
    assert float(dpo_loss(winner, loser, winner, loser, beta=5000.0)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(prefers_winner(preference(winner, loser, winner, loser))) == 0


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    predictions = tuple(x.requires_grad_() for x in tensors(2, 2, 1, 2, 2, count=4, dtype=torch.float64))
    targets = 2 * tensors(2, 2, 1, 2, 2, count=2, seed=1, dtype=torch.float64)
    alphabar = torch.tensor([0.7, 0.1], dtype=torch.float64)

    def loss(*predictions: Tensor) -> Tensor:
        return dpo_loss(*(item_errors(p, t, alphabar) for p, t in zip(predictions, targets, strict=True)), beta=3.0)

    assert torch.autograd.gradcheck(loss, predictions)


def test_a_margin_of_thousands_of_beta_neither_overflows_nor_loses_its_gradient() -> None:
    winner, loser = torch.tensor([3.0], requires_grad=True), torch.tensor([0.0])
    loss = dpo_loss(winner, loser, loser, loser, beta=5000.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7500) and float(winner.grad) == pytest.approx(2500)


def test_shares_are_counted_as_written() -> None:
    assert float(prefers_winner(torch.tensor([0.1, -0.1, 0.0, 2.0]))) == 0.5
    assert float(share_won(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, 2.0, 1.0]))) == 0.625


def test_pairs_are_all_but_the_near_ties_the_better_first() -> None:
    found = ranked_pairs([0.5, 0.9, 0.1, 0.88], min_gap=0.05)
    assert {(p.winner, p.loser): (p.ranks, round(p.reward, 6)) for p in found} == {
        (1, 0): (2, 0.4),
        (1, 2): (3, 0.8),
        (3, 0): (1, 0.38),
        (3, 2): (2, 0.78),
        (0, 2): (1, 0.4),
    }
    assert ranked_pairs([1.0, 1.0]) == [], "equal ones are no pair whatever the gap"
    assert ranked_pairs([2.0, 1.0], min_gap=1.0) == [] and ranked_pairs([2.0, 1.0]) == [RankedPair(0, 1, 1, 1.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"rewards are \['1', '(nan|inf)'\]; expected finite numbers"):
        ranked_pairs([1.0, bad])


@pytest.mark.parametrize(
    ("samples", "chunks", "expected"),
    [
        (6, 5, {5: 0, 4: 1, 3: 2, 2: 3, 1: 4}),
        (6, 1, {5: 0, 4: 0, 3: 0, 2: 0, 1: 0}),
        (6, 2, {5: 0, 4: 0, 3: 0, 2: 1, 1: 1}),  # L_1 = 2.5
        (7, 2, {6: 0, 5: 0, 4: 0, 3: 1, 2: 1, 1: 1}),  # L_1 = 3, left out of the first
        (4, 5, {3: 0, 2: 1, 1: 3}),  # L = 2.4, 1.8, 1.2, 0.6, 0: more chunks than gaps, and the third is empty
    ],
)
def test_rank_gaps_join_in_the_chunks_of_the_table(samples: int, chunks: int, expected: dict[int, int]) -> None:
    assert dict(zip(expected, stages_by_rank(list(expected), samples, chunks), strict=True)) == expected


def test_reward_gaps_join_by_width_or_by_count_as_in_the_tables() -> None:
    gaps = [0.125, 1.125, 0.625, 0.9, 0.875, 0.375]  # width: bounds 0.875, 0.625, 0.375, 0.125
    assert stages_by_reward(gaps, 4, "equal_width") == [3, 0, 1, 0, 0, 2]
    assert stages_by_reward(gaps, 3, "equal_count") == [2, 0, 1, 0, 1, 2]
    assert stages_by_reward(gaps, 4, "equal_count") == [3, 0, 2, 0, 1, 2]  # 2, 3, 5, 6 pairs
    assert stages_by_reward([0.2, 0.2], 5, "equal_width") == [0, 0], "gaps that are all one are all easy"
    assert stages_by_reward([], 5, "equal_width") == stages_by_reward([], 5, "equal_count") == []


@pytest.mark.parametrize("edges", ["equal_width", "equal_count"])
def test_stages_pile_up_from_easy_to_hard_until_every_pair_is_in(edges: str) -> None:
    gaps = tensors(50)[0].abs().tolist()
    joins = stages_by_reward(gaps, 5, edges)
    opened = [open_pairs(joins, stage) for stage in range(5)]
    assert opened[0] and opened[4] == list(range(50))
    for before, after in pairwise(opened):
        assert set(before) <= set(after)
        joined, shut = set(after) - set(before), set(range(50)) - set(after)
        assert not joined or not shut or min(gaps[i] for i in joined) >= max(gaps[i] for i in shut)


def test_stages_follow_each_other_and_the_last_one_stays() -> None:
    assert [stage_at(step, 3, 3) for step in (0, 2, 3, 5, 6, 9, 1000)] == [0, 0, 1, 1, 2, 2, 2]
