"""A comparison's numbers as text: tables and headline of the page, rows of the CSV files."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from train.compare.results import (
    FEWEST_SEEDS,
    FORGETTING,
    LOSS,
    OBJECTIVES,
    ORIGINAL,
    PROMPTS_ALIKE,
    PSNR,
    SECONDS,
    Interval,
    RunResult,
    Spread,
    Summary,
    views,
)

T = TypeVar("T")
Cell = dict[str, str]
DASH = "–"


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits; a dash where it is unknown, never a zero."""
    if math.isnan(value):
        return DASH
    return "not reached" if math.isinf(value) else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else number(share)


def cell(text: str, small: str = "", kind: str = "") -> Cell:
    """One cell of a table. small: a line under it; kind: `words` or `worst`."""
    return {"text": text, "small": small, "kind": kind}


def table(
    name: str, rows: Mapping[str, T], columns: Mapping[str, Callable[[T], Cell]], *, words: Sequence[str] = ()
) -> dict[str, Any]:
    """A table with a row for each variant.

    rows: by variant, what its cells are made of. words: the columns that hold text, not numbers.
    """
    cells = [{"name": variant, "cells": [make(row) for make in columns.values()]} for variant, row in rows.items()]
    return {"name": name, "columns": ["variant", *columns], "words": words, "rows": cells}


def loss_table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Held-out loss, verdict, steps to the baseline's loss, time."""
    columns: dict[str, Callable[[Summary], Cell]] = {
        "seeds": lambda s: cell(str(len(s.seeds))),
        "final loss": _mean(LOSS, 4),
        "change": lambda s: _against_baseline(s, s.change, _signed_percent),
        "verdict": lambda s: cell(s.verdict, kind="words"),
        "steps to baseline's loss": _reach,
        "s per step": _mean(SECONDS),
    }
    return table("Held-out loss", {s.variant: s for s in summaries}, columns, words=["verdict"])


