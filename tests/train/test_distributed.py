"""Two processes on one CPU under accelerate: the same prompt on both, that of one process with the whole batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.models import write_mice, write_smallest_model
from tests.runs import series
from train.log.series import read_series
from train.softprompt import main
from train.state.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
LAUNCH += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
LAUNCH += ["--num_processes=2", "--multi_gpu"]  # without the second accelerate starts one process on a machine, on a CPU too
KEEP_EACH_PROMPT = """
import sys, torch, train.loop
from train.softprompt import main

def train_and_keep(job, folder, *, train=train.loop.train, **options):
    run = train(job, folder, **options)
    torch.save(job.adapted.prompt.learned.detach(), f"{sys.argv[1]}/prompt-of-rank-{job.accelerator.process_index}.pt")
    return run

train.loop.train = train_and_keep
assert main([*sys.argv[2:], "--dry-run"]) == 0
sys.exit(main(sys.argv[2:]))
"""


def losses(run: Path) -> dict[str, list[float]]:
    lines = series(run)
    names = ["loss/train", "loss/validation", "loss/original", "loss/kl_to_pretrained", "kl/on_original", "kl_view/back"]
    names += [f"objective/{n}" for n in ("draft", "dpo", "spin", "studio", "separate")]
    return {name: [line[name] for line in lines if name in line] for name in names}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three mice to train on and three others, neither shared out evenly between two processes; and the smallest model."""
    folder = tmp_path_factory.mktemp("three")
    write_smallest_model(folder / "model")
    return write_mice(folder, train=3, val=3)


def options(mice: Path) -> list[str]:
    return [
        f"--model={mice / 'model'}",
        f"--data.train={mice / 'train'}",
        f"--data.val={mice / 'val'}",
        f"--data.original={mice / 'val'}",
        f"--data.cache={mice / 'cache'}",
        "--kl.every=1",
        "--kl.domain=both",
        "--prompt.separation=1",
        "--draft.weight=0.1",
        "--draft.steps=1",
        "--draft.every=2",
        "--dpo.weight=0.1",
        "--dpo.beta=10",
        "--dpo.samples=2",
        "--dpo.sample_steps=1",
        "--dpo.held_out_objects=1",
        "--spin.weight=0.1",
        "--spin.beta=10",
        "--spin.iterations=2",
        "--spin.sample_steps=1",
        "--spin.held_out_objects=1",
        "--studio.weight=0.1",
        "--studio.over=views",
        "--separate.weight=0.1",
        "--separate.side=8",
        "--train.warmup_steps=0",
        "--train.device=cpu",
        "--monitor.log_every=1",
        "--monitor.validate_every=3",
        "--monitor.validation_timesteps=1",
        "--monitor.preview_objects=1",
        "--monitor.preview_steps=2",
        "--export.report=false",
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_total_batch(three, tmp_path, capsys):
    script = tmp_path / "keep_each_prompt.py"
    script.write_text(KEEP_EACH_PROMPT)
    argv = ["--train.steps=3", *options(three)]
    by_two = [str(script), str(tmp_path), *argv, f"--output={tmp_path / '2'}", "--train.batch_size=1"]
    done = subprocess.run([*LAUNCH, *by_two], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dry run: one step forward and back works") == 1, "only the first process speaks"
    assert main([*argv, f"--output={tmp_path / '1'}", "--train.batch_size=2"]) == 0

    first, second = (torch.load(tmp_path / f"prompt-of-rank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    (alone,) = (tensor for name, tensor in load_checkpoint(tmp_path / "1")["trainable"].items() if tensor.shape == first.shape)
    assert (first - alone).norm() < 1e-5 * alone.norm()
    together, by_one = losses(tmp_path / "2"), losses(tmp_path / "1")
    assert len(by_one["loss/train"]) == 3 and len(by_one["loss/validation"]) == 2
    for name, values in by_one.items():
        assert values
        assert together[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name

    # Only the first process writes.
    assert len(list((tmp_path / "2" / "tensorboard").glob("events*"))) == 1

    # Another number of processes goes on with it, where the objects of a step stay as many.
    resume = ["--resume", str(tmp_path / "2"), "--train.steps=4", "--export.pipeline=false"]
    assert main(resume) == 2
    assert "a step takes 1 objects here (1 x 1 x 1 processes); the run's steps take 2" in capsys.readouterr().err
    assert main([*resume, "--train.batch_size=2"]) == 0
    assert [line["step"] for line in read_series(tmp_path / "2")] == [0, 1, 2, 3, 3, 4, 4]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_the_checkpoint_named(three, tmp_path):
    run = tmp_path / "run"
    argv = [*options(three), "--train.steps=500", "--train.batch_size=1", "--monitor.checkpoint_every=1", f"--output={run}"]
    with subprocess.Popen(
        [*LAUNCH, "-m", "train.softprompt", *argv],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            waited = time.monotonic() + 120
            while not list((run / "checkpoints").glob("step-*[1-9]")):  # objectives that make samples leave one at step 0
                assert launcher.poll() is None and time.monotonic() < waited, "did not start training"
                time.sleep(0.1)
            ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(ranks[0]), signal.SIGKILL)  # the one that writes
            printed, said = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    assert printed.count("500 steps of 2 objects") == 1, "only the first process speaks"
    assert "error: another process of this run has ended, and this one cannot go on without it" in said
    assert f"go on with --resume {run}" in said
    assert load_checkpoint(run)["step"] >= 1
