"""The main job: `python -m train.softprompt`."""

import math
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import InputError, RunError
from train.cli import run_command
from train.log.series import OUTCOMES, read_series
from train.options.command_line import Request, parse
from train.options.config import to_yaml
from train.state.folder import ERROR, LOCK

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import FileLock

    from train.setup import Job
    from train.state.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job.

    Returns: 0 done; 1 failed in the middle; 2 bad input; 128 + N stopped by signal N (saved, can be resumed).
    """
    return run_command(lambda: _run(parse(argv)), interrupted="interrupted before training began; no run was written")


def _run(request: Request) -> int:
    import torch

    from train.export.write import check_free_space
    from train.loop import train
    from train.setup import make_accelerator, prepare
    from train.state.checkpoint import load_checkpoint
    from train.state.folder import list_checkpoints
    from train.state.stop import StopSignal

    config = request.config
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    try:
        accelerator = make_accelerator(config)
        with _run_folder(request, accelerator) as folder:
            if request.resume and not list_checkpoints(folder):
                _refuse_lost_checkpoints(folder, config.monitor.checkpoint_every)
                state = None
            else:
                state = load_checkpoint(folder) if request.resume else None
            job = prepare(config, accelerator, resumed=state is not None)
            if state is not None and not request.resume_override:
                _refuse_another_run(job, state)
            main_process = accelerator.is_main_process
            if main_process:
                print(to_yaml(config))
                print(_summary(job, folder, state, request), flush=True)
            if request.dry_run:
                return _dry_run(job, folder)
            with StopSignal() as stop:
                if main_process:
                    check_free_space(folder, disk_needed(job))
                with _told(folder, accelerator):
                    run = train(job, folder, state=state, stop=stop)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory ({str(error).split('. ')[0]}); what checkpoints there are stay good. Lower train.batch_size "
            f"and raise train.accumulation by as much, or set train.gradient_checkpointing: always; --dry-run shows the peak, "
            f"previews included, without a run"
        ) from error
    if main_process:
        print(_outcome(run, stop.number), flush=True)
    accelerator.end_training()
    return 0 if run.step >= config.train.steps else 128 + (stop.number or 0)


@contextmanager
def _told(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Whatever ends a run while it trains ends it in words, with what it leaves, and is kept in its folder until it is resumed.

    Raises: RunError.
    """
    from safetensors import SafetensorError

    main = accelerator.is_main_process
    if main:
        (folder / ERROR).unlink(missing_ok=True)
    try:
        try:
            yield
        except InputError as error:  # a picture that went away: what was right when the run began is not any more
            raise RunError(f"{error}. {_kept(folder)}") from error
        except (OSError, SafetensorError) as error:
            problem = " ".join(str(error).split())
            raise RunError(f"{problem}; likely the disk is full or was unmounted. {_kept(folder)}") from error
        except RuntimeError as error:
            if not _lost_another_process(error, accelerator):
                raise
            raise RunError(
                f"another process of this run has ended, and this one cannot go on without it "
                f"({' '.join(str(error).split())[:160]}). {_kept(folder)}"
            ) from error
    except Exception as error:
        if main:
            with suppress(OSError):  # of a disk that is full: the error itself is what has to be told
                (folder / ERROR).write_text(f"{error or type(error).__name__}\n", encoding="utf-8")
        raise


def _refuse_another_run(job: "Job", state: "Mapping[str, Any]") -> None:
    """With other samples, or another number of them a step, the run would be another. Raises: InputError."""
    for name, there in job.data.items():
        if there != (before := state["data"].get(name, there)):
            raise InputError(
                f"{name}: has {there} (by their names); the run has {before}. The order of the data, or what the losses are "
                f"measured on, would be another from here on. Give the data as it was, or --resume-override"
            )
    then, now, train = state["objects_per_step"], job.objects_per_step, job.config.train
    if now != then:
        raise InputError(
            f"train.batch_size: a step takes {now} objects here ({train.batch_size} x {train.accumulation} x "
            f"{job.accelerator.num_processes} processes); the run's steps take {then}. Expected batch size, accumulation and "
            f"processes that make {then}, or --resume-override"
        )