def other_table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Forgetting, pictures, prompts."""
    columns: dict[str, Callable[[Summary], Cell]] = {
        "original loss": _mean(ORIGINAL),
        "forgetting": _mean(FORGETTING),
        "times baseline's": lambda s: _against_baseline(s, s.forgetting_ratio, lambda v: number(v, 2)),
        "PSNR, dB": _mean(PSNR, 4, difference=True),
        "PSNR, foreground": _mean("views/psnr_foreground", 4),
        "SSIM": _mean("views/ssim"),
        "copy score": _mean("views/copy_score", 2),
        "separation of views": _mean("views/separation_ratio"),
        "prompt similarity": _mean(PROMPTS_ALIKE),
    }
    return table("Forgetting, pictures and prompts", {s.variant: s for s in summaries}, columns)


def objectives_table(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """Objectives on held-out objects; None where no run measured any."""
    names = dict.fromkeys(name for s in summaries for name in s.series if name.startswith(OBJECTIVES))
    columns = {_spaced(name.removeprefix(OBJECTIVES)): _mean(name, difference=True) for name in names}
    return table("Objectives", {s.variant: s for s in summaries}, columns) if columns else None


def views_table(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """PSNR and SSIM of each view; None where no run measured them."""

    def view(name: str) -> Callable[[Summary], Cell]:
        psnr, ssim = f"views_psnr/{name}", f"views_ssim/{name}"
        return lambda s: cell(number(s.of(psnr).mean, 4), number(s.of(ssim).mean), "worst" if name == s.worst_view else "")

    columns = {_spaced(name): view(name) for s in summaries for name in views(s.series)}
    worst = {"worst": lambda s: cell(_spaced(s.worst_view or DASH))}
    return table("Results by view", {s.variant: s for s in summaries}, columns | worst) if columns else None


def _mean(name: str, digits: int = 3, *, difference: bool = False) -> Callable[[Summary], Cell]:
    """A final number over the seeds, with its standard deviation.

    difference: show the paired difference to the baseline instead of the deviation, where it is known.
    """

    def make(s: Summary) -> Cell:
        values, found = s.of(name), s.difference(name)
        under = f"± {values.deviation:.2g}" if math.isfinite(values.deviation) else ""
        if difference and s.outcome != "baseline" and math.isfinite(found.low):
            under = f"{found.value:+.2g} ({_bounds(found, lambda v: f'{v:+.2g}')})".replace("-", "−")
        return cell(number(values.mean, digits), under)

    return make


def _against_baseline(s: Summary, found: Interval, show: Callable[[float], str]) -> Cell:
    return cell(DASH) if s.outcome == "baseline" else cell(show(found.value), _bounds(found, show))


def _reach(s: Summary) -> Cell:
    reached = f"{s.reached[0]} of {s.reached[1]} reached it" if s.reached[1] else ""
    return cell(percent(s.reach.value), "; ".join(filter(None, [_bounds(s.reach, percent), reached])))


def _bounds(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.low)} to {show(interval.high)}" if math.isfinite(interval.low) else ""


def _signed_percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−") if math.isfinite(share) else number(share)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def headline(summaries: Sequence[Summary], baseline: str) -> str:
    """The outcome in plain words."""
    others = [s for s in summaries if s.variant != baseline]
    if not others:
        return f"The baseline, {baseline}, is the only variant: there is nothing to compare it with."
    parts = [
        f"{s.variant}: held-out loss significantly {outcome} than {baseline}'s, by {s.amount}"
        for outcome in ("lower", "higher")
        for s in others
        if s.outcome == outcome
    ]
    if same := [s.variant for s in others if s.outcome == "not significantly different"]:
        parts.append(f"{', '.join(same)}: no significant difference from {baseline}")
    tested = ["Tests: paired t test of the log losses, 5 % level, 95 % intervals"] if parts else []
    if unknown := [s for s in others if s.outcome in ("too few seeds", "no finished run")]:
        parts.append(
            f"{', '.join(s.variant for s in unknown)}: too few seeds for a verdict ({min(s.paired for s in unknown)} finished "
            f"with the baseline; {FEWEST_SEEDS} or more are needed)"
        )
    return ". ".join([*parts, *tested]) + "."


# ----------------------------------------------------------------------------------------------------------------- CSV


def result_rows(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One row per variant and seed, with every final number; unknown is empty."""
    names = sorted({name for r in results for name in r.final})
    return [
        _plain({"variant": r.variant, "seed": r.seed, "steps": r.steps, **{name: r.number(name) for name in names}})
        for r in results
    ]


def summary_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per variant: means, standard deviations, and bounds of the 95 % intervals."""
    names = sorted({name for s in summaries for name in s.series} | {FORGETTING, PROMPTS_ALIKE, SECONDS})
    objectives = [name for name in names if name.startswith(OBJECTIVES)]
    columns = {name: "prompts_mean_cosine" if name == PROMPTS_ALIKE else name for name in names}
    return [
        _plain(
            {
                "variant": s.variant,
                "seeds": len(s.seeds),
                "paired_seeds": s.paired,
                "verdict": s.verdict,
                **_interval("loss_change", s.change),
                **_interval("share_of_steps_to_baseline_loss", s.reach),
                "reached_baseline_loss": s.reached[0],
                **_interval("forgetting_ratio", s.forgetting_ratio),
                **_interval("psnr_change_db", s.difference(PSNR)),
                **{k: v for name in objectives for k, v in _interval(f"{name}_change", s.difference(name)).items()},
                "worst_view": s.worst_view or "",
                **{f"{column}_{part}": v for name, column in columns.items() for part, v in _parts(s.of(name))},
            }
        )
        for s in summaries
    ]


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _parts(values: Spread) -> tuple[tuple[str, float], ...]:
    return ("mean", values.mean), ("sd", values.deviation)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}
