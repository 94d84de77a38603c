"""Figures in HTML pages: matplotlib's as SVG in the colours of the page, and pictures as data: URIs."""

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from softprompt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

BAR_HEIGHT, BAR_STEP, LABEL = 90, 10, 44
"""Bar charts, in pixels before scaling: the greatest height of a bar, the distance between bars, the room for labels."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind eyes, readable on white and on black (M. Okabe and K. Ito's set, less yellow and black)."""
INK = "#010203"
"""Stands for the colour of the page's text, whichever it is."""
LARGEST_TILE = 256
"""Side in pixels; larger pictures are made smaller, or a page would be too large to open."""


def blank(*, width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of one plot, in inches, whose words and lines are in INK."""
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


def make_logarithmic(axes: "Axes") -> None:
    """Make the y axis logarithmic, its numbers written out (over a wide range powers of ten). Values must be positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if high < 30 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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


def cut_strips(tiles: Path, *, views: int, rows: int) -> list[list[Image.Image]]:
    """Each object's rows of a picture that train.log.logger.preview_tiles made: V + 1 square tiles a row and nothing else.

    Returns: RGBA pictures, the first row of an object led by the input picture, the others by an empty tile; none where the
    picture is of another number of views or rows: better none than one cut wrongly.
    Raises: InputError when the file is damaged.
    """
    try:
        with Image.open(tiles) as opened:
            image = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # which one depends on the byte that is wrong
        reason = " ".join(str(error).split())
        raise InputError(f"{tiles}: cannot be read ({reason}); likely it is damaged: remove it, or move it away") from error
    size = image.width // (views + 1)
    if size == 0 or image.width != (views + 1) * size or image.height % (rows * size):
        return []
    found = []
    for top in range(0, image.height, rows * size):
        strips = [image.crop((0, top + r * size, image.width, top + (r + 1) * size)) for r in range(rows)]
        for strip in strips[1:]:
            strip.paste((0, 0, 0, 0), (0, 0, size, size))
        found.append(strips)
    return found


def data_uri(strip: Image.Image) -> str:
    """PNG in a data: URI, made smaller where its tiles are larger than a report needs."""
    if strip.height > LARGEST_TILE:
        width = round(strip.width * LARGEST_TILE / strip.height)
        strip = strip.resize((width, LARGEST_TILE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    strip.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def strip_row(name: str, strip: Image.Image, *, alt: str) -> dict[str, Any]:
    """A strip of tiles with its name, as the macro `strips` of parts.html.jinja draws it. alt: a text in its place."""
    return {"name": name, "uri": data_uri(strip), "alt": alt, "width": strip.width, "height": strip.height}


def matrix_cells(cosines: "Tensor", least: float) -> list[list[dict[str, float]]]:
    """The cells of a matrix of cosines, shaded from `least` (none) to 1 (full). cosines: [V, V]."""
    return [[{"cosine": c, "ink": (c - least) / ((1 - least) or 1)} for c in row] for row in cosines.tolist()]


def chart(title: str, values: "Tensor", marked: set[int]) -> dict[str, Any]:
    """Bars over tokens. values: [T]. marked: tokens that carry the view."""
    top = float(values.max()) or 1.0
    return {
        "title": title,
        "top": top,
        "width": LABEL + BAR_STEP * len(values),
        "height": BAR_HEIGHT,
        "label": LABEL,
        "bars": [
            {
                "x": LABEL + BAR_STEP * t + 1,
                "width": BAR_STEP - 2,
                "height": round(BAR_HEIGHT * value / top, 2),
                "mark": t in marked,
                "title": f"token {t}: {value:.3f}",
            }
            for t, value in enumerate(values.tolist())
        ],
        "ticks": [{"x": LABEL + BAR_STEP * t + BAR_STEP / 2, "token": t} for t in range(0, len(values), 10)],
        "alt": f"{title}. Largest at token {int(values.argmax())}, {float(values.max()):.3f} of a token's norm.",
    }
