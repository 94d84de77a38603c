"""A step whose numbers are not finite: skipped, counted, written down, and done again by `python -m train.replay`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt.errors import RunError
from train import step
from train.loop import train
from train.options.config import Config
from train.replay import main
from train.setup import prepare
from train.state import incidents
from train.state.checkpoint import load_checkpoint
from train.state.folder import list_incidents
from train.state.incidents import read_incident
from train.state.run import Job, Run
from train.state.stop import StopSignal
from train.step import Trainer


def run_to_end(config: Config, folder: Path) -> Run:
    state = load_checkpoint(folder) if (folder / "checkpoints").is_dir() else None
    return train(prepare(config), folder, state=state, stop=StopSignal())


def weights(job: Job) -> list[torch.Tensor]:
    return [p.detach().clone() for p in job.adapted.all_trainable().values()]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil(2, 3)`: the losses of steps 2 and 3 are not a number."""

    def build(*steps: int) -> None:
        clip = step._clip_gradients

        def with_nan(trainer: Trainer, number: int) -> dict[str, torch.Tensor]:
            if number in steps:
                trainer.adapted.prompt.learned.grad.fill_(float("nan"))
            return clip(trainer, number)

        monkeypatch.setattr(step, "_clip_gradients", with_nan)

    return build


def test_a_bad_step_is_skipped_counted_and_written_down_and_the_run_goes_on(
    mice: Path,
    small_config: Callable[..., Config],
    tmp_path: Path,
    spoil: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(1, 2)
    run = run_to_end(small_config(mice, **{"train.steps": 4, "train.ema_decay": 0.5, "kl.every": 1}), tmp_path / "run")
    assert run.step == 4 and run.skipped_in_a_row == 0
    assert all(p.isfinite().all() for p in run.job.adapted.all_trainable().values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = {line["step"]: line["gradient/skipped_share"] for line in lines if "gradient/skipped_share" in line}
    assert shares == {1: 0, 2: 1, 3: 1, 4: 0}
    assert [("loss/train" in line) for line in lines if "gradient/skipped_share" in line] == [True, False, False, True]
    assert re.search(
        r"WARNING step 1: not finite: denoising loss 0\.\d+, KL .*, gradient norms prompt nan", capsys.readouterr().err
    )

    (folder,) = list_incidents(tmp_path / "run")  # of the first of each row
    incident = read_incident(folder)
    assert folder.name == "step-000001" and incident["step"] == 1
    (batch,) = incident["batches"]
    wanted = run.job.trainer.batches.of_step(1, 0, original=False)[0]
    assert batch["samples"] == run.job.trainer.batches.names(wanted)
    assert batch["timesteps"] == run.job.trainer.batches.make(wanted).timesteps.tolist()
    assert incident["again"] == f"python -m train.replay {folder}"


def test_the_weights_of_a_skipped_step_are_those_before_it(
    mice: Path, small_config: Callable[..., Config], spoil: Callable[..., None]
) -> None:
    spoil(1)
    job = prepare(small_config(mice, **{"prompt.decay": 0.5}))
    step.training_step(job.trainer, 0)
    before, moments = weights(job), [s["step"].item() for s in job.trainer.optimizer.state_dict()["state"].values()]
    assert step.training_step(job.trainer, 1).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, weights(job), strict=True))
    assert [s["step"].item() for s in job.trainer.optimizer.state_dict()["state"].values()] == moments
    assert not step.training_step(job.trainer, 2).skipped


def test_too_many_in_a_row_stop_the_run_with_the_sound_checkpoint_named(
    mice: Path, small_config: Callable[..., Config], tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil(*range(2, 100))
    config = small_config(mice, **{"train.steps": 20, "train.max_skipped": 3})
    with pytest.raises(RunError) as error:
        run_to_end(config, tmp_path / "run")
    said = str(error.value)
    assert said.startswith(
        "step 4: not finite in 3 steps in a row (train.max_skipped), nothing trained in them: denoising loss"
    )
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step-000004'} is sound" in said
    assert f"python -m train.replay {tmp_path / 'run' / 'incidents' / 'step-000004'}" in said
    assert load_checkpoint(tmp_path / "run")["step"] == 4


def test_only_the_newest_incidents_are_kept(
    mice: Path,
    small_config: Callable[..., Config],
    tmp_path: Path,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents, "KEPT", 1)
    spoil(0, 2)
    run_to_end(small_config(mice, **{"train.steps": 4}), tmp_path / "run")
    assert [folder.name for folder in list_incidents(tmp_path / "run")] == ["step-000002"]


# ----------------------------------------------------------------------------------------------------------- done again


def test_a_step_done_again_names_the_layer_or_says_that_all_is_well(
    mice: Path,
    small_config: Callable[..., Config],
    tmp_path: Path,
    spoil: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(2)
    run_to_end(small_config(mice, **{"train.steps": 3, "train.batch_size": 2, "separate.weight": 0.1}), tmp_path / "run")
    (folder,) = list_incidents(tmp_path / "run")
    monkeypatch.undo()
    capsys.readouterr()
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    for name in read_incident(folder)["batches"][0]["samples"]:
        assert re.search(rf"^{name} +new +\d+ +0 +0\.\d+$", said, re.MULTILINE)
    assert re.search(r"^objective/separate: 0\.\d+$", said, re.MULTILINE)
    assert said.endswith("all finite this time\n")

    forward = torch.nn.GroupNorm.forward
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda layer, x: forward(layer, x) * float("inf"))
    assert main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert "the first layer whose output is not finite: unet.down_blocks.0.resnets.0.norm1" in said
    assert said.endswith("not finite again\n")


@pytest.mark.parametrize("content", [None, "{}", "[1]"])
def test_what_is_no_incident_is_refused(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert main(["."]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: holds no incident") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "error: the following arguments are required: incident\n"


def test_an_incident_that_cannot_be_written_does_not_end_the_run(
    mice: Path,
    small_config: Callable[..., Config],
    tmp_path: Path,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    spoil(1)
    monkeypatch.setattr(incidents, "write_state", full)
    run = run_to_end(small_config(mice, **{"train.steps": 2}), tmp_path / "run")
    assert run.step == 2 and list_incidents(tmp_path / "run") == []
    assert "WARNING step 1: what was not finite could not be written down: No space left" in capsys.readouterr().err
