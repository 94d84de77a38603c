"""The messages of the main job: before a run, after a dry run, and at the end."""

import math
import resource
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt.errors import RunError
from softprompt.prompt.similarity import mean_pairwise_cosine
from train.evaluation.evaluator import averaged
from train.export.facelift import how_to_use
from train.log.series import OUTCOMES
from train.options.command_line import Request
from train.state.folder import REPORT
from train.state.run import Job, Run
from train.step import training_step


def summary(job: Job, folder: Path, state: Mapping[str, Any] | None, request: Request) -> str:
    """The run in a few lines, before it starts. state: the checkpoint that is resumed, or None."""
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
        f"training   {groups}; {config.train.steps} steps of {job.trainer.batches.objects_per_step} objects",
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


def disk_needed(job: Job) -> int:
    """Bytes that a run writes, roughly: checkpoints, exports, previews, own samples."""
    config = job.config
    trained = sum(p.numel() for p in job.adapted.all_trainable().values())
    copies = (
        3 + (config.train.ema_decay is not None) + sum(term.copies for term in job.trainer.objectives.terms)
    )  # the weights, Adam's two moments, the average
    checkpoint = 4 * (trained * copies + job.adapted.prompt.waypoints.numel())
    pipeline = 0
    if config.export.pipeline:
        pipeline = 4 * sum(p.numel() for n, p in job.pipeline.unet.named_parameters() if ".lora_" not in n)
        pipeline += sum(f.stat().st_size for f in job.pipeline.folder.rglob("*") if f.is_file() and f.parent.name != "unet")
    previews = (config.train.steps // config.monitor.preview_every + 2) * 2_000_000
    objectives = sum(term.kept_bytes(job.trainer.context) for term in job.trainer.objectives.terms)
    return checkpoint * (config.monitor.checkpoints_kept + 1) + 3 * 4 * trained + pipeline + previews + objectives


def dry_run(job: Job, folder: Path) -> None:
    """Do two steps, the second one timed, and a preview; print what the run will need. Raises: RunError where a number is not
    finite."""
    seconds = 0.0
    terms, context = job.trainer.objectives.terms, job.trainer.context
    rehearsed = [term.name for term in terms if term.rehearse(context)]
    dearest = math.lcm(job.config.kl.every, job.config.draft.every)  # steps of this kind have all terms
    for step in (0, dearest if dearest < job.config.train.steps else 0):
        began = time.monotonic()
        result = training_step(job.trainer, step)
        seconds = time.monotonic() - began
        if result.not_finite is not None:
            raise RunError(f"dry run: not finite, and nothing would be trained: {result.not_finite}")
    began = time.monotonic()
    if job.accelerator.is_main_process:
        with torch.no_grad():
            job.evaluator.preview(job.adapted.prompt.start, None)
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


def outcome(run: Run, signal_number: int | None) -> str:
    """The last lines of a run: its files, its improvement, and how to use them."""
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


def _improvement(run: Run) -> list[str]:
    """Results at step 0 and at the end, and warnings."""
    first, last = run.first or {}, run.last or {}
    lines = []
    for key, name in OUTCOMES.items():
        if key in first and key in last:
            change = f" ({last[key] / first[key] - 1:+.0%})" if key == "loss/validation" else ""
            lines.append(f"{name}: {first[key]:.4g} at step 0, {last[key]:.4g} at step {last['step']:.0f}{change}")
    if "loss/original_pretrained" in first and "loss/original" in last:
        lines.append(
            f"loss on the original domain: {first['loss/original_pretrained']:.4g} of the pretrained model, "
            f"{last['loss/original']:.4g} at step {last['step']:.0f}"
        )
    prompt = run.job.adapted.prompt
    with averaged(run.job.adapted, run.ema):
        alike = [mean_pairwise_cosine(p) for p in (prompt.start, prompt(run.position))]
    lines.append(f"prompts of the views, mean cosine: {alike[0]:.3g} at step 0, {alike[1]:.3g} at step {run.step}")
    warnings = [f"{name}: {said}" for name, said in run.diagnostics.items()]
    lines += [f"WARNING: {said}" for said in warnings + run.job.trainer.curriculum.unfinished(run.curricula, run.step)]
    if run.best and run.best["step"] == 0 < run.step:
        lines.append("WARNING: on held-out objects no step was better than the pretrained model")
    elif run.best and run.best["step"] < run.step:
        lines.append(
            f"best held-out loss {run.best['loss']:.4g} at step {run.best['step']:.0f}, in {run.folder / 'export' / 'best'}"
        )
    return lines
