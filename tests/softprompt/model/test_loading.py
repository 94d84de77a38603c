"""Pipeline folders and their parts: loaded whole, written whole, and refused with everything that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import add_lora
from softprompt.model.attention import MultiViewAttnProcessor
from softprompt.model.loading import load_pipeline, load_text_encoder, load_unet, save_pipeline
from softprompt.model.pipeline import Pipeline

Copy = Callable[[Path], Path]
MODELS = ("unet", "vae", "image_encoder", "image_normalizer")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(copy_of: Copy) -> Path:
    """The packaged pipeline's folder, to be spoilt."""
    return copy_of(MICRO_MODEL)


@pytest.fixture
def unet_folder(copy_of: Copy) -> Path:
    """The packaged model's `unet` folder, to be spoilt."""
    return copy_of(MICRO_MODEL / "unet")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def without(path: Path, name: str) -> None:
    edit_weights(path, lambda weights: weights.pop(name))


def refused(load: Callable[[Path], object], folder: Path, message: str) -> None:
    """Assert that loading fails with an error of one line."""
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


# -------------------------------------------------------------------------------------------------------- pipeline


def test_every_model_is_frozen_and_only_the_unet_takes_the_type_asked_for(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, dtype=torch.bfloat16)
    for name in MODELS:
        model = getattr(pipeline, name)
        assert not model.training and not any(p.requires_grad for p in model.parameters()), name
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if name == "unet" else torch.float32}, name


def test_frozen_models_hold_the_weights_of_their_files(tiny_models: Pipeline, tiny_folder: Path) -> None:
    for part, file in [("vae", WEIGHTS), ("image_encoder", "model.safetensors"), ("image_normalizer", WEIGHTS)]:
        state = getattr(tiny_models, part).state_dict()
        for name, weight in load_file(tiny_folder / part / file).items():
            assert "position_ids" in name or torch.equal(state[name], weight), f"{part}: {name}"


def test_the_text_encoder_is_not_needed_to_load(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    assert load_pipeline(folder).num_views == 6


def test_all_that_is_missing_is_named_at_once(folder: Path, tmp_path: Path) -> None:
    for name in ("vae/config.json", "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing (.*)") as refused:
        load_pipeline(folder)
    named = str(refused.value).split("missing ")[1].split(", ")
    assert sorted(named) == ["feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "vae/config.json"]
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected a FaceLift pipeline folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing model_index\.json, unet/config\.json, vae/"):
        load_pipeline(tmp_path)


def no_class_labels(folder: Path) -> None:
    edit(folder / "unet" / "config.json", class_embed_type=None, projection_class_embeddings_input_dim=None)
    weights = folder / "unet" / WEIGHTS
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith("class_embedding")}, weights)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"is no FaceLift pipeline folder; missing model_index\.json$"),
        (no_class_labels, r"class_embed_type is None; FaceLift passes the input picture through 'projection'"),
        (
            lambda f: without(f / "vae" / WEIGHTS, "quant_conv.bias"),
            r"vae: weights and config\.json do not belong .*: \d+ of \d+ fit, 1 are missing \(quant_conv\.bias\); likely",
        ),
        (
            lambda f: edit_weights(f / "vae" / WEIGHTS, lambda w: w.update({"more": torch.ones(2)})),
            r"vae: .*: (\d+) of \1 fit, 1 have no place \(more\); likely they are of two models",
        ),
        (
            lambda f: without(f / "image_encoder" / "model.safetensors", "visual_projection.weight"),
            r"image_encoder: .*1 are missing \(visual_projection\.weight\)",
        ),
        (lambda f: without(f / "image_normalizer" / WEIGHTS, "std"), r"image_normalizer: .*1 are missing \(std\)"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), r"vae: the weights are missing; expected diffusion_pyt"),
        (lambda f: (f / "image_encoder/model.safetensors").unlink(), r"image_encoder: the weights are missing; expected mod"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), r"vae: cannot be loaded as AutoencoderKL"),
        (lambda f: cut(f / "vae" / WEIGHTS), r"vae: cannot be loaded as AutoencoderKL"),
        (lambda f: cut(f / "image_encoder" / "model.safetensors"), r"image_encoder: cannot be loaded as CLIPVision"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="sample"), r"prediction_type is 'sample'"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), r"scheduler"),
        (lambda f: (f / "image_noising_scheduler/scheduler_config.json").write_text("{"), r"image_noising_scheduler"),
        (lambda f: (f / "feature_extractor" / "preprocessor_config.json").write_text("{"), r"feature_extractor"),
    ],
)
def test_parts_that_cannot_be_used_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    refused(load_pipeline, folder, message)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "tokenizer" / "merges.txt").unlink(),
            r"cannot encode text, missing tokenizer/merges\.txt; copy them from .* or give every waypoint as a prompt file",
        ),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"missing tokenizer/vocab\.json, tokenizer/merges\.txt"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), r"text_encoder: the weights are missing; expected model"),
        (lambda f: cut(f / "text_encoder" / "model.safetensors"), r"text_encoder: cannot be loaded as CLIPTextModel"),
    ],
)
def test_a_text_encoder_that_cannot_be_used_is_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    refused(load_text_encoder, folder, message)


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


@pytest.mark.parametrize("merge", [True, False])
def test_lora_is_merged_only_when_asked_for(tiny: Pipeline, tiny_models: Pipeline, tmp_path: Path, merge: bool) -> None:
    add_lora(tiny.unet, rank=2, alpha=2.0, targets=["to_k"])
    for name, parameter in tiny.unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_pipeline(tiny, tmp_path / "out", merge_lora=merge)
    saved, base = load_unet(tmp_path / "out" / "unet").state_dict(), tiny_models.unet.state_dict()
    changed = {name for name, weight in base.items() if not torch.equal(saved[name], weight)}
    assert changed == ({name for name in base if name.endswith("to_k.weight")} if merge else set())


