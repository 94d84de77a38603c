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
from train import callbacks
from train.evaluation.diagnostics import is_spike
from train.log.logger import Logger
from train.options.config import Config, option_values, to_yaml
from train.state.checkpoint import restore, set_aside_newer
from train.state.folder import list_checkpoints
from train.state.incidents import write_incident
from train.state.run import Job, Run
from train.state.stop import StopSignal
from train.step import StepResult, training_step

SMOOTHING = 0.98
"""Share of the training loss's running mean that a step keeps."""


def train(job: Job, folder: Path, *, state: Mapping[str, Any] | None, stop: StopSignal) -> Run:
    """Train until `train.steps` or until `stop` is set, whichever comes first; then save and export.

    state: a checkpoint to resume from, or None.
    Returns: the run; `run.step` says how far it came.
    Raises: RunError when numbers are not finite for `train.max_skipped` steps in a row, when frozen weights have changed, or
    when an export does not read back.
    """
    config, main = job.config, job.accelerator.is_main_process
    run = start(job, folder, state)
    _begin_objectives(run, stop)
    callbacks.evaluate_if_due(run)

    with tqdm(
        total=config.train.steps,
        initial=run.step,
        unit="step",
        disable=not main,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file needs a line now and then
    ) as bar:
        _train(run, stop, bar)

    callbacks.checkpoint(run)
    callbacks.export(run, folder / "export")
    if config.export.pipeline and run.step >= config.train.steps:
        callbacks.export_pipeline(run, folder / "export")
    callbacks.log_summary(run, option_values(config))
    run.logger.close()
    job.accelerator.wait_for_everyone()
    return run


def _train(run: Run, stop: StopSignal, bar: tqdm) -> None:
    """The steps, and what is due after each."""
    job, monitor = run.job, run.job.config.monitor
    since, timed = time.monotonic(), 0
    stopped, _ = stop.agree(job.accelerator)
    while run.step < job.config.train.steps and not stopped:
        try:
            result = training_step(job.trainer, run.step, run.curricula)
        except torch.OutOfMemoryError:
            if not _enable_checkpointing(job):
                raise
            tqdm.write(
                f"step {run.step}: out of GPU memory; repeated with gradient checkpointing, which stays on: a step takes a "
                f"third longer. train.gradient_checkpointing always starts with it",
                file=sys.stderr,
            )
            continue
        if result.skipped:
            _skipped(run, result)
        run.schedule.step()
        if run.ema is not None and not result.skipped:
            run.ema.step(job.adapted.all_trainable().values())
        run.step += 1
        timed += 1
        run.window.append(_taken(run, result))
        bar.update()

        if run.is_due(monitor.log_every):
            bar.set_postfix_str(_postfix(callbacks.log(run, steps=timed, seconds=time.monotonic() - since)))
            run.window, since, timed = [], time.monotonic(), 0
        stopped, save = stop.agree(job.accelerator)
        if save or run.is_due(monitor.checkpoint_every):
            began, stop.save = time.monotonic(), False
            callbacks.checkpoint(run)
            since += time.monotonic() - began
        if stopped and run.step < job.config.train.steps:
            break  # nobody who stops a run wants to wait for an evaluation
        began = time.monotonic()
        if _begin_objectives(run, stop):
            stopped, _ = stop.agree(job.accelerator)  # a stop has ended the preparation early: no step may use it
        callbacks.evaluate_if_due(run)
        since += time.monotonic() - began


def start(job: Job, folder: Path, state: Mapping[str, Any] | None) -> Run:
    """A run at step 0, or at a checkpoint (`state`); its folder and log are opened."""
    config, decay, main = job.config, job.config.train.ema_decay, job.accelerator.is_main_process
    run = Run(
        job=job,
        folder=folder,
        schedule=make_schedule(config, job.trainer.optimizer),
        curricula=job.trainer.curriculum.start(),
        ema=None if decay is None else EMAModel(job.adapted.all_trainable().values(), decay=decay),
        logger=Logger(folder, active=main),
    )
    if state is not None:
        restore(state, run.parts)
        run.load_progress(state)
        if config.kl.target is None:
            run.curricula = replace(run.curricula, kl_weight=config.kl.weight)  # --resume-override may have changed it
        if main:
            set_aside_newer(folder, run.step)
    if main:
        remove_partial(folder)
        if state is None:
            callbacks.remove_results(folder)
        with new_file(folder / "config.yaml") as partial:
            partial.write_text(to_yaml(config), encoding="utf-8")
        if job.skipped:
            with new_file(folder / "skipped_samples.txt") as partial:
                partial.write_text("".join(f"{one}\n" for one in job.skipped), encoding="utf-8")
    run.frozen = job.adapted.frozen_sums()
    run.remember_weights()
    run.logger.open(resumed_step=None if state is None else run.step, evaluated=run.is_evaluated)
    if state is None:
        run.logger.text("config", f"```\n{to_yaml(config)}\n```")
    return run


