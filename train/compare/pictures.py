"""What the report of a comparison shows: curves as SVG, and strips of sampled views as PNG."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from train.compare.results import Curve, RunResult, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind eyes, readable on white and on black (M. Okabe and K. Ito's set, less yellow and black)."""
BASELINE = "#808080"
STYLES = ("-", "--", ":", "-.")
"""Where there are more variants than colours, and for print."""
INK = "#010203"
"""Stands for the colour of the page's text, whichever it is."""
LARGEST_TILE = 256
"""Side in pixels; larger pictures are made smaller, or the report would be too large to open."""


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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    means = {name: mean_curve([c for c in group if c.steps]) for name, group in curves.items()}
    means = {name: points for name, points in means.items() if points[0]}
    if not means:
        return ""
    figure, axes = _blank(width=6.2, height=3.6)
    for name, (steps, mean, low, high) in means.items():
        axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, mean, label=name, linewidth=2, marker="o", markersize=3.5, **styles[name])
    if min(min(low) for _, _, low, _ in means.values()) > 0:  # else what is not positive would not be drawn
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
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
    figure, axes = _blank(width=6.2, height=1.1 + 0.45 * len(shown))
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


def _blank(*, width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.15, color=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    axes.tick_params(colors=INK)
    return figure, axes


def to_svg(figure: "Figure", *, salt: str) -> str:
    """An <svg> to put into a page: transparent, in the colour of its text, the same for the same data."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 11}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", svg)  # else twice in a page
    return svg.replace(INK, "currentColor")


# ------------------------------------------------------------------------------------------------------------ pictures


def strips(result: RunResult) -> list[dict[str, Image.Image]]:
    """For each object its rows: `truth`, led by the picture given, `pretrained` and `now`, led by an empty tile.

    The file has three rows of V + 1 square tiles for each object and nothing else (train.monitor.preview_tiles).
    Returns: RGBA pictures; none where the run wrote no tiles.
    """
    if result.tiles is None:
        return []
    with Image.open(result.tiles) as opened:
        image = opened.convert("RGBA")
    columns = len(result.views("views_psnr")) + 1
    size = image.width // columns
    if image.width != columns * size or size == 0 or image.height % (3 * size):
        return []  # another number of views than was measured: better no picture than one cut wrongly
    found = []
    for top in range(0, image.height, 3 * size):
        rows = [image.crop((0, top + r * size, image.width, top + (r + 1) * size)) for r in range(3)]
        for row in rows[1:]:
            row.paste((0, 0, 0, 0), (0, 0, size, size))
        found.append(dict(zip(("truth", "pretrained", "now"), rows, strict=True)))
    return found


def data_uri(strip: Image.Image) -> str:
    """PNG in a data: URI, made smaller where its tiles are larger than a report needs."""
    if strip.height > LARGEST_TILE:
        width = round(strip.width * LARGEST_TILE / strip.height)
        strip = strip.resize((width, LARGEST_TILE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    strip.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
