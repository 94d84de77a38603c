"""Weights however they were saved: a variant, in shards, pickled, under the names of a wrapper; and what does not fit."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline, load_text_encoder, load_unet
from softprompt.model.weights import find_weights, read_weights

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_normalizer": "diffusion_pytorch_model",
    "image_encoder": "model",
    "text_encoder": "model",
}


def stem_of(part: str, ending: str) -> str:
    """transformers calls its pickled weights otherwise."""
    return "pytorch_model" if PARTS[part] == "model" and ending == "bin" else PARTS[part]


def save(weights: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(weights, file)
    else:
        save_file(weights, file, metadata={"format": "pt"})


def plain(folder: Path, part: str, weights: dict[str, Tensor], ending: str = "safetensors") -> None:
    save(weights, folder / f"{stem_of(part, ending)}.{ending}")


def variant(folder: Path, part: str, weights: dict[str, Tensor], ending: str = "safetensors") -> None:
    save(weights, folder / f"{stem_of(part, ending)}.fp16.{ending}")


def shards(folder: Path, part: str, weights: dict[str, Tensor], ending: str = "safetensors", of: str = "") -> None:
    """Two, or one where there is but one weight."""
    names, stem = list(weights), stem_of(part, ending)
    halves = [half for half in (names[: len(names) // 2], names[len(names) // 2 :]) if half]
    where: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"{stem}-{number:05d}-of-{len(halves):05d}.{ending}"
        file = f"{stem}{of}-{number:05d}-of-{len(halves):05d}.{ending}" if of else file
        save({name: weights[name] for name in half}, folder / file)
        where |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
    (folder / f"{stem}.{ending}.index{of}.json").write_text(json.dumps(index))


def compiled(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    plain(folder, part, {f"_orig_mod.{name}": weight for name, weight in weights.items()})


def under_ddp(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    plain(folder, part, {f"module.{name}": weight for name, weight in weights.items()}, "bin")


def both_in_shards(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    shards(folder, part, {f"module._orig_mod.{name}": weight for name, weight in weights.items()})


def pickled(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    plain(folder, part, weights, "bin")


def pickled_variant(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    variant(folder, part, weights, "bin")


def pickled_shards(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    shards(folder, part, weights, "bin")


def compiled_in_parts(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    """As torch.compile and FSDP wrap one module and another."""
    wrapped = {re.sub(r"^(\w+)\.", r"\1._fsdp_wrapped_module._orig_mod.", name): w for name, w in weights.items()}
    plain(
        folder, part, wrapped if wrapped.keys() != weights.keys() else {f"_orig_mod.{name}": w for name, w in weights.items()}
    )


WRAPPERS = (compiled, under_ddp, both_in_shards, compiled_in_parts)
WAYS = [variant, shards, pickled, pickled_variant, pickled_shards, *WRAPPERS]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pipeline folder that may be changed."""
    return Path(shutil.copytree(MICRO_MODEL, tmp_path / "model"))


