"""Cost at full size on the device: steps, memory, whole runs. Each check is one function, in a process of its own."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from softprompt.data.samples import write_source
from softprompt.files import folder_size
from softprompt.micro.models import write_pipeline
from softprompt.micro.world import MicroWorld
from train.benchmark import steps as benchmarked
from train.callbacks import checkpoint
from train.evaluation.evaluator import averaged
from train.gpu.checks import OURS, SMALL, Setting, arguments, compiler, run_main
from train.gpu.results import Row, failed, is_true, judged, last_loss, skipped
from train.loop import start
from train.options.command_line import parse
from train.options.config import Config
from train.setup import prepare
from train.step import training_step

HELD_OUT = 24
"""Objects that a run of a few thousand samples validates on."""


def materials(setting: Setting) -> list[Row]:
    """A pipeline folder of random weights, and samples."""
    began = time.monotonic()
    # float16 on the disk: half the bytes to write and read; training loads them in its own precision.
    dtype = torch.float16 if setting.size == "sd21" else torch.float32
    write_pipeline(setting.size, setting.model, picture=None if setting.size == "sd21" else 16, dtype=dtype)
    write_source(MicroWorld("mice", 0, 10, size=64), setting.data)
    return [Row("pipeline folder written", f"{folder_size(setting.model) / 1e9:.2f} GB in {time.monotonic() - began:.0f} s")]


def main_job(setting: Setting) -> list[Row]:
    """The main job at the micro size, from nothing to an export read back."""
    return _main_job(setting, setting.device)


def main_job_on_cpu(setting: Setting) -> list[Row]:
    """The main job on the CPU, whose loss the device's must be near."""
    if setting.device == "cpu":
        return skipped("the device's loss against the CPU's", "there is one device")
    rows = _main_job(setting, "cpu")
    ends = [last_loss(setting.folder / f"main-{device}") for device in (setting.device, "cpu")]
    return [*rows, judged("held-out loss on the device against the CPU's, relative", abs(ends[0] / ends[1] - 1), most=0.1)]


