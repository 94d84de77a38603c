"""Compare training strategies on your own data: `python -m train.compare` trains each variant with each seed and reports."""

import shlex
import signal
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

from filelock import FileLock, Timeout
from tqdm import tqdm

from softprompt.errors import InputError
from softprompt.files import new_file
from train.cli import FAILED, Parser, expand_given, run_command
from train.compare.plan import Comparison, Plan, PlannedRun, comparison_yaml, differences, make_plan, parse_quietly, read_file
from train.compare.results import LOSS, RunResult, read_run
from train.compare.runner import Children, ProcessRunner, Runner, last_error, run_all
from train.runs import is_running
from train.state.folder import LOCK, list_checkpoints

KEPT = "comparison.yaml"
"""File that marks the folder of a comparison: its settings, as they were last."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    comparison: Comparison
    output: Path
    jobs: int
    report_only: bool
    command: str
    """The command that repeats it."""
    name: str = "report"
    """Name of the report's files, that of the comparison's YAML: comparisons may share a folder, and with it their runs."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m train.compare",
        description="Compare training strategies on your own data: train each variant with each seed, and report which differ "
        "significantly from the baseline. Finished runs are kept: repeat the command to continue, or add variants or seeds.",
        epilog="Example: python -m train.compare --config configs/compare/example.yaml --output comparisons/example --jobs 2",
    )
    parser.add_argument("--config", action="config", help="YAML file of the comparison, with the names below.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the runs and the report.")
    parser.add_argument("--jobs", type=int, default=1, help="Number of runs side by side.")
    parser.add_argument("--report-only", action="store_true", help="Train nothing; report on the finished runs.")
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
        raise InputError(f"--config: is given {len(files)} times; expected one file, which is the whole comparison")
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
        with comparison_folder(request):
            return compare(plan, request, ProcessRunner(request.jobs))

    return run_command(command, interrupted="interrupted before the first run began")


def compare(plan: Plan, request: Request, runner: Runner) -> int:
    """Train the runs that are not finished, and write the report of those that are. Returns: the exit code.

    Raises: InputError where an existing run was made with another configuration, or is still running.
    """
    runs = plan.runs()
    results = {run.label: result for run in runs if (result := _read(run))}
    refuse_other_runs(runs, results)
    with new_file(plan.root / KEPT) as partial:
        partial.write_text(comparison_yaml(plan.comparison), encoding="utf-8")
    left = [] if request.report_only else [run for run in runs if run.label not in results]
    print(f"{len(runs)} runs of {plan.steps} steps: {len(results)} are finished, {len(left)} to do", flush=True)
    failures: dict[str, str] = {}
    seconds: list[float] = []
    with Children() as children, tqdm(total=len(left), unit="run", dynamic_ncols=True, disable=None if left else True) as bar:
        for run, code, took in run_all(left, jobs=request.jobs, runner=runner, children=children):
            if result := _read(run):
                results[run.label] = result
                said = f"loss {result.number(LOSS):.4g} in {took / 60:.1f} min"
            else:
                said = f"not finished after {took / 60:.1f} min (exit code {code})"
                if children.stopped_by is None:
                    error = last_error(run) if code else "ended without its last evaluation and export"
                    failures[run.label] = error or f"exit code {code}"
                    said += f" {error}".rstrip()
            seconds.append(took)
            minutes_left = fmean(seconds) * (len(left) - len(seconds)) / request.jobs / 60
            progress = f"{len(seconds)} of {len(left)}, about {minutes_left:.1f} min left"
            tqdm.write(f"{run.variant} seed {run.seed}: {said}; {progress}", file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            if all(r.label in results or r.label in failures for r in left if r.seed == run.seed):
                _report(plan, request, results, failures)  # early, after the last run of each seed
    headline = _report(plan, request, results, failures)
    print(f"\n{headline}\nreport     {plan.root / request.name}.html", flush=True)
    missing = [run for run in left if run.label not in results]
    if children.stopped_by is not None and missing:
        name = signal.Signals(children.stopped_by).name
        print(f"stopped by {name} with {len(missing)} runs left; continue with\n  {request.command}", flush=True)
        return 128 + children.stopped_by
    for run in missing:
        print(f"error: {run.label}: {failures[run.label]} (log: {run.log})", file=sys.stderr)
    return FAILED if missing else 0


@contextmanager
def comparison_folder(request: Request) -> Iterator[None]:
    """Hold the folder's lock, so that no other comparison works in it while the block lasts.

    Raises: InputError when the folder holds something else, or another comparison works in it.
    """
    folder = request.output
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / KEPT).is_file())):
        raise InputError(f"--output {folder}: is not empty and not the folder of a comparison; give a new one")
    if request.report_only and not (folder / KEPT).is_file():
        raise InputError(f"--output {folder}: holds no comparison to report on; leave --report-only out to start one")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEPT).touch()
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise InputError(f"--output {folder}: another comparison is running there; wait for it or stop it first") from None


def refuse_other_runs(runs: Sequence[PlannedRun], finished: Container[str]) -> None:
    """Check the runs that exist before they are resumed or reported on.

    finished: their labels.
    Raises: InputError for a run that was made with another configuration, or that is still running.
    """
    for run in runs:
        where = f"variant {run.variant}, seed {run.seed}"
        if run.label not in finished and is_running(run.folder):
            raise InputError(
                f"{where}: is still running in {run.folder}, likely left behind by a comparison that was killed; wait for it "
                f"or stop it first"
            )
        if run.label not in finished and not list_checkpoints(run.folder):
            continue
        file = run.folder / "config.yaml"
        other = differences(parse_quietly(["--config", str(file)], where), run.config)
        if other:
            changed = "; ".join(f"{name} is {now} now, {before} in {file}" for name, (before, now) in other.items())
            raise InputError(
                f"{where}: {changed}. A comparison never mixes configurations: give another --output, or rename the variant"
            )


def _read(run: PlannedRun) -> RunResult | None:
    return read_run(run.folder, variant=run.variant, seed=run.seed, steps=run.config.train.steps)


def _report(plan: Plan, request: Request, results: Mapping[str, RunResult], failures: Mapping[str, str]) -> str:
    """Write the report of the finished runs, in the plan's order. Returns: its headline."""
    from train.compare.report import write_report

    found = [results[run.label] for run in plan.runs() if run.label in results]
    return write_report(plan, found, failures=failures, command=request.command, name=request.name)


if __name__ == "__main__":
    sys.exit(main())
