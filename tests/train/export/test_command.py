"""`python -m train.export`: any checkpoint as the run would export it, in formats that other programs load, with a card."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import MicroWorld
from softprompt.model.loading import load_pipeline, load_unet
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import sample_views
from softprompt.prompt.embeddings import load_prompt
from tests.models import write_facelift
from tests.pictures import ONE_LEVEL, levels_apart, pixels
from tests.runs import run_to_end
from train import sample
from train.export.__main__ import LORA_FORMATS, main, make_parser
from train.export.lora import FORMATS
from train.export.source import find_checkpoint, open_run
from train.options.config import Config
from train.setup import prepare
from train.state.checkpoint import save_progress, verify
from train.state.folder import checkpoint_folder

RANK, ALPHA = 2, 5.0
LORA = "lora/pytorch_lora_weights.safetensors"
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: its views can be told apart."""
    return partial(small_config, model="micro")


@pytest.fixture(scope="module")
def trained(small: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`trained(**options)`: the folder of a finished run."""

    def run(**options: object) -> Path:
        config = small(**{n.replace("__", "."): v for n, v in options.items()})
        return run_to_end(config, tmp_path_factory.mktemp("runs") / "mice-001").folder

    return run


@pytest.fixture(scope="module")
def run(trained: Runs) -> Path:
    """A run of four steps along the whole path, with a moving average, that learned something; nothing may change it."""
    return trained(
        lora__alpha=ALPHA,
        lora__learning_rate=0.03,
        train__ema_decay=0.5,
        curriculum__at="[0, 1]",
        monitor__preview_every=2,
        monitor__guidance_scale=1.5,
        kl__weight=0,
    )


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its newest checkpoint, in all formats; nothing may change it."""
    folder = tmp_path_factory.mktemp("exported") / "mice"
    assert main([str(run), "--output", str(folder), "--lora", "peft", "kohya", "--pipeline", "--device=cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def earlier(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 2, in kohya's format too, and put into FaceLift beside it; nothing may change it."""
    folder = tmp_path_factory.mktemp("earlier")
    facelift = write_facelift(folder / "FaceLift")
    given = ["--step", "2", "--output", str(folder / "mice"), "--lora", "kohya", "--into", str(facelift)]
    assert main([str(run), *given, "--device=cpu"]) == 0
    return folder / "mice"


def lora_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / LORA)


def same_lora(a: Path, b: Path) -> bool:
    ours, theirs = lora_of(a), lora_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def described(folder: Path) -> dict[str, object]:
    """An export's description, without a mean whose order of summation differs."""
    content: dict[str, object] = json.loads((folder / "clr_embeds.json").read_text())
    return {name: value for name, value in content.items() if name != "rounding_error"}


# ------------------------------------------------------------------------------------------------- which model is exported


def test_the_newest_checkpoint_is_what_the_run_itself_exported(run: Path, exported: Path) -> None:
    for name in ("clr_embeds.pt", "clr_embeds.safetensors"):
        assert (exported / name).read_bytes() == (run / "export" / name).read_bytes()
    assert same_lora(exported, run / "export") and described(exported) == described(run / "export")


def test_an_earlier_checkpoint_gives_the_views_of_its_step(run: Path, earlier: Path, mice: Path, tmp_path: Path) -> None:
    description, picture = described(earlier), min((mice / "val").glob("*/cam_000.png"))
    assert (description["steps"], description["position"]) == (2, 0.5)
    quick = ["--steps=2", "--guidance_scale=1.5", "--eta=0", "--device=cpu"]
    assert sample.main([f"--pictures=[{picture}]", f"--export={earlier}", f"--output={tmp_path / 'views'}", *quick]) == 0
    tiles = pixels(run / "previews" / "tiles-step-000002.png")
    for view in range(6):
        found, expected = tmp_path / "views" / "cam_000" / f"cam_{view:03d}.png", tiles[128:192, (view + 1) * 64 :][:, :64]
        assert levels_apart(pixels(found), expected) <= ONE_LEVEL, view


def test_the_best_is_that_of_the_lowest_validation_loss(run: Path, tmp_path: Path) -> None:
    best = json.loads((run / "export" / "best" / "clr_embeds.json").read_text())["steps"]
    assert find_checkpoint(run, "best") == checkpoint_folder(run, best)
    changed = Path(shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")).parent
    progress = verify(checkpoint_folder(changed, 4))
    for step in (2, 4):
        save_progress(changed, progress | {"best": {"step": step, "loss": 0.1}})
        assert find_checkpoint(changed, "best") == checkpoint_folder(changed, step)
    save_progress(changed, progress | {"best": {"step": 0, "loss": 0.1}})
    with pytest.raises(InputError, match=r"--step best: no step of .* was better than the pretrained model; the run has"):
        find_checkpoint(changed, "best")


def test_the_path_is_the_checkpoint_s_whatever_its_files_are_now(run: Path, exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("- realistic", "- gone.pt"))
    source = open_run(moved, "newest", model=None, device=torch.device("cpu"))
    assert torch.equal(source.prompt, load_prompt(exported / "clr_embeds.safetensors"))


def test_a_prompt_that_began_elsewhere_and_does_not_train_is_not_lost(
    run: Path, trained: Runs, mice: Path, small_config: Callable[..., Config]
) -> None:
    options = {"init_from": run / "export", "prompt.learn": "false", "train.steps": 1, "curriculum.at": "[0, 1]"}
    options |= {"lora.alpha": ALPHA, "kl.weight": 0}
    folder = trained(**{name.replace(".", "__"): value for name, value in options.items()})
    source = open_run(folder, "newest", model=None, device=torch.device("cpu"))
    assert torch.equal(source.prompt, load_prompt(folder / "export" / "clr_embeds.safetensors"))
    resumed = prepare(small_config(mice, **options), resumed=True).adapted.prompt
    torch.testing.assert_close(resumed(0.0), load_prompt(run / "export" / "clr_embeds.safetensors"), atol=1e-5, rtol=0)
    assert not torch.equal(resumed.learned, resumed.start)


# --------------------------------------------------------------------------------------------------------------- formats


def by_hand(folder: Path) -> UNet2DConditionModel:
    """The pretrained UNet with B A alpha / rank added to each weight that the LoRA is on."""
    unet, lora = load_unet(MICRO_MODEL / "unet"), lora_of(folder)
    with torch.no_grad():
        for name in (n for n in lora if ".lora_A." in n):
            layer = unet.get_submodule(name.removeprefix("unet.").split(".lora_A")[0])
            layer.weight += ALPHA / RANK * lora[name.replace(".lora_A.", ".lora_B.")] @ lora[name]
    return unet


def with_diffusers(folder: Path) -> UNet2DConditionModel:
    unet = load_unet(MICRO_MODEL / "unet")
    unet.load_lora_adapter(folder / "lora", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    return unet


def with_peft(folder: Path) -> UNet2DConditionModel:
    return PeftModel.from_pretrained(load_unet(MICRO_MODEL / "unet"), folder / "lora_peft").base_model.model


def with_peft_injected(folder: Path) -> UNet2DConditionModel:
    config = LoraConfig.from_pretrained(folder / "lora_peft")
    unet = inject_adapter_in_model(config, load_unet(MICRO_MODEL / "unet"))
    weights = load_file(folder / "lora_peft" / "adapter_model.safetensors")
    left = set_peft_model_state_dict(unet, {name.removeprefix("base_model.model."): w for name, w in weights.items()})
    assert not left.unexpected_keys
    return unet


def with_diffusers_from_kohya(folder: Path) -> UNet2DConditionModel:
    unet = load_unet(MICRO_MODEL / "unet")
    weights, alphas = StableDiffusionPipeline.lora_state_dict(folder, weight_name="lora_kohya.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(weights, alphas, unet)
    return unet


def with_kohya_by_hand(folder: Path) -> UNet2DConditionModel:
    """The UNet as kohya's scripts change it: up @ down * alpha / rank is added to each layer's weight; its name has _ for ."""
    unet, lora = load_unet(MICRO_MODEL / "unet"), load_file(folder / "lora_kohya.safetensors")
    with torch.no_grad():
        for name, layer in unet.named_modules():
            key = f"lora_unet_{name.replace('.', '_')}"
            if f"{key}.alpha" in lora:
                down, up = lora.pop(f"{key}.lora_down.weight"), lora.pop(f"{key}.lora_up.weight")
                layer.weight += up @ down * lora.pop(f"{key}.alpha") / len(down)
    assert not lora, "each tensor belongs to a layer"
    return unet


@pytest.fixture(scope="module")
def views() -> Callable[[UNet2DConditionModel | Pipeline, Path], Tensor]:
    """`views(unet or pipeline, folder)`: of another picture and seed than exports compare themselves with."""
    pretrained = load_pipeline(MICRO_MODEL)
    picture = MicroWorld("mice", 77, 1).load(0)[0, :3] / 255

    def look(model: UNet2DConditionModel | Pipeline, folder: Path) -> Tensor:
        pipeline = model if isinstance(model, Pipeline) else replace(pretrained, unet=model.eval())
        prompt = load_prompt(folder / "clr_embeds.pt")
        return sample_views(pipeline, prompt, picture, steps=2, guidance_scale=1.0, eta=1.0, seed=9)

    return look


Views = Callable[[UNet2DConditionModel | Pipeline, Path], Tensor]


@pytest.fixture(scope="module")
def expected(exported: Path, views: Views) -> Tensor:
    """Views of the model that was trained; those of the pretrained UNet are others."""
    found = views(by_hand(exported), exported)
    assert (views(load_unet(MICRO_MODEL / "unet"), exported) - found).abs().max() > 0.02
    return found


@pytest.mark.parametrize("load", [with_diffusers, with_peft, with_peft_injected, with_diffusers_from_kohya, with_kohya_by_hand])
def test_each_format_gives_the_views_of_the_model_that_was_trained(
    exported: Path, views: Views, expected: Tensor, load: Callable[[Path], UNet2DConditionModel]
) -> None:
    assert (views(load(exported), exported) - expected).abs().max() < 1e-4


def test_the_merged_pipeline_gives_them_too(exported: Path, views: Views, expected: Tensor) -> None:
    assert (views(load_pipeline(exported / "pipeckpts"), exported) - expected).abs().max() < 1e-4


def test_the_files_are_those_that_other_programs_look_for(exported: Path) -> None:
    config = json.loads((exported / "lora_peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert sorted(p.name for p in (exported / "lora_peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    names = load_file(exported / "lora_peft" / "adapter_model.safetensors").keys()
    assert all(re.fullmatch(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight", name) for name in names)
    kohya = load_file(exported / "lora_kohya.safetensors")
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in kohya)
    assert {float(w) for n, w in kohya.items() if n.endswith("alpha")} == {ALPHA}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in kohya


def test_only_what_is_asked_for_is_written(earlier: Path) -> None:
    expected = {"README.md", "clr_embeds.json", "clr_embeds.pt", "clr_embeds.safetensors", "lora", "views.png"}
    assert {p.name for p in earlier.iterdir()} == expected | {"lora_kohya.safetensors"}
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["FaceLift", "mice"]


def test_what_is_written_is_put_in_at_once(earlier: Path) -> None:
    (found,) = (earlier.parent / "FaceLift").rglob("clr_embeds.pt")
    assert found.read_bytes() == (earlier / "clr_embeds.pt").read_bytes()


def test_every_format_that_can_be_asked_for_is_one() -> None:
    assert tuple(FORMATS) == LORA_FORMATS


# ------------------------------------------------------------------------------------------------------------- the card


def blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_card_is_what_the_hub_expects(run: Path, exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("diffusers", "apache-2.0", "image-to-image")
    assert {"softprompt", "lora", "multi-view"} <= set(data["tags"]) and "base_model" not in data
    picture = data["widget"][0]["output"]["url"]
    newest = run / "previews" / "held_out-step-000004.png"
    assert (exported / picture).read_bytes() == newest.read_bytes() and f"]({picture})" in card.text


def test_the_card_has_the_results_of_the_run_up_to_its_step(run: Path, earlier: Path) -> None:
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, here = (next(p for p in points if p["step"] == step and "loss/validation" in p) for step in (0, 2))
    text = (earlier / "README.md").read_text()
    for what, name in (("held-out loss", "loss/validation"), ("PSNR of views, dB", "views/psnr")):
        assert f"| {what} | {first[name]:.4g} | {here[name]:.4g} | 2 |" in text
    grid = run / "previews" / "held_out-step-000002.png"
    assert (earlier / "views.png").read_bytes() == grid.read_bytes() and "at step 2" in text


def test_the_card_says_how_it_was_trained_and_nothing_of_this_machine(run: Path, exported: Path, mice: Path) -> None:
    text = (exported / "README.md").read_text()
    assert f"| `lora.alpha` | 8.0 | {ALPHA} |" in text and "| `data.train` | micro | train |" in text
    assert "ema_decay: 0.5" in text and "step 4 of 4, the moving average of the weights" in text
    assert str(mice) not in text and str(mice.parent) not in text and str(run.parent) not in text


def test_the_card_s_commands_work_where_it_lies(
    exported: Path, mice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    facelift = write_facelift(tmp_path / "FaceLift")
    names = {"FACELIFT": facelift, "VIEWS": tmp_path / "views", "PICTURE.png": next(mice.rglob("cam_000.png"))}
    programs: Mapping[str, Callable[[list[str]], int]] = {"train.export": main, "train.sample": sample.main}
    commands = "".join(blocks(exported, "bash")).splitlines()
    assert len(commands) == 3
    for command in commands:
        for name, path in names.items():
            command = command.replace(name, str(path))
        python, m, program, *rest = shlex.split(command)
        assert (python, m) == ("python", "-m")
        assert programs[program]([*rest, "--steps=1", "--device=cpu"] if program == "train.sample" else rest) == 0
    assert len(list(tmp_path.glob("views/*/*.png"))) == 6
    assert sorted(p.name for p in facelift.rglob("*")) == ["inference.py", "mvdiffusion"], "undone"
    snippets = blocks(exported, "python")
    assert len(snippets) == 2
    for block in snippets:
        found: dict[str, object] = {}
        exec(block, found)
        unet = found["unet"]
        assert isinstance(unet, UNet2DConditionModel | PeftModel)
        (settings,) = unet.peft_config.values()
        assert settings.lora_alpha == ALPHA and any(p.any() for n, p in unet.named_parameters() if ".lora_B." in n)


def test_an_export_that_lies_alone_has_a_card_without_picture_and_results(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copytree(run / "export", tmp_path / "a" / "b" / "alone"))
    assert main([str(alone), "--output", str(tmp_path / "out"), "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    for what in ("a picture", "results"):
        assert f"WARNING    the model card is without {what}: {alone} lies in no run's folder" in printed
    assert (tmp_path / "out" / "clr_embeds.safetensors").read_bytes() == (alone / "clr_embeds.safetensors").read_bytes()
    assert same_lora(tmp_path / "out", alone) and described(tmp_path / "out") == described(alone)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "views.png" not in text and "## Results" not in text and "## Training" not in text and "# alone" in text
    assert not (tmp_path / "out" / "views.png").exists()


@pytest.fixture(scope="module")
def like_facelift(trained: Runs, tiny_folder: Path) -> Path:
    """A run from a pipeline folder that FaceLift's own classes wrote, of the prompt alone."""
    return trained(model=tiny_folder, train__steps=2, lora__rank=0, export__tolerance=1e-3)


def test_what_is_made_of_facelift_s_weights_has_their_licence(like_facelift: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(like_facelift), "--output", str(out), "--pipeline", "--device=cpu"]) == 0
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert (data["base_model"], data["license"], data["license_name"]) == (
        "wlyu/OpenFaceLift",
        "other",
        "adobe-research-license",
    )
    text = (out / "README.md").read_text()
    assert "non-commercial research only" in text and str(tiny_folder.parent) not in text
    assert "--model PIPECKPTS --export ." in text and "LoRA" not in text
    names = {p.relative_to(out / "pipeckpts") for p in (out / "pipeckpts").rglob("*") if p.is_file()}
    assert names == {p.relative_to(tiny_folder) for p in tiny_folder.rglob("*") if p.is_file()}
    index, theirs = (json.loads((f / "model_index.json").read_text()) for f in (out / "pipeckpts", tiny_folder))
    assert index == theirs


def test_a_model_that_moved_is_given_again(like_facelift: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(like_facelift, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(tiny_folder), "nowhere"))
    with pytest.raises(InputError, match=r"nowhere: no such folder in .*; expected a FaceLift pipeline folder"):
        open_run(run, "newest", model=None, device=torch.device("cpu"))
    source = open_run(run, "newest", model=str(tiny_folder), device=torch.device("cpu"))
    assert torch.equal(source.prompt, load_prompt(run / "export" / "clr_embeds.safetensors"))


def test_a_model_of_another_width_is_refused(like_facelift: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "prompt_width", 768)
    with pytest.raises(InputError, match=r"takes prompts of 6 views, 768 wide; the run's have 6 and are 1024 wide\. Likely"):
        open_run(like_facelift, "newest", model=str(tiny_folder), device=torch.device("cpu"))


def test_another_model_than_the_lora_s_is_refused(run: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"step-000004: the checkpoint's trained parameters are not .* e\.g\. unet"):
        open_run(run, "newest", model=str(tiny_folder), device=torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- whole or nothing


def test_an_alpha_that_a_converter_loses_is_found_and_nothing_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def converter_alone(unet: UNet2DConditionModel, file: Path) -> None:
        weights = {f"unet.{name}": w.detach() for name, w in get_peft_model_state_dict(unet).items()}
        save_file(convert_state_dict_to_kohya(weights), file)

    monkeypatch.setitem(FORMATS, "kohya", replace(FORMATS["kohya"], write=converter_alone))
    assert main([str(run), "--output", str(tmp_path / "out"), "--lora", "kohya", "--device=cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: export: lora_kohya.safetensors read back differs from the model in memory by 0.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "state.pt").write_bytes(b"short"), "state.pt has 5 bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
@pytest.mark.parametrize("step", ["newest", "best", "4"])
def test_a_damaged_checkpoint_is_named_and_another_offered(
    run: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    reason: str,
    step: str,
    error_of: Callable[..., str],
) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "tensorboard")))
    damage(checkpoint_folder(broken, 4))
    error = error_of(main, broken, "--step", step, "--output", tmp_path / "out")
    assert f"checkpoints/step-000004: is damaged ({reason}" in error and "; --step takes another: 2" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["RUN", "--output=OUT", "--step=3"],
            "--step 3: RUN holds no checkpoint of step 3; the run has checkpoints of step 2, 4",
        ),
        (
            ["RUN", "--output=OUT", "--step=last"],
            "--step: is last; expected newest, best, or a step; the run has checkpoints of",
        ),
        (["RUN/export", "--output=OUT", "--step=2"], "--step: RUN/export is an export, of one step"),
        (["RUN", "--output=RUN"], "RUN: exists already and is not an empty folder; choose another"),
        (["RUN/previews", "--output=OUT"], "RUN/previews: is no run (it has no config.yaml) and no export (no clr_embeds.pt)"),
        (
            ["RUN", "--into=FACELIFT"],
            "--into: RUN holds no export; give its own export, RUN/export, or --output FOLDER as well",
        ),
        (["RUN/export", "--into=FACELIFT", "--lora", "peft"], "--lora: changes what --output writes"),
        (["RUN", "--output=OUT", "--into=RUN"], "RUN: is not FaceLift's repository, it has no inference.py and no mvdiffusion"),
        (["RUN"], "nothing to do: give --output FOLDER to write an export, --into FACELIFT to put one in, or both"),
        (["RUN", "--undo=FACELIFT"], "--undo: stands alone"),
        (["gone", "--output=OUT"], "gone: no such folder; expected a run (runs/NAME-001) or an export of one"),
        (["RUN", "--output=OUT", "--lora", "koya"], "argument --lora: invalid choice: 'koya' (choose from"),
        (["RUN", "--outptu=OUT"], "unknown option 'outptu'; did you mean 'output'?"),
        ([], "the run or export to take is missing"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    run: Path, tmp_path: Path, options: list[str], message: str, error_of: Callable[..., str]
) -> None:
    names = {"RUN": run, "OUT": tmp_path / "out", "FACELIFT": write_facelift(tmp_path / "FaceLift")}
    before = [sorted(folder.rglob("*")) for folder in (run, tmp_path)]
    assert filled(message, names) in error_of(main, *(filled(option, names) for option in options))
    assert [sorted(folder.rglob("*")) for folder in (run, tmp_path)] == before


def filled(text: str, names: Mapping[str, Path]) -> str:
    return re.sub(r"^(--\w+=)?(RUN|OUT|FACELIFT)\b|(?<=[ :])RUN\b", lambda m: replaced(m, names), text)


def replaced(match: re.Match[str], names: Mapping[str, Path]) -> str:
    return (match.group(1) or "") + str(names[match.group(2) or "RUN"])


def redescribe(export: Path, **what: object) -> None:
    file = export / "clr_embeds.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | what))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: shutil.rmtree(e / "lora"), "--lora: EXPORT has no LoRA (lora.rank 0); only its prompt was trained"),
        (lambda e: (e / LORA).write_bytes(b"no weights"), "EXPORT/lora: cannot be loaded into "),
        (lambda e: save_file({n: w * float("nan") for n, w in lora_of(e).items()}, e / LORA), "EXPORT/lora: "),
        (lambda e: (e / "clr_embeds.json").write_text("{}"), "EXPORT/clr_embeds.json: origin, model, licence, waypoints, "),
        (lambda e: redescribe(e, steps="many"), "EXPORT/clr_embeds.json: steps: missing, or of another type; expected"),
        (lambda e: redescribe(e, waypoints=["facelift"]), "EXPORT/clr_embeds.json: waypoints: missing, or of another type"),
        (
            lambda e: (e / "clr_embeds.json").unlink(),
            "EXPORT/clr_embeds.json: not found; the description of an exported",
        ),
    ],
)
def test_an_export_that_is_spoilt_is_refused(
    run: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str, error_of: Callable[..., str]
) -> None:
    spoilt = Path(shutil.copytree(run / "export", tmp_path / "export"))
    spoil(spoilt)
    error = error_of(main, spoilt, "--output", tmp_path / "out", "--lora", "kohya", "--device=cpu")
    assert error.startswith(f"error: {message}".replace("EXPORT", str(spoilt)))
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_merged_pipeline_is_refused_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    error = error_of(main, run, "--output", tmp_path / "out", "--pipeline", "--device=cpu")
    assert "GB free; the merged pipeline folder takes about 0.0 GB" in error


def test_the_help_has_examples() -> None:
    printed = make_parser().format_help()
    assert printed.count("python -m train.export ") >= 5 and "--undo ../FaceLift" in printed
