"""The runs of a comparison, each in its own process: some side by side, all stopped when the comparison is."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import FrameType
from typing import Any

from softprompt.files import new_file, remove_partial
from train.compare.plan import PlannedRun
from train.options.config import to_yaml
from train.state.folder import list_checkpoints


class Children:
    """The running processes. Inside the block SIGINT, SIGTERM and SIGHUP are passed on to them, and no more are started."""

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        """The first signal that was received."""
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None and self.stopped_by is None:  # a defect of ours must not leave them behind
            self.stopped_by = signal.SIGTERM
            self._pass_on(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.stopped_by is None:
            self.stopped_by = number
            name = signal.Signals(number).name
            print(f"\n{name}: no new run starts; the running ones save a checkpoint and stop", file=sys.stderr)
        self._pass_on(signal.SIGTERM if number == signal.SIGHUP else number)

    def _pass_on(self, number: int) -> None:
        with self._lock:
            for process in self._running:
                process.send_signal(number)

    def run(self, command: Sequence[str], *, log: Any, environment: dict[str, str]) -> int | None:
        """Start a process and wait for it. It gets its signals only from here, not from the terminal as well.

        Returns: its exit code; None after a signal, when no more are started.
        """
        with self._lock:
            if self.stopped_by is not None:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)


Runner = Callable[[PlannedRun, Children], int | None]
"""Trains one run. Returns: its exit code; None where it was not started."""


@dataclass(frozen=True)
class ProcessRunner:
    """Trains each run in a process of train.softprompt."""

    jobs: int

    def __call__(self, run: PlannedRun, children: Children) -> int | None:
        command = prepare(run)
        # Runs side by side share the cores: with a thread for each core in each of them, they would wait for each other.
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        with run.log.open("ab") as log:
            return children.run(command, log=log, environment={"OMP_NUM_THREADS": threads} | os.environ)


def prepare(run: PlannedRun) -> list[str]:
    """The command that starts a run, or resumes it from its checkpoint; a run killed before its first checkpoint is removed."""
    program = [sys.executable, "-m", "train.softprompt"]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    if list_checkpoints(run.folder):
        remove_partial(run.folder)
        return [*program, "--resume", str(run.folder)]
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.log.unlink(missing_ok=True)  # it belongs to the run that was removed
    with new_file(run.config_file) as partial:
        partial.write_text(to_yaml(run.config), encoding="utf-8")
    return [*program, "--config", str(run.config_file), "--output", str(run.folder)]


def run_all(
    runs: Sequence[PlannedRun], *, jobs: int, runner: Runner, children: Children
) -> Iterator[tuple[PlannedRun, int, float]]:
    """Train the runs in their order, `jobs` side by side; one that fails does not stop the others.

    Yields: each run that was started as it ends, its exit code, and how long it took in seconds.
    """

    def one(run: PlannedRun) -> tuple[PlannedRun, int | None, float]:
        began = time.monotonic()
        code = None if children.stopped_by is not None else runner(run, children)
        return run, code, time.monotonic() - began

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for future in as_completed([pool.submit(one, run) for run in runs]):
            run, code, seconds = future.result()
            if code is not None:
                yield run, code, seconds


def last_error(run: PlannedRun) -> str:
    """The last line of a run's log that looks like an error, else its last line."""
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines() if run.log.is_file() else []
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return ([""] + lines[-1:] + errors[-1:])[-1]
