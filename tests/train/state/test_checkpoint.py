"""Checkpoints: complete or absent, and what is put back is what was saved, bit for bit."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from softprompt.errors import InputError, RunError
from train.loop import training_step
from train.options.config import Config
from train.setup import prepare
from train.state import checkpoint
from train.state.checkpoint import Parts, load_checkpoint, restore, save_checkpoint, save_progress, set_aside_newer
from train.state.folder import checkpoint_folder, list_checkpoints
from train.state.run import Job

Small = Callable[..., Config]
PROGRESS = {
    "step": 2,
    "first": {"loss/validation": 0.5, "step": 0},
    "last": {"step": 2},
    "best": {"step": 2, "loss": 0.25},
    "pace": {},
    "warned": {},
    "worse": 0,
    "running_loss": 0.5,
    "window": [],
    "skipped_in_a_row": 0,
    "data": {"data.train": "4 objects, 0123abcd"},
    "objects_per_step": 1,
}


class Scaler:
    """Stands for fp16's gradient scaler."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


@dataclass
class Training:
    job: Job
    schedule: LambdaLR
    ema: EMAModel | None
    scaler: Scaler | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.job.adapted.trainable().values() for p in group.values()]

    def step(self, number: int) -> None:
        training_step(self.job.trainer, number)
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)

    def save(self, run: Path, keep: int = 3, **progress: Any) -> Path:
        return save_checkpoint(run, self.parts, progress={**PROGRESS, **progress}, keep=keep)

    def restore(self, state: dict[str, Any]) -> None:
        restore(state, self.parts)

    @property
    def parts(self) -> Parts:
        return Parts(self.job.adapted, self.job.trainer.optimizer, self.schedule, self.ema, self.scaler)

    def everything(self) -> dict[str, Any]:
        """All that a checkpoint should hold, copied."""
        moments = self.job.trainer.optimizer.state_dict()
        return {
            "trainable": [p.detach().clone() for p in self.parameters],
            "waypoints": self.job.adapted.prompt.waypoints.clone(),
            "moments": [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in moments["state"].values()],
            "rates": [g["lr"] for g in moments["param_groups"]],
            "schedule": dict(self.schedule.state_dict()),
            "ema": [p.clone() for p in self.ema.shadow_params] if self.ema else None,
        }