def state(part: str, folder: Path) -> dict[str, Tensor]:
    found = load_text_encoder(folder)[1] if part == "text_encoder" else getattr(load_pipeline(folder), part)
    return dict(found.state_dict())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_part_is_loaded_however_its_weights_were_saved(model: Path, part: str, way: Callable[..., None]) -> None:
    expected = state(part, model)
    (file,) = (model / part).glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    way(model / part, part, weights)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = state(part, model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    said = [str(w.message) for w in warned if "saved compiled, or under DDP" in str(w.message)]
    assert len(said) == (way in WRAPPERS), said


def test_the_plain_names_come_before_a_variant_and_safetensors_before_pickles(model: Path) -> None:
    folder = model / "unet"
    weights = {name: torch.zeros_like(weight) for name, weight in load_file(folder / f"{PARTS['unet']}.safetensors").items()}
    for way in (variant, pickled):
        way(folder, "unet", weights)
    found = find_weights(folder, PARTS["unet"])
    assert [file.name for file in found.files] == [f"{PARTS['unet']}.safetensors"] and found.variant is None and found.is_safe
    assert any(weight.any() for weight in read_weights(folder, PARTS["unet"]).values())


def test_an_index_of_a_variant_s_shards_as_older_diffusers_named_it_is_read(model: Path) -> None:
    folder = model / "unet"
    weights = load_file(folder / f"{PARTS['unet']}.safetensors")
    (folder / f"{PARTS['unet']}.safetensors").unlink()
    shards(folder, "unet", weights, of=".fp16")
    assert find_weights(folder, PARTS["unet"]).variant == "fp16"
    (folder / f"{PARTS['unet']}.safetensors.index.fp16.json").rename(folder / f"{PARTS['unet']}.safetensors.fp16.index.json")
    assert find_weights(folder, PARTS["unet"]).variant == "fp16"
    assert read_weights(folder, PARTS["unet"]).keys() == weights.keys()


def spoil(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / f"{PARTS['unet']}.safetensors")
        (folder / f"{PARTS['unet']}.safetensors").unlink()
        shards(folder, "unet", weights)
        change(folder)

    return apply


def two_variants(folder: Path) -> None:
    file = folder / f"{PARTS['unet']}.safetensors"
    shutil.copy(file, folder / f"{PARTS['unet']}.fp16.safetensors")
    file.rename(folder / f"{PARTS['unet']}.non_ema.safetensors")


INDEX = f"{PARTS['unet']}.safetensors.index.json"
SECOND = f"{PARTS['unet']}-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_variants, r"unet: has variants of its weights \(.*fp16.*non_ema.*\) and no .*; expected one of them"),
        (spoil(lambda f: (f / SECOND).unlink()), r"index\.json: 1 of 2 shards are missing, e\.g\. .*-00002-of"),
        (spoil(lambda f: (f / SECOND).write_bytes(b"no weights")), r"00002-of-00002\.safetensors: cannot be read"),
        (
            spoil(lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')),
            r"names .\.\./a\.safetensors.; expected files of weights in its own folder",
        ),
        (spoil(lambda f: (f / INDEX).write_text('{"weight_map": 3}')), r"index\.json: has no weight_map"),
        (spoil(lambda f: (f / INDEX).write_text("{")), r"index\.json: cannot be read as JSON"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(model: Path, change: Callable[[Path], None], message: str) -> None:
    change(model / "unet")
    with pytest.raises(InputError, match=message):
        load_unet(model / "unet")


def test_names_of_which_only_some_have_a_prefix_are_left_and_refused(model: Path) -> None:
    file = model / "unet" / f"{PARTS['unet']}.safetensors"
    weights = load_file(file)
    save_file({(f"module.{n}" if i < 2 else n): w for i, (n, w) in enumerate(weights.items())}, file)
    with pytest.raises(
        InputError, match=rf"{len(weights) - 2} of {len(weights)} fit, 2 are missing .*, 2 have no place \(modul"
    ):
        load_unet(model / "unet")


@pytest.mark.parametrize("way", [variant, pickled_variant, compiled], ids=lambda way: way.__name__)
def test_how_the_weights_of_a_part_were_read_is_noted(model: Path, way: Callable[..., None]) -> None:
    weights = load_file(model / "vae" / f"{PARTS['vae']}.safetensors")
    (model / "vae" / f"{PARTS['vae']}.safetensors").unlink()
    way(model / "vae", "vae", weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (note,) = load_pipeline(model).notes
    expected = (
        rf"{len(weights)} of its {len(weights)} weights are named as _orig_mod"
        if way is compiled
        else "the variant fp16 is taken"
    )
    assert re.search(rf"/vae: {expected}", note)


def test_weights_in_full_precision_come_before_a_variant_of_any_kind(model: Path) -> None:
    weights = load_file(model / "unet" / f"{PARTS['unet']}.safetensors")
    (model / "unet" / f"{PARTS['unet']}.safetensors").unlink()
    variant(model / "unet", "unet", {name: torch.zeros_like(weight) for name, weight in weights.items()})
    pickled(model / "unet", "unet", weights)
    found = load_pipeline(model)
    assert all(torch.equal(weight, weights[name]) for name, weight in found.unet.state_dict().items()) and not found.notes


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda w: {f"unet.{name}": weight for name, weight in w.items()},
            r"0 of \d+ fit, .* a part of a larger model, under unet\.",
        ),
        (lambda w: w | {"conv_in.lora_A.weight": torch.ones(1)}, r"likely they are a LoRA, or a UNet with one"),
        (
            lambda w: {f"encoder.{i}": weight for i, weight in enumerate(w.values())},
            r"likely they are of another kind of model",
        ),
        (lambda w: dict(list(w.items())[5:]), r"5 are missing \(.*likely they were saved or copied incompletely"),
        (lambda w: w | {"conv_out.bias": torch.ones(7)}, r"1 have another shape \(conv_out\.bias\); likely config\.json is of"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_likely_cause(
    model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], cause: str
) -> None:
    file = model / "unet" / f"{PARTS['unet']}.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match=cause) as refused:
        load_unet(model / "unet")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["unet", "image_encoder"])
def test_of_shards_beside_one_file_those_are_taken_that_from_pretrained_takes(model: Path, part: str) -> None:
    (file,) = (model / part).glob("*.safetensors")
    weights = load_file(file)
    shards(model / part, part, {name: weight + 1 if weight.is_floating_point() else weight for name, weight in weights.items()})
    cls = {"unet": UNet2DConditionModel, "image_encoder": CLIPVisionModelWithProjection}[part]
    if part == "unet":  # the stock class has no names for FaceLift's blocks
        config = (model / part / "config.json").read_text()
        (model / part / "config.json").write_text(config.replace("MV2D", "2D"))
    theirs = cls.from_pretrained(model / part).state_dict()
    ours = state(part, model)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
