"""Two processes on one CPU under accelerate: the same prompt on both, the losses of one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
LAUNCH += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
KEEP_EACH_PROMPT = """
import sys, torch, train.loop
from train.softprompt import main

def train_and_keep(job, folder, *, train=train.loop.train, **options):
    run = train(job, folder, **options)
    torch.save(job.adapted.prompt.learned.detach(), f"{sys.argv[1]}/prompt-of-rank-{job.accelerator.process_index}.pt")
    return run

train.loop.train = train_and_keep
sys.exit(main(sys.argv[2:]))
"""


def launch(processes: int, *arguments: str) -> str:
    done = subprocess.run(
        # accelerate starts several processes on a machine only where --multi_gpu says so, on a CPU too.
        [*LAUNCH, f"--num_processes={processes}", *(["--multi_gpu"] if processes > 1 else []), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/train", "loss/validation", "loss/original", "loss/kl_to_pretrained", "kl/on_original", "kl_view/back")
    return {name: [line[name] for line in lines if name in line] for name in names}


def test_two_processes_train_as_one_with_the_same_total_batch(mice, tmp_path):
    script = tmp_path / "keep_each_prompt.py"
    script.write_text(KEEP_EACH_PROMPT)
    options = [
        f"--data.train={mice / 'train'}",
        f"--data.cache={mice.parent / 'cache'}",
        f"--data.val={mice / 'val'}",
        "--train.steps=3",
        "--train.warmup_steps=0",
    ]
    options += [
        "--kl.every=1",
        "--kl.domain=both",
        "--data.original=micro",
        "--prompt.separation=1",
        "--monitor.log_every=1",
        "--monitor.validate_every=3",
        "--monitor.preview_objects=1",
    ]
    options += ["--monitor.preview_steps=2", "--monitor.validation_timesteps=1", "--train.device=cpu"]
    for processes, batch in ((2, 1), (1, 2)):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        run = [str(folder), f"--output={folder / 'run'}", f"--train.batch_size={batch}", *options]
        launch(processes, str(script), *run)

    first, second = (torch.load(tmp_path / "2" / f"prompt-of-rank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone, together = losses(tmp_path / "1" / "run"), losses(tmp_path / "2" / "run")
    assert len(alone["loss/train"]) == 3 and len(alone["loss/validation"]) == 2
    for name, values in alone.items():
        assert values
        assert together[name] == pytest.approx(values, abs=1e-4, rel=1e-3), name


def test_the_documented_launch_command_works(mice, tmp_path):
    options = [
        f"--data.train={mice / 'train'}",
        f"--data.cache={mice.parent / 'cache'}",
        f"--data.val={mice / 'val'}",
        "--train.batch_size=1",
        "--train.device=cpu",
    ]
    options += ["--kl.domain=new"]
    said = launch(2, "-m", "train.softprompt", *options, f"--output={tmp_path / 'run'}", "--dry-run")
    assert said.count("dry run: one step forward and back works") == 1, "only the first process speaks"
    assert "150 steps of 2 objects" in said