def _refuse_lost_checkpoints(folder: Path, checkpoint_every: int) -> None:
    """A run without checkpoints begins again at step 0, which removes its results. Raises: InputError where it had come further
    than its first checkpoint, so that its checkpoints were removed by somebody else."""
    exported = folder / "export" / "clr_embeds.pt"
    newest = max((point["step"] for point in read_series(folder)), default=0)
    if exported.is_file() or newest > checkpoint_every:
        raise InputError(
            f"{folder / 'checkpoints'}: holds no checkpoint to resume from, and the run had come to step {newest}; likely its "
            f"checkpoints were removed or moved. Put them back, or start a new run with --config {folder / 'config.yaml'} "
            f"--output NEW"
        )


def _kept(folder: Path) -> str:
    from train.state.folder import list_checkpoints

    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return f"There is no checkpoint yet: --resume {folder} begins again at step 0"
    return f"{checkpoints[-1]} is the newest checkpoint: go on with --resume {folder}"


def _lost_another_process(error: RuntimeError, accelerator: "Accelerator") -> bool:
    """Whether an error is one of talking to the other processes; gloo's have no class of their own."""
    from torch.distributed import DistError

    return accelerator.num_processes > 1 and (isinstance(error, DistError) or "gloo" in str(error))


@contextmanager
def _run_folder(request: Request, accelerator: "Accelerator") -> Iterator[Path]:
    """The run's folder, the same for all processes, and locked: no second run can write into it.

    Where a new run ends before it has written anything, a folder made for it is removed.
    """
    from accelerate.utils import broadcast_object_list

    folder, lock = request.resume or Path(request.config.output or next_run_folder(request.name)), None
    if accelerator.is_main_process and request.dry_run and request.resume is None:
        _refuse_used(folder)
    elif accelerator.is_main_process and not request.dry_run:
        folder, lock = _take(request)
    folder = Path(broadcast_object_list([str(folder)])[0])
    try:
        yield folder
    finally:
        if lock is not None:
            if request.resume is None and os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
            lock.release()


def _take(request: Request) -> "tuple[Path, FileLock]":
    """Lock the folder that is resumed or that the user chose, or else the next that is free. Raises: InputError."""
    from filelock import FileLock, Timeout

    asked = request.resume or (request.config.output and Path(request.config.output))
    while True:
        folder = asked or next_run_folder(request.name)
        if request.resume is None:
            _refuse_used(folder)
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if asked:
                raise InputError(
                    f"{'--resume' if request.resume else 'output'}: {folder} is in use: another process trains there; wait for "
                    f"it or stop it first"
                ) from None
            continue
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); expected a folder for the run") from error
        if request.resume is None and _others_in(folder):  # another run came and went meanwhile
            lock.release()
            _refuse_used(folder)
        return folder, lock


def _refuse_used(folder: Path) -> None:
    """Raises: InputError for a folder that holds more than what a killed run may leave before its config.yaml is written."""
    if folder.exists() and (not folder.is_dir() or _others_in(folder)):
        hint = f" Go on with that run: --resume {folder}" if (folder / "config.yaml").is_file() else ""
        raise InputError(f"output: {folder} is not empty; a run never writes over another. Give a new folder.{hint}")


def _others_in(folder: Path) -> list[str]:
    """What is in a folder besides the lock and what a killed process left half-written."""
    return [name for name in os.listdir(folder) if name != LOCK and not (name.startswith(".") and ".partial-" in name)]