def test_a_full_folder_is_not_written_over(tiny_models: Pipeline, folder: Path) -> None:
    before = files_in(folder)
    with pytest.raises(InputError, match=r"exists already and is not an empty folder"):
        save_pipeline(tiny_models, folder)
    assert files_in(folder) == before
    assert not list(folder.parent.glob(".*partial*"))


# --------------------------------------------------------------------------------------------------------------- UNet


def stock_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        **changes,
    ).requires_grad_(False)


@torch.no_grad()
def test_base_stable_diffusion_is_widened_with_zeros(tmp_path: Path) -> None:
    base = stock_unet(in_channels=4)
    base.save_pretrained(tmp_path / "unet")
    wide = load_unet(tmp_path / "unet")
    assert wide.config["in_channels"] == 8
    assert torch.equal(wide.conv_in.weight[:, :4], base.conv_in.weight) and not wide.conv_in.weight[:, 4:].any()

    noisy, tokens = torch.randn(6, 4, 8, 8), torch.randn(6, 7, 12)
    stock = base(noisy, 500, encoder_hidden_states=tokens).sample
    sparse = MultiViewAttnProcessor(6, "sparse")  # what FaceLift ships
    base.set_attn_processor({n: sparse if ".attn1." in n else p for n, p in base.attn_processors.items()})
    expected = base(noisy, 500, encoder_hidden_states=tokens).sample
    assert (expected - stock).abs().max() > 1e-4
    for given in (torch.zeros_like(noisy), 10 * torch.randn(noisy.shape)):
        found = wide(torch.cat([noisy, given], dim=1), 500, encoder_hidden_states=tokens).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    without(tmp_path / "unet" / WEIGHTS, "conv_in.weight")
    with pytest.raises(InputError, match=r"do not belong together: 207 of 208 fit, 1 are missing \(conv_in\.weight\)"):
        load_unet(tmp_path / "unet")


@torch.no_grad()
def test_a_stock_folder_with_single_view_attention_is_the_stock_model(tmp_path: Path) -> None:
    base = stock_unet(in_channels=8)
    base.save_pretrained(tmp_path / "unet")
    edit(tmp_path / "unet" / "config.json", multiview_attention=False)
    sample, tokens = torch.randn(6, 8, 8, 8), torch.randn(6, 7, 12)
    found = load_unet(tmp_path / "unet")(sample, 500, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, base(sample, 500, encoder_hidden_states=tokens).sample, atol=1e-5, rtol=0)


def pickle_weights(folder: Path, content: Any) -> None:
    (folder / WEIGHTS).unlink()
    target = folder / "diffusion_pytorch_model.bin"
    target.write_bytes(content) if isinstance(content, bytes) else torch.save(content, target)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json: not found; .* \(give the `unet` folder itself\)"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds a JSON list"),
        (lambda f: edit(f / "config.json", _class_name="UNet3D"), r"its _class_name is 'UNet3D'; expected UNetMV2DCond"),
        (lambda f: edit(f / "config.json", _class_name=None), r"its _class_name is None"),
        (lambda f: edit(f / "config.json", down_block_types=["Moon"] * 3), r"config\.json: no UNet can be built from it"),
        (
            lambda f: edit(f / "config.json", cross_attention_dim=768),
            r"do not belong together: \d+ of \d+ fit, 14 have another shape \(.*attn2.*; likely config\.json is of a model of",
        ),
        (lambda f: (f / WEIGHTS).unlink(), r"the weights are missing; expected diffusion_pytorch_model\.safetensors or"),
        (lambda f: cut(f / WEIGHTS), r"cannot be read \(.*\); the file is damaged, cut short"),
        (
            lambda f: edit_weights(f / WEIGHTS, lambda w: w.update({"stranger.weight": torch.ones(2)})),
            r"do not belong together: .* 1 have no place \(stranger\.weight\); likely",
        ),
        (lambda f: pickle_weights(f, b"hello world"), r"bin: cannot be read"),
        (lambda f: pickle_weights(f, [torch.ones(2)]), r"bin: holds a list; expected weights by name"),
    ],
)
def test_a_unet_that_cannot_be_used_is_refused(unet_folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(unet_folder)
    refused(load_unet, unet_folder, message)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda w: {f"unet.{name}": weight for name, weight in w.items()},
            r"0 of \d+ fit, .* a part of a larger model, under unet\.",
        ),
        (lambda w: w | {"conv_in.lora_A.weight": torch.ones(1)}, r"likely they are a LoRA, or a UNet with one"),
        (lambda w: {f"e.{i}": weight for i, weight in enumerate(w.values())}, r"likely they are of another kind of model"),
        (lambda w: dict(list(w.items())[5:]), r"5 are missing \(.*likely they were saved or copied incompletely"),
        (lambda w: w | {"conv_out.bias": torch.ones(7)}, r"1 have another shape \(conv_out\.bias\); likely config\.json is of"),
        (
            lambda w: {(f"module.{n}" if i < 2 else n): weight for i, (n, weight) in enumerate(w.items())},
            r"\d+ of \d+ fit, 2 are missing .*, 2 have no place \(module",  # a prefix of all names would be removed
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_likely_cause(
    unet_folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], cause: str
) -> None:
    save_file(change(load_file(unet_folder / WEIGHTS)), unet_folder / WEIGHTS)
    refused(load_unet, unet_folder, cause)
