"""The command itself: it runs to the end, stops when told, resumes, and refuses bad input in one line."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from softprompt.micro import MICRO_MODEL
from softprompt.model.unet import build_unet, save_unet
from softprompt.prompt.embeddings import load_prompt
from tests.runs import exit_code, series
from train.log.series import is_ablation
from train.options.config import Config, to_yaml
from train.softprompt import main

REPOSITORY = Path(__file__).parents[2]
QUICK = [
    "--train.batch_size=1",
    "--monitor.log_every=1",
    "--monitor.validation_timesteps=1",
    "--monitor.preview_objects=1",
    "--monitor.preview_steps=2",
]


WITHOUT_EXTRAS = ["--export.pipeline=false", "--export.report=false"]


def on(mice: Path, *options: str) -> list[str]:
    """A quick run on the mice."""
    data = [f"--data.train={mice / 'train'}", f"--data.val={mice / 'val'}", f"--data.cache={mice.parent / 'cache'}"]
    return [*QUICK, *data, "--kl.domain=new", *options]


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which the command refuses its input, its exit code checked."""
    code = exit_code(main, [*QUICK, *options])
    # Where the machine is slow there is a progress bar before the error.
    said = [line for line in capsys.readouterr().err.strip().splitlines() if line and "%|" not in line]
    assert code == 2, said
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


# ------------------------------------------------------------------------------------------------------- real FaceLift


