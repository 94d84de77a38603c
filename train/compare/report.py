"""The report of a comparison: one self-contained HTML page, and its numbers as CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from softprompt.files import new_file
from train.compare.plan import Comparison, Plan, comparison_yaml, flat_options, own_files
from train.compare.results import FORGETTING, LOSS, Curve, RunResult, Summary, summarise, views
from train.compare.tables import (
    cell,
    headline,
    loss_table,
    objectives_table,
    other_table,
    result_rows,
    summary_rows,
    table,
    views_table,
)
from train.log.series import display_name
from train.report.charts import COLOURS, INK, LARGEST_TILE, blank, cut_strips, make_logarithmic, strip_row, to_svg
from train.report.template import write_page

BASELINE = "#808080"
STYLES = ("-", "--", ":", "-.")
"""Line styles, for more variants than colours, and for print."""
KINDS = ("truth", "pretrained", "now")
"""Rows of the tiles that a run writes."""


def write_report(
    plan: Plan, results: Sequence[RunResult], *, failures: Mapping[str, str], command: str, name: str = "report"
) -> str:
    """Write NAME.html, NAME-results.csv and NAME-summary.csv, each whole or not at all.

    results: of the finished runs. failures: by VARIANT-seed-S, the last error. command: the one that repeats the comparison.
    Returns: the headline.
    """
    comparison = plan.comparison
    summaries = [summarise(variant, results, comparison.baseline) for variant in comparison.variants]
    result = headline(summaries, comparison.baseline)
    page = {
        "comparison": comparison,
        "headline": result,
        "finished": len(results),
        "steps": plan.steps,
        "config": plan.configs[comparison.baseline],
        "options": _options(comparison.options),
        "variants": variants_table(comparison),
        "figures": figures(comparison, results, summaries),
        "losses": loss_table(summaries),
        "others": other_table(summaries),
        "objectives": objectives_table(summaries),
        "views": views_table(summaries),
        "grid": grid(comparison, results),
        "missing": missing_runs(plan, results, failures),
        "command": command,
        "yaml": comparison_yaml(comparison),
    }
    write_page(plan.root / f"{name}.html", "compare", page)
    for kind, rows in {"results": result_rows(results), "summary": summary_rows(summaries)}.items():
        with new_file(plan.root / f"{name}-{kind}.csv") as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["variant"])
            writer.writeheader()
            writer.writerows(rows)
    return result


def variants_table(comparison: Comparison) -> dict[str, Any]:
    """The files and options that each variant adds to the base."""
    columns = {
        "files after the base": lambda given: cell(", ".join(own_files(given)) or "none", kind="words"),
        "options": lambda given: cell(_options({k: v for k, v in given.items() if k != "config"}) or "none", kind="words"),
    }
    return table("Variants", comparison.variants, columns, words=["variant", *columns])


def _options(options: Mapping[str, Any]) -> str:
    flat = flat_options(options, "options")
    return ", ".join(f"{name}: {v if isinstance(v, str) else json.dumps(v)}" for name, v in flat.items())


def missing_runs(plan: Plan, results: Sequence[RunResult], failures: Mapping[str, str]) -> list[str]:
    """A line for each run that is not finished, with the error if it is known."""
    finished = {(r.variant, r.seed) for r in results}
    return [
        f"{run.variant}, seed {run.seed}: " + (f"failed: {failures[run.label]}" if run.label in failures else "not finished")
        for run in plan.runs()
        if (run.variant, run.seed) not in finished
    ]


# ------------------------------------------------------------------------------------------------------------- figures


def figures(comparison: Comparison, results: Sequence[RunResult], summaries: Sequence[Summary]) -> dict[str, tuple[str, str]]:
    """(SVG, text that stands for it) of the losses by step, and of the final losses relative to the baseline."""
    styles = line_styles(list(comparison.variants), comparison.baseline)
    by_variant = {name: [r for r in results if r.variant == name] for name in comparison.variants}
    validation = {name: [r.validation for r in runs] for name, runs in by_variant.items()}
    original = {name: [r.original for r in runs] for name, runs in by_variant.items()}
    others = [s for s in summaries if s.variant != comparison.baseline]
    ends, rises = _means(summaries, LOSS, 4), _means(summaries, FORGETTING, 3)
    found = {
        "validation": (
            curves_figure(validation, styles, ylabel="held-out loss"),
            f"Held-out loss by step, a line for each variant. At the end: {ends}.",
        ),
        "original": (
            curves_figure(original, styles, ylabel="loss on the original domain"),
            f"Loss on the original domain by step. Above the pretrained model's at the end: {rises}.",
        ),
        "changes": (
            changes_figure(others, styles),
            f"Change of the final loss by variant: {'; '.join(f'{s.variant} {s.verdict}' for s in others)}",
        ),
    }
    return {name: (Markup(svg), alt) for name, (svg, alt) in found.items()}


def _means(summaries: Sequence[Summary], name: str, digits: int) -> str:
    return "; ".join(f"{s.variant} {s.of(name).mean:.{digits}g}" for s in summaries if math.isfinite(s.of(name).mean))


def line_styles(variants: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Each variant's colour and line, the same in all figures."""
    others = [name for name in variants if name != baseline]
    return {baseline: {"color": BASELINE, "linestyle": "--"}} | {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i, name in enumerate(others)
    }


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, mean, lowest, highest) over the curves, at the steps that all of them have."""
    common = [step for step in (curves[0] if curves else ()) if all(step in curve for curve in curves)]
    columns = [[curve[step] for curve in curves] for step in common]
    return common, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def curves_figure(curves: Mapping[str, Sequence[Curve]], styles: Mapping[str, Mapping[str, Any]], *, ylabel: str) -> str:
    """Mean over seeds of each variant, and the band from the lowest to the highest seed, on a logarithmic scale.

    curves: by variant, one for each seed. Returns: SVG; empty where no variant has a point.
    """
    means = {name: mean_curve([c for c in group if c]) for name, group in curves.items()}
    means = {name: points for name, points in means.items() if points[0]}
    if not means:
        return ""
    figure, axes = blank(width=6.2, height=3.6)
    for name, (steps, mean, low, high) in means.items():
        axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, mean, label=name, linewidth=2, marker="o", markersize=3.5, **styles[name])
    if min(min(low) for _, _, low, _ in means.values()) > 0:  # a logarithmic axis drops what is not positive
        make_logarithmic(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    columns = max(1, min(3, 60 // max(map(len, means))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    return to_svg(figure, salt=ylabel)


def changes_figure(summaries: Sequence[Summary], styles: Mapping[str, Mapping[str, Any]]) -> str:
    """The final loss relative to the baseline's in per cent: a ring for each seed, the mean, and its 95 % interval.

    summaries: without the baseline. Returns: SVG; empty where no variant has a seed in common with the baseline.
    """
    shown = [s for s in summaries if any(map(math.isfinite, s.changes))]
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
    axes.set_xlim(min(seen) - margin, max(seen) + margin)  # a wide interval of few seeds is cut off: the table has its ends
    axes.set_xlabel("final held-out loss relative to the baseline, %")
    return to_svg(figure, salt="changes")


# ------------------------------------------------------------------------------------------------------------ pictures


def grid(comparison: Comparison, results: Sequence[RunResult]) -> dict[str, Any]:
    """The same held-out objects from each variant's first finished seed, and how they came about."""
    first = {r.variant: r for r in reversed(results)}
    shown = {name: found for name in comparison.variants if name in first and (found := strips(first[name]))}
    lead = comparison.baseline if comparison.baseline in shown else next(iter(shown), "")
    objects = [
        [
            *(_row(name, rows[name], b) for name in KINDS[:2]),
            *(_row(name, found[b]["now"], b) for name, found in shown.items() if b < len(found)),
        ]
        for b, rows in enumerate(shown.get(lead, []))
    ]
    return {
        "objects": objects,
        "columns": ["input", *(display_name(name) for name in views(first[lead].final))] if lead else [],
        "seeds": ", ".join(f"{name} {first[name].seed}" for name in shown),
        "lead": lead,
        "shrunk_to": LARGEST_TILE if any(found[0]["truth"].height > LARGEST_TILE for found in shown.values()) else None,
        "without": [name for name in comparison.variants if name not in shown],
    }


def _row(name: str, strip: Image.Image, b: int) -> dict[str, Any]:
    return strip_row(name, strip, alt=f"Object {b + 1}, views: {name}")


def strips(result: RunResult) -> list[dict[str, Image.Image]]:
    """For each object its rows: `truth`, led by the input picture, `pretrained` and `now`, led by an empty tile.

    Returns: RGBA pictures; none where the run wrote no tiles.
    """
    if result.tiles is None:
        return []
    cut = cut_strips(result.tiles, views=len(views(result.final)), rows=len(KINDS))
    return [dict(zip(KINDS, rows, strict=True)) for rows in cut]
