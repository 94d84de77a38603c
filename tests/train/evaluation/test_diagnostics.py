"""Signs that a run goes wrong, from series written by hand."""

import re

import pytest

from train.evaluation.diagnostics import (
    SIGNS,
    collapse_signs,
    is_spike,
    moved_weights,
    prompt_signs,
    standing_still,
    worse_sign,
)

WELL = {"views/separation_ratio": 0.9, "views/copy_score": 0.1, "prompt_views_alike/closest_ratio": 1.2}


@pytest.mark.parametrize(
    ("sign", "series", "threshold", "said"),
    [
        ("views_alike", "views/separation_ratio", 0.5, r"differ by 49% of what the true ones do .* below 50%"),
        ("copies_input", "views/copy_score", 0.5, r"have gone 51% of the way .* copies its input"),
        ("prompts_alike", "prompt_views_alike/closest_ratio", 0.5, r"49% as far apart as at the start"),
    ],
)
def test_each_sign_is_told_by_its_own_series(sign: str, series: str, threshold: float, said: str) -> None:
    worse = 0.01 if sign == "copies_input" else -0.01
    assert collapse_signs(WELL, {}) == collapse_signs({**WELL, series: threshold}, {}) == {}
    found = collapse_signs({**WELL, series: threshold + worse}, {})
    assert list(found) == [sign] and sign in SIGNS
    assert re.search(said, found[sign])
    assert "try " in found[sign].lower(), "what to do about it"


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert collapse_signs({}, {}) == collapse_signs({"loss/validation": 1.0}, {}) == {}
    assert collapse_signs({"views/copy_score": float("nan")}, {}) == {}


def test_what_it_was_at_step_0_is_said_beside_it() -> None:
    found = collapse_signs({"views/copy_score": 0.61}, {"views/copy_score": 0.68})
    assert "gone 61% of the way" in found["copies_input"] and "above 50%; at step 0 68%" in found["copies_input"]


def test_a_copy_score_that_rises_is_told_before_it_is_high() -> None:
    assert collapse_signs({"views/copy_score": 0.35}, {"views/copy_score": 0.1}) == {}
    found = collapse_signs({"views/copy_score": 0.36}, {"views/copy_score": 0.1})
    assert "gone 36% of the way" in found["copies_input"] and "above 35%; at step 0 10%" in found["copies_input"]
    assert collapse_signs({"views/copy_score": 0.5}, {"views/copy_score": 0.9}) == {}, "it has fallen"


# ------------------------------------------------------------------------------------------------------------ the prompt


@pytest.mark.parametrize("rounding", [1e-7, 8e-3])
def test_a_prompt_without_effect_is_one_that_changes_no_more_than_rounding(rounding: float) -> None:
    least = max(1e-3, 2 * rounding)
    assert prompt_signs({"prompt_effect/of_learned": 1.01 * least}, rounding=rounding) == {}
    (name, said), *rest = prompt_signs({"prompt_effect/of_learned": 0.99 * least}, rounding=rounding).items()
    assert name == "prompt_without_effect" and name in SIGNS and not rest and "prompt.learning_rate" in said


@pytest.mark.parametrize(("least", "most", "found"), [(0.5, 2.0, False), (0.49, 1.0, True), (1.0, 2.01, True)])
def test_norms_far_from_the_path_s_are_named(least: float, most: float, found: bool) -> None:
    signs = prompt_signs({"prompt_norm/least_to_path": least, "prompt_norm/most_to_path": most}, rounding=1e-7)
    assert list(signs) == ["prompt_norms"] * found
    assert not found or "0.49 times" in signs["prompt_norms"] or "2 times" in signs["prompt_norms"]


def test_of_a_prompt_that_was_not_measured_nothing_is_said() -> None:
    assert prompt_signs({}, rounding=1e-7) == {}


# ----------------------------------------------------------------------------------------------------------- the weights


def test_a_loss_above_that_of_step_0_is_named_after_three_validations() -> None:
    assert worse_sign(2, 0.3, 0.2) == {}
    assert "last 3 validations were worse" in worse_sign(3, 0.3, 0.2)["worse_than_start"]


def test_a_group_that_was_trained_and_has_not_moved_is_named() -> None:
    trains = {"prompt": True, "lora": True}
    assert standing_still({"prompt": 1e-3, "lora": 1e-9}, trains) == {}
    assert list(standing_still({"prompt": 1e-3, "lora": 0.9e-9}, trains)) == ["lora_stands_still"]
    assert standing_still({"prompt": 1e-3, "lora": 0.0}, {"prompt": True, "lora": False}) == {}, "it was not its turn"
    assert {"lora_stands_still", "prompt_stands_still"} < set(SIGNS)


def test_a_frozen_tensor_that_moved_came_or_went_is_named() -> None:
    before = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [float("nan"), float("nan")]}
    assert moved_weights(before, dict(before)) == []
    assert moved_weights(before, {**before, "b": [3.0, 4.5]}) == ["b"]
    assert moved_weights(before, {"a": [1.0, 2.0], "d": [0.0, 0.0]}) == ["b", "c", "d"]


def test_a_spike_stands_out_of_the_running_mean() -> None:
    assert not is_spike(9.0, None), "there is nothing to stand out of"
    assert not is_spike(5.0, 1.0) and is_spike(5.1, 1.0)
