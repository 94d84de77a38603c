"""The words and numbers of a comparison's report: tables, headline, rows of the CSV files. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.compare.results import FEWEST_SEEDS, OBJECTIVES, Interval, RunResult, Spread, Summary

DASH = "–"
CAVEATS = (
    "With k variants there are k chances to be fooled: of twenty that change nothing, about one would be told apart from the "
    "baseline by chance, since the intervals are 95 % ones and are not corrected for how many there are.",
    "Seeds vary the order of data, the noise and the start of what is trained. They do not vary the objects: the intervals say "
    "what another seed would give on these objects, not what other objects would.",
    "The intervals of the loss and of forgetting are paired t intervals of log ratios, which take them to be roughly normal; "
    "those of steps are percentile bootstraps over seeds, and too narrow with few seeds.",
    "Forgetting is measured under the prompt that a variant ends with. Under the pretrained prompt a variant that trains the "
    "prompt alone has forgotten nothing, and one that starts under another prompt is worse on the original domain from step 0.",
    "The held-out loss is measured at fixed noise and timesteps, without dropped conditions. A lower loss is not always a "
    "better picture: read it next to PSNR, SSIM and the pictures, which few objects and one noise per seed stand behind.",
    "PSNR and SSIM compare with the one true view; a plausible view that is not that one scores low.",
    "The runs' settings were not tuned for each variant; one that loses here may win at another learning rate or length.",
    "Time per step depends on what else the machine did, runs side by side included.",
)
OTHER_NOTE = (
    "Original loss: on the pretrained model's own domain, at the end. Forgetting: how much higher that is than the untouched "
    "pretrained model's, under the variant's own prompt, and how many times the baseline's that is. PSNR, SSIM: higher is "
    "better; under PSNR, the paired change against the baseline in dB with its 95 % t interval. Copy score: 1, views copy the "
    "input; 0, as different from it as the truth. Separation: 1, views differ from each other as the true ones do; 0, "
    "they are the same. Prompts alike: mean cosine of the views' prompts; 1, they have become one."
)


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits; a dash where it is unknown, never a zero."""
    if math.isnan(value):
        return DASH
    return "not reached" if math.isinf(value) else f"{value:.{digits}g}"


def percent(share: float, *, signed: bool = False) -> str:
    """A share as per cent."""
    if not math.isfinite(share):
        return number(share)
    text = f"{100 * share:+.1f}".replace("-", "−") if signed else f"{100 * share:.0f}"
    return f"{text} %"


def cell(text: str, small: str = "", kind: str = "") -> dict[str, str]:
    """One cell of a table. small: a line under it; kind: `words` or `worst`."""
    return {"text": text, "small": small, "kind": kind}


def _spread(values: Spread | None, digits: int = 3) -> dict[str, str]:
    values = values or Spread()
    return cell(number(values.mean, digits), f"± {values.deviation:.2g}" if math.isfinite(values.deviation) else "")


def _bounds(interval: Interval, show: Any) -> str:
    return f"{show(interval.low)} to {show(interval.high)}" if math.isfinite(interval.low) else ""


def loss_table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Held-out loss, verdict, steps to the baseline's loss, time."""
    rows = []
    for s in summaries:
        baseline = s.outcome == "baseline"
        change = cell(DASH) if baseline else cell(percent(s.change.value, signed=True), _bounds(s.change, _signed))
        reached = f"{s.reach.reached} of {s.reach.of} reached it" if s.reach.of else ""
        bounds = _bounds(s.reach.share, percent)
        rows.append(
            {
                "name": s.variant,
                "cells": [
                    cell(str(len(s.seeds))),
                    _spread(s.loss, 4),
                    change,
                    cell(s.verdict, kind="words"),
                    cell(percent(s.reach.share.value), "; ".join(filter(None, [bounds, reached]))),
                    _spread(s.seconds_per_step),
                ],
            }
        )
    return {
        "name": "Held-out loss",
        "columns": [
            "variant",
            "seeds",
            "final loss",
            "change",
            "verdict on the loss",
            "steps to baseline's loss",
            "s per step",
        ],
        "words": ["verdict on the loss"],
        "rows": rows,
        "note": "Final loss: mean over seeds ± standard deviation; lower is better. Change: paired with the baseline's run of "
        "the same seed, and its 95 % interval. Steps to the baseline's loss: where the curve first comes down to the final "
        "loss of the baseline's run of that seed, as a share of all steps; median over seeds, and 95 % bootstrap interval.",
    }


def _signed(share: float) -> str:
    return percent(share, signed=True)


