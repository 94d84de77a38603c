"""Correctness of the numbers on the device, at the micro size: each check is one function, in a process of its own."""

import json
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import torch

from softprompt.data.batch import seeded
from softprompt.errors import RunError
from softprompt.model.sampling import sample_views
from train import setup
from train.evaluation.evaluator import averaged
from train.gpu.checks import SMALL, Setting, arguments, compiler, run_main
from train.gpu.results import Row, is_true, judged, last_loss, skipped
from train.loop import train
from train.options.command_line import parse
from train.setup import Job, prepare
from train.state.stop import StopSignal
from train.step import training_step

TOLERANCES = {"fp32": (2e-3, 5e-3), "bf16": (0.03, 0.03), "fp16": (0.01, 0.01)}
"""The largest allowed differences from float32 on the CPU, by precision: of a loss, relative; of a picture in [0, 1], mean.
 float32 differs by the order of sums; bf16 keeps 8 bits of a number, fp16 11."""
STEPS = 3


def job_for(setting: Setting, **options: object) -> Job:
    """A small run of the embedded model on the device."""
    given = {**SMALL, "train.device": setting.device, **options}
    return prepare(parse(arguments(given)).config)


def _numbers(job: Job) -> dict[str, Any]:
    """Losses of some steps, a validation and a sampled set."""
    results = [training_step(job.trainer, step) for step in range(STEPS)]
    with averaged(job.adapted, None), torch.no_grad():
        validation = job.evaluator.validation(0.0, with_original=False)["loss/validation"]
        picture = job.held_out.pictures(0, seeded("preview", 0))[0]
        views = sample_views(job.pipeline, job.adapted.prompt(0.0), picture, steps=4, guidance_scale=2.0, eta=0.0)
    return {
        "loss": [result.denoising for result in results],
        "kl": [result.kl for result in results],
        "validation": validation,
        "views": views.float().cpu().flatten().tolist(),
    }


def reference(setting: Setting) -> list[Row]:
    """float32 on the CPU, which the others are compared with."""
    numbers = _numbers(job_for(setting, **{"train.device": "cpu", "train.precision": "fp32"}))
    setting.reference.write_text(json.dumps(numbers), encoding="utf-8")
    return [Row("held-out loss after three steps", f"{numbers['validation']:.4g}")]


def precision(setting: Setting, name: str) -> list[Row]:
    """Steps, KL, validation and views in one precision, against the reference."""
    if name == "fp16" and setting.device == "cpu":
        return skipped(name, "fp16 needs a CUDA device")
    job = job_for(setting, **{"train.precision": name})
    found, expected = _numbers(job), json.loads(setting.reference.read_text(encoding="utf-8"))
    most_loss, most_view = TOLERANCES[name]
    losses = [abs(a / b - 1) for a, b in zip(found["loss"], expected["loss"], strict=True)]
    # From the first measurement after an update on; the KL is a square, so its relative difference is larger.
    later = [abs(a / b - 1) for a, b in zip(found["kl"][1:], expected["kl"][1:], strict=True)]
    views = torch.tensor(found["views"]) - torch.tensor(expected["views"])
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in job.adapted.all_trainable().values()}
    return [
        judged("training losses, relative", max(losses), most=most_loss),
        judged("KL before the first update", abs(found["kl"][0]), most=0.0),
        judged("KL after it, relative", max(later), most=3 * most_loss),
        judged("held-out loss, relative", abs(found["validation"] / expected["validation"] - 1), most=most_loss),
        judged("sampled views, mean difference", float(views.abs().mean()), most=most_view),
        is_true("prompt and LoRA", dtypes == {"float32"}, ", ".join(sorted(dtypes)), "float32"),
    ]


def scaler(setting: Setting) -> list[Row]:
    """fp16's gradient scaler leaves an overflowing step out and goes on."""
    if setting.device == "cpu":
        return skipped("an overflow is left out", "fp16 needs a CUDA device")
    job = job_for(setting, **{"train.precision": "fp16"})
    scaler = job.accelerator.scaler
    assert scaler is not None
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**60})
    before = [parameter.detach().clone() for parameter in job.adapted.all_trainable().values()]
    first = training_step(job.trainer, 0)
    kept = all(torch.equal(a, b) for a, b in zip(before, job.adapted.all_trainable().values(), strict=True))
    taken = next((step for step in range(1, 80) if not training_step(job.trainer, step).skipped), None)
    return [
        is_true("an overflowing step", first.skipped and kept, f"skipped {first.skipped}, weights kept {kept}", "both true"),
        is_true("a later step trains", taken is not None, f"step {taken}", "any"),
    ]


