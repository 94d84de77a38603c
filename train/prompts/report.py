"""Prompts side by side: in the terminal, and as one HTML page that needs nothing else."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_file
from softprompt.prompt.similarity import words_before_padding
from train.prompts.measure import (
    ANOTHER_ENCODER,
    Drift,
    Measures,
    drift,
    in_ranges,
    measure,
    nearest_phrases,
    start_distance,
)
from train.prompts.sources import TOY, Source
from train.report.charts import chart, matrix_cells
from train.report.template import render

MADE_BY = "softprompt train.prompts"
"""Marks a page as ours."""


@dataclass(frozen=True)
class Shown:
    """A prompt, what was measured of it, and against which other."""

    source: Source
    measures: Measures
    drift: Drift | None
    compared: str
    """With what, or why not, in words; empty for the first."""
    words: tuple[int, ...] | None
    """Tokens of each view that are not padding, as far as is known."""
    reads: tuple[str, ...] = ()
    """What each view reads nearest to, of the phrases that were given."""


@dataclass(frozen=True)
class Phrases:
    """Texts that prompts are set beside."""

    texts: tuple[str, ...]
    encoded: Tensor
    """[N, T, D]."""

    def nearest_to(self, source: Source) -> tuple[str, ...]:
        """A sentence a view."""
        if source.prompt.shape[1:] != self.encoded.shape[1:]:
            width, ours = self.encoded.shape[-1], source.prompt.shape[-1]
            return (f"not comparable: the phrases' text encoder gives tokens of {width} numbers, these have {ours}",)
        if source.steps == 0 and start_distance(source.prompt, self.encoded[:1]) > ANOTHER_ENCODER:
            return ("not comparable: the prompt was likely made with another text encoder than the phrases; give its --model",)
        found = nearest_phrases(source.prompt, self.encoded).topk(2, dim=1)
        return tuple(
            f"{view} reads nearest to {self.texts[first]!r} ({best:.2f}), then {self.texts[second]!r} ({next_:.2f})"
            for view, (first, second), (best, next_) in zip(
                source.views, found.indices.tolist(), found.values.tolist(), strict=True
            )
        )


def look_at(sources: Sequence[Source], phrases: Phrases | None = None) -> list[Shown]:
    """Measure each prompt, its distance to the first where their shapes agree, and what its views read nearest to."""
    shown: list[Shown] = []
    first = sources[0]
    reference_words = words_of(first)
    for source in sources:
        measures, words = measure(source.prompt, source.views), words_of(source)
        reads = () if phrases is None else phrases.nearest_to(source)
        if source is first:
            shown.append(Shown(source, measures, None, "", words, reads))
        elif source.prompt.shape != first.prompt.shape:
            shown.append(Shown(source, measures, None, f"not comparable with {first.name}: another shape", words, reads))
        else:
            far = start_distance(source.prompt, first.prompt) > ANOTHER_ENCODER
            apart = far and source.steps == first.steps == 0  # training moves the start token too
            compared = f"from {first.name}" + (", likely made with another text encoder" if apart else "")
            compared += f", learned in {source.steps} steps" if source.steps else ""
            shown.append(Shown(source, measures, drift(source.prompt, first.prompt, reference_words), compared, words, reads))
    return shown


def words_of(source: Source) -> tuple[int, ...] | None:
    """How many tokens of each view are words: as its text has, or else by the looks of the padding; None: not known."""
    if source.words is not None:
        return source.words
    found = words_before_padding(source.prompt)
    return None if found is None else tuple(found)


def rows(one: Shown) -> list[tuple[str, str]]:
    """What there is to say of a prompt, a line each, with its heading."""
    m, source = one.measures, one.source
    least, most = (f"{float(norm):.1f}" for norm in m.norms.aminmax())
    said = [
        ("shape", source.shape),
        ("norms", f"a token's is {least} to {most}, mean {float(m.norms.mean()):.1f}"),
        ("view", view_line(m)),
        ("closest", "{} and {}, cosine {:.3f}".format(*m.closest)),
        ("float16", rounding_line(one)),
    ]
    if source.toy:
        said.insert(1, ("encoder", f"{TOY}: of use with the embedded model alone"))
    if one.words is not None:
        how = "by its texts" if source.words is not None else "by their likeness"
        counts = " or ".join(dict.fromkeys(str(count) for count in one.words))
        said.insert(-2, ("padding", f"from token {counts} on ({how})"))
    return said + [("reads" if i == 0 else "", sentence) for i, sentence in enumerate(one.reads)] + drift_rows(one)


def view_line(m: Measures) -> str:
    """Which tokens carry the view."""
    carriers, spread = in_ranges(m.carriers), in_ranges(m.spread_over)
    said = f"token{'s' * (len(m.carriers) != 1)} {carriers} carr{'y' if len(m.carriers) != 1 else 'ies'} it"
    if m.shared:
        said += f"; {in_ranges(range(m.shared))} are the same in all views"
    if spread != carriers:
        said += f"; over all views {spread} differ, as after names of unequal length"
    return said


def rounding_line(one: Shown) -> str:
    """What float16 changes."""
    most, mean = one.measures.rounding
    if most == 0:
        return "rounding to it changes nothing" + (": it is stored so" if one.source.dtype == "float16" else "")
    lost = one.drift.rounded_away if one.drift is not None else None
    share = "" if lost is None else f"; {lost:.2%} of the change from the first"
    return f"rounding to it changes a number by {most:.1e} at most, {mean:.1e} on average{share}"


def drift_rows(one: Shown) -> list[tuple[str, str]]:
    """How far it is from the first."""
    if one.drift is None:
        return [("change", one.compared)] if one.compared else []
    d = one.drift
    views = ", ".join(f"{name} {change:.1%}" for name, change in zip(one.source.views, d.by_view.tolist(), strict=True))
    furthest = sorted(d.by_token.topk(3).indices.tolist())
    said = [("change", f"{one.compared}, of its norm: {views}")]
    if d.rounded_away is None:
        return [("change", f"{one.compared}: none")]
    said.append(("", "cosine with it: " + ", ".join(f"{cosine:.3f}" for cosine in d.cosines.tolist())))
    said.append(("", f"most in token {', '.join(map(str, furthest))} ({float(d.by_token.max()):.1%} of the token's norm)"))
    where = "not known where its padding begins"
    if d.in_words is not None:
        where = f"{d.in_words:.1%} of it (squared) in word tokens, {1 - d.in_words:.1%} in padding"
    said.append(("", where))
    return said


def print_report(shown: Sequence[Shown]) -> None:
    """A paragraph and a matrix of cosines for each prompt."""
    columns = min(120, max(80, shutil.get_terminal_size().columns))
    for one in shown:
        print(one.source.name)
        for heading, said in rows(one):
            start = f"  {heading:<10}"
            print(textwrap.fill(said, columns, initial_indent=start, subsequent_indent=" " * 12, break_on_hyphens=False))
        width = max(11, *(len(view) for view in one.source.views))
        print(f"  {'cosines':<{width + 2}}" + "".join(f"{view:>{width + 1}}" for view in one.source.views))
        for view, row in zip(one.source.views, one.measures.cosines.tolist(), strict=True):
            print(f"    {view:<{width}}" + "".join(f"{cosine:{width + 1}.3f}" for cosine in row))
        print()


def refuse_other_page(path: Path) -> None:
    """Raises: InputError where something lies that is no earlier page."""
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; expected the name of a page, e.g. prompts.html")
    if path.is_file() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise InputError(f"--output {path}: is no earlier page of this command; choose another name, or move it away first")


def write_page(shown: Sequence[Shown], path: Path, command: str) -> None:
    """Write the page, whole or not at all. Raises: InputError when it cannot be written."""
    context = {
        "made_by": MADE_BY,
        "date": f"{datetime.now().astimezone():%-d %B %Y, %H:%M %Z}",
        "prompts": [as_context(one) for one in shown],
        "command": command,
    }
    try:
        with new_file(path) as partial:
            partial.write_text(render("train.prompts", context), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error}); likely read-only, or its disk is full") from error


def as_context(one: Shown) -> dict[str, Any]:
    """A prompt as its part of the page shows it."""
    m, views = one.measures, [view.replace("_", " ") for view in one.source.views]
    carriers = set(m.carriers)
    return {
        "name": one.source.name,
        "rows": rows(one),
        "texts": list(zip(views, one.source.texts, strict=True)) if one.source.texts else [],
        "views": views,
        "matrix": matrix_cells(m.cosines, float(m.cosines.min())),
        "norms": [
            {"view": view, "min": float(n.min()), "mean": float(n.mean()), "max": float(n.max())}
            for view, n in zip(views, m.norms, strict=True)
        ],
        "charts": [
            chart("Difference to the view that a view is most like, by token", m.telling, carriers),
            chart("Spread over all views, by token", m.spread, carriers),
            *([chart("Change from the first prompt, by token", one.drift.by_token, carriers)] if one.drift else []),
        ],
        "change": []
        if one.drift is None
        else [
            {"view": view, "change": change, "cosine": cosine}
            for view, change, cosine in zip(views, one.drift.by_view.tolist(), one.drift.cosines.tolist(), strict=True)
        ],
    }