def make_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Learning rate of each group: warm-up and decay within the steps in which it trains."""

    def factor(group: str) -> Callable[[int], float]:
        first, end = config.window(group)
        return lambda step: learning_rate_factor(
            step, first=first, end=end, warmup=config.train.warmup_steps, schedule=config.train.schedule
        )

    return LambdaLR(optimizer, [factor(group["name"]) for group in optimizer.param_groups])


def _begin_objectives(run: Run, stop: StopSignal) -> bool:
    """Let objectives prepare what depends on the model as it is now. Returns: whether any did."""
    trainer = run.job.trainer
    if terms := trainer.objectives.begins(run.step):
        callbacks.checkpoint(run)  # the preparation may take long; a killed run resumes from here
        for term in terms:
            term.begin(trainer.context, run.folder, run.step, run.position, stopped=lambda: stop.number is not None)
    return bool(terms)


def _enable_checkpointing(job: Job) -> bool:
    """Enable gradient checkpointing if it is set to `auto`. Returns: whether that changes anything."""
    unet, automatic = job.pipeline.unet, job.config.train.gradient_checkpointing == "auto"
    if not automatic or unet.is_gradient_checkpointing or job.accelerator.num_processes > 1:  # the others would not know
        return False
    job.trainer.optimizer.zero_grad(set_to_none=True)
    unet.enable_gradient_checkpointing()
    torch.cuda.empty_cache()
    return True


def _taken(run: Run, result: StepResult) -> StepResult:
    """Update the run's state by a step's numbers. Returns: the result, marked where its loss was a spike."""
    if result.not_finite is not None:
        return result
    spike = False
    if result.denoising is not None:
        spike = is_spike(result.denoising, run.running_loss)
        before = result.denoising if run.running_loss is None else run.running_loss
        run.running_loss = SMOOTHING * before + (1 - SMOOTHING) * result.denoising
    if not result.skipped:
        run.skipped_in_a_row = 0
    curriculum = run.job.trainer.curriculum
    callbacks.advance(run, curriculum.after_step(run.curricula, run.step, denoising=result.denoising, kl=result.kl))
    return replace(result, spike=spike)


def _skipped(run: Run, result: StepResult) -> None:
    """Print and record why a step was skipped; end the run after too many. Rare overflows are how fp16 finds its scale.

    Raises: RunError.
    """
    run.skipped_in_a_row += 1
    given_up = run.skipped_in_a_row >= run.job.config.train.max_skipped
    what = result.not_finite or "gradients overflowed in fp16"
    incident = None
    if (result.not_finite and run.skipped_in_a_row == 1) or given_up:
        incident = write_incident(run, run.step, what)
    if result.not_finite and run.job.accelerator.is_main_process:
        tqdm.write(f"WARNING step {run.step}: not finite: {what}; the step is skipped, the weights stay", file=sys.stderr)
    if given_up:
        checkpoints = list_checkpoints(run.folder)
        sound = f"{checkpoints[-1]} is sound" if checkpoints else "there is no checkpoint yet"
        losses = [value for value in (result.denoising, result.kl) if value is not None]
        guilty = [name for name, value in result.objectives.items() if not math.isfinite(value)]
        likely = "a learning rate is too high, or fp16 overflows (try train.precision bf16)"
        if guilty and all(map(math.isfinite, losses)):
            likely = f"{guilty[0]} itself is not finite, since the denoising loss and the KL are"
        raise RunError(
            f"step {run.step}: not finite in {run.skipped_in_a_row} steps in a row (train.max_skipped), nothing trained in "
            f"them: {what}. {sound}. Likely {likely}; to find the sample and the layer: python -m train.replay {incident}"
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