@pytest.mark.slow
def test_real_facelift_input_runs_to_the_end_and_drops_back_in(facelift, tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = [
        f"--model={tiny_folder}",
        f"--data.train={facelift / 'sample_000'}",
        f"--data.cache={tmp_path / 'cache'}",
        "--kl.domain=new",
        f"--prompt.waypoints=[{facelift / 'clr_embeds.pt'}, realistic]",
        "--train.steps=3",
        f"--output={out}",
    ]
    assert main([*QUICK, *options]) == 0
    said = capsys.readouterr().out
    assert "the only object is both trained on and validated on" in said
    assert "read back in a fresh model" in said and "--into FACELIFT" in said
    prompt = torch.load(out / "export" / "clr_embeds.pt", weights_only=True)
    assert prompt.shape == (6, 77, 1024) and prompt.dtype == torch.float16
    assert not torch.equal(prompt, torch.load(facelift / "clr_embeds.pt", weights_only=True))

    described = json.loads((out / "export" / "clr_embeds.json").read_text())
    assert "Adobe Research License" in described["licence"] and described["waypoints"][0]["texts"] is None
    exported = out / "export" / "pipeckpts"
    files = {p.relative_to(tiny_folder) for p in tiny_folder.rglob("*") if p.is_file()}
    assert {p.relative_to(exported) for p in exported.rglob("*") if p.is_file()} == files
    ours, theirs = (json.loads((f / "unet" / "config.json").read_text()) for f in (exported, tiny_folder))
    unimportant = {"_diffusers_version", "_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in unimportant} == {k: v for k, v in theirs.items() if k not in unimportant}
    index = [json.loads((f / "model_index.json").read_text()) for f in (exported, tiny_folder)]
    assert index[0] == index[1]

    again = refused(capsys, *options)
    assert f"{out} is not empty" in again and f"--resume {out}" in again
    assert main(["--resume", str(out), "--train.steps=4"]) == 0
    assert "resumed    at step 3 of 4" in capsys.readouterr().out
    points = series(out)
    assert [point["step"] for point in points if not is_ablation(point)] == [0, 1, 2, 3, 3, 4, 4]
    assert [point["step"] for point in points if is_ablation(point)] == [3, 4], "finished twice"
    assert "step 4 of 4" in (out / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_saves_exports_and_says_how_to_go_on(mice, smallest_model, tmp_path, number):
    out = tmp_path / "run"
    options = on(mice, f"--model={smallest_model}", f"--output={out}", "--train.steps=500")
    command = [sys.executable, "-m", "train.softprompt", *options]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            waited = time.monotonic() + 120
            while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
                assert process.poll() is None and time.monotonic() < waited, "did not start training"
                time.sleep(0.1)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + number, stderr
    assert "finishing what is under way" in stderr and "Traceback" not in stderr
    assert f"python -m train.softprompt --resume {out}" in stdout
    load_prompt(out / "export" / "clr_embeds.pt", width=1024)
    step = max(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))
    assert 1 <= step < 500

    assert main(["--resume", str(out), f"--train.steps={step + 1}", *WITHOUT_EXTRAS]) == 0
    steps = [line["step"] for line in series(out)]
    assert steps == sorted(steps) and steps[-1] == step + 1


def test_a_run_killed_before_its_first_checkpoint_begins_again(mice, tmp_path, capsys):
    out = tmp_path / "run"
    line = on(mice, "--train.steps=2", "--lora.rank=2", *WITHOUT_EXTRAS, f"--output={out}", "--resume-or-start")
    assert main(line) == 0
    expected, prompt = series(out), load_prompt(out / "export" / "clr_embeds.safetensors")
    shutil.rmtree(out / "checkpoints")
    capsys.readouterr()
    said = refused(capsys, *line)
    assert "holds no checkpoint to resume from, and the run had come to step 2" in said, "a finished run is not thrown away"
    assert series(out) == expected
    shutil.rmtree(out / "export")  # now it is as a kill just before the checkpoint of step 2 leaves it
    (out / "previews" / "left-step-000009.png").touch()
    (out / ".config.partial-0123456789ab.yaml").touch()
    assert main(line) == 0
    assert "resumed    at step 0, since the run was stopped before its first checkpoint, of 2" in capsys.readouterr().out
    assert series(out) == expected and torch.equal(load_prompt(out / "export" / "clr_embeds.safetensors"), prompt)
    assert not list(out.rglob("left-*")) and not list(out.rglob("*.partial-*"))


def test_a_dry_run_says_what_is_needed_and_writes_nothing(mice, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(on(mice, f"--output={out}", "--dry-run")) == 0
    said = capsys.readouterr().out
    for part in ("prompt: 473,088 parameters", "lora: 154,112 parameters", "s with KL; 150 steps in", "GB at peak", "MB in"):
        assert part in said
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------- bad input


def write_prompt(path: Path, change: Callable[[torch.Tensor], object]) -> Path:
    torch.save(change(torch.randn(6, 77, 1024, generator=torch.Generator().manual_seed(0))), path)
    return path


def with_nan(prompt: torch.Tensor) -> torch.Tensor:
    prompt[2, 5, 7] = float("nan")
    return prompt


def with_a_copy(prompt: torch.Tensor) -> torch.Tensor:
    prompt[3] = prompt[1]
    return prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[..., :768].clone(), r"is 768 wide .* takes 1024.*CLIP ViT-L/14"),
        (lambda p: p[:5].clone(), r"has 5 views .*; the model has 6"),
        (lambda p: p[:, :76].clone(), r"has 76 tokens a view .*expected 77"),
        (with_nan, r"NaN or infinite values in view right"),
        (lambda p: p * 0, r"all zero in view front"),
        (with_a_copy, r"views front_right and back are identical"),
        (
            lambda p: {"prompt": p},
            r"holds a dict with 'prompt' .*; expected one bare tensor .*; convert it with: python -m train\.prompts convert ",
        ),
        (lambda p: Path("x"), r"is no plain tensor file"),
    ],
)
def test_a_bad_prompt_is_refused(capsys, tmp_path, change, message):
    prompt, out = write_prompt(tmp_path / "prompt.pt", change), tmp_path / "run"
    said = refused(capsys, f"--prompt.waypoints=[{prompt}, realistic]", f"--output={out}")
    assert str(prompt) in said and re.search(message, said) and not out.exists(), said


def without_a_view(mice: Path) -> str:
    next((mice / "train").glob("*/cam_005.png")).unlink()
    return str(mice / "train")


def cut_short(mice: Path) -> str:
    picture = next((mice / "train").glob("*/cam_002.png"))
    picture.write_bytes(picture.read_bytes()[:200])
    return str(mice / "train")


def empty_foreground(mice: Path) -> str:
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(next((mice / "train").glob("*/cam_001.png")))
    return str(mice / "train")


def a_list(*lines: str) -> Callable[[Path], str]:
    def write(mice: Path) -> str:
        (mice / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return str(mice / "list.txt")

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mice: str(mice / "nowhere.txt"), r"nowhere\.txt: not found; expected a list of samples or a folder"),
        (a_list(), r"list\.txt: lists no sample"),
        (a_list("train/nobody"), r"list\.txt: line 1: 'train/nobody'.*no such sample folder"),
        (without_a_view, r"cam_005\.png missing, 5 of 6 views found"),
        (cut_short, r"cam_002\.png: cannot be decoded"),
        (empty_foreground, r"cam_001\.png: no visible pixel"),
    ],
)
def test_bad_data_is_refused(capsys, mice, tmp_path, spoil, message):
    shutil.copytree(mice, tmp_path / "mice")
    out = tmp_path / "run"
    data = f"--data.train={spoil(tmp_path / 'mice')}"
    said = refused(capsys, *on(tmp_path / "mice", data, f"--data.val={mice / 'val'}", f"--output={out}"))
    assert re.search(message, said) and not out.exists(), said


