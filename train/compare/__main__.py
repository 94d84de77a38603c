"""Which training strategy works for your data: `python -m train.compare`. Trains each variant with each seed, and reports.

What runs is in train.compare.plan, how in train.compare.runner, what it means in train.compare.results, and what it looks
like in train.compare.report.
"""

import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from softprompt.errors import InputError
from softprompt.files import new_file
from train.cli import FAILED, Parser, expand_given, run_command
from train.compare.plan import Comparison, Plan, PlannedRun, comparison_yaml, differences, make_plan, parse_quietly, read_file
from train.compare.results import is_finished, read_run
from train.compare.runner import Children, Outcome, ProcessRunner, Runner, has_checkpoint, run_all

KEPT = "comparison.yaml"
"""File that marks the folder of a comparison: what was asked last."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    comparison: Comparison
    output: Path
    jobs: int
    report_only: bool
    command: str
    """That makes it again."""
    name: str = "report"
    """Of the report's files: that of the comparison's file. Comparisons may share a folder, and with it their runs."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m train.compare",
        description="Compare training strategies on your own data: train each variant with each seed, and report what differs "
        "by more than the noise. What is finished is kept: call it again to go on, or with more variants or seeds.",
        epilog="Example: python -m train.compare --config configs/compare/example.yaml --output comparisons/example --jobs 2",
    )
    parser.add_argument("--config", action="config", help="YAML file of the comparison: the names below.")
    parser.add_argument("--output", type=str, required=True, help="Folder of the comparison: its runs and its report.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs side by side.")
    parser.add_argument("--report-only", action="store_true", help="Train nothing; report what is finished.")
    parser.add_class_arguments(Comparison)
    return parser


def read_request(argv: Sequence[str] | None = None) -> Request:
    """Read the command line. Bad options end the program with code 2 and one line.

    Raises: InputError for a file or values that cannot be used.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = expand_given(argv, ("config",))
    parser = make_parser()
    files = [a.partition("=")[2] or "".join(argv[i + 1 : i + 2]) for i, a in enumerate(argv) if a.split("=")[0] == "--config"]
    if len(files) > 1:
        raise InputError(f"--config: is there {len(files)} times; expected one file, which is the whole comparison")
    for file in files:
        read_file(file)
    namespace = parser.parse_args(argv)
    if namespace.jobs < 1:
        raise InputError(f"--jobs: is {namespace.jobs}; expected 1 or more")
    values = parser.instantiate(namespace)
    given = {f.name: getattr(values, f.name) for f in fields(Comparison)}
    given["variants"] = {name: options or {} for name, options in given["variants"].items()}
    command = shlex.join(["python", "-m", "train.compare", *(a for a in argv if a != "--report-only")])
    name = Path(files[0]).stem if files else "report"
    return Request(Comparison(**given), Path(namespace.output), namespace.jobs, namespace.report_only, command, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns: 0 done; 1 a run failed, the others are reported; 2 bad input, nothing was started; 128 + N stopped by signal N.
    """

    def command() -> int:
        request = read_request(argv)
        plan = make_plan(request.comparison, request.output)
        for warning in plan.warnings:
            print(warning, file=sys.stderr)
        with comparison_folder(request) as lock:
            return compare(plan, request, ProcessRunner(request.jobs, keep_open=(lock,)))

    return run_command(command, interrupted="interrupted before the first run began")


def compare(plan: Plan, request: Request, runner: Runner) -> int:
    """Do what is not yet done, write the report of what there is. Returns: the exit code.

    Raises: InputError where a run that is there was made with another configuration.
    """
    runs = plan.runs()
    finished = [run for run in runs if is_finished(run.folder, plan.steps)]
    refuse_other_runs(runs, finished)
    with new_file(plan.root / KEPT) as partial:
        partial.write_text(comparison_yaml(plan.comparison), encoding="utf-8")
    left = [] if request.report_only else [run for run in runs if run not in finished]
    print(f"{len(runs)} runs of {plan.steps} steps: {len(finished)} are finished, {len(left)} to do", flush=True)
    failures: dict[str, str] = {}
    with Children() as children:
        for outcome in _watched(run_all(left, jobs=request.jobs, runner=runner, children=children), plan, request, len(left)):
            if outcome.code and children.stopped_by is None:
                failures[outcome.run.label] = outcome.error or f"exit code {outcome.code}"
            _report_if_round_ended(plan, request, outcome, left, failures)
    missing = [run for run in left if not is_finished(run.folder, plan.steps)]
    if children.stopped_by is None:
        for run in missing:
            failures.setdefault(run.label, "ended without its last evaluation and export")
    headline = _write_report(plan, request, failures)
    print(f"\n{headline}\nreport     {plan.root / request.name}.html", flush=True)
    if children.stopped_by is not None and missing:
        name = signal.Signals(children.stopped_by).name
        print(f"stopped by {name} with {len(missing)} runs left; go on with\n  {request.command}", flush=True)
        return 128 + children.stopped_by
    for run in missing:
        print(f"error: {run.label}: {failures[run.label]} (log: {run.log})", file=sys.stderr)
    return FAILED if missing else 0


