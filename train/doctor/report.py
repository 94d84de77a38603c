"""Data set report: in the terminal, as one HTML page that needs nothing else, and as JSON."""

import base64
import io
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from softprompt.data.decode import decode
from softprompt.files import new_file, write_json
from train.doctor.findings import ViewNumbers
from train.doctor.kinds import KINDS, Finding, Sample, view_names
from train.doctor.look import Files
from train.report.template import render

MADE_BY = "softprompt train.doctor"
"""Marks the JSON file, and with it a folder, as ours."""
MOST_STRIPS = 60
"""Samples shown with their pictures; the page has about 20 kB for each."""
MOST_NAMES = 6
"""Samples named in the terminal for each kind."""
TILE = 96
"""Side of a thumbnail in pixels."""


@dataclass(frozen=True)
class Report:
    """All there is to say of a data set."""

    train: str
    val: str | None
    samples: Sequence[Sample]
    files: Sequence[Files]
    findings: Sequence[Finding]
    views: Sequence[ViewNumbers]
    unseen: Sequence[str]
    """What was not looked at, and why."""
    command: str
    """That makes it again."""

    @property
    def would_run(self) -> bool:
        """Whether training would take the data set: there are warnings at most."""
        return not any(KINDS[finding.kind].is_error for finding in self.findings)

    @property
    def headline(self) -> str:
        """In a sentence."""
        by_kind = self.by_kind()
        errors = sum(KINDS[kind].is_error for kind in by_kind)
        counted = [f"{n} kind{'s' * (n != 1)} of {what}" for n, what in ((errors, "error"), (len(by_kind) - errors, "warning"))]
        if errors:
            return f"Training would not run: {' and '.join(said for said in counted if said[0] != '0')}."
        return f"Training would run; {counted[1] if by_kind else 'nothing was found'}."

    @property
    def inspected(self) -> str:
        """What, and how much of it."""
        on = sum(sample.is_train for sample in self.samples)
        pictures = [p for sample in self.samples for p in sample.pictures if p is not None]
        sizes = sorted({(p.width, p.height) for p in pictures})
        written = f" of {sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else f" of {len(sizes)} sizes" if sizes else ""
        held = f", {len(self.samples) - on} to validate on ({self.val})" if self.val is not None else ""
        return f"{on} object{'s' * (on != 1)} to train on ({self.train}){held}: {len(pictures)} pictures{written}"

    def by_kind(self) -> dict[str, list[Finding]]:
        """In the order of KINDS; only those that there are."""
        found: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return dict(found)

    def names(self, finding: Finding) -> str:
        """Of its samples; "all" for the data set as a whole."""
        names = [self.samples[s].name for s in finding.samples]
        more = f" = {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return " = ".join(names[:MOST_NAMES]) + more if names else "all"


