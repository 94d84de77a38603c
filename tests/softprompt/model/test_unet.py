"""FaceLift's UNet on stock parts: its numbers, its attention, its folders in and out, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import add_lora
from softprompt.model.attention import MultiViewAttnProcessor
from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import save_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

Copy = Callable[[Path], Path]


@pytest.fixture
def unet_folder(copy_of: Copy) -> Path:
    """The packaged model's `unet` folder, to be spoilt."""
    return copy_of(MICRO_MODEL / "unet")


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


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def randomise_lora(unet: diffusers.UNet2DConditionModel, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


# ------------------------------------------------------------------------------------------------------------ numbers


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
    assert (change[6:] < 1e-5).all(), "the other object was touched"


# ---------------------------------------------------------------------------------------------------------- attention


def slow_attention(attn: Attention, x: Tensor, views: int, kind: str) -> Tensor:
    """One picture and one head at a time."""
    results = []
    for n in range(len(x)):
        own = x[n]
        of_object = x[n - n % views : n - n % views + views]
        seen = {"sparse": torch.cat([of_object[0], own]), "full": torch.cat(list(of_object)), "single": own}[kind]
        heads = []
        for q, k, v in zip(
            *(m.chunk(attn.heads, dim=-1) for m in (attn.to_q(own), attn.to_k(seen), attn.to_v(seen))), strict=True
        ):
            heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
        results.append(attn.to_out[0](torch.cat(heads, dim=-1)))
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["sparse", "full", "single"])
@torch.no_grad()
def test_attention_matches_a_slow_version(kind: str) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=12, heads=3, dim_head=4, processor=MultiViewAttnProcessor(4, kind))
    attn.requires_grad_(False)
    x = 3 * torch.randn(8, 5, 12)
    torch.testing.assert_close(attn(x), slow_attention(attn, x, 4, kind), atol=1e-5, rtol=1e-5)


def test_a_batch_that_is_no_whole_number_of_objects_is_an_error() -> None:
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=MultiViewAttnProcessor(6, "sparse"))
    with pytest.raises(ValueError, match=r"a batch of 7 pictures is no multiple of the model's 6 views"):
        attn(torch.randn(7, 3, 8))


@pytest.mark.parametrize(
    ("multiview", "sparse", "kind"),
    [(True, True, "sparse"), (True, False, "full"), (False, True, "single"), (False, False, "single")],
)
def test_the_folder_s_flags_decide_the_attention(unet_folder: Path, multiview: bool, sparse: bool, kind: str) -> None:
    edit_config(unet_folder, multiview_attention=multiview, sparse_mv_attention=sparse, num_views=3)
    processors = load_unet(unet_folder).attn_processors
    own = [p for name, p in processors.items() if ".attn1." in name]
    cross = [p for name, p in processors.items() if ".attn2." in name]
    assert own and {(p.kind, p.num_views) for p in own} == {(kind, 3)}
    assert len(cross) == len(own) and all(isinstance(p, AttnProcessor2_0) for p in cross)


def test_attention_kinds_give_different_outputs(copy_of: Copy, tiny_folder: Path, golden: dict[str, Tensor]) -> None:
    folder = copy_of(tiny_folder / "unet")
    edit_config(folder, sparse_mv_attention=False)
    full = forward(load_unet(folder), golden)
    edit_config(folder, multiview_attention=False)
    single = forward(load_unet(folder), golden)
    for a, b in [(full, golden["output"]), (single, golden["output"]), (full, single)]:
        assert (a - b).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- in and out


