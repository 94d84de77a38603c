"""Malicious files, and damaged ones that were once accepted: refused in one line; nothing is run, fetched or overwritten."""

import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from softprompt.data.pictures import load_picture
from softprompt.data.samples import open_source, picture_name, write_source
from softprompt.data.storage import Fingerprints, ShardStore, key_of
from softprompt.errors import InputError
from softprompt.files import read_json, remove_folder, remove_partial
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline, load_text_encoder, load_unet
from softprompt.prompt.embeddings import load_prompt
from tests.fuzz.mutations import time_limit
from tests.fuzz.readers import PROGRESS, loras, make_checkpoint, make_samples, prompt, put_manifest, put_state, saved
from tests.pictures import png_chunk
from train.compare.__main__ import read_request
from train.export.write import LORA_WEIGHTS
from train.log.series import FILE, read_series
from train.options.command_line import parse
from train.state.checkpoint import MANIFEST, DamagedError, load_checkpoint, read_state, verify


def refusal(call: Callable[[], object]) -> str:
    """The error message of a call that must fail, checked to be one line."""
    with pytest.raises((InputError, DamagedError)) as caught, time_limit():
        call()
    line = str(caught.value)
    assert line.isprintable(), line
    return line


# ---------------------------------------------------------------------------------------------------------------- pickles


