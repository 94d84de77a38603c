"""Find what is wrong with a data set before training: `python -m train.doctor`.

Inspects every picture, and reports what training would refuse and what it would silently learn: as a table, and as a page with
the pictures. Nothing in the data set is changed.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.errors import InputError
from softprompt.files import read_json, writing_to
from train.cli import FAILED, Parser, run_command
from train.options.checks import FROM_1, Checked, option


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set, with the option names of the main command."""

    train: str
    """List file, or folder of samples."""
    val: str | None = None
    """List file, or folder of samples, for validation."""


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of the command."""

    data: Data
    views: int = option(6, FROM_1)
    """Pictures of an object, cam_000.png and on."""
    size: int = option(512, FROM_1)
    """Side in pixels at which training reads the pictures: that of the model."""
    output: str = "doctor"
    """Folder of the report, doctor.html and doctor.json; new, empty, or that of an earlier report, which is replaced."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 training would run, 1 it would not, 2 bad options or paths, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        options = read_options(argv)
        folder = Path(options.output)
        refuse_other_folder(folder)
        return examine(options, folder, shlex.join(["python", "-m", "train.doctor", *argv]))

    return run_command(command, interrupted="interrupted; nothing was written")


def read_options(argv: Sequence[str]) -> Options:
    """Read the command line. Bad options end the program with code 2 and one line.

    Raises: InputError for values that cannot be used.
    """
    parser = Parser(
        prog="python -m train.doctor",
        description=__doc__,
        epilog="Example: python -m train.doctor --data.train mice/ --data.val held_out.txt",
    )
    parser.add_class_arguments(Options, None)
    given: Any = parser.instantiate(parser.parse_args(argv))
    return Options(data=given.data, views=given.views, size=given.size, output=given.output)


def refuse_other_folder(folder: Path) -> None:
    """Raises: InputError if the report's folder holds anything but an earlier report."""
    from train.report.template import made_by

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    report = folder / "doctor.json"
    if not report.is_file() or read_json(report, what="an earlier report").get("made_by") != made_by("doctor"):
        raise InputError(f"--output {folder}: holds something else than an earlier report; expected a new or empty folder")


def examine(options: Options, folder: Path, command: str) -> int:
    """Inspect the data set, print the findings and write the report. Returns: the exit code.

    Raises: InputError if there are no samples, or the report cannot be written.
    """
    from train.doctor.checks import find, medians, not_inspected
    from train.doctor.report import Report, print_report, write_report
    from train.doctor.samples import collect

    data, views = options.data, options.views
    samples = collect(data.train, data.val, num_views=views, size=options.size)
    findings = find(samples, views, options.size)
    report = Report(data.train, data.val, samples, findings, medians(samples, views), not_inspected(samples), command)
    with writing_to(f"--output {folder}"):
        write_report(report, folder)
    print_report(report)
    print(f"report     {folder / 'doctor.html'}")
    return 0 if report.would_run else FAILED


if __name__ == "__main__":
    sys.exit(main())