def other_table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Forgetting, pictures, prompts."""
    columns = (
        "original loss|forgetting|times baseline's|PSNR, dB|PSNR, object|SSIM|copy score|separation of views|prompts alike"
    )
    return {
        "name": "Forgetting, pictures and prompts",
        "columns": ["variant", *columns.split("|")],
        "words": [],
        "rows": [{"name": s.variant, "cells": _other_cells(s)} for s in summaries],
        "note": OTHER_NOTE,
    }


def _other_cells(s: Summary) -> list[dict[str, str]]:
    ratio = cell(number(s.forgotten_ratio.value, 2), _bounds(s.forgotten_ratio, lambda v: number(v, 2)))
    return [
        _spread(s.series.get("loss/original")),
        _spread(s.forgotten),
        cell(DASH) if s.outcome == "baseline" else ratio,
        _psnr(s),
        _spread(s.series.get("views/psnr_foreground"), 4),
        _spread(s.series.get("views/ssim")),
        _spread(s.series.get("views/copy_score"), 2),
        _spread(s.series.get("views/separation_ratio")),
        _spread(s.prompts_alike),
    ]


def _psnr(s: Summary) -> dict[str, str]:
    """Mean, and the change against the baseline under it where it is known, else the deviation."""
    plain = _spread(s.series.get("views/psnr"), 4)
    if s.outcome == "baseline" or math.isnan(s.psnr_change.low):
        return plain
    change = f"{s.psnr_change.value:+.2g} ({_bounds(s.psnr_change, lambda v: f'{v:+.2g}')})"
    return cell(plain["text"], change.replace("-", "−"))


def objectives_table(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """What the objectives are for, on held-out objects; None where no run measured any."""
    names = list(dict.fromkeys(name for s in summaries for name in s.series if name.startswith(OBJECTIVES)))
    if not names:
        return None
    rows = []
    for s in summaries:
        cells = []
        for name in names:
            change = s.objective_changes.get(name, Interval())
            shown = _spread(s.series.get(name))
            if s.outcome != "baseline" and math.isfinite(change.low):
                under = f"{change.value:+.2g} ({_bounds(change, lambda v: f'{v:+.2g}')})"
                shown = cell(shown["text"], under.replace("-", "−"))
            cells.append(shown)
        rows.append({"name": s.variant, "cells": cells})
    return {
        "name": "Objectives",
        "columns": ["variant", *(_view(name.removeprefix(OBJECTIVES)) for name in names)],
        "words": [],
        "rows": rows,
        "note": "On held-out objects at the end, whether a variant trains on it or not (monitor.objectives); means over seeds. "
        "Under them the paired difference to the baseline and its 95 % t interval. Of a reward more is better; of what "
        "an objective lowers, less.",
    }


def views_table(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """PSNR and SSIM of each view; None where no run measured them."""
    names = list(dict.fromkeys(name for s in summaries for name in s.view_psnr))
    if not names:
        return None
    rows = []
    for s in summaries:
        cells = [
            cell(
                number(s.view_psnr.get(name, math.nan), 4),
                number(s.view_ssim.get(name, math.nan)),
                "worst" if name == s.worst_view else "",
            )
            for name in names
        ]
        rows.append({"name": s.variant, "cells": [*cells, cell(_view(s.worst_view) if s.worst_view else DASH)]})
    return {
        "name": "View by view",
        "columns": ["variant", *map(_view, names), "worst"],
        "words": [],
        "rows": rows,
        "note": "PSNR in dB, and SSIM under it; means over seeds. Underlined: the view of the lowest PSNR.",
    }


def _view(name: str) -> str:
    return name.replace("_", " ")


def headline(summaries: Sequence[Summary], baseline: str) -> str:
    """The outcome in plain words."""
    others = [s for s in summaries if s.variant != baseline]
    if not others:
        return f"Only the baseline, {baseline}, is here: there is nothing to compare it with."
    lower = [s for s in others if s.outcome == "lower"]
    higher = [s for s in others if s.outcome == "higher"]
    noise = [s for s in others if s.outcome == "noise"]
    unknown = [s for s in others if s not in [*lower, *higher, *noise]]
    parts = [f"{s.variant}: held-out loss {s.verdict} than {baseline}'s" for s in [*lower, *higher]]
    if noise:
        parts.append(f"{_names(noise)}: not to be told apart from {baseline} by these seeds (inside the noise)")
    if unknown:
        few = min((s.paired for s in unknown), default=0)
        parts.append(
            f"{_names(unknown)}: too few seeds to say ({few} finished with the baseline; {FEWEST_SEEDS} or more are needed)"
        )
    return ". ".join(parts) + "."


def _names(summaries: Sequence[Summary]) -> str:
    return ", ".join(s.variant for s in summaries)


# ----------------------------------------------------------------------------------------------------------------- CSV


def result_rows(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One row per variant and seed, with every final number; unknown is empty."""
    names = sorted({name for r in results for name in r.final})
    return [
        _plain(
            {
                "variant": r.variant,
                "seed": r.seed,
                "steps": r.steps,
                **{name: r.number(name) for name in names},
                "forgetting": r.forgotten,
                "prompt_views_alike/mean_cosine": r.prompts_alike,
                "seconds_per_step": r.seconds_per_step,
            }
        )
        for r in results
    ]


def summary_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per variant: means, standard deviations, and bounds of the 95 % intervals."""
    names = sorted({name for s in summaries for name in s.series})
    return [
        _plain(
            {
                "variant": s.variant,
                "seeds": len(s.seeds),
                "paired_seeds": s.paired,
                "verdict": s.verdict,
                **_interval("loss_change", s.change),
                **_interval("share_of_steps_to_baseline_loss", s.reach.share),
                "reached_baseline_loss": s.reach.reached,
                **_interval("forgetting_ratio", s.forgotten_ratio),
                **_interval("psnr_change_db", s.psnr_change),
                **_objective_intervals(s, names),
                **_two("forgetting", s.forgotten),
                **_two("prompts_mean_cosine", s.prompts_alike),
                **_two("seconds_per_step", s.seconds_per_step),
                "worst_view": s.worst_view or "",
                **{key: value for name in names for key, value in _two(name, s.series.get(name, Spread())).items()},
            }
        )
        for s in summaries
    ]


def _objective_intervals(s: Summary, names: Sequence[str]) -> dict[str, float]:
    """names: of all series."""
    changes = {name: s.objective_changes.get(name, Interval()) for name in names if name.startswith(OBJECTIVES)}
    return {key: value for name, change in changes.items() for key, value in _interval(f"{name}_change", change).items()}


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _two(name: str, values: Spread) -> dict[str, float]:
    return {f"{name}_mean": values.mean, f"{name}_sd": values.deviation}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}