def next_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME-001, or the number after the highest that is there."""
    numbers = [0]
    with suppress(FileNotFoundError):
        numbers += [int(n) for e in os.listdir(root) if (n := e.removeprefix(f"{name}-")) != e and n.isdecimal()]
    return root / f"{name}-{max(numbers) + 1:03d}"


def _summary(job: "Job", folder: Path, state: "Mapping[str, Any] | None", request: Request) -> str:
    """What is about to happen, in a few lines."""
    from softprompt.prompt.similarity import mean_pairwise_cosine

    config, prompt = job.config, job.adapted.prompt
    counts = {name: sum(p.numel() for p in group.values()) for name, group in job.adapted.trainable().items()}
    groups = ", ".join(f"{name} {count:,} parameters" for name, count in counts.items())
    alike = ", ".join(
        f"{spec} {mean_pairwise_cosine(w):.3f}" for spec, w in zip(config.prompt.waypoints, prompt.waypoints, strict=True)
    )
    lines = [
        f"model      {job.pipeline.folder.name}: {job.pipeline.num_views} views of {job.pipeline.picture_size}x"
        f"{job.pipeline.picture_size}, prompts [{job.pipeline.num_views}, 77, {job.pipeline.prompt_width}]",
        *job.notes,
        f"training   {groups}; {config.train.steps} steps of {job.objects_per_step} objects",
        f"waypoints  mean cosine between their views: {alike}",
        f"run        {folder}   (watch it: tensorboard --logdir {shlex.quote(str(folder))})",
    ]
    if state is not None:
        lines += [f"WARNING    {damage}; the checkpoint before it is used" for damage in state["damaged"]]
    if request.resume:
        lines += [f"changed    {change}" for change in request.changed]
        at = "0, since the run was stopped before its first checkpoint," if state is None else state["step"]
        lines.append(f"resumed    at step {at} of {config.train.steps}")
    return "\n".join(lines)


def disk_needed(job: "Job") -> int:
    """Bytes a run leaves on disk, roughly: checkpoints, exports, previews."""
    config = job.config
    trained = sum(p.numel() for p in job.adapted.all_trainable().values())
    copies = 3 + (config.train.ema_decay is not None) + job.objectives.copies  # the weights, Adam's two moments, the average
    checkpoint = 4 * (trained * copies + job.adapted.prompt.waypoints.numel())
    pipeline = 0
    if config.export.pipeline:
        pipeline = 4 * sum(p.numel() for n, p in job.pipeline.unet.named_parameters() if ".lora_" not in n)
        pipeline += sum(f.stat().st_size for f in job.pipeline.folder.rglob("*") if f.is_file() and f.parent.name != "unet")
    previews = (config.train.steps // config.monitor.preview_every + 2) * 2_000_000
    objectives = job.objectives.kept_bytes(job)
    return checkpoint * (config.monitor.checkpoints_kept + 1) + 3 * 4 * trained + pipeline + previews + objectives


def _dry_run(job: "Job", folder: Path) -> int:
    """Two steps, the second one timed, and a preview; says what the run will need."""
    import torch

    from train.evaluation.evaluate import preview
    from train.step import training_step

    seconds = 0.0
    rehearsed = job.objectives.rehearse(job)
    dearest = math.lcm(job.config.kl.every, job.config.draft.every)  # steps of this kind have all terms
    for step in (0, dearest if dearest < job.config.train.steps else 0):
        began = time.monotonic()
        result = training_step(job, step)
        seconds = time.monotonic() - began
        if result.not_finite is not None:
            raise RunError(f"dry run: not finite, and nothing would be trained: {result.not_finite}")
    began = time.monotonic()
    if job.accelerator.is_main_process:
        with torch.no_grad():
            preview(job, job.adapted.prompt.start, None)
    preview_seconds = time.monotonic() - began
    cuda = job.accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = seconds * job.config.train.steps
    if job.accelerator.is_main_process:
        known = {n: v for n, v in result.objectives.items() if n.partition("_")[0] not in rehearsed}
        measured = {"loss": result.denoising, **known}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items() if value is not None)
        print(f"\ndry run: one step forward and back works; {shown}; no run was written")
        for name, group in job.adapted.trainable().items():
            count = sum(p.numel() for p in group.values())
            print(
                f"  trains   {name}: {count:,} parameters in {len(group)} tensors, gradient norm {result.grad_norms[name]:.3g}"
            )
        kl, own = " with KL" if job.config.kl.weight > 0 else "", f"; samples for {' and '.join(rehearsed)} come on top"
        minutes = f"{job.config.train.steps} steps in at most {total / 60:.1f} min"
        print(f"  step     {seconds:.2f} s{kl}; {minutes}{own if rehearsed else ''}")
        print(
            f"  preview  {preview_seconds:.1f} s for the first, about half of it after that; validation and export come on top"
        )
        print(f"  memory   {peak / 1e9:.2f} GB at peak on {'the GPU' if cuda else 'this machine'}")
        print(f"  disk     {disk_needed(job) / 1e6:.0f} MB in {folder}")
    return 0


def _outcome(run: "Run", signal_number: int | None) -> str:
    """The run's last lines: what was made, how much better it is, and how to use it."""
    from train.export.facelift import how_to_use
    from train.report.page import NAME as REPORT

    config, exported = run.job.config, run.exported
    assert exported is not None and run.first is not None, "every run ends in an export and starts with an evaluation"
    dtype = str(run.job.pipeline.unet.dtype).removeprefix("torch.")
    lines = [""]
    if run.step < config.train.steps:
        lines += [
            f"stopped by signal {signal_number} after step {run.step} of {config.train.steps}; go on with",
            f"  python -m train.softprompt --resume {run.folder}",
        ]
    made = sorted(p.name + ("/" if p.is_dir() else "") for p in exported.folder.iterdir() if not p.name.startswith("."))
    lines.append(f"made       {exported.folder}: {', '.join(made)}")
    lines.append(
        f"verified   read back in a fresh model: views differ by {exported.read_back:.1e} at most (allowed "
        f"{config.export.tolerance:g}); rounding the prompt to float16 changes them by {exported.rounding:.1e} (in "
        f"{dtype} arithmetic)" + ("" if run.merged is None else f"; merged pipeline {run.merged:.1e}")
    )
    lines += [f"           {line}" for line in _improvement(run)]
    if config.export.report:
        lines.append(f"report     {run.folder / REPORT}")
    return "\n".join(lines + [""] + how_to_use(exported.folder))


