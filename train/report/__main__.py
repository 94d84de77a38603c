"""Report of a run on one page: results, settings, curves, next steps: `python -m train.report`.

Every run leaves this page, RUN/report.html, at its end; this makes it again, or makes that of a run that was killed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softprompt.errors import InputError
from softprompt.files import writing_to
from train.cli import PlainParser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit code."""
    parser = PlainParser(
        prog="python -m train.report",
        description=__doc__,
        epilog="Examples: python -m train.report runs/micro-001 | python -m train.report runs/micro-001 --picture mice.png",
    )
    parser.add_argument("run", type=Path, help="Folder of a run, as train.softprompt leaves it.")
    parser.add_argument("--output", type=Path, help="The page to write; RUN/report.html by default.")
    parser.add_argument("--picture", type=Path, help="Also the run at a glance, as a PNG of this name.")
    given = parser.parse_args(argv)
    return run_command(lambda: _report(given), interrupted="interrupted; nothing half-written is left")


def _report(given: argparse.Namespace) -> int:
    from train.report.figures import picture  # torch and diffusers, which --help should not wait for
    from train.report.page import write_report
    from train.report.read import read_story

    if given.picture is not None and given.picture.suffix != ".png":
        raise InputError(f"--picture: is {given.picture}; expected a name that ends in .png")
    with writing_to(given.output or given.run):
        story = read_story(given.run)
        page, headline = write_report(story, given.output)
        if given.picture is not None:
            picture(story, given.picture)
    print(f"{headline}\n\nmade       {page}" + (f", {given.picture}" if given.picture else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