def test_facelift_layout_saved_and_loaded_again_is_exact(tiny: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    save_unet(tiny.unet, tmp_path / "unet", layout="facelift")
    original, saved = load_file(tiny_folder / "unet" / WEIGHTS), load_file(tmp_path / "unet" / WEIGHTS)
    assert saved.keys() == original.keys()
    again = load_unet(tmp_path / "unet").state_dict()
    for name, weight in original.items():
        assert torch.equal(saved[name], weight) and torch.equal(again[name], weight), name
    configs = [json.loads((f / "unet" / "config.json").read_text()) for f in (tiny_folder, tmp_path)]
    expected, found = ({k: v for k, v in c.items() if not k.startswith("_")} for c in configs)
    assert {k: found.get(k) for k in expected} == expected
    assert configs[1]["_class_name"] == "UNetMV2DConditionModel"


def test_facelift_s_class_is_given_no_option_that_it_does_not_know(tiny: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    save_unet(tiny.unet, tmp_path / "unet", layout="facelift")
    expected, found = (json.loads((f / "unet" / "config.json").read_text()) for f in (tiny_folder, tmp_path))
    assert found.keys() <= expected.keys()


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


def test_weights_are_frozen_and_of_the_type_asked_for(tiny_folder: Path) -> None:
    unet = load_unet(tiny_folder / "unet", dtype=torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("layout", ["facelift", "stock"])
def test_merged_lora_gives_the_adapted_model_s_output(
    tiny: Pipeline, golden: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    before = {name: weight.clone() for name, weight in tiny.unet.state_dict().items()}
    add_lora(tiny.unet, rank=3, alpha=6.0, targets=LORA_TARGETS)
    randomise_lora(tiny.unet)
    adapted = forward(tiny.unet, golden)
    assert (adapted - golden["output"]).abs().max() > 1e-2, "the LoRA does nothing"
    save_unet(tiny.unet, tmp_path / "merged", layout=layout, merge_lora=True)
    torch.testing.assert_close(forward(load_unet(tmp_path / "merged"), golden), adapted, atol=1e-5, rtol=0)
    assert torch.equal(forward(tiny.unet, golden), adapted), "saving changed the model"
    save_unet(tiny.unet, tmp_path / "without", layout=layout)
    saved = load_file(tmp_path / "without" / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())


def test_an_existing_folder_is_not_written_over(tiny_models: Pipeline, unet_folder: Path) -> None:
    before = (unet_folder / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match=r"exists already and is not an empty folder"):
        save_unet(tiny_models.unet, unet_folder)
    assert (unet_folder / WEIGHTS).read_bytes() == before


# ---------------------------------------------------------------------------------------------- base Stable Diffusion


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


def test_base_weights_without_an_input_layer_are_refused(tmp_path: Path) -> None:
    stock_unet(in_channels=4).save_pretrained(tmp_path / "unet")
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(InputError, match=r"do not belong together: 207 of 208 fit, 1 are missing \(conv_in\.weight\)"):
        load_unet(tmp_path / "unet")


@torch.no_grad()
def test_a_stock_folder_with_single_view_attention_is_the_stock_model(tmp_path: Path) -> None:
    base = stock_unet(in_channels=8)
    base.save_pretrained(tmp_path / "unet")
    edit_config(tmp_path / "unet", multiview_attention=False)
    sample, tokens = torch.randn(6, 8, 8, 8), torch.randn(6, 7, 12)
    found = load_unet(tmp_path / "unet")(sample, 500, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, base(sample, 500, encoder_hidden_states=tokens).sample, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("flag", "value"),
    [("cd_attention_last", True), ("cd_attention_mid", True), ("addition_downsample", True), ("selfattn_block", "other")],
)
def test_flags_that_are_not_supported_are_refused_by_name(unet_folder: Path, flag: str, value: Any) -> None:
    edit_config(unet_folder, **{flag: value})
    with pytest.raises(InputError, match=rf"config\.json: {flag} is {value!r}; only .* is supported"):
        load_unet(unet_folder)


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, folder / WEIGHTS)


def add_tensor(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"stranger.weight": torch.ones(2)}, folder / WEIGHTS)


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100_000])


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
        (lambda f: edit_config(f, _class_name="UNet3D"), r"its _class_name is 'UNet3D'; expected UNetMV2DConditionModel"),
        (lambda f: edit_config(f, _class_name=None), r"its _class_name is None"),
        (lambda f: edit_config(f, down_block_types=["Moon"] * 3), r"config\.json: no UNet can be built from it"),
        (
            lambda f: edit_config(f, cross_attention_dim=768),
            r"do not belong together: \d+ of \d+ fit, 14 have another shape \(.*attn2",
        ),
        (lambda f: (f / WEIGHTS).unlink(), r"the weights are missing; expected diffusion_pytorch_model\.safetensors or"),
        (cut_weights, r"cannot be read \(.*\); the file is damaged, cut short"),
        (drop_tensor, r"do not belong together: .* 1 are missing \(conv_out\.bias\); likely"),
        (add_tensor, r"do not belong together: .* 1 have no place \(stranger\.weight\); likely"),
        pytest.param(
            lambda f: pickle_weights(f, b"hello world"),
            r"bin: cannot be read",
        ),
        pytest.param(
            lambda f: pickle_weights(f, [torch.ones(2)]),
            r"weights",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(unet_folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(unet_folder)
    with pytest.raises(InputError, match=message) as refused:
        load_unet(unet_folder)
    assert "\n" not in str(refused.value) and str(unet_folder) in str(refused.value)


def test_pickled_weights_are_read_too(unet_folder: Path) -> None:
    expected = load_file(unet_folder / WEIGHTS)
    pickle_weights(unet_folder, expected)
    found = load_unet(unet_folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_shared_prompt_gives_what_a_prompt_for_each_picture_gives(tiny_folder: Path) -> None:
    unet = load_unet(tiny_folder / "unet")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(6, 77, 1024, generator=generator)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 0, 1])
    sample, labels = torch.randn(12, 8, 8, 8, generator=generator), torch.randn(12, 64, generator=generator)
    outputs, gradients = [], []
    for shared in (True, False):
        learned = prompt.clone().requires_grad_()
        options = {"cross_attention_kwargs": {"prompt_of": order}} if shared else {}
        out = unet(
            sample, 300, encoder_hidden_states=learned if shared else learned[order], class_labels=labels, **options
        ).sample
        out.square().mean().backward()
        assert learned.grad is not None
        outputs.append(out.detach())
        gradients.append(learned.grad)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)
