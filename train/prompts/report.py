"""Prompts side by side: in the terminal, and as one HTML page that needs no other file."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.files import writing_to
from softprompt.prompt.similarity import words_before_padding
from train.log.series import display_name
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
from train.report.template import write_page


@dataclass(frozen=True)
class Shown:
    """A prompt and its measurements."""

    source: Source
    measures: Measures
    drift: Drift | None
    compared: str
    """The prompt that it is compared with, or why it is not; empty for the first."""
    words: Sequence[int] | None
    """Number of tokens of each view that are not padding; None: not known."""
    reads: Sequence[str] = ()
    """Sentences: the phrase that each view is nearest to."""


@dataclass(frozen=True)
class Phrases:
    """Texts that views are compared with."""

    texts: Sequence[str]
    encoded: Tensor
    """[N, T, D]."""

    def nearest_to(self, source: Source) -> list[str]:
        """A sentence for each view, or one that says why they are not comparable."""
        if source.prompt.shape[1:] != self.encoded.shape[1:]:
            width, ours = self.encoded.shape[-1], source.prompt.shape[-1]
            return [f"not comparable: the phrases' text encoder gives tokens of {width} numbers, these have {ours}"]
        if source.steps == 0 and start_distance(source.prompt, self.encoded[:1]) > ANOTHER_ENCODER:
            return ["not comparable: the prompt was likely made with another text encoder than the phrases; give its --model"]
        cosines, which = nearest_phrases(source.prompt, self.encoded).topk(2, dim=1)
        return [
            f"{view} reads nearest to {self.texts[first]!r} ({best:.2f}), then {self.texts[second]!r} ({next_:.2f})"
            for view, (first, second), (best, next_) in zip(source.views, which.tolist(), cosines.tolist(), strict=True)
        ]


def inspect(sources: Sequence[Source], phrases: Phrases | None = None) -> list[Shown]:
    """Measure each prompt, its change from the first if they have one shape, and the phrases nearest to its views."""
    shown: list[Shown] = []
    first = sources[0]
    reference_words = _words(first)
    for source in sources:
        change, compared = None, ""
        if source is not first and source.prompt.shape != first.prompt.shape:
            compared = f"not comparable with {first.name}: another shape"
        elif source is not first:
            change = drift(source.prompt, first.prompt, reference_words)
            compared = f"from {first.name}" + (
                ", likely made with another text encoder" if other_encoder(source, first) else ""
            )
            compared += f", learned in {source.steps} steps" if source.steps else ""
        reads = phrases.nearest_to(source) if phrases else ()
        shown.append(Shown(source, measure(source.prompt, source.views), change, compared, _words(source), reads))
    return shown


def other_encoder(source: Source, first: Source) -> bool:
    """Whether two prompts likely come from two text encoders, by their start tokens; this is not known of trained prompts."""
    return start_distance(source.prompt, first.prompt) > ANOTHER_ENCODER and source.steps == first.steps == 0


def _words(source: Source) -> Sequence[int] | None:
    return words_before_padding(source.prompt) if source.words is None else source.words


def rows(one: Shown) -> list[tuple[str, str]]:
    """A prompt's description: heading and text of each line."""
    m, source = one.measures, one.source
    least, most = (f"{float(norm):.1f}" for norm in m.norms.aminmax())
    found = [("shape", source.shape)]
    if source.toy:
        found.append(("encoder", f"{TOY}: fits only the embedded model"))
    found += [("norms", f"a token's is {least} to {most}, mean {float(m.norms.mean()):.1f}"), ("view", _view_line(m))]
    if one.words is not None:
        how = "by its texts" if source.words is not None else "by their similarity"
        counts = " or ".join(dict.fromkeys(str(count) for count in one.words))
        found.append(("padding", f"from token {counts} on ({how})"))
    found += [("closest", "{} and {}, cosine {:.3f}".format(*m.closest)), ("float16", _rounding_line(one))]
    return found + _with_heading("reads", one.reads) + _with_heading("change", _drift_lines(one))


