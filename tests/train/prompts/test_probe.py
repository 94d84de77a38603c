"""The untouched model's loss on samples under each prompt, at the same noise."""

import json
from pathlib import Path

import pytest
import torch

from softprompt.data.cache import EncodedObjects
from softprompt.micro.world import MicroWorld
from softprompt.model.loading import load_pipeline
from softprompt.prompt.encoding import encode_texts
from softprompt.prompt.templates import TEMPLATES, view_texts
from tests.train.prompts.conftest import Run
from train.compare.results import Interval
from train.prompts.probe import Row, in_percent, probe, suggestion, summarise
from train.prompts.sources import Encoder


def test_the_same_prompt_has_the_same_loss_and_another_one_another(smallest_model: Path, encoder: Encoder) -> None:
    pipeline = load_pipeline(smallest_model)
    objects = EncodedObjects(MicroWorld("mice", 0, 2, size=pipeline.picture_size), pipeline, "white")
    objects.fill(progress=False)
    prompts = {name: encode_texts(view_texts(name), encoder.tokenizer, encoder.model) for name in ("facelift", "realistic")}
    losses = probe(pipeline, objects, {**prompts, "again": prompts["facelift"]}, [100, 600, 900], batch_size=2)
    assert losses["facelift"].shape == (2, 3, 6)
    assert torch.equal(losses["facelift"], losses["again"])
    assert not torch.allclose(losses["facelift"], losses["realistic"], rtol=1e-6)


def test_rows_are_means_and_changes_from_the_first_prompt() -> None:
    first = torch.full((4, 2, 6), 0.2, dtype=torch.float64)
    second = first * torch.tensor([0.5, 0.6, 0.5, 0.6], dtype=torch.float64)[:, None, None]
    a, b = summarise({"a": first, "b": second}, [100, 900], 1000)
    assert a.loss == pytest.approx(0.2) and a.change.value == pytest.approx(0)
    assert b.loss == pytest.approx(0.11) and b.by_view == pytest.approx([0.11] * 6)
    assert b.change.value == pytest.approx(0.3**0.5 - 1) and b.change.low < b.change.value < b.change.high < 0
    assert b.by_timestep[0] == pytest.approx(0.11) and b.by_timestep[1] != b.by_timestep[1]  # no timestep in the second range


def test_the_suggestion_is_the_best_prompt_only_where_its_interval_excludes_no_change() -> None:
    first = Row("facelift", 0.2, Interval(0.0, 0.0, 0.0), [], [])
    sure = Row("a rat, {view} view.", 0.1, Interval(-0.5, -0.55, -0.45), [], [])
    unsure = Row("realistic", 0.19, Interval(-0.05, -0.12, 0.02), [], [])
    assert "begin at a rat, {view} view." in suggestion([first, sure, unsure], 9)
    assert 'waypoints: [facelift, "a rat, {view} view."]' in suggestion([first, sure], 9)
    assert "begin at facelift" in suggestion([first, unsure], 9)
    assert "none: an interval needs more than 2" in suggestion([first, sure], 2)
    assert in_percent(sure.change) == "-50.0 % (-55.0 to -45.0)"


def test_the_command_measures_every_template_and_the_user_s_own_prompts(
    run: Run, mice: Path, smallest_model: Path, tmp_path: Path
) -> None:
    said = run(
        *("probe", "--model", smallest_model, "--data.train", mice / "train", "--also", "a rat, {view} view."),
        *("--objects", 3, "--timesteps", 2, "--device", "cpu", "--output", tmp_path / "probe.json"),
    )
    assert "samples 3, at 2 timesteps" in said and "suggestion" in said
    assert "NaN" not in (tmp_path / "probe.json").read_text()
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [row["name"] for row in found["rows"]] == [*TEMPLATES, "a rat, {view} view."]
    assert all(row["loss"] > 0 and len(row["by_view"]) == 6 for row in found["rows"])


def test_what_cannot_be_measured_is_one_error(refused: Run, mice: Path, smallest_model: Path, tmp_path: Path) -> None:
    model = ("probe", "--model", smallest_model)
    assert "--objects: is 0; expected 1 or more" in refused(*model, "--data.train", mice / "train", "--objects", 0)
    assert "--timesteps: is 2000" in refused(*model, "--data.train", mice / "train", "--timesteps", 2000)
    assert str(tmp_path / "none") in refused(*model, "--data.train", tmp_path / "none")
    assert "--also: 'realstic' is no prompt file" in refused(*model, "--data.train", mice / "train", "--also", "realstic")
