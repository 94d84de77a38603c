"""Signs of collapse, from series written by hand."""

import re

import pytest

from train.watch import SIGNS, collapse_signs

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
