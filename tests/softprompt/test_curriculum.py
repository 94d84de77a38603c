"""Step to position, against tables written out."""

import pytest

from softprompt.curriculum import position_at

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


def test_fractions_of_a_run_work_like_steps() -> None:
    assert position_at(0.25, [0.0, 0.5], [0.0, 1.0]) == pytest.approx(0.5)
    assert position_at(0.125, [0.0, 0.5], [0.0, 1.0], "cosine") == pytest.approx(0.146447, abs=1e-6)


def test_three_template_stages_switch_at_their_steps() -> None:
    stages = {0: 0, 1999: 0, 2000: 1, 4999: 1, 5000: 2, 20_000: 2}
    assert {step: position_at(step, [0, 2000, 5000], [0, 1, 2], "step") for step in stages} == stages


def test_a_position_may_fall_again() -> None:
    assert position_at(15, [0, 10, 20], [0.0, 1.0, 0.0]) == pytest.approx(0.5)
