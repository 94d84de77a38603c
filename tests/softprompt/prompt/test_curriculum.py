"""Step to position, against tables written out."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler

from softprompt.prompt.curriculum import (
    Budget,
    Stage,
    adapted_kl_weight,
    learning_rate_factor,
    lowest_timestep,
    move_within_budget,
    position_at,
    position_of_stage,
    timestep_edges,
    wait_for_plateau,
)

AT = [100, 200, 400]
POSITIONS = [0.0, 1.0, 3.0]
TABLES = {
    "linear": {0: 0, 100: 0, 125: 0.25, 150: 0.5, 199: 0.99, 200: 1, 250: 1.5, 300: 2, 400: 3, 401: 3, 10_000: 3},
    "cosine": {0: 0, 100: 0, 125: 0.146447, 150: 0.5, 175: 0.853553, 200: 1, 250: 1.292893, 300: 2, 400: 3, 10_000: 3},
    "step": {0: 0, 100: 0, 150: 0, 199: 0, 200: 1, 201: 1, 399: 1, 400: 3, 10_000: 3},
}


@pytest.mark.parametrize("easing", TABLES)
def test_positions_are_those_of_the_table(easing: str) -> None:
    found = {step: position_at(step, AT, POSITIONS, easing) for step in TABLES[easing]}
    assert found == pytest.approx(TABLES[easing], abs=1e-6)


@pytest.mark.parametrize("easing", TABLES)
def test_the_first_and_last_positions_hold_outside(easing: str) -> None:
    assert position_at(-5, [0, 10], [0.5, 2.0], easing) == 0.5
    assert position_at(11, [0, 10], [0.5, 2.0], easing) == 2.0
    assert position_at(7, [0], [1.5], easing) == 1.5


def test_fractions_of_a_run_work_like_steps_and_a_position_may_fall_again() -> None:
    assert position_at(0.125, [0.0, 0.5], [0.0, 1.0], "cosine") == pytest.approx(0.146447, abs=1e-6)
    assert position_at(15, [0, 10, 20], [0.0, 1.0, 0.0]) == pytest.approx(0.5)


def play(values: list[float | None], **options: float) -> list[Stage]:
    """The stage after each step, from step 1 on."""
    stages, stage = [], Stage()
    for step, value in enumerate(values, start=1):
        stage = wait_for_plateau(stage, step, value, **options)
        stages.append(stage)
    return stages


def test_a_stage_ends_after_more_values_without_improvement_than_the_patience() -> None:
    #                          best     waits 1, 2  better   waits 1, 2, 3: over
    values: list[float | None] = [5.0, 4.0, 4.0, 4.5, 3.9, 4.0, 3.9, 4.0, 9.0, 8.0]
    stages = play(values, last=5, patience=2)
    assert [s.number for s in stages] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert [s.waited for s in stages] == [0, 0, 1, 2, 0, 1, 2, 0, 0, 0]
    assert [s.best for s in stages] == [5, 4, 4, 4, 3.9, 3.9, 3.9, None, 9, 8], "the best is forgotten at each stage"
    assert stages[7] == Stage(number=1, began=8)


def test_an_improvement_is_at_least_the_minimum_gain() -> None:
    assert [s.waited for s in play([1.0, 0.995, 0.991, 0.9, 0.9], last=1, patience=9, min_gain=0.01)] == [0, 1, 2, 0, 1]


def test_the_running_mean_is_watched_not_each_value() -> None:
    stages = play([4.0, 8.0, 0.0], last=1, patience=9, smoothing=0.5)
    assert [s.smoothed for s in stages] == [4, 6, 3] and [s.best for s in stages] == [4, 4, 3]


def test_a_stage_ends_at_its_ceiling_with_or_without_values() -> None:
    improving = play([1 / n for n in range(1, 8)], last=2, patience=9, max_steps=3)
    unseen = play([None] * 7, last=2, patience=9, max_steps=3)
    assert [s.number for s in improving] == [s.number for s in unseen] == [0, 0, 1, 1, 1, 2, 2]
    assert [s.began for s in unseen] == [0, 0, 3, 3, 3, 6, 6], "the last stage never ends"


def test_steps_without_a_value_cost_no_patience() -> None:
    assert [s.waited for s in play([1.0, None, None, 1.0], last=1, patience=1)] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("easing", "glided"),
    [
        ("linear", [0.5, 0.75, 1, 1.25, 1.5, 1.5]),
        ("cosine", [0.5, 0.646447, 1, 1.353553, 1.5, 1.5]),
        ("step", [0.5] * 4 + [1.5] * 2),
    ],
)
def test_a_stage_s_position_is_glided_to(easing: str, glided: list[float]) -> None:
    positions = [0.5, 1.5]
    assert [position_of_stage(Stage(), step, positions, 4, easing) for step in (0, 7)] == [0.5, 0.5]
    found = [position_of_stage(Stage(1, began=10), step, positions, 4, easing) for step in range(10, 16)]
    assert found == pytest.approx(glided, abs=1e-6)
    assert position_of_stage(Stage(1, began=10), 10, positions, 0, easing) == 1.5, "no glide is a switch"


def test_the_position_advances_as_the_kl_budget_allows() -> None:
    state, positions = Budget(), []
    for kl in (None, 0.0, None, 0.05, 0.075, 0.1, 0.2, 0.0, 0.0):
        state = move_within_budget(state, kl, budget=0.1, fastest=0.4, last=1.5)
        positions.append(state.position)
    #           unknown  free  as before  half  a quarter  at budget  above  free  arrived
    assert positions == pytest.approx([0, 0.4, 0.8, 1.0, 1.1, 1.1, 1.1, 1.5, 1.5])


def test_the_budget_is_compared_with_the_running_mean() -> None:
    state = move_within_budget(Budget(smoothed=0.2), 0.0, budget=0.1, fastest=1.0, last=9.0, smoothing=0.5)
    assert state == Budget(position=0.0, smoothed=0.1)


def test_the_kl_weight_follows_its_target() -> None:
    table = {0.0: 0.98, 0.5: 0.98, 0.9: 0.99, 1.0: 1.0, 1.1: 1.01, 1.2: 1.02, 50.0: 1.02}
    found = {kl: adapted_kl_weight(1.0, kl, target=1.0, rate=0.1) for kl in table}
    assert found == pytest.approx(table)
    assert adapted_kl_weight(3.0, 0.2, target=0.1, rate=1.0) == pytest.approx(3.6)


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_clusters_of_timesteps_have_the_bounds_of_the_table() -> None:
    assert timestep_edges(alphas_cumprod(), 4, "uniform") == [0, 250, 500, 750, 1000]
    assert timestep_edges(alphas_cumprod(), 3, "uniform") == [0, 333, 667, 1000]
    # Steps of equal log SNR.
    table = [0, 1, 3, 6, 11, 21, 37, 63, 103, 160, 234, 320, 414, 508, 598, 681, 757, 826, 889, 946, 1000]
    assert timestep_edges(alphas_cumprod(), 20, "log_snr") == table
    assert timestep_edges(alphas_cumprod(), 1, "log_snr") == [0, 1000]


def test_the_noisiest_cluster_comes_first_and_the_others_join() -> None:
    assert [lowest_timestep([0, 250, 500, 1000], stage) for stage in range(4)] == [500, 250, 0, 0]


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("constant", "constant_with_warmup"), ("cosine", "cosine"), ("linear", "linear")]
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_over_a_whole_run_are_those_of_diffusers(schedule: str, theirs: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected, reference = [], get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    for _ in range(12):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    found = [learning_rate_factor(step, first=0, end=12, warmup=warmup, schedule=schedule) for step in range(12)]
    assert found == pytest.approx(expected)


def test_a_group_that_trains_for_a_while_has_its_warm_up_and_decay_within_it() -> None:
    found = [learning_rate_factor(step, first=4, end=8, warmup=2, schedule="linear") for step in range(10)]
    assert found == [0, 0, 0, 0, 0, 0.5, 1, 0.5, 0, 0]
