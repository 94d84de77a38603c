"""An export: its files are correct and verified, and reach FaceLift by the printed commands."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.data.batch import seeded
from softprompt.errors import RunError
from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import MicroWorld
from softprompt.model.adapted import add_lora
from softprompt.model.loading import load_pipeline, load_unet, save_pipeline
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import sample_views
from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.encoding import load_waypoints
from softprompt.prompt.templates import VIEWS
from train.export import write as write_module
from train.export.facelift import how_to_use
from train.export.write import export, export_pipeline
from train.state.folder import Exported

METADATA = {
    "origin": "softprompt",
    "waypoints": ["facelift", "realistic"],
    "position": 0.75,
    "steps": 12,
    "model": "micro",
    "licence": "derived from pipeckpts: the terms of its weights hold for this file too",
}
RANK, ALPHA = 2, 5.0


@dataclass
class Trained:
    pipeline: Pipeline
    prompt: Tensor
    picture: Tensor

    def export(self, folder: Path, *, tolerance: float = 1e-4) -> Exported:
        return export(self.pipeline, self.prompt, folder, picture=self.picture, metadata=METADATA, tolerance=tolerance)

    def export_pipeline(self, folder: Path, *, tolerance: float = 1e-4) -> float:
        return export_pipeline(self.pipeline, folder, picture=self.picture, tolerance=tolerance)

    def views(self, pipeline: Pipeline, prompt: Tensor) -> Tensor:
        """Views of another picture and seed than those that the export is verified with."""
        picture = MicroWorld("mice", 77, 1).load(0)[0, :3] / 255
        return sample_views(pipeline, prompt, picture, steps=4, guidance_scale=3.0, eta=1.0, seed=9)


def trained(rank: int, dtype: torch.dtype = torch.float32) -> Trained:
    """A model as after a run: LoRA and prompt differ enough to change the views."""
    pipeline = load_pipeline(MICRO_MODEL, dtype=dtype)
    if rank:
        add_lora(pipeline.unet, rank=rank, alpha=ALPHA, targets=["to_q", "to_k", "to_v", "to_out.0"])
        move(pipeline.unet)
    start = load_waypoints(["facelift"], folder=MICRO_MODEL, subject="mouse", angle="", num_views=6, width=1024)[0]
    prompt = start + 0.05 * torch.randn(start.shape, generator=seeded("prompt"))
    return Trained(pipeline, prompt, MicroWorld("mice", 5, 1).load(0)[0, :3] / 255)


@torch.no_grad()
def move(unet: UNet2DConditionModel, seed: int = 0) -> None:
    for name, parameter in unet.named_parameters():
        if ".lora_B" in name:
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=seeded(seed, name)))


@pytest.fixture(scope="module")
def model() -> Trained:
    """A trained model; nothing may change it."""
    return trained(RANK)


@pytest.fixture(scope="module")
def done(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export of the trained model, with its whole pipeline; nothing may change the folder."""
    exported = model.export(tmp_path_factory.mktemp("a_run") / "export")
    assert [p.name for p in exported.folder.iterdir() if p.name.startswith(("pipeckpts", "."))] == [], "that is the second step"
    assert 0 <= model.export_pipeline(exported.folder) < 1e-4
    return exported


