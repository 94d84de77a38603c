"""FaceLift's UNet on stock parts: its numbers, its flags, and its folders in both layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import add_lora
from softprompt.model.attention import MultiViewAttnProcessor, SharedPromptAttnProcessor
from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import build_unet, save_unet
from tests.models import perturb

WEIGHTS = "diffusion_pytorch_model.safetensors"
Copy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def golden(facelift: Path) -> dict[str, Tensor]:
    return load_file(facelift / "tiny" / "unet_forward.safetensors")


@torch.no_grad()
def forward(unet: diffusers.UNet2DConditionModel, golden: dict[str, Tensor], tokens: Tensor | None = None) -> Tensor:
    return unet(
        golden["sample"],
        golden["timestep"],
        encoder_hidden_states=golden["encoder_hidden_states"] if tokens is None else tokens,
        class_labels=golden["class_labels"],
    ).sample


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_output_matches_facelift_s(tiny_models: Pipeline, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(forward(tiny_models.unet, golden), golden["output"], atol=1e-4, rtol=0)


def test_order_of_a_prompt_s_tokens_changes_nothing(tiny_models: Pipeline, golden: dict[str, Tensor]) -> None:
    tokens = golden["encoder_hidden_states"].clone()
    tokens[4] = tokens[4][torch.randperm(77, generator=torch.Generator().manual_seed(0))]
    assert not torch.equal(tokens, golden["encoder_hidden_states"])
    torch.testing.assert_close(forward(tiny_models.unet, golden, tokens), golden["output"], atol=1e-4, rtol=0)


def test_swapping_two_views_prompts_changes_the_output(tiny_models: Pipeline, golden: dict[str, Tensor]) -> None:
    tokens = golden["encoder_hidden_states"].clone()
    tokens[[2, 4]] = tokens[[4, 2]]
    change = (forward(tiny_models.unet, golden, tokens) - golden["output"]).abs().amax(dim=(1, 2, 3))
    assert (change[[2, 4]] > 1e-3).all()
    assert (change[6:] < 1e-5).all(), "the other object's views changed"


@pytest.mark.parametrize(
    ("multiview", "sparse", "kind"),
    [(True, True, "sparse"), (True, False, "full"), (False, True, "single"), (False, False, "single")],
)
def test_the_folder_s_flags_decide_the_attention(multiview: bool, sparse: bool, kind: str) -> None:
    flags = {"multiview_attention": multiview, "sparse_mv_attention": sparse, "num_views": 3}
    with torch.device("meta"):
        processors = build_unet(config_of(MICRO_MODEL / "unet") | flags).attn_processors
    own = [p for name, p in processors.items() if ".attn1." in name]
    cross = [p for name, p in processors.items() if ".attn2." in name]
    assert own and all(isinstance(p, MultiViewAttnProcessor) for p in own)
    assert {(p.kind, p.num_views) for p in own} == {(kind, 3)}
    assert len(cross) == len(own) and all(isinstance(p, SharedPromptAttnProcessor) for p in cross)


def test_attention_kinds_give_different_outputs(copy_of: Copy, tiny_folder: Path, golden: dict[str, Tensor]) -> None:
    folder, outputs = copy_of(tiny_folder / "unet"), [golden["output"]]
    for flag in ("sparse_mv_attention", "multiview_attention"):
        (folder / "config.json").write_text(json.dumps(config_of(folder) | {flag: False}))
        outputs.append(forward(load_unet(folder), golden))
    sparse, full, single = outputs
    assert min((a - b).abs().max() for a, b in [(full, sparse), (single, sparse), (full, single)]) > 1e-3


@pytest.mark.parametrize(
    ("flag", "value"),
    [("cd_attention_last", True), ("cd_attention_mid", True), ("addition_downsample", True), ("selfattn_block", "other")],
)
def test_flags_that_are_not_supported_are_refused_by_name(flag: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"config\.json: {flag} is {value!r}; only .* is supported"):
        build_unet(config_of(MICRO_MODEL / "unet") | {flag: value}, origin="config.json")


def test_facelift_layout_saved_and_loaded_again_is_exact(tiny: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    save_unet(tiny.unet, tmp_path / "unet", layout="facelift")
    original, saved = load_file(tiny_folder / "unet" / WEIGHTS), load_file(tmp_path / "unet" / WEIGHTS)
    assert saved.keys() == original.keys()
    again = load_unet(tmp_path / "unet").state_dict()
    for name, weight in original.items():
        assert torch.equal(saved[name], weight) and torch.equal(again[name], weight), name
    expected, found = (config_of(f / "unet") for f in (tiny_folder, tmp_path))
    assert found["_class_name"] == "UNetMV2DConditionModel"
    assert found.keys() <= expected.keys(), "FaceLift's class refuses options that it does not know"
    assert all(found.get(k) == v for k, v in expected.items() if not k.startswith("_"))


def test_stock_layout_loads_strictly_with_plain_diffusers(tiny: Pipeline, golden: dict[str, Tensor], tmp_path: Path) -> None:
    save_unet(tiny.unet, tmp_path / "unet", layout="stock")
    assert "MV2D" not in (tmp_path / "unet" / "config.json").read_text()
    plain, info = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "unet", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    for name, weight in tiny.unet.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    torch.testing.assert_close(forward(load_unet(tmp_path / "unet"), golden), golden["output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["facelift", "stock"])
def test_merged_lora_gives_the_adapted_model_s_output(
    tiny: Pipeline, golden: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    before = {name: weight.clone() for name, weight in tiny.unet.state_dict().items()}
    add_lora(tiny.unet, rank=3, alpha=6.0, targets=["to_q", "to_k", "to_v", "to_out.0"])
    perturb((parameter for name, parameter in tiny.unet.named_parameters() if ".lora_" in name), scale=0.05)
    adapted = forward(tiny.unet, golden)
    assert (adapted - golden["output"]).abs().max() > 1e-2, "the LoRA does nothing"
    save_unet(tiny.unet, tmp_path / "merged", layout=layout, merge_lora=True)
    torch.testing.assert_close(forward(load_unet(tmp_path / "merged"), golden), adapted, atol=1e-5, rtol=0)
    assert torch.equal(forward(tiny.unet, golden), adapted), "saving changed the model"
    save_unet(tiny.unet, tmp_path / "without", layout=layout)
    saved = load_file(tmp_path / "without" / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())