def other_width(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    shutil.rmtree(folder / "unet")
    save_unet(build_unet(config | {"cross_attention_dim": 512}), folder / "unet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"no such folder; expected a FaceLift pipeline folder"),
        (lambda folder: shutil.rmtree(folder / "vae"), r"is no FaceLift pipeline folder; missing vae/config\.json"),
        (other_width, r"is 1024 wide .*the UNet's cross-attention takes 512"),
    ],
)
def test_a_bad_model_is_refused(capsys, tmp_path, spoil, message):
    folder, out = tmp_path / "pipeckpts", tmp_path / "run"
    shutil.copytree(MICRO_MODEL, folder)
    spoil(folder)
    said = refused(capsys, f"--model={folder}", f"--output={out}")
    assert str(folder) in said and re.search(message, said) and not out.exists(), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.lerning_rate=1"], r"unknown option 'train\.lerning_rate'; did you mean"),
        (["--train.steps=many"], r"train\.steps: is many; expected a whole number"),
        (["--prompt.carry=fade"], r"curriculum\.position: is 1\.0; expected less than 1"),
        (["--data.reference_view=6"], r"data\.reference_view: is 6; expected views from 0 to 5"),
        (["--lora.targets=[to_q, to_x]"], r"lora\.targets: no layer of the UNet is called to_x"),
        (["--resume=nowhere"], r"nowhere: holds no config\.yaml"),
    ],
)
def test_a_bad_option_is_refused(capsys, tmp_path, options, message):
    out = tmp_path / "run"
    said = refused(capsys, *options, f"--output={out}")
    assert re.search(message, said) and not out.exists(), said


@pytest.mark.parametrize("resuming", [False, True])
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_it(capsys, tmp_path, resuming):
    if resuming:
        (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    where = ["--resume-override", f"--resume={tmp_path}"] if resuming else [f"--output={tmp_path}"]
    holder = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            said = refused(capsys, *where)
            assert f"{tmp_path} is in use: another process trains there" in said
        finally:
            other.kill()
    # The lock has died with its process.
    said = refused(capsys, *where, "--lora.targets=[to_x]")
    assert "in use" not in said


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_a_run_that_can_be_resumed(capsys, mice, smallest_model, tmp_path, monkeypatch):
    out, write = tmp_path / "run", Path.write_bytes

    def full_at_step_2(path, content):
        if "step-000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    options = on(mice, "--train.steps=2", "--monitor.checkpoint_every=1", f"--model={smallest_model}", *WITHOUT_EXTRAS)
    monkeypatch.setattr(Path, "write_bytes", full_at_step_2)
    assert main([*options, f"--output={out}"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: [Errno 28] No space left on device") and "the disk is full" in said
    assert said.endswith(f"{out / 'checkpoints' / 'step-000001'} is the newest checkpoint: go on with --resume {out}")
    monkeypatch.undo()
    assert (out / "error.txt").read_text().strip() == said.removeprefix("error: ")
    assert main(["--resume", str(out)]) == 0
    assert not (out / "error.txt").exists()
    assert "resumed    at step 1 of 2" in capsys.readouterr().out


def test_other_data_on_a_resume_is_refused_and_a_finished_run_stays_finished(capsys, mice, tmp_path):
    shutil.copytree(mice, tmp_path / "mice")
    out = tmp_path / "run"
    assert (
        main(
            on(tmp_path / "mice", f"--data.val={mice / 'val'}", "--train.steps=1", "--export.pipeline=false", f"--output={out}")
        )
        == 0
    )
    (tmp_path / "mice").rename(tmp_path / "moved")
    moved = ["--resume", str(out), f"--data.train={tmp_path / 'moved' / 'train'}", "--train.steps=2"]
    next(p for p in (tmp_path / "moved" / "train").iterdir() if p.is_dir()).rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(moved) == 2
    assert re.search(
        r"error: data\.train: has 3 objects, \w+ \(by their names\); the run has 4 objects", capsys.readouterr().err
    )
    assert not (out / "error.txt").exists(), "the run itself is as finished as it was"
    assert main([*moved, "--resume-override"]) == 0
    assert "changed    train.steps: is 2; the run has 1" in capsys.readouterr().out


def test_a_full_run_folder_is_left_as_it_is(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = refused(capsys, f"--output={tmp_path}")
    assert f"{tmp_path} is not empty; a run never writes over another" in said
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
