"""The training loop.

All randomness is a function of (seed, step, position in the global batch), and so is the order of the data: a step is the same
whether the run was interrupted before it or not, and however its objects are shared out between batches and processes.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from softprompt.errors import RunError
from softprompt.files import new_file, remove_partial
from softprompt.prompt.curriculum import learning_rate_factor
from train.evaluation import evaluator as observe
from train.evaluation.diagnostics import is_spike
from train.log.logger import Monitor
from train.options.config import Config, option_values, to_yaml
from train.setup import Job
from train.state import artifacts as keep
from train.state.checkpoint import restore, set_aside_newer
from train.state.folder import list_checkpoints
from train.state.incidents import write_incident
from train.state.pacing import Pace, after_step
from train.state.run import Run
from train.state.stop import StopSignal
from train.step import StepResult, training_step

SMOOTHING = 0.98
"""Share of the training loss's running mean that a step leaves in place."""


def train(job: Job, folder: Path, *, state: Mapping[str, Any] | None, stop: StopSignal) -> Run:
    """Train until `train.steps` or until `stop` is set, whichever comes first; then export.

    state: a checkpoint to go on from, or None.
    Returns: the run; `run.step` says how far it came.
    Raises: RunError when numbers are not finite for `train.max_skipped` steps in a row, when weights that are frozen have
    moved, or when an export is not what is in memory.
    """
    config, main = job.config, job.accelerator.is_main_process
    run = start(job, folder, state)
    if main and job.skipped:
        with new_file(folder / "skipped_samples.txt") as partial:
            partial.write_text("".join(f"{one}\n" for one in job.skipped), encoding="utf-8")
    if state is None:
        run.monitor.text("config", f"```\n{to_yaml(config)}\n```")
    _begin_objectives(run, stop)
    observe.evaluate_if_due(run)

    with tqdm(
        total=config.train.steps,
        initial=run.step,
        unit="step",
        disable=not main,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
    ) as bar:
        _train(run, stop, bar)
    keep.checkpoint(run)
    keep.export(run, folder / "export")
    if config.export.pipeline and run.step >= config.train.steps:
        keep.export_pipeline(run, folder / "export")
    run.monitor.hparams(option_values(config), run.last or {})
    if main:
        keep.report(run)
    run.monitor.close()
    job.accelerator.wait_for_everyone()
    return run


def _train(run: Run, stop: StopSignal, bar: tqdm) -> None:
    """Steps, and what is due after each."""
    job, config = run.job, run.job.config
    since = time.monotonic()
    while run.step < config.train.steps and not stop.agreed(job.accelerator):
        try:
            result = training_step(job, run.step, run.pace)
        except torch.OutOfMemoryError:
            if not _save_memory(job):
                raise
            tqdm.write(
                f"step {run.step}: out of GPU memory; done again with gradient checkpointing, which stays on: a step takes a "
                f"third longer. train.gradient_checkpointing always begins with it",
                file=sys.stderr,
            )
            continue
        if result.skipped:
            _skipped(run, result)
        run.schedule.step()
        if run.ema is not None and not result.skipped:
            run.ema.step(job.adapted.all_trainable().values())
        run.step += 1
        run.window.append(_taken(run, result))
        bar.update()

        if observe.due(run, config.monitor.log_every):
            bar.set_postfix_str(_postfix(observe.log(run, since)))
            run.window, since = [], time.monotonic()
        if stop.save_agreed(job.accelerator) or observe.due(run, config.monitor.checkpoint_every):
            keep.checkpoint(run)
        if stop.agreed(job.accelerator) and run.step < config.train.steps:
            break  # whoever stops it does not wait for an evaluation
        began = time.monotonic()
        _begin_objectives(run, stop)
        observe.evaluate_if_due(run)
        since += time.monotonic() - began


def _begin_objectives(run: Run, stop: StopSignal) -> None:
    """Let objectives make what they need of the model as it is now."""
    job = run.job
    if job.objectives.begins(run.step):
        keep.checkpoint(run)  # what follows may take long; a killed run then goes on from here
        job.objectives.begin(job, run.folder, run.step, run.position, stopped=lambda: stop.number is not None)