def _main_job(setting: Setting, device: str) -> list[Row]:
    run = setting.folder / f"main-{device}"
    small = SMALL | {"export.pipeline": "true"} if setting.size == "tiny" else {}
    # Without the report, whose figures need matplotlib: a cluster's node may not have it.
    options = {**small, "export.report": "false", "train.device": device, "output": run}
    began = time.monotonic()
    argv = [sys.executable, "-m", "train.softprompt", *arguments(options)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return failed("the run", done.returncode, _last_line(done.stderr))
    read_back = re.search(r"views differ by (\S+) at most.*?(?:merged pipeline (\S+))?$", done.stdout, re.MULTILINE)
    assert read_back is not None, done.stdout
    return [
        Row("from nothing to the export", f"{time.monotonic() - began:.0f} s"),
        Row("held-out loss at the end", f"{last_loss(run):.4g}"),
        judged("export read back, largest difference", float(read_back[1]), most=1e-4),
    ]


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def steps(setting: Setting, batch_size: int, *, compiled: bool = False) -> list[Row]:
    """Ways of training against each other in one process, FaceLift's own where it fits."""
    file = setting.folder / f"steps-{batch_size}{'-compiled' if compiled else ''}.json"
    options = [f"--size={setting.size}", f"--device={setting.device}", f"--batch_size={batch_size}", f"--output={file}"]
    options += [
        f"--repeats={2 if setting.size == 'sd21' else 1}",
        f"--compile={str(compiled).lower()}",
        f"--facelift={str(not compiled).lower()}",
    ]
    with patch.object(benchmarked, "compile_blocks", compiler(setting.device)):
        code = run_main("train.benchmark.__main__", options)
    if code:
        return failed("train.benchmark", code)
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [Row("matrix product", f"{found['matmul_flops'] / 1e12:.4g} TFLOP/s")]
    speeds: dict[str, float] = {}
    for way in found["ways"]:
        seconds = median(way["seconds"])
        speeds[way["name"]] = batch_size / seconds
        used = way["flop"] / seconds / found["matmul_flops"]
        rows.append(Row(way["name"], f"{1e3 * seconds:.4g} ms a step, {batch_size / seconds:.3g} objects/s, {used:.0%} of it"))
    (ours,) = (way for way in found["ways"] if way["name"].endswith(OURS) and "original" not in way["name"])
    used = ours["flop"] / median(ours["seconds"]) / found["matmul_flops"]
    goals = setting.size == "sd21" and setting.device == "cuda"
    theirs = [speed for name, speed in speeds.items() if name.startswith("FaceLift")]
    if theirs:
        ratio = speeds[ours["name"]] / theirs[0]
        rows.append(judged("ours, KL every 4th, against FaceLift's own step", ratio, least=3 if goals else None, unit="x"))
    rows.append(judged("ours, KL every 4th, of the matrix product", used, least=0.45 if goals else None))
    return rows


def alone(setting: Setting, way: str) -> list[Row]:
    """The peak of memory of one way, with nothing else in its process."""
    file = setting.folder / f"alone-{re.sub('[^A-Za-z0-9]+', '-', way)}.json"
    options = [f"--size={setting.size}", f"--device={setting.device}", f"--only={way}", "--repeats=1", f"--output={file}"]
    if code := run_main("train.benchmark.__main__", [*options, f"--kernels={str(way == OURS).lower()}"]):
        return failed("train.benchmark", code)
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for one in found["ways"]:
        if one["peak_bytes"] is None:
            rows.append(Row(f"{one['name']}: peak", "the CPU's allocator keeps none", "", "skip"))
        else:
            most = 10.0 if way == OURS and setting.size == "sd21" else None
            rows.append(judged(f"{one['name']}: peak", one["peak_bytes"] / 1e9, most=most, unit=" GB"))
    return rows + [Row(f"kernel: {name[:80]}", f"{share:.1%} of the time") for name, share in found["kernels"].items()]


def profile_of_memory(setting: Setting, gigabytes: int) -> list[Row]:
    """Four steps, a preview and an export with a profile's configuration, on a card that has no more memory than it."""
    on_gpu = setting.device == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    run = setting.folder / f"run-{gigabytes}gb"
    code = run_main(
        "train.softprompt", [*_real_run(setting, f"facelift_mouse_{gigabytes}gb"), f"--output={run}", "--export.report=false"]
    )
    if code:
        return failed("the run", code)
    exported = is_true("export", (run / "export" / "clr_embeds.pt").is_file(), "written and read back", "written and read back")
    if not on_gpu:
        return [exported, Row("peak", "needs a CUDA device, whose memory can be limited and measured", "", "skip")]
    return [exported, judged("peak reserved", torch.cuda.max_memory_reserved() / 1e9, most=0.9 * gigabytes, unit=" GB")]


def long_run(setting: Setting) -> list[Row]:
    """Steps a second of a warm run, and what a run of 3,000 steps spends on validation, previews and checkpoints."""
    config = parse([*_real_run(setting, "facelift_mouse"), "--train.steps=3000"]).config
    job = prepare(config)
    run = start(job, setting.folder / "run-long", None)
    cuda = setting.device == "cuda"

    def timed(work: Callable[[], object]) -> float:
        if cuda:
            torch.cuda.synchronize()
        began = time.monotonic()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.monotonic() - began

    for step in range(2):
        training_step(job.trainer, step)
    cycle = config.kl.every if setting.size == "sd21" else 1
    step_s = timed(lambda: [training_step(job.trainer, step) for step in range(2, 2 + cycle)]) / cycle
    with averaged(job.adapted, run.ema), torch.no_grad():
        validation_s = timed(lambda: job.evaluator.validation(0.0, with_original=False)) * HELD_OUT / len(job.held_out)
        shown = job.evaluator.preview(job.adapted.prompt(0.0), None)
        preview_s = timed(lambda: job.evaluator.preview(job.adapted.prompt(0.0), shown.pretrained))
    checkpoint_s = timed(lambda: checkpoint(run))
    return [
        Row("steps a second, warm, of 8 objects" if setting.size == "sd21" else "steps a second, warm", f"{1 / step_s:.3g}"),
        *_shares(config, step_s, {"validation": validation_s, "preview": preview_s, "checkpoint": checkpoint_s}),
    ]


def _shares(config: Config, step_s: float, once: dict[str, float]) -> list[Row]:
    """once: seconds of each, each time it is due."""
    monitor, length = config.monitor, config.train.steps
    due = {name: length // getattr(monitor, f"{'validate' if name == 'validation' else name}_every") + 1 for name in once}
    totals = {name: due[name] * seconds for name, seconds in once.items()}
    whole = length * step_s + sum(totals.values())
    rows = [Row(f"a run of {length} steps", f"{whole / 60:.1f} min, of which steps {length * step_s / whole:.1%}")]
    for name, total in totals.items():
        rows.append(Row(f"{name}, {due[name]} times", f"{once[name]:.2f} s each, {total / whole:.1%} of the run"))
    return rows


def _real_run(setting: Setting, config: str) -> list[str]:
    """Options of a short run of a configuration for real weights, on what `materials` has written."""
    repository = Path(__file__).parents[2]
    line = [f"--config={repository / 'configs' / f'{config}.yaml'}", f"--model={setting.model}", f"--data.train={setting.data}"]
    options = {
        "train.device": setting.device,
        "train.steps": 4,
        "train.warmup_steps": 0,
        "data.cache": setting.folder / "cache",
        "monitor.preview_objects": 1,
        "monitor.preview_steps": 30 if setting.size == "sd21" else 1,
        "monitor.validation_timesteps": 1,
        "export.pipeline": "false",
    }
    if setting.size == "tiny":
        options |= {"train.batch_size": 1, "train.accumulation": 1}
    return [*line, *arguments(options)]
