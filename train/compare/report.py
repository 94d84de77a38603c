"""The report of a comparison: one HTML file that needs nothing else, and its numbers as CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from softprompt.files import new_file
from train.compare.pictures import changes_figure, curves_figure, look, strips
from train.compare.plan import Comparison, Plan, comparison_yaml, flat_options, own_files
from train.compare.results import RunResult, Summary, summarise
from train.compare.tables import (
    CAVEATS,
    cell,
    headline,
    loss_table,
    objectives_table,
    other_table,
    result_rows,
    summary_rows,
    views_table,
)
from train.report import template as page
from train.report.charts import LARGEST_TILE, data_uri


def write_report(
    plan: Plan, results: Sequence[RunResult], *, failures: Mapping[str, str], command: str, name: str = "report"
) -> str:
    """Write NAME.html, NAME-results.csv and NAME-summary.csv, each whole or not at all.

    results: of the finished runs. failures: by VARIANT-seed-S, what was last said. command: that makes it again.
    Returns: the headline.
    """
    comparison = plan.comparison
    summaries = [summarise(name, results, comparison.baseline) for name in comparison.variants]
    said = headline(summaries, comparison.baseline)
    context = {
        "title": f"Training strategies compared: {', '.join(comparison.variants)}",
        "date": f"{datetime.now().astimezone():%-d %B %Y, %H:%M %Z}",
        "headline": said,
        "facts": facts(plan, results),
        "variants": variants_table(comparison),
        "figures": figures(comparison, results, summaries),
        "results": list(filter(None, [loss_table(summaries), other_table(summaries), objectives_table(summaries)])),
        "views": views_table(summaries),
        "grid": grid(comparison, results),
        "missing": missing_runs(plan, results, failures),
        "command": command,
        "comparison": comparison_yaml(comparison),
        "caveats": CAVEATS,
    }
    with new_file(plan.root / f"{name}.html") as partial:
        partial.write_text(render(context), encoding="utf-8")
    _write_csv(plan.root / f"{name}-results.csv", result_rows(results))
    _write_csv(plan.root / f"{name}-summary.csv", summary_rows(summaries))
    return said


def render(context: Mapping[str, Any]) -> str:
    """The page. Every text is escaped; the figures alone are taken as they are."""
    from markupsafe import Markup

    drawn = [{**figure, "svg": Markup(figure["svg"])} for figure in context["figures"]]
    return page.render("train.compare", {**context, "figures": drawn})


def facts(plan: Plan, results: Sequence[RunResult]) -> list[str]:
    """What all variants have in common."""
    comparison, config = plan.comparison, plan.configs[plan.comparison.baseline]
    wanted = len(comparison.variants) * len(comparison.seeds)
    options = flat_options(comparison.options, "options")
    return [
        f"{len(comparison.variants)} variants, each with seeds {', '.join(map(str, comparison.seeds))}: {len(results)} of "
        f"{wanted} runs are finished",
        f"Baseline: {comparison.baseline}",
        f"{plan.steps} steps; model {config.model}; trained on {config.data.train}",
        f"Base: {', '.join(comparison.base) or 'the defaults'}",
        f"Options of all variants: {_options(options) or 'none'}",
    ]


def variants_table(comparison: Comparison) -> dict[str, Any]:
    """What makes each variant what it is."""
    rows = []
    for name, given in comparison.variants.items():
        own = flat_options({k: v for k, v in given.items() if k != "config"}, name)
        rows.append(
            {
                "name": name,
                "cells": [
                    cell(", ".join(own_files(given)) or "none", kind="words"),
                    cell(_options(own) or "none", kind="words"),
                ],
            }
        )
    columns = ["variant", "files over the base", "options of its own"]
    return {"name": "Variants", "columns": columns, "words": columns, "rows": rows, "note": ""}


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items())


def figures(comparison: Comparison, results: Sequence[RunResult], summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """The curves, and the final losses against the baseline's."""
    styles = look(list(comparison.variants), comparison.baseline)
    by_variant = {name: [r for r in results if r.variant == name] for name in comparison.variants}
    ends = "; ".join(f"{s.variant} {s.loss.mean:.4g}" for s in summaries if math.isfinite(s.loss.mean))
    rises = "; ".join(f"{s.variant} {s.forgotten.mean:.3g}" for s in summaries if math.isfinite(s.forgotten.mean))
    band = "Line: mean over seeds. Band: from the lowest to the highest seed. Dots: where it was measured."
    return [
        {
            "title": "Loss on held-out objects",
            "svg": curves_figure(
                {n: [r.validation for r in rs] for n, rs in by_variant.items()}, styles, ylabel="held-out loss"
            ),
            "alt": f"Held-out loss by step, a line for each variant. At the end: {ends}.",
            "caption": band,
            "absent": "No run is finished yet.",
        },
        {
            "title": "Loss on the pretrained model's own domain",
            "svg": curves_figure(
                {n: [r.original for r in rs] for n, rs in by_variant.items()}, styles, ylabel="loss on the original domain"
            ),
            "alt": f"Loss on the original domain by step. Above the untouched model's at the end: {rises}.",
            "caption": f"What rises is forgotten. {band}",
            "absent": "Not measured: no run had objects of the pretrained model's domain (data.original).",
        },
        {
            "title": "Final loss against the baseline",
            "svg": changes_figure([s for s in summaries if s.variant != comparison.baseline], styles),
            "alt": "Change of the final loss in per cent, by variant: "
            + "; ".join(f"{s.variant} {s.verdict}" for s in summaries if s.variant != comparison.baseline),
            "caption": "Left of the line is better. Ring: a seed, paired with the baseline's run of that seed. Diamond: mean. "
            "Bar: 95 % interval; it may run off the picture where there are few seeds.",
            "absent": "No variant has a finished run that the baseline has too.",
        },
    ]