def same(a: Any, b: Any) -> bool:
    """Equal all through, tensors bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.fixture
def training(mice: Path, small_config: Small) -> Callable[..., Training]:
    def build(**overrides: object) -> Training:
        config = small_config(mice, **{"train.ema_decay": 0.9, "kl.weight": 0, **overrides})
        job = prepare(config)
        schedule = get_scheduler("cosine", job.trainer.optimizer, num_warmup_steps=0, num_training_steps=config.train.steps)
        parameters = [p for group in job.adapted.trainable().values() for p in group.values()]
        decay = config.train.ema_decay
        return Training(job, schedule, None if decay is None else EMAModel(parameters, decay=decay))

    return build


@pytest.fixture(scope="module")
def kept() -> dict[str, Training]:
    """Where `untrained` is kept."""
    return {}


@pytest.fixture
def untrained(training: Callable[..., Training], kept: dict[str, Training]) -> Training:
    """Prepared once: to be saved, and to have its weights changed, but not to be trained."""
    if not kept:
        kept["untrained"] = training()
    return kept["untrained"]


# ------------------------------------------------------------------------------------------------------------ in and out


def test_what_is_put_back_is_what_was_saved_bit_for_bit(tmp_path: Path, training: Callable[..., Training]) -> None:
    ours, theirs = training(), training(**{"train.seed": 7})
    ours.scaler, theirs.scaler = Scaler(512.0), Scaler(1.0)
    for step in range(2):
        ours.step(step)
    with torch.no_grad():
        ours.job.adapted.prompt.waypoints.add_(1.0)  # as if the prompt's file had changed since
    before = ours.everything()
    assert not same(theirs.everything()["trainable"], before["trainable"])
    assert ours.save(tmp_path) == tmp_path / "checkpoints" / "step-000002"
    state = load_checkpoint(tmp_path)
    assert {k: state[k] for k in PROGRESS} == PROGRESS
    theirs.restore(state)
    after = theirs.everything()
    assert {k for k in before if not same(before[k], after[k])} == set()
    assert any(m["exp_avg"].any() for m in after["moments"]) and after["ema"]
    assert theirs.scaler.scale == 512
    assert same(ours.everything(), before), "saving changed what was saved"


def test_a_step_after_putting_back_is_the_step_that_would_have_come(tmp_path: Path, training: Callable[..., Training]) -> None:
    ours, theirs = training(), training()
    for step in range(2):
        ours.step(step)
    ours.save(tmp_path)
    theirs.restore(load_checkpoint(tmp_path))
    for one in (ours, theirs):
        one.step(2)
    assert same(theirs.everything(), ours.everything())


def test_a_checkpoint_holds_only_what_trains(tmp_path: Path, untrained: Training) -> None:
    folder = untrained.save(tmp_path)
    state = torch.load(folder / "state.pt", weights_only=True)
    assert set(state["trainable"]) == {n for n, p in untrained.job.adapted.named_parameters() if p.requires_grad}
    parts = {"trainable", "waypoints", "optimizer", "schedule", "ema", "scaler", "objectives"}
    assert set(state) == parts
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["progress"] == PROGRESS
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.pt"]
    assert set(load_checkpoint(tmp_path)) == {*parts, *PROGRESS, "damaged"}


def test_the_series_of_a_checkpoint_are_brought_up_to_date_and_nothing_else(tmp_path: Path, untrained: Training) -> None:
    folders = [untrained.save(tmp_path, step=step) for step in (1, 2)]
    before = {f: f.read_bytes() for folder in folders for f in folder.iterdir()}
    new = {
        **PROGRESS,
        "step": 2,
        "first": PROGRESS["first"],
        "last": {"step": 2, "loss/validation": 0.125},
        "best": {"step": 2, "loss": 0.125},
    }
    save_progress(tmp_path, new)
    after = {f: f.read_bytes() for folder in folders for f in folder.iterdir()}
    assert after.keys() == before.keys()
    assert {f for f in after if after[f] != before[f]} == {folders[1] / "manifest.json"}
    state = load_checkpoint(tmp_path)
    assert {key: state[key] for key in new} == new


def test_series_of_a_step_without_a_checkpoint_make_none(tmp_path: Path, untrained: Training) -> None:
    save_progress(tmp_path, PROGRESS)
    assert list(tmp_path.iterdir()) == []
    untrained.save(tmp_path, step=1)
    save_progress(tmp_path, PROGRESS)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_series_that_are_no_number_come_back(tmp_path: Path, untrained: Training) -> None:
    untrained.save(tmp_path, last={"step": 2, "views/copy_score": float("nan"), "loss/validation": 1 / 3})
    last = load_checkpoint(tmp_path)["last"]
    assert math.isnan(last["views/copy_score"]) and last["loss/validation"] == 1 / 3


# ------------------------------------------------------------------------------------------------------------- which ones


def test_only_the_newest_and_the_best_stay(tmp_path: Path, untrained: Training) -> None:
    for step in (1, 2, 3, 999_999, 1_000_000):
        untrained.save(tmp_path, keep=2, step=step)
    assert PROGRESS["best"]["step"] == 2
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (2, 999_999, 1_000_000)]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000002", "step-999999", "step-1000000"}
    assert load_checkpoint(tmp_path)["step"] == 1_000_000


def test_a_checkpoint_being_written_is_none(tmp_path: Path, untrained: Training) -> None:
    untrained.save(tmp_path, step=1)
    for name in (".step-000009.partial-1", "step-000008.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / ".step-000009.partial-1" / "state.pt").write_bytes(b"half")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path, untrained: Training) -> None:
    folder = untrained.save(tmp_path)
    before = (folder / "state.pt").read_bytes()
    with torch.no_grad():
        untrained.job.adapted.prompt.learned.add_(1.0)
    assert untrained.save(tmp_path) == folder
    assert (folder / "state.pt").read_bytes() == before


def test_old_checkpoints_that_a_killed_run_did_not_come_to_remove_go_later(
    tmp_path: Path, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained.save(tmp_path, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_folder", lambda folder: None)
        untrained.save(tmp_path, step=5, keep=1)
    assert len(list_checkpoints(tmp_path)) == 2
    untrained.save(tmp_path, step=5, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path: Path, untrained: Training) -> None:
    folder = untrained.save(tmp_path)
    (folder / "state.pt").write_bytes(b"half")
    assert untrained.save(tmp_path) == folder
    assert load_checkpoint(tmp_path)["damaged"] == []


def test_too_full_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained.save(tmp_path, step=1, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(RunError, match=r"step-000002: not saved: it takes \d+\.\d MB, and 2\.0 MB are free; .*are sound"):
        untrained.save(tmp_path, step=2, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_disk_that_gives_back_something_else_is_said_and_what_was_there_stays(
    tmp_path: Path, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained.save(tmp_path, step=1, keep=1)
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: write(path, bytes(len(content))))
    with pytest.raises(RunError, match=r"step-000002: was read back damaged .*others stay"):
        untrained.save(tmp_path, step=2, keep=1)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_an_error_while_saving_leaves_nothing_under_the_final_name(
    tmp_path: Path, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained.save(tmp_path, step=1, keep=1)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    for name in ("write_json", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(*((checkpoint, name, full) if name == "write_json" else (torch, "save", full)))
            with pytest.raises(OSError, match="no space left"):
                untrained.save(tmp_path, step=2, keep=1)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_run_without_a_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoints: holds no checkpoint to resume from"):
        load_checkpoint(tmp_path)


DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "end missing": lambda content: content[:-10],
    "another file": lambda content: b"x" * 999,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, untrained: Training, file: str, damage: str
) -> None:
    untrained.save(tmp_path, step=1)
    damaged = untrained.save(tmp_path, step=2) / file
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    state = load_checkpoint(tmp_path)
    assert state["step"] == 1
    (said,) = state["damaged"]
    assert "step-000002" in said and file in said and "\n" not in said
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(InputError, match=r"holds no sound checkpoint to resume from: .*step-000002") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value), "more than one line"


def test_damaged_checkpoints_newer_than_the_one_gone_on_with_do_not_push_new_ones_out(
    tmp_path: Path, untrained: Training
) -> None:
    untrained.save(tmp_path, step=1)
    (untrained.save(tmp_path, step=9) / "state.pt").write_bytes(b"half")
    state = load_checkpoint(tmp_path)
    set_aside_newer(tmp_path, state["step"])
    untrained.save(tmp_path, step=2, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002"]
    assert (tmp_path / "checkpoints" / "step-000009.damaged").is_dir()


def test_a_bit_that_flipped_is_found(tmp_path: Path, untrained: Training) -> None:
    file = untrained.save(tmp_path) / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="holds no sound checkpoint"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path, untrained: Training) -> None:
    folder = untrained.save(tmp_path)
    progress = {name: value for name, value in PROGRESS.items() if name != "pace"}
    checkpoint._write_manifest(folder, checkpoint._manifest(folder)["state"], progress)
    with pytest.raises(InputError, match=r"manifest\.json: has no pace; likely another version of softprompt"):
        load_checkpoint(tmp_path)


def test_learning_rates_are_the_configuration_s_when_it_was_changed(tmp_path: Path, training: Callable[..., Training]) -> None:
    ours, theirs = training(), training(**{"lora.learning_rate": 0.5, "lora.weight_decay": 0.25, "train.ema_decay": 0.75})
    ours.step(0)
    ours.save(tmp_path)
    theirs.restore(load_checkpoint(tmp_path))
    factor = ours.schedule.lr_lambdas[0](ours.schedule.last_epoch)
    groups = {group["name"]: group for group in theirs.job.trainer.optimizer.param_groups}
    assert groups["lora"]["lr"] == pytest.approx(0.5 * factor) and groups["lora"]["weight_decay"] == 0.25
    assert theirs.ema is not None and theirs.ema.decay == 0.75
    theirs.schedule.step()
    assert groups["lora"]["lr"] == pytest.approx(0.5 * ours.schedule.lr_lambdas[0](ours.schedule.last_epoch + 1))


# ----------------------------------------------------------------------------------------------------------- another run


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"lora.rank": 3},
            r"trained parameters are not this configuration's \(\d+ differ, e\.g\. unet\.\S*lora_\S*\).*lora\.rank",
        ),
        ({"lora.targets": "[to_q]"}, r"trained parameters are not .*lora\.targets"),
        ({"prompt.learn": "false"}, r"trained parameters are not .*e\.g\. prompt\.learned.*prompt\.learn was changed"),
        ({"prompt.waypoints": "[facelift, hybrid, realistic]"}, r"another number of waypoints than prompt\.waypoints"),
        ({"train.ema_decay": "null"}, r"train\.ema_decay was switched on or off"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused_in_words(
    tmp_path: Path, untrained: Training, training: Callable[..., Training], other: dict[str, object], message: str
) -> None:
    untrained.save(tmp_path)
    theirs = training(**other)
    before = theirs.everything()
    with pytest.raises(InputError, match=f"resume: .*{message}"):
        theirs.restore(load_checkpoint(tmp_path))
    assert same(theirs.everything(), before), "half of it was put in"
