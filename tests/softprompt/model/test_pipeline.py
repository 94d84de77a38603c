"""FaceLift's pipeline folder: loaded whole, written whole, and refused with everything that is wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import add_lora
from softprompt.model.loading import load_pipeline, load_text_encoder, load_unet, save_pipeline
from softprompt.model.pipeline import Pipeline

Copy = Callable[[Path], Path]
MODELS = ("unet", "vae", "image_encoder", "image_normalizer")


@pytest.fixture
def folder(copy_of: Copy) -> Path:
    """The packaged pipeline's folder, to be spoilt."""
    return copy_of(MICRO_MODEL)


def test_facelift_s_folder_is_loaded_with_its_sizes(tiny_models: Pipeline, tiny_folder: Path) -> None:
    assert tiny_models.num_views == 6 and tiny_models.prompt_width == 1024
    assert tiny_models.latent_shape == (4, 8, 8) and tiny_models.picture_size == 32
    assert tiny_models.folder == tiny_folder
    assert tiny_models.scheduler.config["prediction_type"] == "v_prediction"


def test_every_model_is_frozen_and_only_the_unet_takes_the_type_asked_for(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, dtype=torch.bfloat16)
    for name in MODELS:
        model = getattr(pipeline, name)
        assert not model.training and not any(p.requires_grad for p in model.parameters()), name
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if name == "unet" else torch.float32}, name


def test_frozen_models_hold_the_weights_of_their_files(tiny_models: Pipeline, tiny_folder: Path) -> None:
    for part, file in [
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
        ("image_normalizer", "diffusion_pytorch_model"),
    ]:
        state = getattr(tiny_models, part).state_dict()
        for name, weight in load_file(tiny_folder / part / f"{file}.safetensors").items():
            assert name in state or "position_ids" in name, f"{part}: {name}"
            assert "position_ids" in name or torch.equal(state[name], weight), f"{part}: {name}"


def test_the_text_encoder_is_not_needed_to_load(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    assert load_pipeline(folder).num_views == 6


# ------------------------------------------------------------------------------------------------------------ refused


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path: Path, name: str) -> None:
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def test_all_that_is_missing_is_named_at_once(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    shutil.rmtree(folder / "scheduler")
    (folder / "feature_extractor" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing (.*)") as refused:
        load_pipeline(folder)
    named = str(refused.value).split("missing ")[1].split(", ")
    assert sorted(named) == ["feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "vae/config.json"]


def test_a_folder_that_is_not_there_or_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected a FaceLift pipeline folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing model_index\.json, unet/config\.json, vae/"):
        load_pipeline(tmp_path)


def test_a_folder_without_its_index_is_refused_since_it_could_not_be_written_again(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing model_index\.json$"):
        load_pipeline(folder)


def test_a_unet_without_projection_class_labels_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", class_embed_type=None, projection_class_embeddings_input_dim=None)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith("class_embedding")}, weights)
    with pytest.raises(InputError, match=r"class_embed_type is None; FaceLift is given its picture through 'projection'"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: without(f / "vae" / "diffusion_pytorch_model.safetensors", "quant_conv.bias"),
            r"vae: 1 missing keys in its weights \(quant_conv\.bias\); \d+ of the \d+ of its config\.json fit; likely",
        ),
        (
            lambda f: without(f / "image_encoder" / "model.safetensors", "visual_projection.weight"),
            r"image_encoder: 1 missing keys in its weights \(visual_projection\.weight\)",
        ),
        (
            lambda f: without(f / "image_normalizer" / "diffusion_pytorch_model.safetensors", "std"),
            r"image_normalizer: 1 missing keys in its weights \(std\)",
        ),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            r"vae: the weights are missing; expected diffusion_pyt",
        ),
        (
            lambda f: (f / "image_encoder" / "model.safetensors").unlink(),
            r"image_encoder: the weights are missing; expected mod",
        ),
        (lambda f: (f / "vae" / "config.json").write_text("{"), r"vae: cannot be loaded as AutoencoderKL"),
        (lambda f: cut(f / "vae" / "diffusion_pytorch_model.safetensors"), r"vae: cannot be loaded as AutoencoderKL"),
        pytest.param(
            lambda f: cut(f / "image_encoder" / "model.safetensors"),
            r"image_encoder: cannot be loaded as CLIPVision",
        ),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="sample"), r"prediction_type is 'sample'"),
        pytest.param(lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), r"scheduler"),
        pytest.param(
            lambda f: (f / "image_noising_scheduler" / "scheduler_config.json").write_text("{"),
            r"image_noising_scheduler",
        ),
        pytest.param(lambda f: (f / "feature_extractor" / "preprocessor_config.json").write_text("{"), r"feature_extractor"),
    ],
)
def test_parts_that_cannot_be_used_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as refused:
        load_pipeline(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "tokenizer" / "merges.txt").unlink(),
            r"cannot encode text, missing tokenizer/merges\.txt; copy them from .* or give every waypoint as a prompt file",
        ),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"missing tokenizer/vocab\.json, tokenizer/merges\.txt"),
        (
            lambda f: (f / "text_encoder" / "model.safetensors").unlink(),
            r"text_encoder: the weights are missing; expected model",
        ),
        pytest.param(
            lambda f: cut(f / "text_encoder" / "model.safetensors"),
            r"text_encoder: cannot be loaded as CLIPTextModel",
        ),
    ],
)
def test_a_text_encoder_that_cannot_be_used_is_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_text_encoder(folder)


# ------------------------------------------------------------------------------------------------------------- saving


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_saved_pipeline_has_facelift_s_files_classes_and_bytes(tiny: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(tiny_folder)
    for name in sorted(files_in(tiny_folder)):
        if not name.startswith("unet/"):
            assert (tmp_path / "out" / name).read_bytes() == (tiny_folder / name).read_bytes(), name
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["_class_name"] == "UNetMV2DConditionModel"
    again = load_pipeline(tmp_path / "out").unet.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in tiny.unet.state_dict().items())


def lora_changes(unet: UNet2DConditionModel, pipeline_folder: Path) -> set[str]:
    saved = load_unet(pipeline_folder / "unet").state_dict()
    return {name for name, weight in unet.state_dict().items() if not torch.equal(saved[name], weight)}


@pytest.mark.parametrize("merge", [True, False])
def test_lora_is_merged_only_when_asked_for(tiny: Pipeline, tiny_folder: Path, tmp_path: Path, merge: bool) -> None:
    add_lora(tiny.unet, rank=2, alpha=2.0, targets=["to_k"])
    for name, parameter in tiny.unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_pipeline(tiny, tmp_path / "out", merge_lora=merge)
    changed = lora_changes(load_unet(tiny_folder / "unet"), tmp_path / "out")
    keys = {n for n in load_unet(tiny_folder / "unet").state_dict() if n.endswith("to_k.weight")}
    assert changed == (keys if merge else set())


def test_a_full_folder_is_not_written_over(tiny_models: Pipeline, folder: Path) -> None:
    before = files_in(folder)
    with pytest.raises(InputError, match=r"exists already and is not an empty folder"):
        save_pipeline(tiny_models, folder)
    assert files_in(folder) == before
    assert not list(folder.parent.glob(".*partial*"))


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
    assert moves == ["cuda", "cuda", "cpu"], "once, when nobody uses them any more"
