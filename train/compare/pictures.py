"""What the report of a comparison shows: curves over seeds as SVG, and strips of sampled views."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from train.compare.results import Curve, RunResult, Summary
from train.report.charts import COLOURS, INK, blank, cut_strips, make_logarithmic, to_svg

BASELINE = "#808080"
STYLES = ("-", "--", ":", "-.")
"""Where there are more variants than colours, and for print."""
KINDS = ("truth", "pretrained", "now")
"""Rows of the tiles that a run writes."""


def look(variants: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Each variant's colour and line, the same in all figures."""
    others = [name for name in variants if name != baseline]
    drawn = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i, name in enumerate(others)
    }
    return {name: drawn.get(name, {"color": BASELINE, "linestyle": "--"}) for name in variants}


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, mean, lowest, highest) over the curves, at the steps that all of them have."""
    by_step = [dict(zip(c.steps, c.values, strict=True)) for c in curves]
    common = [step for step in (curves[0].steps if curves else ()) if all(step in points for points in by_step)]
    columns = [[points[step] for points in by_step] for step in common]
    return common, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def curves_figure(curves: Mapping[str, Sequence[Curve]], styles: Mapping[str, Mapping[str, Any]], *, ylabel: str) -> str:
    """Mean over seeds of each variant, and the band from the lowest to the highest seed, on a logarithmic scale.

    curves: by variant, one for each seed. Returns: SVG; empty where no variant has a point.
    """
    means = {name: mean_curve([c for c in group if c.steps]) for name, group in curves.items()}
    means = {name: points for name, points in means.items() if points[0]}
    if not means:
        return ""
    figure, axes = blank(width=6.2, height=3.6)
    for name, (steps, mean, low, high) in means.items():
        axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, mean, label=name, linewidth=2, marker="o", markersize=3.5, **styles[name])
    if min(min(low) for _, _, low, _ in means.values()) > 0:  # else what is not positive would not be drawn
        make_logarithmic(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    columns = max(1, min(3, 60 // max((len(name) for name in means), default=1)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    return to_svg(figure, salt=ylabel)


def changes_figure(summaries: Sequence[Summary], styles: Mapping[str, Mapping[str, Any]]) -> str:
    """The final loss against the baseline's in per cent: a ring for each seed, the mean, and its 95 % interval.

    summaries: without the baseline. Returns: SVG; empty where there is nothing to set against it.
    """
    shown = [s for s in summaries if any(math.isfinite(c) for c in s.changes)]
    if not shown:
        return ""
    figure, axes = blank(width=6.2, height=1.1 + 0.45 * len(shown))
    seen = [100 * change for s in shown for change in s.changes if math.isfinite(change)] + [0.0]
    margin = 0.6 * (max(seen) - min(seen)) or 1.0
    axes.axvline(0, color=BASELINE, linestyle="--", linewidth=1)
    for y, s in enumerate(shown):
        colour = styles[s.variant]["color"]
        if math.isfinite(s.change.low):
            axes.plot([100 * s.change.low, 100 * s.change.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([100 * s.change.value], [y], color=colour, marker="D", markersize=7)
        axes.plot([100 * c for c in s.changes], [y] * len(s.changes), "o", color=colour, markerfacecolor="none", markersize=6)
    axes.set_yticks(range(len(shown)), [s.variant for s in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(min(seen) - margin, max(seen) + margin)  # an interval of few seeds may run off: the table has its ends
    axes.set_xlabel("final held-out loss against the baseline, %")
    return to_svg(figure, salt="changes")


# ------------------------------------------------------------------------------------------------------------ pictures


def strips(result: RunResult) -> list[dict[str, Image.Image]]:
    """For each object its rows: `truth`, led by the picture given, `pretrained` and `now`, led by an empty tile.

    Returns: RGBA pictures; none where the run wrote no tiles.
    """
    if result.tiles is None:
        return []
    cut = cut_strips(result.tiles, views=len(result.views("views_psnr")), rows=len(KINDS))
    return [dict(zip(KINDS, rows, strict=True)) for rows in cut]