@contextmanager
def comparison_folder(request: Request) -> Iterator[int]:
    """Make the folder this comparison's while the block lasts, and while a run started in it does.

    Yields: the lock, a file descriptor; runs that inherit it hold it, should this program be killed.
    Raises: InputError when the folder holds something else, or another comparison works in it.
    """
    folder = request.output
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / KEPT).is_file())):
        raise InputError(f"--output {folder}: is no comparison's folder, and not empty; give a new one")
    if request.report_only and not (folder / KEPT).is_file():
        raise InputError(f"--output {folder}: holds no comparison to report on; leave --report-only out to begin one")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEPT).touch()
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--output {folder}: another comparison, or a run it left behind, is at work there") from None
        yield file.fileno()


def refuse_other_runs(runs: Sequence[PlannedRun], finished: Sequence[PlannedRun]) -> None:
    """Raises: InputError when a run that is finished, or can be gone on with, was made with another configuration."""
    for run in runs:
        if run not in finished and not has_checkpoint(run):
            continue
        file = run.folder / "config.yaml"
        where = f"variant {run.variant}, seed {run.seed}"
        other = differences(parse_quietly(["--config", str(file)], where), run.config)
        if other:
            changed = "; ".join(f"{name} is {now} now, {before} in {file}" for name, (before, now) in other.items())
            raise InputError(
                f"{where}: {changed}. A comparison never mixes configurations: give another --output, or the "
                f"variant another name"
            )


def _watched(outcomes: Iterator[Outcome], plan: Plan, request: Request, count: int) -> Iterator[Outcome]:
    """A bar, and a line for each run that ended."""
    seconds: list[float] = []
    with tqdm(total=count, unit="run", dynamic_ncols=True, disable=None if count else True) as bar:
        for number, outcome in enumerate(outcomes, start=1):
            if outcome.code is not None:
                seconds.append(outcome.seconds)
                left = sum(seconds) / len(seconds) * (count - number) / request.jobs
                tqdm.write(
                    f"{_outcome_line(outcome, plan)}; {number} of {count}, about {left / 60:.1f} min left", file=sys.stdout
                )
                sys.stdout.flush()
                bar.update()
            yield outcome


def _outcome_line(outcome: Outcome, plan: Plan) -> str:
    run, minutes = outcome.run, f"{outcome.seconds / 60:.1f} min"
    if is_finished(run.folder, plan.steps):
        result = read_run(run.folder, variant=run.variant, seed=run.seed, steps=plan.steps)
        return f"{run.variant} seed {run.seed}: loss {result.number('loss/validation'):.4g} in {minutes}"
    return f"{run.variant} seed {run.seed}: not finished after {minutes} (exit code {outcome.code}) {outcome.error}".rstrip()


def _report_if_round_ended(
    plan: Plan, request: Request, outcome: Outcome, left: Sequence[PlannedRun], failures: dict[str, str]
) -> None:
    """After the last run of each seed: an early look."""
    of_seed = [run for run in left if run.seed == outcome.run.seed]
    if outcome.code is None or any(not is_finished(r.folder, plan.steps) and r.label not in failures for r in of_seed):
        return
    _write_report(plan, request, failures)


def _write_report(plan: Plan, request: Request, failures: dict[str, str]) -> str:
    """Read what is finished and write the report. Returns: its headline."""
    from train.compare.report import write_report

    results = [
        read_run(run.folder, variant=run.variant, seed=run.seed, steps=plan.steps)
        for run in plan.runs()
        if is_finished(run.folder, plan.steps)
    ]
    return write_report(plan, results, failures=failures, command=request.command, name=request.name)


if __name__ == "__main__":
    sys.exit(main())