def print_report(report: Report) -> None:
    """A table of findings and one of the views, as wide as the terminal, 80 to 120 columns."""
    width = min(120, max(80, shutil.get_terminal_size().columns))
    print(f"inspected  {report.inspected}")
    titles = {True: "ERRORS: training would not run", False: "WARNINGS: training would run"}
    for is_error, title in titles.items():
        rows = {kind: found for kind, found in report.by_kind().items() if KINDS[kind].is_error == is_error}
        if not rows:
            continue
        print(f"\n{title:<33} objects")
        for kind, found in rows.items():
            names = [report.names(finding) for finding in found]
            more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            said = f"{KINDS[kind].title:<32} {_count(found):>6}  {', '.join(names[:MOST_NAMES])}{more}"
            print(textwrap.fill(said, width, initial_indent="  ", subsequent_indent=" " * 43))
            meant = f"{KINDS[kind].meaning} {KINDS[kind].advice}"
            print(textwrap.fill(meant, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    print(f"\n{'view':<14} {'pictures':>8} {'foreground':>11} {'centre: right':>14} {'down':>7}   (medians)")
    for view in report.views:
        x, y = view.centre
        medians = [f"{view.share:.1%}", f"{x:+.3f}", f"{y:+.3f}"] if view.pictures else ["-", "-", "-"]
        print(f"{view.name:<14} {view.pictures:>8} {medians[0]:>11} {medians[1]:>14} {medians[2]:>7}")
    for sentence in report.unseen:
        print(textwrap.fill(f"not inspected: {sentence}", width, subsequent_indent=" " * 6))
    print(f"\n{report.headline}")


def _count(found: Sequence[Finding]) -> str:
    return str(len({s for finding in found for s in finding.samples}) or "all")


def write_report(report: Report, folder: Path) -> None:
    """Write doctor.html and doctor.json into a folder, each whole or not at all."""
    strips, hidden = _strips(report)
    context = {
        "date": f"{datetime.now().astimezone():%-d %B %Y, %H:%M %Z}",
        "report": report,
        "kinds": [(KINDS[kind], _count(found), found) for kind, found in report.by_kind().items()],
        "strips": strips,
        "hidden": hidden,
        "view_names": [view.name.replace("_", " ") for view in report.views],
    }
    with new_file(folder / "doctor.html") as partial:
        partial.write_text(render("train.doctor", context), encoding="utf-8")
    write_json(folder / "doctor.json", as_json(report))


def as_json(report: Report) -> dict[str, Any]:
    """The findings, and the medians of the views; what is not known is null."""
    return {
        "made_by": MADE_BY,
        "command": report.command,
        "would_run": report.would_run,
        "objects": {"train": sum(s.is_train for s in report.samples), "val": sum(not s.is_train for s in report.samples)},
        "findings": [
            {
                "kind": finding.kind,
                "is_error": KINDS[finding.kind].is_error,
                "samples": [report.samples[s].name for s in finding.samples],
                "views": [report.views[v].name for v in finding.views],
                "detail": finding.detail,
            }
            for finding in report.findings
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
        "not_looked_at": list(report.unseen),
    }


def _strips(report: Report) -> tuple[list[dict[str, Any]], int]:
    """Samples with findings and their thumbnails, and how many more there are. The first of each kind come first into the
    choice, so that no kind is crowded out by another; they are shown by kind."""
    of_sample: dict[int, list[Finding]] = defaultdict(list)
    rank: dict[int, int] = {}
    for found in report.by_kind().values():
        for place, finding in enumerate(found):
            for s in finding.samples:
                of_sample[s].append(finding)
                rank[s] = min(rank.get(s, place), place)
    chosen = set(sorted(of_sample, key=lambda s: rank[s])[:MOST_STRIPS])
    shown = [s for s in of_sample if s in chosen]
    names = view_names(len(report.views))
    strips = []
    for s in shown:
        warned, refused = (
            {v for finding in of_sample[s] if KINDS[finding.kind].is_error == is_error for v in finding.views}
            for is_error in (False, True)
        )
        tiles = [
            {
                "uri": _thumbnail(file),
                "alt": f"{report.samples[s].name}, {name}",
                "mark": "refused" if v in refused else "warned" if v in warned else "",
            }
            for v, (name, file) in enumerate(zip(names, report.files[s], strict=True))
        ]
        lines = [
            {
                "title": KINDS[finding.kind].title,
                "is_error": KINDS[finding.kind].is_error,
                "detail": f"{report.names(finding)}; {finding.detail}" if len(finding.samples) > 1 else finding.detail,
            }
            for finding in of_sample[s]
        ]
        strips.append({"name": report.samples[s].name, "tiles": tiles, "lines": lines})
    return strips, len(of_sample) - len(strips)


def _thumbnail(file: Path | None) -> str:
    """A picture as data URI, transparency kept; empty where there is none, or it cannot be decoded."""
    if file is None:
        return ""
    try:
        picture = decode(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    picture.thumbnail((TILE, TILE), Image.Resampling.BOX)
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
