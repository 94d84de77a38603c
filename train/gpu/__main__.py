"""Check correctness and speed on this machine's GPU in one command: `python -m train.gpu`.

Each check is a process of its own with a time limit of its own; results are kept after each, as JSON and as a table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt.errors import InputError
from softprompt.files import refuse_taken
from train.cli import FAILED, PlainParser, run_command, suggestion
from train.gpu import checks
from train.gpu.checks import PARTS, Check, Setting
from train.gpu.results import MARKS, Row, read_rows, save_rows, skipped, write_results


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 if no check failed, 1 if one did, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(argv)
    command = _one if given.only else _all
    return run_command(lambda: command(given), interrupted=f"interrupted; finished checks are in {given.output}")


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m train.gpu",
        description=__doc__,
        epilog="Examples: python -m train.gpu | python -m train.gpu --size tiny --device cpu --output try",
    )
    parser.add_argument("--size", choices=("sd21", "tiny"), default="sd21", help="Size of the model; tiny to try the checks.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda, or cpu to try the checks.")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="New folder for gpu.md and gpu.json; gpu by default.")
    parser.add_argument("--minutes", type=float, default=9, help="Minutes for all of them; 9 by default.")
    parser.add_argument("--parts", help="Only these parts, with commas: right, main job, full size, memory, long run.")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one check, in this process
    return parser


def _one(given: argparse.Namespace) -> int:
    """One check, in the process that was started for it."""
    only = json.loads(given.only)
    check = Check("", 0, only["function"], options=only["options"])
    save_rows(check.run(Setting(given.size, given.device, given.output)), _file_of(given.output, only["name"]))
    return 0


def _all(given: argparse.Namespace) -> int:
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: is cuda; torch {torch.__version__} finds no CUDA device; likely a CPU build, or no driver")
    wanted = [part.strip() for part in given.parts.split(",")] if given.parts else list(PARTS)
    for part in wanted:
        if part not in PARTS:
            raise InputError(f"--parts: {part!r} is no part; expected some of {', '.join(PARTS)}{suggestion(part, PARTS)}")
    refuse_taken(given.output)
    given.output.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    about: dict[str, Any] = {"card": card, "torch": torch.__version__, "size": given.size, "date": time.strftime("%Y-%m-%d")}
    rows: list[Row] = []
    failed: set[str] = set()
    began = time.monotonic()
    for name, check in checks.CHECKS.items():
        if check.part not in wanted:
            continue
        left = 60 * given.minutes - (time.monotonic() - began)
        if check.needs and (check.needs in failed or not _file_of(given.output, check.needs).is_file()):
            new = skipped(name, f"needs {check.needs!r}, which was not done or failed")
        elif left < check.seconds / 3:
            new = skipped(name, f"no time was left (--minutes {given.minutes:g})")
        else:
            new = _in_process(name, check, min(check.seconds, max(left, 1)), given)
        new = [replace(row, check=name) for row in new]
        rows += new
        if any(row.outcome == "fail" for row in new):
            failed.add(name)
        write_results(rows, {**about, "minutes": round((time.monotonic() - began) / 60, 1)}, given.output)
        for row in new:
            wanted_of = f" ({row.wanted})" if row.wanted else ""
            print(f"{name:28s} {row.name:55s} {row.found}{wanted_of} {MARKS[row.outcome]}", flush=True)
    names = f": {', '.join(sorted(failed))}" if failed else ""
    print(f"\nwritten    {given.output / 'gpu.md'} and .json; {len(failed)} of the checks failed{names}")
    return FAILED if failed else 0


def _in_process(name: str, check: Check, limit: float, given: argparse.Namespace) -> list[Row]:
    """A check in a process of its own, killed where it takes too long. Returns: its rows."""
    only = json.dumps({"name": name, "function": check.function, "options": dict(check.options)})
    line = [sys.executable, "-m", "train.gpu", "--only", only, "--size", given.size, "--device", given.device]
    line += ["--output", str(given.output)]
    began = time.monotonic()
    log = _file_of(given.output, name).with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    seconds = time.monotonic() - began
    if code == 0:
        return read_rows(_file_of(given.output, name), seconds)
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1:]
    why = f"took more than {limit:.0f} s" if code is None else f"exit code {code}: {''.join(last)[:300]}"
    return [Row("the check itself", f"{why} (see {log.name})", "an end", "fail", seconds=seconds)]


def _file_of(folder: Path, name: str) -> Path:
    """The file of a check's rows."""
    return folder / "checks" / ("".join(c if c.isalnum() else "-" for c in name) + ".json")


if __name__ == "__main__":
    sys.exit(main())
