"""`python -m train.micro` builds a pipeline folder, and continues after a stop with the same weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softprompt.micro.models import SIZES, vae_config
from softprompt.model.loading import load_pipeline
from train.micro import __main__ as micro
from train.micro import trainer as micro_trainer

TOY = [
    "--objects=4",
    "--prior_objects=1",
    "--vae_steps=2",
    "--decoder_steps=2",
    "--clip_steps=9",
    "--prior_steps=16",
    "--heads_steps=2",
    "--save_every=8",
    "--evaluated=1",
]


def build(folder: Path, *options: str) -> int:
    return micro.main(["--output", str(folder), *TOY, *options])


@pytest.mark.slow
def test_building_is_the_same_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = SIZES["tiny"]
    vae, vision = vae_config([8, 8, 8], layers=1, groups=8), tiny.vision | {"image_size": 64}
    monkeypatch.setitem(SIZES, "micro", replace(tiny, vae=vae, vision=vision, picture=64))
    assert build(tmp_path / "straight", "--grid", str(tmp_path / "grid.png")) == 0
    assert (tmp_path / "grid.png").is_file()

    save, stops = micro_trainer.Trainer._save, [("clip", 8), ("prior", 8)]

    def save_and_stop(self: micro_trainer.Trainer, phase: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        save(self, phase, step, optimizer)
        if stops and (phase, step) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(micro_trainer.Trainer, "_save", save_and_stop)
        while stops:
            assert build(tmp_path / "stopped") == 130
    assert not (tmp_path / "stopped").exists()
    assert build(tmp_path / "stopped", "--seed", "1") == 2, "went on with another seed"
    assert build(tmp_path / "stopped") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "stopped", "straight"]
    for weights in (tmp_path / "straight").rglob("*.safetensors"):
        other = load_file(tmp_path / "stopped" / weights.relative_to(tmp_path / "straight"))
        for name, tensor in load_file(weights).items():
            assert torch.equal(tensor, other[name]), f"{weights.parent.name}: {name}"
    load_pipeline(tmp_path / "stopped")


def test_an_existing_folder_is_kept(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "mine").write_text("precious")
    error = error_of(micro.main, f"--output={tmp_path}", *TOY)
    assert error.startswith("error: output: ") and "--overwrite" in error
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_size=0", "batch_size: is 0; expected 1 or more"),
        ("--left_out=[dogs]", "left_out: is ('dogs',); expected some of heads_render_level"),
    ],
)
def test_options_that_cannot_be_are_refused(option: str, message: str, tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert message in error_of(micro.main, f"--output={tmp_path / 'new'}", *TOY, option)
