"""Weights however they were saved: a variant, in shards, pickled, under the names of a wrapper."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_frozen, load_pipeline, load_unet
from softprompt.model.weights import find_weights, read_weights

UNET = "diffusion_pytorch_model"
PARTS: dict[str, tuple[str, Callable[[Path], torch.nn.Module]]] = {
    "unet": (UNET, load_unet),
    "vae": (UNET, partial(load_frozen, AutoencoderKL)),
    "image_normalizer": (UNET, partial(load_frozen, StableUnCLIPImageNormalizer)),
    "image_encoder": ("model", partial(load_frozen, CLIPVisionModelWithProjection)),
    "text_encoder": ("model", partial(load_frozen, CLIPTextModel)),
}
Weights = dict[str, Tensor]


def write(weights: Weights, file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(weights, file)
    else:
        save_file(weights, file, metadata={"format": "pt"})


def whole(folder: Path, stem: str, weights: Weights, *, ending: str = "safetensors", variant: str = "", name: str = r"\g<0>"):
    """One file, each weight's name changed by the template."""
    write({re.sub(r"^.*$", name, n): w for n, w in weights.items()}, folder / f"{stem}{variant}.{ending}")


def shards(
    folder: Path, stem: str, weights: Weights, *, ending: str = "safetensors", variant: str = "", prefix: str = ""
) -> None:
    """Two, or one where there is but one weight."""
    names = list(weights)
    halves = [half for half in (names[: len(names) // 2], names[len(names) // 2 :]) if half]
    where: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"{stem}{variant}-{number:05d}-of-{len(halves):05d}.{ending}"
        write({prefix + name: weights[name] for name in half}, folder / file)
        where |= {prefix + name: file for name in half}
    (folder / f"{stem}.{ending}.index{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def compiled_in_parts(folder: Path, stem: str, weights: Weights) -> None:
    """With the prefixes of torch.compile and FSDP in front of some modules."""
    wrapped = {re.sub(r"^(\w+)\.", r"\1._fsdp_wrapped_module._orig_mod.", name): w for name, w in weights.items()}
    whole(folder, stem, wrapped, name=r"\g<0>" if wrapped.keys() != weights.keys() else r"_orig_mod.\g<0>")


PLAINLY = {
    "variant": partial(whole, variant=".fp16"),
    "shards": shards,
    "pickled": partial(whole, ending="bin"),
    "pickled variant": partial(whole, ending="bin", variant=".fp16"),
    "pickled shards": partial(shards, ending="bin"),
}
WRAPPED = {
    "compiled": partial(whole, name=r"_orig_mod.\g<0>"),
    "under DDP": partial(whole, ending="bin", name=r"module.\g<0>"),
    "both in shards": partial(shards, prefix="module._orig_mod."),
    "compiled in parts": compiled_in_parts,
}
WAYS: dict[str, Callable[[Path, str, Weights], None]] = {**PLAINLY, **WRAPPED}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """A UNet's folder that may be changed."""
    return Path(shutil.copytree(MICRO_MODEL / "unet", tmp_path / "unet"))


def taken_out(folder: Path) -> Weights:
    """The weights of a part, whose file is removed."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    return weights


def saved_as(way: str, folder: Path, stem: str, weights: Weights) -> None:
    """transformers has another stem for pickles."""
    pickled = "pickled" in way or way == "under DDP"
    WAYS[way](folder, "pytorch_model" if stem == "model" and pickled else stem, weights)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_part_is_loaded_however_its_weights_were_saved(tmp_path: Path, part: str, way: str) -> None:
    stem, load = PARTS[part]
    folder = Path(shutil.copytree(MICRO_MODEL / part, tmp_path / part))
    expected = load(folder).state_dict()
    saved_as(way, folder, stem, taken_out(folder))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = load(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    said = [str(w.message) for w in warned if "saved compiled, or under DDP" in str(w.message)]
    assert len(said) == (way in WRAPPED), said


def test_the_plain_names_come_before_a_variant_and_safetensors_before_pickles(unet: Path) -> None:
    weights = load_file(unet / f"{UNET}.safetensors")
    for way in ("variant", "pickled"):
        WAYS[way](unet, UNET, {name: torch.zeros_like(weight) for name, weight in weights.items()})
    found = find_weights(unet, UNET)
    assert [file.name for file in found.files] == [f"{UNET}.safetensors"] and found.variant is None and found.is_safe
    assert any(weight.any() for weight in read_weights(unet, UNET).values())
    (unet / f"{UNET}.safetensors").unlink()
    found = find_weights(unet, UNET)
    assert found.variant is None and not found.is_safe, "weights in full precision before a variant, even as pickles"


def test_an_index_of_a_variant_s_shards_as_older_diffusers_named_it_is_read(unet: Path) -> None:
    weights = taken_out(unet)
    shards(unet, UNET, weights, variant=".fp16")
    assert find_weights(unet, UNET).variant == "fp16"
    (unet / f"{UNET}.safetensors.index.fp16.json").rename(unet / f"{UNET}.safetensors.fp16.index.json")
    assert find_weights(unet, UNET).variant == "fp16"
    assert read_weights(unet, UNET).keys() == weights.keys()


@pytest.mark.parametrize("part", ["unet", "image_encoder"])
def test_shards_beside_one_file_are_taken_where_from_pretrained_takes_them(tmp_path: Path, part: str) -> None:
    stem, load = PARTS[part]
    folder = Path(shutil.copytree(MICRO_MODEL / part, tmp_path / part))
    weights = load_file(folder / f"{stem}.safetensors")
    shards(folder, stem, {name: weight + 1 if weight.is_floating_point() else weight for name, weight in weights.items()})
    # The stock class has no names for FaceLift's blocks.
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("MV2D", "2D"))
    cls = {"unet": UNet2DConditionModel, "image_encoder": CLIPVisionModelWithProjection}[part]
    theirs, ours = cls.from_pretrained(folder).state_dict(), load(folder).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


INDEX = f"{UNET}.safetensors.index.json"
SECOND = f"{UNET}-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / SECOND).unlink(), r"index\.json: 1 of 2 shards are missing, e\.g\. .*-00002-of"),
        (lambda f: (f / SECOND).write_bytes(b"no weights"), r"00002-of-00002\.safetensors: cannot be read"),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
            r"names .\.\./a\.safetensors.; expected files of weights in its own folder",
        ),
        (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), r"index\.json: has no weight_map"),
        (lambda f: (f / INDEX).write_text("{"), r"index\.json: cannot be read as JSON"),
        (
            lambda f: [whole(f, UNET, {}, variant=v) for v in (".fp16", ".non_ema")] and (f / INDEX).unlink(),
            r"unet: has variants of its weights \(.*fp16.*non_ema.*\) and no .*; expected one of them",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_refused(unet: Path, change: Callable[[Path], None], message: str) -> None:
    shards(unet, UNET, taken_out(unet))
    change(unet)
    with pytest.raises(InputError, match=message):
        load_unet(unet)


@pytest.mark.parametrize("way", ["variant", "pickled variant", "compiled"])
def test_how_the_weights_of_a_part_were_read_is_noted(tmp_path: Path, way: str) -> None:
    model = Path(shutil.copytree(MICRO_MODEL, tmp_path / "model"))
    weights = taken_out(model / "vae")
    WAYS[way](model / "vae", UNET, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (note,) = load_pipeline(model).notes
    compiled = rf"{len(weights)} of its {len(weights)} weights are named as _orig_mod"
    assert re.search(rf"/vae: {compiled if way == 'compiled' else 'the variant fp16 is taken'}", note)
