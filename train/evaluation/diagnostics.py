"""Signs that a run is going wrong, read from its own series and weights: pure functions, a sentence for each sign."""

import math
from collections.abc import Mapping, Sequence

ALIKE_VIEWS = 0.5
"""Generated views that differ by less than this share of what the true ones differ have collapsed."""
COPIES = 0.5
"""Views that have gone this share of the way from the truth to the input picture are copies of it."""
RISE = 0.25
"""A copy score that has risen by so much since step 0 is one as well."""
ALIKE_PROMPTS = 0.5
"""Two prompts nearer to each other than this share of their distance at the start have collapsed."""
NORMS = (0.5, 2.0)
"""A token's norm, as a multiple of the path's there, is outside what a text encoder gives."""
WORSE = 3
"""Validations in a row that are worse than that at step 0."""
EFFECT = 1e-3
"""A learned prompt that changes the prediction by a smaller share than this, or than twice what a number is rounded by, does
nothing."""
STILL = 1e-9
"""A group that has changed by a smaller share of itself since the last evaluation stands still."""
SPIKE = 5.0
"""A step's loss is a spike where it is so many times the running mean."""

_REMEDY = (
    "Likely the prompts do not distinguish the views, or the input picture is a random view: try data.reference_view 0 and "
    "prompt.learn true, both together"
)

SIGNS = (
    "views_alike",
    "copies_input",
    "prompts_alike",
    "prompt_norms",
    "prompt_without_effect",
    "worse_than_start",
    "prompt_stands_still",
    "lora_stands_still",
)
OF_PREVIEWS = ("views_alike", "copies_input", "prompt_without_effect")
"""Those that only an evaluation with previews measures."""


def collapse_signs(series: Mapping[str, float], start: Mapping[str, float]) -> dict[str, str]:
    """The signs of collapse that an evaluation shows, by name; none where all is well or nothing was measured.

    series: of one evaluation, by their names in the log. start: of that at step 0, to be named beside it: the pretrained model
    does not know the new subject yet, and may show the same signs.
    Returns: name, one of SIGNS => what was found, what it means, what to try.
    Source: ours; the thresholds too.
    """
    signs = {}

    def then(name: str) -> str:
        return f"; at step 0 {start[name]:.0%}" if name in start else ""

    separation = series.get("views/separation_ratio")
    if separation is not None and separation < ALIKE_VIEWS:
        signs["views_alike"] = (
            f"the generated views of an object differ by {separation:.0%} of what the true ones do (views/separation_ratio, "
            f"below {ALIKE_VIEWS:.0%}{then('views/separation_ratio')}): they collapse into one picture. {_REMEDY}"
        )
    copied = series.get("views/copy_score")
    most = min(COPIES, start.get("views/copy_score", COPIES) + RISE)
    if copied is not None and copied > most:
        signs["copies_input"] = (
            f"the generated views have gone {copied:.0%} of the way from the true ones to the input picture "
            f"(views/copy_score, above {most:.0%}{then('views/copy_score')}): the model copies its input. {_REMEDY}"
        )
    closest = series.get("prompt_views_alike/closest_ratio")
    if closest is not None and closest < ALIKE_PROMPTS:
        signs["prompts_alike"] = (
            f"two views' prompts are {closest:.0%} as far apart as at the start (prompt_views_alike/closest_ratio, below "
            f"{ALIKE_PROMPTS:.0%}): the model will confuse these views. Try prompt.separation 1, a lower "
            f"prompt.learning_rate, or other waypoints"
        )
    return signs


def prompt_signs(series: Mapping[str, float], *, rounding: float) -> dict[str, str]:
    """Signs that the learned prompt is out of bounds, or idle. series, returns, source: as of `collapse_signs`.

    rounding: relative, of the arithmetic: 1.2e-7 for float32, 7.8e-3 for bfloat16.
    """
    signs = {}
    shares = [series.get(f"prompt_norm/{end}_to_path") for end in ("least", "most")]
    outside = [share for share in shares if share is not None and not NORMS[0] <= share <= NORMS[1]]
    if outside:
        signs["prompt_norms"] = (
            f"a token's norm is {outside[0]:.2g} times what it is on the path (prompt_norm/least_to_path, most_to_path; "
            f"expected {NORMS[0]:g} to {NORMS[1]:g}): no text encoder gives such a prompt. Try a lower prompt.learning_rate, "
            f"prompt.norm_band 0.2 or prompt.decay"
        )
    effect = series.get("prompt_effect/of_learned")
    least = max(EFFECT, 2 * rounding)
    if effect is not None and effect < least:
        signs["prompt_without_effect"] = (
            f"without what the prompt has learned the prediction differs by {effect:.1e} of itself (prompt_effect/of_learned, "
            f"below {least:.1g}), no more than by rounding. Try a higher prompt.learning_rate, or prompt.learn false to "
            f"save its cost"
        )
    return signs


def worse_sign(in_a_row: int, loss: float, start: float) -> dict[str, str]:
    """The sign that training makes the model worse. in_a_row: newest validations with a loss above that at step 0.

    Source: ours; the threshold too.
    """
    if in_a_row < WORSE:
        return {}
    return {
        "worse_than_start": (
            f"the last {in_a_row} validations were worse than that at step 0 (loss {loss:.4g}, then {start:.4g}). "
            f"Likely a learning rate is too high, or the data's views are in another order than the prompts'; "
            f"python -m train.doctor checks the latter"
        )
    }


def standing_still(moved: Mapping[str, float], trains: Mapping[str, bool]) -> dict[str, str]:
    """The sign that a group does not train. moved: by group, by what share of itself; trains: whether it was its turn."""
    return {
        f"{group}_stands_still": (
            f"the {group} has changed by {share:.1g} of itself since the last evaluation, though it was trained. Likely its "
            f"learning rate is so low that float32 rounds its steps away, or every step was skipped (gradient/skipped_share)"
        )
        for group, share in moved.items()
        if trains[group] and share < STILL
    }


def moved_weights(before: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> list[str]:
    """Names of frozen tensors that are not what they were: by their sums, and those that came or went. NaN equals NaN."""

    def same(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))

    return [
        name for name in sorted({*before, *now}) if name not in before or name not in now or not same(before[name], now[name])
    ]


def is_spike(loss: float, running_mean: float | None) -> bool:
    """Whether a step's loss stands out: more than SPIKE times the running mean of those before; None: there are none."""
    return running_mean is not None and loss > SPIKE * running_mean
