"""The main job: `python -m train.softprompt`."""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import InputError, RunError
from train.cli import run_command
from train.log.series import read_series
from train.options.command_line import Request, parse
from train.options.config import to_yaml
from train.state.folder import ERROR, list_checkpoints, locked, next_run_folder, refuse_used

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.state.run import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job.

    Returns: 0 done; 1 failed in the middle; 2 bad input; 128 + N stopped by signal N (saved, can be resumed).
    """
    return run_command(lambda: _run(parse(argv)), interrupted="interrupted before training began; no run was written")


def _run(request: Request) -> int:
    import torch

    from train.export.write import check_free_space
    from train.loop import train
    from train.report.page import write_report
    from train.report.read import read_story
    from train.setup import make_accelerator, prepare
    from train.state.stop import StopSignal
    from train.summary import disk_needed, dry_run, outcome, summary

    config = request.config
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    try:
        accelerator = make_accelerator(config)
        main_process = accelerator.is_main_process
        with _run_folder(request, accelerator) as folder:
            state = _checkpoint_to_resume(request, folder)
            job = prepare(config, accelerator, resumed=state is not None)
            if state is not None and not request.resume_override:
                _refuse_another_run(job, state)
            if main_process:
                print(to_yaml(config))
                print(summary(job, folder, state, request), flush=True)
            if request.dry_run:
                dry_run(job, folder)
                return 0
            with StopSignal() as stop:
                if main_process:
                    check_free_space(folder, disk_needed(job))
                with _errors_in_words(folder, accelerator):
                    run = train(job, folder, state=state, stop=stop)
                    if main_process and config.export.report:
                        write_report(read_story(folder))
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory ({str(error).split('. ')[0]}); existing checkpoints are sound. Lower train.batch_size and "
            f"raise train.accumulation by as much, or set train.gradient_checkpointing: always; --dry-run shows the peak, "
            f"previews included, without a run"
        ) from error
    if main_process:
        print(outcome(run, stop.number), flush=True)
    accelerator.end_training()
    return 0 if run.step >= config.train.steps else 128 + (stop.number or 0)


@contextmanager
def _run_folder(request: Request, accelerator: "Accelerator") -> Iterator[Path]:
    """The run's folder, the same on all processes, and locked by the main process."""
    from accelerate.utils import broadcast_object_list

    output = Path(request.config.output) if request.config.output else None
    folder = request.resume or output or next_run_folder(request.name)
    if request.dry_run or not accelerator.is_main_process:
        if accelerator.is_main_process and request.resume is None:
            refuse_used(folder)
        yield Path(broadcast_object_list([str(folder)])[0])
        return
    with locked(output, request.name, resume=request.resume) as folder:
        yield Path(broadcast_object_list([str(folder)])[0])


def _checkpoint_to_resume(request: Request, folder: Path) -> "Mapping[str, Any] | None":
    """The newest sound checkpoint of a resumed run; None where the run starts at step 0.

    A run that was killed before its first checkpoint starts again, which removes its results. Raises: InputError where it had
    come further, so that its checkpoints were removed by somebody else.
    """
    from train.state.checkpoint import load_checkpoint

    if not request.resume:
        return None
    if list_checkpoints(folder):
        return load_checkpoint(folder)
    newest = max((point["step"] for point in read_series(folder)), default=0)
    if (folder / "export" / "clr_embeds.pt").is_file() or newest > request.config.monitor.checkpoint_every:
        raise InputError(
            f"{folder / 'checkpoints'}: holds no checkpoint to resume from, and the run had come to step {newest}; likely its "
            f"checkpoints were removed or moved. Put them back, or start a new run with --config {folder / 'config.yaml'} "
            f"--output NEW"
        )
    return None


def _refuse_another_run(job: "Job", state: "Mapping[str, Any]") -> None:
    """With other samples, or another number of them a step, the run would be another one. Raises: InputError."""
    for name, there in job.data.items():
        if there != (before := state["data"].get(name, there)):
            raise InputError(
                f"{name}: has {there} (by their names); the run has {before}. The order of the data, or the objects that the "
                f"losses are measured on, would change. Give the same data, or --resume-override"
            )
    batches, train = job.trainer.batches, job.config.train
    then, now = state["objects_per_step"], batches.objects_per_step
    if now != then:
        raise InputError(
            f"train.batch_size: a step takes {now} objects here ({train.batch_size} x {train.accumulation} x "
            f"{job.accelerator.num_processes} processes); the run's steps take {then}. Expected batch size, accumulation and "
            f"processes that make {then}, or --resume-override"
        )


@contextmanager
def _errors_in_words(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Turn any error that ends a run into a sentence that says what remains, and keep it in the run's folder.

    Raises: RunError.
    """
    from safetensors import SafetensorError

    if accelerator.is_main_process:
        (folder / ERROR).unlink(missing_ok=True)
    try:
        try:
            yield
        except InputError as error:  # a picture that disappeared: what was right when the run started is no longer
            raise RunError(f"{error}. {_how_to_resume(folder)}") from error
        except (OSError, SafetensorError) as error:
            problem = " ".join(str(error).split())
            raise RunError(f"{problem}; likely the disk is full or was unmounted. {_how_to_resume(folder)}") from error
        except RuntimeError as error:
            if not _lost_another_process(error, accelerator):
                raise
            raise RunError(
                f"another process of this run has ended, and this one cannot go on without it "
                f"({' '.join(str(error).split())[:160]}). {_how_to_resume(folder)}"
            ) from error
    except Exception as error:
        if accelerator.is_main_process:
            with suppress(OSError):  # on a full disk: the error itself matters
                (folder / ERROR).write_text(f"{error or type(error).__name__}\n", encoding="utf-8")
        raise


def _how_to_resume(folder: Path) -> str:
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return f"There is no checkpoint yet: --resume {folder} begins again at step 0"
    return f"{checkpoints[-1]} is the newest checkpoint: go on with --resume {folder}"


def _lost_another_process(error: RuntimeError, accelerator: "Accelerator") -> bool:
    """Whether an error comes from communicating with the other processes; gloo's have no class of their own."""
    from torch.distributed import DistError

    return accelerator.num_processes > 1 and (isinstance(error, DistError) or "gloo" in str(error))


if __name__ == "__main__":
    sys.exit(main())