def killed(setting: Setting) -> list[Row]:
    """A run that is killed and resumed ends as one that was not."""
    whole, cut = setting.folder / "run-whole", setting.folder / "run-killed"
    options = {**SMALL, "train.device": setting.device, "train.steps": 6, "monitor.checkpoint_every": 2}
    line = [*arguments(options), "--resume-or-start"]

    argv = [sys.executable, "-m", "train.softprompt", *line, f"--output={cut}"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((cut / "checkpoints").glob("step-*")):
            time.sleep(0.05)
        was_killed = process.poll() is None
        process.kill()
    for folder in (cut, whole):
        if code := run_main("train.softprompt", [*line, f"--output={folder}"]):
            raise RunError(f"train.softprompt ended with {code}")
    same = 0.0 if setting.device == "cpu" else 1e-2  # kernels on a GPU are not all deterministic
    ends = [last_loss(run) for run in (cut, whole)]
    return [
        is_true("killed before its end", was_killed, str(was_killed), "true"),
        judged("its held-out loss at the end, relative", abs(ends[0] / ends[1] - 1), most=same),
    ]


def compiled(setting: Setting) -> list[Row]:
    """Compiled blocks against plain ones."""
    plain = job_for(setting)
    losses = [training_step(plain.trainer, step).denoising for step in range(STEPS)]
    began = time.monotonic()
    with patch.object(setup, "compile_blocks", compiler(setting.device)):
        job = job_for(setting, **{"train.compile": "true"})
    found = [training_step(job.trainer, step).denoising for step in range(STEPS)]
    worst = max(abs(a / b - 1) for a, b in zip(found, losses, strict=True) if a is not None and b)
    return [
        judged("losses, relative", worst, most=TOLERANCES["bf16" if setting.device == "cuda" else "fp32"][0]),
        Row("compiling and three steps", f"{time.monotonic() - began:.0f} s"),
    ]


def encoders(setting: Setting) -> list[Row]:
    """VAE and image encoder leave the card while training does not need them, and come back."""
    job = job_for(setting)
    pipeline, away = job.pipeline, job.pipeline.vae.device.type
    picture = job.held_out.pictures(0, seeded("preview", 0))[0]
    with averaged(job.adapted, None), torch.no_grad():
        prompt = job.adapted.prompt(0.0)
        first, second = (sample_views(pipeline, prompt, picture, steps=2, guidance_scale=1.0, eta=0.0) for _ in range(2))
        with pipeline.encoders_on_device():
            back = pipeline.vae.device.type
    places, wanted = [away, back, pipeline.vae.device.type], ["cpu", setting.device, "cpu"]
    return [
        is_true("they rest", pipeline.encoders_rest, str(pipeline.encoders_rest), "true"),
        is_true("before, in use, and after", places == wanted, ", ".join(places), ", ".join(wanted)),
        judged("views before and after", float((first - second).abs().max()), most=1e-3),
    ]


def memory(setting: Setting) -> list[Row]:
    """Out of memory is answered by gradient checkpointing: the card's memory is limited to less than a plain step takes."""
    if setting.device == "cpu":
        return skipped("a step that does not fit is done again", "needs a CUDA device, whose memory can be limited")
    options = {"train.batch_size": 24, "data.limit": 24, "train.steps": 2, "train.precision": "fp32"}
    job = job_for(setting, **options)
    unet, peaks = job.pipeline.unet, []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training_step(job.trainer, 0)
        peaks.append(torch.cuda.max_memory_reserved())
    unet.disable_gradient_checkpointing()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / total)
    run = train(job, setting.folder / "run-memory", state=None, stop=StopSignal())
    return [
        Row("a step plain, and with checkpointing", f"{peaks[0] / 1e9:.2f} GB, {peaks[1] / 1e9:.2f} GB"),
        is_true("checkpointing was switched on", unet.is_gradient_checkpointing, str(unet.is_gradient_checkpointing), "true"),
        is_true("the run came to its end", run.step == 2, f"step {run.step}", "step 2"),
    ]
