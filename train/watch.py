"""Signs that a run is going wrong, read from its own series: pure functions, a sentence for each sign."""

from collections.abc import Mapping

ALIKE_VIEWS = 0.5
"""Generated views that differ by less than this share of what the true ones differ have collapsed."""
COPIES = 0.5
"""Views that have gone this share of the way from the truth to the picture given are copies of it."""
ALIKE_PROMPTS = 0.5
"""Two prompts nearer to each other than this share of their distance at the start have collapsed."""

_REMEDY = (
    "Likely the prompts do not tell the views apart, or the picture given is a random view: try data.reference_view 0 and "
    "prompt.learn true, both together"
)

SIGNS = ("views_alike", "copies_input", "prompts_alike")


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
    if copied is not None and copied > COPIES:
        signs["copies_input"] = (
            f"the generated views have gone {copied:.0%} of the way from the true ones to the picture given "
            f"(views/copy_score, above {COPIES:.0%}{then('views/copy_score')}): the model copies its input. {_REMEDY}"
        )
    closest = series.get("prompt_views_alike/closest_ratio")
    if closest is not None and closest < ALIKE_PROMPTS:
        signs["prompts_alike"] = (
            f"two views' prompts are {closest:.0%} as far apart as at the start (prompt_views_alike/closest_ratio, below "
            f"{ALIKE_PROMPTS:.0%}): the model will confuse these views. Try prompt.separation 1, a lower "
            f"prompt.learning_rate, or other waypoints"
        )
    return signs
