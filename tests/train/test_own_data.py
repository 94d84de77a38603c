"""The README's commands for real weights, run with a model of a hundred million weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.data.samples import write_source
from softprompt.micro import MICRO_MODEL
from softprompt.micro.models import SIZES
from softprompt.micro.world import MicroWorld
from softprompt.model.loading import load_pipeline, load_text_encoder
from softprompt.prompt.embeddings import load_prompt, save_prompt
from softprompt.prompt.encoding import load_waypoints
from tests.train.test_documented_commands import SHORT, call, commands
from train.benchmark.__main__ import main as benchmark

README = Path(__file__).parents[2] / "README.md"
QUICK = {
    "train.doctor": ["--size=64"],
    "train.softprompt": [*SHORT, "--data.cache=cache"],
    "train.sample": ["--steps=1", "--guidance_scale=1", "--device=cpu"],
    "train.export": [],
}
"""Options added to the README's commands to make them short."""


@pytest.mark.slow
def test_the_readme_s_commands_for_own_data_work_with_a_model_that_is_not_the_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(README.parent / "configs")
    repository = tmp_path / "FACELIFT" / "mvdiffusion" / "data" / "fixed_prompt_embeds_6view"
    repository.mkdir(parents=True)
    (tmp_path / "FACELIFT" / "inference.py").touch()
    model = tmp_path / "FACELIFT" / "checkpoints" / "mvdiffusion" / "pipeckpts"
    assert benchmark(["--write_pipeline", str(model), "--size", "medium"]) == 0
    pipeline = load_pipeline(model)
    weights = sum(p.numel() for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder) for p in part.parameters())
    tokenizer, text_encoder = load_text_encoder(model)
    weights += sum(p.numel() for p in text_encoder.parameters())
    assert 0.8e8 < weights < 1.5e8
    assert len(tokenizer) == text_encoder.config.vocab_size == SIZES["medium"].tokens
    (tmp_path / "PIPECKPTS").symlink_to(model)
    start = load_waypoints(["facelift"], folder=model, subject="mouse", angle="", num_views=6, width=1024)[0]
    save_prompt(start, repository / "clr_embeds.pt")
    write_source(MicroWorld("mice", 0, 3), tmp_path / "SAMPLES")
    shutil.copy(next((tmp_path / "SAMPLES").glob("*/cam_000.png")), tmp_path / "PICTURE")

    ran = []
    for command in commands(README):
        argv = command.argv
        if argv[:2] == ["python", "-m"] and any(word in argv for word in ("SAMPLES", "PIPECKPTS", "RUN/export")):
            ran.append(argv[2])
            assert call(argv[2], [*argv[3:], *QUICK[argv[2]]]) == 0, capsys.readouterr()
    assert ran == ["train.doctor", "train.softprompt", "train.softprompt", "train.sample", "train.export"]
    assert len(list((tmp_path / "views").rglob("cam_00?.png"))) == 6
    described = json.loads((tmp_path / "RUN" / "export" / "clr_embeds.json").read_text())
    assert described["model"] == "PIPECKPTS"
    assert load_prompt(repository / "clr_embeds.pt").shape == (6, 77, 1024)
    assert load_pipeline(model).unet.config["num_views"] == 6, "the merged pipeline is in its place"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture=100"], "error: picture: is 100; expected a multiple of 64"),
        (["--size=huge"], "error: size: is huge; expected tiny or micro or medium or sd21"),
        (["--write_pipeline=."], "error: .: exists already and is not an empty folder"),
    ],
)
def test_a_pipeline_that_cannot_be_written_is_refused(
    tmp_path: Path, error_of: Callable[..., str], options: list[str], message: str
) -> None:
    assert message in error_of(benchmark, f"--write_pipeline={tmp_path / 'new'}", *options)
    assert not (tmp_path / "new").exists()


def test_the_tokens_of_a_written_pipeline_are_the_embedded_model_s(tmp_path: Path) -> None:
    assert benchmark(["--write_pipeline", str(tmp_path / "tiny"), "--size", "tiny", "--picture", "64"]) == 0
    text = "a photograph of a mouse, front view"
    assert load_text_encoder(tmp_path / "tiny")[0](text).input_ids == load_text_encoder(MICRO_MODEL)[0](text).input_ids