def _with_heading(heading: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    return [(heading if i == 0 else "", line) for i, line in enumerate(lines)]


def _view_line(m: Measures) -> str:
    carriers, spread = in_ranges(m.carriers), in_ranges(m.spread_over)
    text = f"token{'s' * (len(m.carriers) != 1)} {carriers} carr{'y' if len(m.carriers) != 1 else 'ies'} it"
    if m.shared:
        text += f"; {in_ranges(range(m.shared))} are the same in all views"
    if spread != carriers:
        text += f"; over all views {spread} differ, as after names of unequal length"
    return text


def _rounding_line(one: Shown) -> str:
    most, mean = one.measures.rounding
    if most == 0:
        return "rounding to it changes nothing" + (": it is stored so" if one.source.dtype == "float16" else "")
    lost = one.drift.rounded_away if one.drift is not None else None
    share = "" if lost is None else f"; {lost:.2%} of the change from the first"
    return f"rounding to it changes a number by {most:.1e} at most, {mean:.1e} on average{share}"


def _drift_lines(one: Shown) -> list[str]:
    d = one.drift
    if d is None:
        return [one.compared] if one.compared else []
    if d.rounded_away is None:
        return [f"{one.compared}: none"]
    views = ", ".join(f"{name} {change:.1%}" for name, change in zip(one.source.views, d.by_view.tolist(), strict=True))
    furthest = ", ".join(map(str, sorted(d.by_token.topk(3).indices.tolist())))
    return [
        f"{one.compared}, relative to its norm: {views}",
        "cosine with it: " + ", ".join(f"{cosine:.3f}" for cosine in d.cosines.tolist()),
        f"most in token {furthest} ({float(d.by_token.max()):.1%} of the token's norm)",
        "share in padding not known: no padding was found"
        if d.share_in_words is None
        else f"{d.share_in_words:.1%} of it (squared) in word tokens, {1 - d.share_in_words:.1%} in padding",
    ]


def print_report(shown: Sequence[Shown]) -> None:
    """Print a paragraph and a matrix of cosines for each prompt."""
    columns = min(120, max(80, shutil.get_terminal_size().columns))
    for one in shown:
        print(one.source.name)
        for heading, text in rows(one):
            start = f"  {heading:<10}"
            print(textwrap.fill(text, columns, initial_indent=start, subsequent_indent=" " * 12, break_on_hyphens=False))
        width = max(11, *(len(view) for view in one.source.views))
        print(f"  {'cosines':<{width + 2}}" + "".join(f"{view:>{width + 1}}" for view in one.source.views))
        for view, row in zip(one.source.views, one.measures.cosines.tolist(), strict=True):
            print(f"    {view:<{width}}" + "".join(f"{cosine:{width + 1}.3f}" for cosine in row))
        print()
    cosines = {one.source.name: float(one.drift.cosines.mean()) for one in shown if one.drift is not None}
    if len(cosines) > 1:
        width = max(map(len, cosines))
        print(f"cosine with {shown[0].source.name}, mean over views")
        for name, cosine in cosines.items():
            print(f"  {name:<{width}}  {cosine:.3f}")
        print()


def write_prompts_page(shown: Sequence[Shown], path: Path, command: str) -> None:
    """Write the page, whole or not at all. Raises: InputError if it cannot be written."""
    with writing_to(f"--output {path}"):
        write_page(path, "prompts", {"prompts": [_as_context(one) for one in shown], "command": command})


def _as_context(one: Shown) -> dict[str, Any]:
    m, d, views = one.measures, one.drift, [display_name(view) for view in one.source.views]
    charts = [
        ("Difference from the most similar view, by token", m.telling),
        ("Spread over all views, by token", m.spread),
        *([("Change from the first prompt, by token", d.by_token)] if d else []),
    ]
    norms = (m.norms.amin(1), m.norms.mean(1), m.norms.amax(1))
    return {
        "name": one.source.name,
        "rows": rows(one),
        "texts": list(zip(views, one.source.texts, strict=True)) if one.source.texts else [],
        "views": views,
        "matrix": matrix_cells(m.cosines, float(m.cosines.min())),
        "norms": list(zip(views, *(norm.tolist() for norm in norms), strict=True)),
        "charts": [chart(title, values, set(m.carriers)) for title, values in charts],
        "change": list(zip(views, d.by_view.tolist(), d.cosines.tolist(), strict=True)) if d else [],
    }