def _improvement(run: "Run") -> list[str]:
    """Before and after, of what was evaluated at both ends."""
    from softprompt.prompt.similarity import mean_pairwise_cosine
    from train.evaluation.evaluate import averaged
    from train.state.pacing import unfinished

    first, last = run.first or {}, run.last or {}
    lines = []
    for key, name in OUTCOMES.items():
        if key in first and key in last:
            change = f" ({last[key] / first[key] - 1:+.0%})" if key == "loss/validation" else ""
            lines.append(f"{name}: {first[key]:.4g} at step 0, {last[key]:.4g} at step {last['step']:.0f}{change}")
    if "loss/original_pretrained" in first and "loss/original" in last:
        lines.append(
            f"loss on the pretrained model's own domain: {first['loss/original_pretrained']:.4g} of the untouched model, "
            f"{last['loss/original']:.4g} at step {last['step']:.0f}"
        )
    prompt = run.job.adapted.prompt
    with averaged(run.job, run.ema):
        alike = [mean_pairwise_cosine(p) for p in (prompt.start, prompt(run.position))]
    lines.append(f"prompts of the views, mean cosine: {alike[0]:.3g} at step 0, {alike[1]:.3g} at step {run.step}")
    warnings = [f"{name}: {said}" for name, said in run.warned.items()]
    lines += [f"WARNING: {said}" for said in warnings + unfinished(run.job.config, run.pace, run.step)]
    if run.best and run.best["step"] == 0 < run.step:
        lines.append("WARNING: on held-out objects no step was better than the pretrained model")
    elif run.best and run.best["step"] < run.step:
        lines.append(
            f"best held-out loss {run.best['loss']:.4g} at step {run.best['step']:.0f}, in {run.folder / 'export' / 'best'}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