class Harm:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path, how: Callable[..., object]) -> None:
        self.call = (how, (f"touch {marker}",) if how is os.system else (str(marker), "w"))

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path, how: Callable[..., object], layout: str) -> bytes:
    """A file with tensors and a `Harm`, in one of the layouts that torch.load reads."""
    content = {"conv_in.weight": torch.zeros(1), "trainable": Harm(marker, how)}
    if layout == "pickle":
        return pickle.dumps(content, protocol=2)
    return saved(content, _use_new_zipfile_serialization=layout == "zip")


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("how", [os.system, open, eval], ids=lambda how: how.__name__)
def test_code_in_a_pickle_is_never_run(tmp_path: Path, how: Callable[..., object], layout: str) -> None:
    marker = tmp_path / "marker"
    content = hostile(marker, how, layout)

    (tmp_path / "p.pt").write_bytes(content)
    assert "p.pt: is no plain tensor file" in refusal(lambda: load_prompt(tmp_path / "p.pt"))

    (tmp_path / "unet").mkdir()
    shutil.copy(MICRO_MODEL / "unet" / "config.json", tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(content)
    assert "diffusion_pytorch_model.bin: cannot be read" in refusal(lambda: load_unet(tmp_path / "unet"))

    folder = make_checkpoint(tmp_path / "run")
    put_state(folder, content)
    assert verify(folder) == PROGRESS  # it is what was written, by whoever wrote it
    assert "state.pt cannot be read" in refusal(lambda: load_checkpoint(tmp_path / "run"))
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_code_in_an_array_is_never_run(tmp_path: Path, ending: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / f"p.{ending}"
    array = np.array([Harm(marker, os.system)], dtype=object)
    np.save(file, array) if ending == "npy" else np.savez(file, array)
    assert f"p.{ending}: cannot be read as a prompt file" in refusal(lambda: load_prompt(file))
    assert not marker.exists()
    trusted = np.load(file, allow_pickle=True)
    if ending == "npz":
        trusted["arr_0"]
    assert marker.exists(), "the file does no harm, so this test shows nothing"


@pytest.mark.parametrize("part", ["vae", "image_encoder", "image_normalizer", "text_encoder"])
def test_code_in_the_weights_of_a_part_is_never_run(tmp_path: Path, part: str) -> None:
    model, marker = Path(shutil.copytree(MICRO_MODEL, tmp_path / "model")), tmp_path / "marker"
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if weights.stem == "model" else f"{weights.stem}.bin"
    (model / part / name).write_bytes(hostile(marker, os.system, "zip"))
    load = load_text_encoder if part == "text_encoder" else load_pipeline
    assert f"/{part}: cannot be loaded as" in refusal(lambda: load(model))
    assert not marker.exists()


def test_the_hostile_pickles_do_harm_where_they_are_trusted(tmp_path: Path) -> None:
    """Without this, the tests above would prove nothing."""
    for layout in ("zip", "legacy", "pickle"):
        marker = tmp_path / layout
        (tmp_path / "p.pt").write_bytes(hostile(marker, os.system, layout))
        load = pickle.loads if layout == "pickle" else lambda _: torch.load(tmp_path / "p.pt", weights_only=False)
        load((tmp_path / "p.pt").read_bytes())
        assert marker.exists()


def test_tags_of_python_in_yaml_make_no_objects(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "config.yaml"
    for tag in ("object/apply:os.system", "object/new:os.system", "object/apply:subprocess.call"):
        file.write_text(f"output: !!python/{tag} ['touch {marker}']\n")
        assert "is no YAML" in refusal(lambda: parse(["--config", str(file)]))
        file.write_text(f"baseline: a\nvariants: {{a: !!python/{tag} ['touch {marker}']}}\n")
        assert "is no YAML" in refusal(lambda: read_request(["--config", str(file), "--output=x"]))
        with pytest.raises((InputError, SystemExit)):
            parse([f"--prompt.waypoints=!!python/{tag} ['touch {marker}']"])
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------------------ paths


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "lines",
    [
        "../outside/mouse_0",
        "{outside}/mouse_0",
        "../inside/../outside/mouse_0",
        "mouse_0/../../outside/mouse_1",
        "//{outside}/mouse_0",
    ],
)
def test_a_list_reads_samples_from_anywhere_and_writes_nowhere_else(tmp_path: Path, lines: str) -> None:
    make_samples(tmp_path / "outside", 2)
    make_samples(tmp_path / "inside", 1)
    (tmp_path / "inside" / "list.txt").write_text(f"mouse_0\n{lines.format(outside=tmp_path / 'outside')}\n")
    before = tree(tmp_path)
    source = open_source(tmp_path / "inside" / "list.txt", size=12)
    assert len(set(source.names)) == 2 and not any(".." in name for name in source.names)
    write_source(source, tmp_path / "copy")
    assert {name: content for name, content in tree(tmp_path).items() if not name.startswith("copy")} == before
    assert len(open_source(tmp_path / "copy" / "samples.txt", size=12)) == 2


@pytest.mark.parametrize("line", ["mouse\0_0", "\0", "../../../../../../../../etc/passwd", "x" * 300, "x/" * 3000, "\x1b[2J"])
def test_a_line_that_names_no_folder_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"{line}\n")
    assert "list.txt" in refusal(lambda: open_source(tmp_path / "list.txt", size=12))


def test_names_of_variants_stay_in_the_folder_of_the_comparison(tmp_path: Path) -> None:
    for name in ('"../x"', '"/x"', '".."', '"."', '"a/b"', '"a\\0b"', '"a\\nb"', "1e9", ".inf"):
        (tmp_path / "c.yaml").write_text(f"baseline: a\nvariants: {{a: {{}}, {name}: {{}}}}\n")
        line = refusal(lambda: read_request(["--config", str(tmp_path / "c.yaml"), f"--output={tmp_path / 'out'}"]))
        assert "cannot be the name of a folder" in line or "expected a name as text" in line


def test_what_a_link_leads_to_is_never_removed(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere" / "kept"
    kept.parent.mkdir()
    kept.write_text("kept")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".x.partial-1").symlink_to(kept.parent)
    (run / ".y.partial-1").symlink_to(kept)
    remove_partial(run)
    (run / "checkpoints" / "step-000001").symlink_to(kept.parent)
    remove_folder(run / "checkpoints" / "step-000001")
    assert kept.read_text() == "kept"
    assert not any(path.is_symlink() for path in run.rglob("*"))


# ------------------------------------------------------------------------------------------------------------------ bombs


def test_a_picture_that_claims_more_pixels_than_any_camera_has_is_not_decoded(tmp_path: Path) -> None:
    file = tmp_path / "cam_000.png"
    for width, height, colour, problem in (
        (20, 2**22, 0, "it claims 20 x 4194304 pixels"),
        (9000, 9000, 6, "it claims 9000 x 9000 pixels"),
        (2**31 - 1, 2**31 - 1, 2, "exceeds limit"),  # Pillow's own
    ):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
        body = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + png_chunk(b"IEND", b""))
        assert problem in refusal(lambda: load_picture(file, 16))
    Image.new("L", (8192, 1), 9).save(file)
    assert load_picture(file, 16)[3].any()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML_BOMBS = {
    "a billion laughs": f"{LAUGHS}prompt: *j\n",
    "a billion laughs in a list": f"{LAUGHS}lora: {{targets: *j}}\n",
    "a list inside itself": "prompt: &p {waypoints: [*p]}\n",
    "lists in lists": "lora: {targets: " + "[" * 200 + "]" * 200 + "}\n",
    "lists in lists without an end": "[" * 100_000,
    "a number of 6000 digits": "lora: {rank: " + "9" * 6000 + "}\n",
    "a hexadecimal one": "lora: {rank: 0x" + "F" * 6000 + "}\n",
    "a day that there is not": "output: 2024-02-30\n",
    "a truth that is none": "output: !!bool x\n",
    "a name that is there twice": "lora: {rank: 4, rank: 8}\n",
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_that_stands_for_what_it_cannot_is_refused_at_once(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML_BOMBS[name])
    assert "config.yaml: is no YAML" in refusal(lambda: parse(["--config", str(file)]))
    assert "config.yaml: is no YAML" in refusal(lambda: read_request(["--config", str(file), "--output=x"]))


def test_anchors_of_a_sane_size_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("curriculum: {at: &x [0.0, 0.5], position: *x}\n")
    assert parse(["--config", str(tmp_path / "c.yaml")]).config.curriculum.position == [0.0, 0.5]


def test_a_tensor_that_claims_gigabytes_is_not_made(tmp_path: Path) -> None:
    for shape, end in (([6, 77, 2**40], 6 * 77 * 2**42), ([6, 77, 4], 2**60), ([2**62, 4, 4], 16), ([6, 77, 0], 0)):
        header = json.dumps({"prompt": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        (tmp_path / "p.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        refusal(lambda: load_prompt(tmp_path / "p.safetensors"))
    (tmp_path / "p.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refusal(lambda: load_prompt(tmp_path / "p.safetensors"))


def test_sizes_that_no_model_has_are_refused_before_they_are_allocated(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MICRO_MODEL, tmp_path / "model"))
    for part, name, value in (
        ("image_encoder", "num_channels", 10**6),
        ("image_encoder", "num_hidden_layers", 10**6),
        ("unet", "layers_per_block", 2**31),
        ("vae", "block_out_channels", [10**9, 10**9]),
        ("image_normalizer", "embedding_dim", 2**31),
        ("text_encoder", "num_hidden_layers", 10**6),
    ):
        file = model / part / "config.json"
        sound = file.read_text()
        file.write_text(json.dumps(json.loads(sound) | {name: value}))
        load = load_text_encoder if part == "text_encoder" else load_pipeline
        assert f"config.json: {name} is {value}; expected" in refusal(lambda load=load: load(model))
        file.write_text(sound)


def test_a_number_instead_of_a_part_s_options_is_not_looked_up_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a host was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    model = Path(shutil.copytree(MICRO_MODEL, tmp_path / "model"))
    for file in (model / "scheduler" / "scheduler_config.json", model / "vae" / "config.json", model / "model_index.json"):
        sound = file.read_text()
        for content in ("12345", '"stabilityai/stable-diffusion-2-1"', "[]", "null"):
            file.write_text(content)
            assert f"{file.name}: holds a JSON" in refusal(lambda: load_pipeline(model))
        file.write_text(sound)


def test_json_in_json_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a":' * 100_000)
    assert "x.json: cannot be read as JSON" in refusal(lambda: read_json(tmp_path / "x.json", what="a test"))


@pytest.mark.slow
def test_a_zip_that_holds_gigabytes_of_zeros_is_no_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.pt"
    file.write_bytes(saved(prompt()))
    with zipfile.ZipFile(file) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bomb:
        for name, content in parts.items():
            bomb.writestr(name, bytes(2**26) if name.endswith("data/0") else content)
    code = (
        "import resource, sys; from softprompt.prompt.embeddings import load_prompt; from softprompt.errors import InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_prompt(sys.argv[1])\nexcept InputError as error: assert str(error).isprintable()\n"
        "else: sys.exit('taken')\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- what once got through


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_cut_anywhere_are_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    whole = saved(prompt(), _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for length in range(0, 1500, 13):
        for name, read in (("p.pt", load_prompt), ("diffusion_pytorch_model.bin", lambda file: load_unet(file.parent))):
            (tmp_path / name).write_bytes(whole[:length])
            assert name in refusal(lambda read=read, name=name: read(tmp_path / name))


def test_a_key_that_was_written_over_another_gives_no_other_row(tmp_path: Path) -> None:
    keys = [key_of(i) for i in range(3)]
    ShardStore(tmp_path).write(keys, {"x": torch.arange(3)})
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content.replace(keys[1], keys[0]).replace(keys[2], keys[1]))
    store = ShardStore(tmp_path)
    assert store.read(keys[:2]) is None and not file.exists()
    store.write(keys, {"x": torch.arange(3)})
    assert store.read(keys)["x"].tolist() == [0, 1, 2]


def test_a_content_that_was_written_over_another_s_is_read_again(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        file.write_text(file.name)
        os.utime(file, (1e9, 1e9))
    kept = Fingerprints(tmp_path / "kept.safetensors", 1)
    a, b = (kept.of(str(file), [file])[0] for file in files)
    kept.save()
    content = (tmp_path / "kept.safetensors").read_bytes()
    (tmp_path / "kept.safetensors").write_bytes(content.replace(a, b))
    again = Fingerprints(tmp_path / "kept.safetensors", 1)
    assert not np.any(again.known([str(file) for file in files])[0])
    assert [again.of(str(file), [file])[0] for file in files] == [a, b]


@pytest.mark.parametrize(
    "line", ["{}", '{"step": 1', '{"step": "1"}', '{"step": 1, "x": []}', "}", '{"a":' * 5000 + "1" + "}" * 5000, "\ud800}"]
)
def test_a_line_of_metrics_that_is_no_point_is_named(tmp_path: Path, line: str) -> None:
    spoiled = line.encode("utf-8", "surrogatepass") + b"\n"
    (tmp_path / FILE).write_bytes(b'{"step": 0, "x": null}\n' + spoiled + b'{"step": 2}\n{"step": 3')
    if line.endswith("}"):
        assert "metrics.jsonl: line 2 is no point of a series" in refusal(lambda: read_series(tmp_path))
    else:  # half a line, as a killed run may have left
        assert read_series(tmp_path) == [{"step": 0, "x": None}, {"step": 2}]


def test_a_lora_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    reader = loras(tmp_path)
    weights = load_file(reader.file)
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, reader.file)
    assert re.search(rf"{LORA_WEIGHTS} holds NaN or infinite values", refusal(reader.read))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([1], "it holds something else"),
        ({"trainable": {}}, "another version of softprompt"),
        (torch.zeros(2), "it holds something else"),
    ],
    ids=["a list", "parts of one", "a tensor"],
)
def test_another_thing_with_the_checksum_of_a_state_is_no_state(tmp_path: Path, state: object, said: str) -> None:
    folder = make_checkpoint(tmp_path)
    put_state(folder, saved(state))
    assert said in refusal(lambda: read_state(folder))


@pytest.mark.parametrize(
    "body", [{"state": None, "progress": {}}, {"state": {}, "progress": {}}, {"state": [], "progress": None}]
)
def test_a_manifest_of_another_kind_is_damaged_whatever_its_checksum(tmp_path: Path, body: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path)
    put_manifest(folder, body)
    assert MANIFEST in refusal(lambda: verify(folder))


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert "not found" in refusal(lambda: open_source("x" * 5000, size=12))


def test_a_sample_whose_pictures_are_other_things_is_refused(tmp_path: Path) -> None:
    (folder,) = make_samples(tmp_path / "data", 1)
    picture = folder / picture_name(3)
    for make in (
        picture.mkdir,
        lambda: os.mkfifo(picture),
        lambda: picture.symlink_to(picture),
        lambda: picture.symlink_to("x"),
    ):
        picture.rmdir() if picture.is_dir() else picture.unlink()
        make()
        assert "cam_003.png" in refusal(lambda: open_source(tmp_path / "data", size=12))
