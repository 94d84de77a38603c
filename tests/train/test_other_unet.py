"""A UNet of the user's own beside a pipeline folder: a checkpoint of FaceLift's trainer, from training to the merged export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline, load_unet
from tests.runs import run_to_end
from train.export.__main__ import main as export
from train.export.read import refuse_another_unet
from train.options.config import Config
from train.sample import main as sample
from train.softprompt import main
from train.state.run import Job

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_unet(folder: Path, factor: float, **changes: object) -> Path:
    """Write the embedded UNet with scaled weights, so that it differs."""
    folder.mkdir(parents=True)
    config = json.loads((MICRO_MODEL / "unet" / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MICRO_MODEL / "unet" / WEIGHTS)
    save_file({name: weight * factor for name, weight in weights.items()}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the layout of FaceLift's trainer."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint-2000"
    write_unet(folder / "unet", 0.98)
    write_unet(folder / "unet_ema", 0.99, decay=0.9999, optimization_step=2000)
    (folder / "optimizer.bin").write_bytes(b"of the optimizer")
    return folder


# ------------------------------------------------------------------------------------------------------------------ taken


@pytest.mark.parametrize(("name", "factor"), [("unet", 0.98), ("unet_ema", 0.99)])
def test_a_unet_of_a_checkpoint_takes_the_place_of_the_pipeline_s_own(checkpoint: Path, name: str, factor: float) -> None:
    pipeline = load_pipeline(MICRO_MODEL, unet=checkpoint / name)
    assert pipeline.folder == MICRO_MODEL and pipeline.unet_folder == checkpoint / name
    own = load_file(MICRO_MODEL / "unet" / WEIGHTS)
    assert all(torch.equal(weight, own[n] * factor) for n, weight in pipeline.unet.state_dict().items())


def test_the_pipeline_needs_no_unet_of_its_own_then(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MICRO_MODEL, tmp_path / "pipeckpts", ignore=shutil.ignore_patterns("unet")))
    assert load_pipeline(folder, unet=checkpoint / "unet").num_views == 6


def test_training_says_which_unet_it_takes(make_job: Callable[..., Job], checkpoint: Path) -> None:
    job = make_job(model="micro", unet=str(checkpoint / "unet"))
    assert f"unet       {checkpoint / 'unet'}, instead of the one in micro" in job.notes
    assert job.pipeline.unet_folder == checkpoint / "unet"


# ---------------------------------------------------------------------------------------------------------------- refused


def test_a_checkpoint_as_the_model_is_refused_with_the_option_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"model: .*checkpoint-2000 is a training checkpoint: it holds unet and unet_ema"
    ) as two:
        load_pipeline(checkpoint)
    assert f"--unet {checkpoint / 'unet'} or --unet {checkpoint / 'unet_ema'} (the moving average)" in str(two.value)
    write_unet(tmp_path / "checkpoint-1" / "unet", 1.0)
    with pytest.raises(InputError, match=r"it holds unet and no other part; .*--model PIPECKPTS, and with it --unet .*/unet$"):
        load_pipeline(tmp_path / "checkpoint-1")


def test_a_unet_s_folder_as_the_model_is_refused_with_the_option_named(checkpoint: Path) -> None:
    with pytest.raises(
        InputError, match=r"model: .*/unet is a UNet's folder; .*--model PIPECKPTS, and with it --unet .*/unet$"
    ):
        load_pipeline(checkpoint / "unet")


def test_what_is_no_unet_is_refused_with_what_is_meant(checkpoint: Path, tmp_path: Path) -> None:
    for folder, message in (
        (checkpoint, r"holds the UNet in a folder of its own; .*give that: --unet .*/unet; there is .*/unet_ema as well$"),
        (MICRO_MODEL, r"holds the UNet in a folder of its own; .*give that: --unet .*/unet$"),
        (tmp_path / "nowhere", r"no such folder; .*give CHECKPOINT/unet"),
        (MICRO_MODEL / "vae", r"holds no config\.json of a UNet; expected the folder with"),
    ):
        with pytest.raises(InputError, match=rf"^unet: .*{message}") as refused:
            load_pipeline(MICRO_MODEL, unet=folder)
        assert "\n" not in str(refused.value)


def test_a_unet_of_another_size_than_the_pipeline_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"unet: .*projection_class_embeddings_input_dim is \d+; .*image_encoder takes \d+; likely"
    ):
        load_pipeline(MICRO_MODEL, unet=tiny_folder / "unet")


@pytest.mark.parametrize(
    ("given", "trained_on", "message"),
    [
        (None, "a/unet", r"unet: is null; e was trained on a/unet: give that with --unet"),
        ("b/unet_ema", "a/unet", r"unet: is b/unet_ema; e was trained on a/unet"),
        ("a/unet", None, r"unet: is a/unet; e was trained on the UNet of its --model: leave --unet out"),
    ],
)
def test_another_unet_than_an_export_s_is_refused(given: str | None, trained_on: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        refuse_another_unet(given, trained_on, Path("e"))


def test_the_unet_of_an_export_may_have_moved() -> None:
    refuse_another_unet("moved/unet", "a/unet", Path("e"))
    refuse_another_unet(None, None, Path("e"))


# ---------------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def run(small: Callable[..., Config], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small(**{"model": "micro", "train.steps": 2, "unet": str(checkpoint / "unet")})
    return run_to_end(config, tmp_path_factory.mktemp("runs") / "run").folder


def test_an_export_says_which_unet_it_is_of(run: Path, checkpoint: Path) -> None:
    assert json.loads((run / "export" / "clr_embeds.json").read_text())["unet"] == str(checkpoint / "unet")


@pytest.mark.parametrize("source", [".", "export"])
def test_a_merged_pipeline_has_the_unet_that_was_trained_from(run: Path, checkpoint: Path, tmp_path: Path, source: str) -> None:
    moved = Path(shutil.copytree(checkpoint / "unet", tmp_path / "unet"))
    assert export([str(run / source), "--unet", str(moved), "--pipeline", "--output", str(tmp_path / "out")]) == 0
    merged, trained_from = (load_unet(folder).state_dict() for folder in (tmp_path / "out" / "pipeckpts" / "unet", moved))
    assert all(torch.equal(merged[name], weight) for name, weight in trained_from.items() if "to_" not in name)


def test_sampling_with_another_unet_is_refused(
    run: Path, checkpoint: Path, tmp_path: Path, mice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = min((mice / "val").glob("*/cam_000.png"))
    given = [f"--pictures={picture}", f"--export={run / 'export'}", "--steps=1", f"--output={tmp_path / 'views'}"]
    assert sample(given) == 2
    assert "error: unet: is null; " in capsys.readouterr().err
    assert sample([*given, "--unet", str(checkpoint / "unet_ema")]) == 2
    assert "was trained on" in capsys.readouterr().err
    assert sample([*given, "--unet", str(checkpoint / "unet")]) == 0


def test_a_run_goes_on_where_the_unet_has_moved(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    moved = Path(shutil.copytree(checkpoint / "unet", tmp_path / "unet"))
    assert main(["--resume", str(again), "--unet", str(moved), "--train.steps", "3"]) == 0
    assert json.loads((again / "export" / "clr_embeds.json").read_text())["unet"] == str(moved)
