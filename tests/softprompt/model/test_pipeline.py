"""The models of a pipeline, and where its encoders are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softprompt.model.pipeline import Pipeline


def test_facelift_s_pipeline_has_its_sizes(tiny_models: Pipeline, tiny_folder: Path) -> None:
    assert tiny_models.num_views == 6 and tiny_models.prompt_width == 1024
    assert tiny_models.latent_shape == (4, 8, 8) and tiny_models.picture_size == 32
    assert tiny_models.folder == tiny_folder
    assert tiny_models.scheduler.config["prediction_type"] == "v_prediction"


def test_encoders_that_rest_leave_the_device_after_the_last_use(
    micro_models: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = replace(micro_models)
    moves: list[str] = []
    monkeypatch.setattr(Pipeline, "device", torch.device("cuda"))
    monkeypatch.setattr(Pipeline, "_move_encoders", lambda self, device: moves.append(device.type))
    with pipeline.encoders_on_device():
        pass
    assert moves == ["cuda"], "they stay unless they are to rest"
    pipeline.encoders_rest = True
    moves.clear()
    with pipeline.encoders_on_device(), pytest.raises(RuntimeError), pipeline.encoders_on_device():
        raise RuntimeError
    assert moves == ["cuda", "cuda", "cpu"], "once, after the outermost block"