@pytest.fixture
def first_step(done: Exported, tmp_path: Path) -> Path:
    """The folder of an export whose second step is still to come."""
    return Path(shutil.copytree(done.folder, tmp_path / "export", ignore=shutil.ignore_patterns("pipeckpts")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ------------------------------------------------------------------------------------------------------------- the files


def test_an_export_holds_prompt_lora_and_pipeline_and_nothing_else(done: Exported) -> None:
    expected = ["clr_embeds.json", "clr_embeds.pt", "clr_embeds.safetensors", "lora", "pipeckpts"]
    assert sorted(p.name for p in done.folder.iterdir()) == expected
    assert [p.name for p in done.folder.parent.iterdir()] == ["export"]
    assert [p.name for p in (done.folder / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert done.read_back < 1e-4 and 0 < done.rounding < 0.1


def test_the_prompt_is_the_bare_float16_tensor_facelift_loads(done: Exported, model: Trained, facelift: Path) -> None:
    stored = torch.load(done.folder / "clr_embeds.pt", weights_only=True)
    assert type(stored) is Tensor and stored.dtype == torch.float16 and not stored.requires_grad
    assert torch.equal(stored, model.prompt.half())
    theirs = torch.load(next(facelift.rglob("clr_embeds.pt")), weights_only=True)
    assert (stored.dtype, stored.shape, type(stored)) == (theirs.dtype, theirs.shape, type(theirs))
    assert torch.equal(load_prompt(done.folder / "clr_embeds.safetensors"), model.prompt), "float32 loses nothing"


def test_the_json_beside_it_says_what_the_prompt_is(done: Exported, model: Trained) -> None:
    described = json.loads((done.folder / "clr_embeds.json").read_text(encoding="utf-8"))
    assert {key: described[key] for key in METADATA} == METADATA
    assert described["views"] == list(VIEWS) and described["shape"] == [6, 77, 1024]
    assert (described["file"], described["dtype"]) == ("clr_embeds.pt", "float16")
    error = (model.prompt.half().float() - model.prompt).abs()
    assert described["rounding_error"]["max"] == pytest.approx(float(error.max())) and float(error.max()) > 0
    norms = model.prompt.norm(dim=-1)
    assert described["token_norms"]["max"] == pytest.approx(float(norms.max()), abs=1e-4)
    assert described["token_norms"]["first"] == pytest.approx(float(norms[:, 0].mean()), abs=1e-4)
    flat = model.prompt.flatten(1)
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(torch.tensor(described["view_cosines"]), cosines, atol=1e-4, rtol=0)


def test_the_lora_keeps_rank_and_alpha_and_gives_the_views_in_memory(done: Exported, model: Trained) -> None:
    unet = load_unet(MICRO_MODEL / "unet")
    unet.load_lora_adapter(done.folder / "lora", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    (settings,) = unet.peft_config.values()
    assert (settings.r, settings.lora_alpha) == (RANK, ALPHA)
    assert set(settings.target_modules) == {"to_q", "to_k", "to_v", "to_out.0"}
    prompt = load_prompt(done.folder / "clr_embeds.pt")
    expected = model.views(model.pipeline, prompt)
    found = model.views(replace(model.pipeline, unet=unet.eval()), prompt)
    assert (found - expected).abs().max() <= 1e-4
    without = model.views(replace(model.pipeline, unet=load_unet(MICRO_MODEL / "unet")), prompt)
    assert (without - expected).abs().max() > 0.05, "the LoRA changes nothing, so this test shows nothing"
    with safe_open(done.folder / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(name.startswith("unet.") and ".lora_" in name for name in file.keys())  # noqa: SIM118


def test_the_pipeline_folder_is_facelift_s_and_gives_the_views_in_memory(
    done: Exported, model: Trained, tiny_folder: Path
) -> None:
    folder = done.folder / "pipeckpts"
    ours, original = contents(folder), contents(MICRO_MODEL)
    assert ours.keys() == original.keys()
    assert {name for name in ours if ours[name] != original[name]} == {"unet/diffusion_pytorch_model.safetensors"} | (
        {"unet/config.json"} if ours["unet/config.json"] != original["unet/config.json"] else set()
    )
    config, theirs = (json.loads((f / "unet" / "config.json").read_text(encoding="utf-8")) for f in (folder, tiny_folder))
    assert config["_class_name"] == theirs["_class_name"] == "UNetMV2DConditionModel"
    assert config.keys() == theirs.keys()
    prompt = load_prompt(done.folder / "clr_embeds.pt")
    difference = model.views(load_pipeline(folder), prompt) - model.views(model.pipeline, prompt)
    assert difference.abs().max() <= 1e-4


def test_without_lora_the_prompt_alone_is_exported(tmp_path: Path) -> None:
    exported = trained(rank=0).export(tmp_path / "export")
    assert sorted(p.name for p in exported.folder.iterdir()) == ["clr_embeds.json", "clr_embeds.pt", "clr_embeds.safetensors"]
    assert exported.read_back == 0.0
    assert not any("LoRA" in line or "pipeckpts" in line for line in how_to_use(exported.folder))


def test_without_lora_the_pipeline_folder_is_the_pretrained_one(tmp_path: Path) -> None:
    model = trained(rank=0)
    folder = model.export(tmp_path / "export").folder
    assert model.export_pipeline(folder) == 0.0
    ours, original = (load_unet(f / "unet").state_dict() for f in (folder / "pipeckpts", MICRO_MODEL))
    assert ours.keys() == original.keys() and all(torch.equal(ours[name], original[name]) for name in ours)


def test_the_pipeline_folder_is_of_the_files_exported_and_not_of_the_model_since(first_step: Path, done: Exported) -> None:
    since = trained(RANK)
    move(since.pipeline.unet, seed=1)
    since.prompt = since.prompt * 2
    since.export_pipeline(first_step)
    assert contents(first_step) == contents(done.folder)


def test_a_half_precision_lora_is_merged_in_float32(tmp_path: Path) -> None:
    model = trained(RANK, torch.bfloat16)
    folder = model.export(tmp_path / "export").folder
    assert model.export_pipeline(folder) < 1e-4
    merged, original = (load_unet(f / "unet").state_dict() for f in (folder / "pipeckpts", MICRO_MODEL))
    lora = {name: p.detach() for name, p in model.pipeline.unet.named_parameters() if ".lora_" in name}
    changed = set()
    for name, a in lora.items():
        if ".lora_A" in name:
            assert a.dtype == torch.float32, "what trains is float32"
            layer = name.split(".lora_A")[0] + ".weight"
            expected = original[layer] + ALPHA / RANK * lora[name.replace(".lora_A", ".lora_B")] @ a
            torch.testing.assert_close(merged[layer], expected, atol=1e-6, rtol=0)
            assert not torch.equal(expected.bfloat16().float(), expected)
            changed.add(layer)
    assert changed and {n for n in original if not torch.equal(merged[n], original[n])} == changed


# -------------------------------------------------------------------------------------------------------------- TF32


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that TF32 keeps."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def convolutions_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as on CUDA: float32 is rounded to TF32 unless that is switched off."""
    plain = torch.nn.functional.conv2d

    def conv2d(input: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        if torch.backends.cudnn.allow_tf32 and input.dtype == weight.dtype == torch.float32:
            input, weight = as_tf32(input), as_tf32(weight)
        return plain(input, weight, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def test_the_rounding_of_these_tests_is_tf32_s() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-12, 1 + 3 * 2**-12, -1 - 2**-12, 0.0, 1e-3])
    assert as_tf32(x)[:6].tolist() == [1.0, 1 + 2**-10, 1.0, 1 + 2**-10, -1.0, 0.0]
    assert 0 < abs(float(as_tf32(x)[6]) - 1e-3) < 1e-3 * 2**-11


@pytest.mark.usefixtures("convolutions_in_tf32")
def test_merging_is_compared_without_tf32(
    model: Trained, first_step: Path, done: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "full_float32", nullcontext)
        with pytest.raises(RunError, match="export: pipeckpts read back differs"):
            model.export_pipeline(first_step)
    shutil.rmtree(first_step / "pipeckpts.unverified")
    assert model.export_pipeline(first_step) <= 1e-4
    assert torch.backends.cudnn.allow_tf32, "put back as it was"
    assert contents(first_step) == contents(done.folder)


@pytest.mark.usefixtures("convolutions_in_tf32")
def test_tf32_is_put_back_when_the_comparison_fails(model: Trained, first_step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        assert not torch.backends.cudnn.allow_tf32
        raise OSError("no space left on device")

    monkeypatch.setattr(write_module, "save_pipeline", fails)
    with pytest.raises(OSError, match="no space"):
        model.export_pipeline(first_step)
    assert torch.backends.cudnn.allow_tf32


# --------------------------------------------------------------------------------------------------- verified, or nothing


def test_a_newer_export_takes_the_place_of_an_older_and_leaves_the_rest(model: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "clr_embeds.pt").write_bytes(b"best")
    for name in ("clr_embeds.pt", "lora/old.safetensors", "pipeckpts/model_index.json", ".export.partial-new/clr_embeds.pt"):
        target = folder / name if not name.startswith(".") else tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"old")
    model.export(folder)
    assert torch.equal(load_prompt(folder / "clr_embeds.pt"), model.prompt.half().float())
    assert [p.name for p in (folder / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert not (folder / "pipeckpts").exists(), "of another model than the prompt beside it"
    assert (folder / "best" / "clr_embeds.pt").read_bytes() == b"best"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_compiled_blocks_that_round_otherwise_are_not_compared_with(model: Trained, tmp_path: Path) -> None:
    def rounds_otherwise(graph: Callable[..., list[Tensor]], _: object) -> Callable[..., list[Tensor]]:
        return lambda *inputs: [output * 1.001 for output in graph(*inputs)]

    for block in model.pipeline.unet.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.compile(backend=rounds_otherwise)
    try:
        assert model.export(tmp_path / "export").read_back == 0
    finally:
        for block in model.pipeline.unet.modules():
            block._compiled_call_impl = None


@pytest.mark.parametrize("broken", ["weights", "nan"])
def test_an_export_that_reads_back_otherwise_is_none_and_the_earlier_one_stays(
    model: Trained, done: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    shutil.copytree(done.folder, tmp_path / "export")
    before = contents(tmp_path / "export")
    spoilt = {
        "weights": (write_module, "load_unet", spoilt_unet),
        "nan": (write_module, "load_prompt", lambda *a, **k: load_prompt(*a, **k) * float("nan")),
    }
    monkeypatch.setattr(*spoilt[broken])
    message = (
        r"export: clr_embeds\.pt and lora read back differs .* more than export\.tolerance 0\.0001\. It is kept as "
        r"\S*/export\.unverified for inspection"
    )
    (tmp_path / "export.unverified" / "lora").mkdir(parents=True)  # what an earlier failure left is no hindrance
    with pytest.raises(RunError, match=message):
        model.export(tmp_path / "export")
    assert contents(tmp_path / "export") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "export.unverified"]
    assert {"clr_embeds.pt", "lora"} <= {p.name for p in (tmp_path / "export.unverified").iterdir()}


def spoilt_unet(folder: Path, **options: torch.dtype) -> UNet2DConditionModel:
    unet = load_unet(folder, **options)
    unet.conv_in.weight.data *= 1.01
    return unet


def no_merge(pipeline: Pipeline, folder: Path, *, merge_lora: bool) -> None:
    save_pipeline(pipeline, folder, merge_lora=not merge_lora)


def nan_merged(pipeline: Pipeline, folder: Path, *, merge_lora: bool) -> None:
    save_pipeline(pipeline, folder, merge_lora=merge_lora)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: w * float("nan") if n == "conv_in.bias" else w for n, w in load_file(file).items()}, file)


@pytest.mark.parametrize("broken", [no_merge, nan_merged])
def test_a_pipeline_that_reads_back_otherwise_is_kept_aside_and_prompt_and_lora_stay_exported(
    model: Trained, first_step: Path, done: Exported, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None]
) -> None:
    before = contents(first_step)
    for name in ("pipeckpts.unverified", ".pipeckpts.partial-new"):  # what an earlier failure left is no hindrance
        (first_step / name).mkdir()
        (first_step / name / "old").touch()
    message = (
        r"export: pipeckpts read back differs .* more than export\.tolerance 0\.0001\. It is kept as "
        r"\S*/export/pipeckpts\.unverified for inspection"
    )
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "save_pipeline", broken)
        with pytest.raises(RunError, match=message):
            model.export_pipeline(first_step)
    after = contents(first_step)
    aside = {name: content for name, content in after.items() if name.startswith("pipeckpts.unverified/")}
    assert {n: c for n, c in after.items() if n not in aside} == before
    expected = {f"pipeckpts.unverified/{f.relative_to(MICRO_MODEL)}" for f in MICRO_MODEL.rglob("*") if f.is_file()}
    assert aside.keys() == expected, "it is complete, for inspection"
    assert not any("pipeckpts" in line for line in how_to_use(first_step)), "nobody is told to use it"
    assert model.export_pipeline(first_step) <= 1e-4, "it can be tried again"
    assert {n: c for n, c in contents(first_step).items() if n not in aside} == contents(done.folder)


def test_a_pipeline_cut_short_in_writing_leaves_prompt_and_lora_exported(
    model: Trained, first_step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(first_step)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("softprompt.model.loading.save_unet", full)
    with pytest.raises(OSError, match="no space left"):
        model.export_pipeline(first_step)
    assert contents(first_step) == before
    assert sorted(p.name for p in first_step.iterdir()) == sorted({name.split("/")[0] for name in before})


def test_an_export_leaves_the_model_in_memory_as_it_was(model: Trained, tmp_path: Path) -> None:
    unet = model.pipeline.unet
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    grads = {name: p.requires_grad for name, p in unet.named_parameters()}
    unet.train()
    exported = model.export(tmp_path / "export")
    model.export_pipeline(exported.folder)
    assert unet.training
    unet.eval()
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == grads
    assert all(torch.equal(x, before[name]) for name, x in unet.state_dict().items())
    assert unet.device == torch.device("cpu")


def test_the_printed_line_for_diffusers_loads_the_lora(done: Exported) -> None:
    (line,) = [line for line in how_to_use(done.folder) if "load_lora_adapter" in line]
    unet = load_unet(MICRO_MODEL / "unet")
    exec(line.strip(), {"unet": unet})
    assert next(iter(unet.peft_config.values())).lora_alpha == ALPHA
