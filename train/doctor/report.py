"""The data set's report: in the terminal, as one HTML page that needs no other file, and as JSON."""

import base64
import io
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from softprompt.data.decode import decode
from softprompt.files import write_json
from train.doctor.checks import ERRORS, KINDS, WARNINGS, Finding, ViewNumbers
from train.doctor.samples import Sample
from train.log.series import display_name
from train.report.template import made_by, write_page

MOST_STRIPS = 60
"""Samples shown with their pictures; each takes about 20 kB of the page."""
MOST_NAMES = 6
"""Samples named in the terminal for each kind of finding."""
TILE = 96
"""Side of a thumbnail in pixels."""


@dataclass(frozen=True)
class Report:
    """A data set's samples, findings and medians."""

    train: str
    val: str | None
    samples: Sequence[Sample]
    findings: Sequence[Finding]
    views: Sequence[ViewNumbers]
    not_inspected: Sequence[str]
    """Checks that were not possible, and why."""
    command: str
    """The command that makes it again."""

    @cached_property
    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, in the order of KINDS."""
        found: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return dict(found)

    @property
    def would_run(self) -> bool:
        """Whether training would accept the data set: there are no errors."""
        return not any(finding.is_error for finding in self.findings)

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        counts = {"error": len(self.by_kind.keys() & ERRORS), "warning": len(self.by_kind.keys() & WARNINGS)}
        kinds = " and ".join(f"{n} kind{'s' * (n != 1)} of {what}" for what, n in counts.items() if n)
        return f"Training would {'run; ' + (kinds or 'nothing was found') if self.would_run else 'not run: ' + kinds}."

    @property
    def inspected(self) -> str:
        """The numbers of objects and pictures."""
        on = sum(sample.is_train for sample in self.samples)
        pictures = [p for sample in self.samples for p in sample.pictures if p is not None]
        sizes = sorted({(p.width, p.height) for p in pictures})
        written = f" of {sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else f" of {len(sizes)} sizes" if sizes else ""
        val = f", {len(self.samples) - on} validation objects ({self.val})" if self.val is not None else ""
        return f"{on} training object{'s' * (on != 1)} ({self.train}){val}: {len(pictures)} pictures{written}"

    def names(self, finding: Finding) -> str:
        """The names of a finding's samples; "all" for the data set as a whole."""
        return _some([self.samples[s].name for s in finding.samples], " = ") or "all"

    def count(self, kind: str) -> str:
        """The number of objects with findings of a kind; "all" for the data set as a whole."""
        return str(len({s for finding in self.by_kind[kind] for s in finding.samples}) or "all")


def _some(names: Sequence[str], joint: str, last_joint: str | None = None) -> str:
    more = len(names) - MOST_NAMES
    return joint.join(names[:MOST_NAMES]) + (f"{last_joint or joint}{more} more" if more > 0 else "")


def print_report(report: Report) -> None:
    """Print a table of findings and one of the views, as wide as the terminal, 80 to 120 columns."""
    width = min(120, max(80, shutil.get_terminal_size().columns))
    print(f"inspected  {report.inspected}")
    for title, kinds in (("ERRORS: training would not run", ERRORS), ("WARNINGS: training would run", WARNINGS)):
        rows = {kind: found for kind, found in report.by_kind.items() if kind in kinds}
        if rows:
            print(f"\n{title:<33} objects")
        for kind, found in rows.items():
            names = _some([report.names(finding) for finding in found], ", ", ", and ")
            row = f"{kinds[kind].title:<32} {report.count(kind):>6}  {names}"
            print(textwrap.fill(row, width, initial_indent="  ", subsequent_indent=" " * 43))
            print(textwrap.fill(kinds[kind].advice, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    print(f"\n{'view':<14} {'pictures':>8} {'foreground':>11} {'centre: right':>14} {'down':>7}   (medians)")
    for view in report.views:
        share, x, y = (f"{view.share:.1%}", *(f"{at:+.3f}" for at in view.centre)) if view.pictures else "---"
        print(f"{view.name:<14} {view.pictures:>8} {share:>11} {x:>14} {y:>7}")
    for sentence in report.not_inspected:
        print(textwrap.fill(f"not inspected: {sentence}", width, subsequent_indent=" " * 6))
    print(f"\n{report.headline}")


def write_report(report: Report, folder: Path) -> None:
    """Write doctor.html and doctor.json into a folder, each whole or not at all."""
    strips, hidden = _strips(report)
    context = {
        "command": report.command,
        "report": report,
        "kinds": KINDS,
        "errors": ERRORS,
        "strips": strips,
        "hidden": hidden,
        "view_names": [display_name(view.name) for view in report.views],
    }
    write_page(folder / "doctor.html", "doctor", context)
    write_json(folder / "doctor.json", as_json(report))


def as_json(report: Report) -> dict[str, Any]:
    """The findings, and the medians of the views; null where there is none."""
    return {
        "made_by": made_by("doctor"),
        "command": report.command,
        "would_run": report.would_run,
        "objects": {"train": sum(s.is_train for s in report.samples), "val": sum(not s.is_train for s in report.samples)},
        "findings": [
            {
                "kind": f.kind,
                "is_error": f.is_error,
                "samples": [report.samples[s].name for s in f.samples],
                "views": [report.views[v].name for v in f.views],
                "detail": f.detail,
            }
            for f in report.findings
        ],
        "views": [
            {
                "name": view.name,
                "pictures": view.pictures,
                "foreground_share": view.share if view.pictures else None,
                "centre_right_down": list(view.centre) if view.pictures else None,
            }
            for view in report.views
        ],
        "not_inspected": list(report.not_inspected),
    }


def _strips(report: Report) -> tuple[list[dict[str, Any]], int]:
    """Samples with findings and their thumbnails, and how many more there are.

    The first samples of each kind are chosen first, so that no kind is crowded out; they are shown by kind.
    """
    of_sample: dict[int, list[Finding]] = defaultdict(list)
    rank: dict[int, int] = {}
    for found in report.by_kind.values():
        for place, finding in enumerate(found):
            for s in finding.samples:
                of_sample[s].append(finding)
                rank[s] = min(rank.get(s, place), place)
    chosen = set(sorted(of_sample, key=lambda s: rank[s])[:MOST_STRIPS])
    strips = []
    for s, findings in of_sample.items():
        if s not in chosen:
            continue
        sample = report.samples[s]
        marks = {v: "warned" for finding in findings for v in finding.views}
        marks |= {v: "refused" for finding in findings if finding.is_error for v in finding.views}
        tiles = [
            {"uri": _thumbnail(file), "alt": f"{sample.name}, {view.name}", "mark": marks.get(v, "")}
            for v, (view, file) in enumerate(zip(report.views, sample.files, strict=True))
        ]
        lines = [(f, f"{report.names(f)}; {f.detail}" if len(f.samples) > 1 else f.detail) for f in findings]
        strips.append({"name": sample.name, "tiles": tiles, "lines": lines})
    return strips, len(of_sample) - len(strips)


def _thumbnail(file: Path | None) -> str:
    """A picture as data URI, with its transparency; empty if there is none or it cannot be decoded."""
    try:
        picture = None if file is None else decode(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        picture = None
    if picture is None:
        return ""
    picture.thumbnail((TILE, TILE), Image.Resampling.BOX)
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