def grid(comparison: Comparison, results: Sequence[RunResult]) -> dict[str, Any]:
    """The same held-out objects by all variants, each with its first seed."""
    first = {name: next((r for r in results if r.variant == name), None) for name in comparison.variants}
    pictures = {name: strips(result) for name, result in first.items() if result is not None}
    shown = {name: found for name, found in pictures.items() if found}
    without = [name for name in comparison.variants if name not in shown]
    note = f"No pictures of {', '.join(without)}: no finished run, or it wrote no previews/tiles-step-N.png." if without else ""
    if not shown:
        return {"objects": [], "columns": [], "note": note}
    lead = comparison.baseline if comparison.baseline in shown else next(iter(shown))
    result = first[lead]
    assert result is not None, "it has pictures"
    objects = [
        [
            _row("truth", shown[lead][b]["truth"], b),
            _row("pretrained", shown[lead][b]["pretrained"], b),
            *(_row(name, found[b]["now"], b) for name, found in shown.items() if b < len(found)),
        ]
        for b in range(len(shown[lead]))
    ]
    seeds = ", ".join(f"{name} {r.seed}" for name, r in first.items() if r is not None and name in shown)
    large = max(found[0]["truth"].height for found in shown.values()) > LARGEST_TILE
    smaller = f" Pictures are made smaller, to {LARGEST_TILE} pixels." if large else ""
    explained = (
        f"Held-out objects at the end of training, by the first finished seed ({seeds}). truth: the picture given, then "
    )
    explained += f"the true views; pretrained: the untouched model, as {lead} saw it.{smaller} {note}"
    columns = ["input", *(name.replace("_", " ") for name in result.views("views_psnr"))]
    return {"objects": objects, "columns": columns, "note": explained.strip()}


def _row(name: str, strip: Any, b: int) -> dict[str, Any]:
    return {
        "name": name,
        "uri": data_uri(strip),
        "alt": f"Object {b + 1}, views: {name}",
        "width": strip.width,
        "height": strip.height,
    }


def missing_runs(plan: Plan, results: Sequence[RunResult], failures: Mapping[str, str]) -> list[str]:
    """A line for each run that is not finished, and why if it is known."""
    there = {(r.variant, r.seed) for r in results}
    return [
        f"{run.variant}, seed {run.seed}: " + (f"failed: {failures[run.label]}" if run.label in failures else "not finished")
        for run in plan.runs()
        if (run.variant, run.seed) not in there
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with new_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["variant"])
        writer.writeheader()
        writer.writerows(rows)