def start(job: Job, folder: Path, state: Mapping[str, Any] | None) -> Run:
    """A run at step 0, or where a checkpoint (`state`) left it; its folder and log are opened."""
    config, decay = job.config, job.config.train.ema_decay
    run = Run(
        job=job,
        folder=folder,
        schedule=make_schedule(config, job.optimizer),
        pace=Pace.start(config),
        ema=None if decay is None else EMAModel(job.adapted.all_trainable().values(), decay=decay),
        monitor=Monitor(folder, active=job.accelerator.is_main_process),
    )
    if state is not None:
        restore(state, run.parts)
        run.go_on_from(state)
        if config.kl.target is None:
            run.pace = replace(run.pace, kl_weight=config.kl.weight)  # which --resume-override may have changed
        if job.accelerator.is_main_process:
            set_aside_newer(folder, run.step)
    if job.accelerator.is_main_process:
        remove_partial(folder)
        if state is None:
            keep.remove_results(folder)
        with new_file(folder / "config.yaml") as partial:
            partial.write_text(to_yaml(config), encoding="utf-8")
    run.frozen = job.adapted.frozen_sums()
    run.remember_weights()
    run.monitor.open(resumed_step=None if state is None else run.step, evaluated=observe.evaluated(run))
    return run


def make_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Each group's learning rate: warm-up and decay within the steps in which it trains."""

    def factor(group: str) -> Callable[[int], float]:
        first, end = config.window(group)
        return lambda step: learning_rate_factor(
            step, first=first, end=end, warmup=config.train.warmup_steps, schedule=config.train.schedule
        )

    return LambdaLR(optimizer, [factor(group["name"]) for group in optimizer.param_groups])


def _save_memory(job: Job) -> bool:
    """Switch gradient checkpointing on where it is left to need. Returns: whether that is a change."""
    unet, by_need = job.pipeline.unet, job.config.train.gradient_checkpointing == "auto"
    if not by_need or unet.is_gradient_checkpointing or job.accelerator.num_processes > 1:  # the others would not know
        return False
    job.optimizer.zero_grad(set_to_none=True)
    unet.enable_gradient_checkpointing()
    torch.cuda.empty_cache()
    return True


def _taken(run: Run, result: StepResult) -> StepResult:
    """Take in what a step gave. Returns: it, marked where its loss was a spike."""
    if result.not_finite is not None:
        return result
    spike = False
    if result.denoising is not None:
        spike = is_spike(result.denoising, run.running_loss)
        before = result.denoising if run.running_loss is None else run.running_loss
        run.running_loss = SMOOTHING * before + (1 - SMOOTHING) * result.denoising
    if not result.skipped:
        run.skipped_in_a_row = 0
    observe.move_on(run, after_step(run.job.config, run.pace, run.step, denoising=result.denoising, kl=result.kl))
    return replace(result, spike=spike)


def _skipped(run: Run, result: StepResult) -> None:
    """Say and write down what stopped a step; stop where too many did. An overflow now and then is how fp16 finds its scale.

    Raises: RunError.
    """
    run.skipped_in_a_row += 1
    most, main = run.job.config.train.max_skipped, run.job.accelerator.is_main_process
    given_up = run.skipped_in_a_row >= most
    what = result.not_finite or "gradients overflowed in fp16"
    incident = None
    if (result.not_finite and run.skipped_in_a_row == 1) or given_up:
        incident = write_incident(run, run.step, what)
    if result.not_finite and main:
        tqdm.write(f"WARNING step {run.step}: not finite: {what}; the step is skipped, the weights stay", file=sys.stderr)
    if given_up:
        checkpoints = list_checkpoints(run.folder)
        sound = f"{checkpoints[-1]} is sound" if checkpoints else "there is no checkpoint yet"
        fit = [value for value in (result.denoising, result.kl) if value is not None]
        guilty = [name for name, value in result.objectives.items() if not math.isfinite(value)]
        likely = "a learning rate is too high, or fp16 overflows (try train.precision bf16)"
        if guilty and all(map(math.isfinite, fit)):
            likely = f"it is {guilty[0]} itself that gives no number, since the denoising loss and the KL do"
        raise RunError(
            f"step {run.step}: not finite in {run.skipped_in_a_row} steps in a row (train.max_skipped), nothing trained in "
            f"them: {what}. {sound}. Likely {likely}; see "
            f"which sample and layer it comes from: python -m train.replay {incident}"
        )


def _postfix(series: Mapping[str, float]) -> str:
    shown = {
        "loss": series.get("loss/train"),
        "KL": series.get("loss/kl_to_pretrained"),
        "s": series["curriculum/position"],
        "lr prompt": series.get("learning_rate/prompt"),
        "lr lora": series.get("learning_rate/lora"),
    }
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if value is not None)
