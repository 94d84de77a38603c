"""The readers of files, each with valid files to damage and a check of its results."""

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from softprompt.data.pictures import load_picture
from softprompt.data.samples import open_source, picture_name
from softprompt.data.storage import Fingerprints, ShardStore, key_of
from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import AdaptedModel, add_lora
from softprompt.model.loading import load_pipeline, load_text_encoder
from softprompt.model.weights import read_weights
from softprompt.prompt.embeddings import check_prompt, load_prompt, save_prompt
from softprompt.prompt.soft_prompt import SoftPrompt
from tests.fuzz.mutations import (
    BYTES,
    JSON,
    PNG,
    SAFETENSORS,
    TEXT,
    YAML,
    Mutator,
    change_json,
    deep_nesting,
    empty,
    replace_a_word,
    splice,
)
from train.compare.__main__ import read_request
from train.export.read import start_from
from train.export.write import LORA_WEIGHTS
from train.log.series import FILE, read_series
from train.options.command_line import parse
from train.options.config import Config, to_yaml
from train.options.yaml_file import read_yaml
from train.state.checkpoint import (
    _PROGRESS,
    MANIFEST,
    STATE,
    DamagedError,
    Parts,
    _digest,
    _write_manifest,
    load_checkpoint,
    verify,
    write_state,
)
from train.state.folder import checkpoint_folder

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Reader:
    """A kind of file and its reader."""

    file: Path
    """The path of each damaged file."""
    sound: Sequence[bytes]
    """The contents of valid files, which are damaged."""
    mutators: Sequence[Mutator]
    read: Callable[[], None]
    """Reads the file and asserts that the result is right."""
    refuses: tuple[type[BaseException], ...] = (InputError,)
    write: Callable[[bytes], None] | None = None
    """Writes a damaged file; None: its content is written to `file`."""


def prompt(seed: int = 0, width: int = 4) -> Tensor:
    return torch.randn(6, 77, width, generator=torch.Generator().manual_seed(seed))


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def prompt_reader(file: Path, sound: Sequence[bytes], mutators: Sequence[Mutator]) -> Reader:
    def read() -> None:
        check_prompt(load_prompt(file, width=4), width=4)

    return Reader(file, sound, mutators, read)


def pickled_prompts(folder: Path) -> Reader:
    sound = [saved(prompt().half()), saved(prompt()), saved(prompt(), _use_new_zipfile_serialization=False)]
    return prompt_reader(folder / "p.pt", sound, (*BYTES, *[splice(other) for other in sound], empty))


def safe_prompts(folder: Path) -> Reader:
    save_prompt(prompt(), folder / "p.safetensors")
    sound = (folder / "p.safetensors").read_bytes()
    return prompt_reader(folder / "p.safetensors", [sound], (*SAFETENSORS, splice(saved(prompt())), empty))


def loras(folder: Path) -> Reader:
    pipeline = load_pipeline(MICRO_MODEL)
    add_lora(pipeline.unet, rank=1, alpha=1.0, targets=["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])
    adapted = AdaptedModel(pipeline.unet, SoftPrompt(prompt(width=pipeline.prompt_width)[None]))
    lora = {name: p for name, p in pipeline.unet.named_parameters() if ".lora_" in name}
    save_prompt(prompt(1, pipeline.prompt_width), folder / "clr_embeds.safetensors")
    file = folder / "lora" / LORA_WEIGHTS
    file.parent.mkdir()
    save_file({f"unet.{name.replace('.default', '')}": p.detach() for name, p in lora.items()}, file)

    def read() -> None:
        start_from(folder, adapted, 0.0)
        assert all(p.isfinite().all() for p in lora.values())

    read()
    return Reader(file, [file.read_bytes()], (*SAFETENSORS, empty), read)


def make_samples(folder: Path, count: int, size: int = 12) -> list[Path]:
    """Write sample folders with pictures of `size` pixels, in both layouts."""
    made = []
    for number in range(count):
        made.append(folder / f"mouse_{number}")
        pictures = made[-1] / "images" if number % 2 else made[-1]
        pictures.mkdir(parents=True)
        for view in range(6):
            Image.new("RGBA", (size, size), (view, number, 9, 255)).save(pictures / picture_name(view))
    return made


def lists(folder: Path) -> Reader:
    folders = make_samples(folder / "data", 3)
    text = f"# mice\nmouse_0\n\nmouse_1/\n{folders[2]}\n"
    words = "mouse_0 mouse_1 . .. / ../data //mouse_0 ../../../../../../etc /etc/passwd images \0 # ~ $HOME * é".split()
    words += ["x" * 300, "x/" * 3000, str(folders[0]), "mouse_0/images", "mouse_0\u2028mouse_1"]
    file = folder / "data" / "samples.txt"

    def read() -> None:
        source = open_source(file, size=12)
        assert len(source) == len(set(source.names)) == len(source.locations) > 0
        for index, location in enumerate(source.locations):
            # By its relative name, or an absolute path that stands in the list, even if spoiling it made that another test's.
            ours = Path(location) in [*folders, *(f / "images" for f in folders)]
            assert ours or location in file.read_text(encoding="utf-8", errors="replace"), location
            assert source.load(index).shape == (6, 4, 12, 12)

    return Reader(file, [text.encode()], (*BYTES, *TEXT, *[replace_a_word(words)] * 8, empty), read)


def pictures(folder: Path) -> Reader:
    file = folder / "cam_000.png"
    coloured = Image.effect_noise((20, 15), 90)
    sound = []
    for mode in ("RGBA", "RGB", "L", "LA", "P", "1", "I;16"):
        grey = Image.frombytes("I;16", (20, 15), bytes(range(200)) * 3) if mode == "I;16" else coloured.convert(mode)
        grey.save(file, **({"transparency": 3} if mode == "P" else {}))
        sound.append(file.read_bytes())
    coloured.convert("RGBA").save(file, save_all=True, append_images=[coloured.convert("RGBA").rotate(90)])
    sound.append(file.read_bytes())

    def read() -> None:
        picture = load_picture(file, 16)
        assert picture.shape == (4, 16, 16) and picture.dtype == torch.uint8 and picture[3].any()

    return Reader(file, sound, (*PNG, splice(sound[0]), empty), read)


def configurations(folder: Path) -> Reader:
    file = folder / "config.yaml"
    sound = [to_yaml(Config()).encode(), (REPOSITORY / "configs" / "three_stages.yaml").read_bytes()]

    def read() -> None:
        assert isinstance(parse(["--config", str(file)]).config, Config)

    return Reader(file, sound, YAML, read, (InputError, SystemExit))


def texts_of_configurations(folder: Path) -> Reader:
    """The YAML reader alone: a hundred times as fast as a whole command line."""
    file = folder / "config.yaml"
    sound = [to_yaml(Config()).encode(), (REPOSITORY / "configs" / "compare" / "strategies.yaml").read_bytes()]

    def read() -> None:
        repr(read_yaml(file))  # of what is inside itself, or far too much, would not come to an end

    return Reader(file, sound, YAML, read)


def comparisons(folder: Path) -> Reader:
    file = folder / "comparison.yaml"
    sound = [
        b"base: [a.yaml]\noptions: {train.steps: 4}\nseeds: [0, 1]\nbaseline: a\nvariants:\n  a: {}\n  b: {lora: {rank: 3}}\n",
        (REPOSITORY / "configs" / "compare" / "strategies.yaml").read_bytes(),
    ]

    def read() -> None:
        comparison = read_request(["--config", str(file), f"--output={folder / 'out'}"]).comparison
        assert comparison.baseline in comparison.variants

    return Reader(file, sound, YAML, read, (InputError, SystemExit))


PROGRESS = dict.fromkeys(_PROGRESS) | {"step": 2, "last": {"step": 2}, "running_loss": 0.5}


def make_checkpoint(run: Path) -> Path:
    """Write a checkpoint of two numbers."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    adapted = SimpleNamespace(all_trainable=lambda: {"p": parameter}, prompt=SimpleNamespace(waypoints=torch.zeros(1, 1, 2, 2)))
    optimizer = torch.optim.AdamW([parameter])
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    folder = checkpoint_folder(run, 2)
    write_state(folder, Parts(adapted, optimizer, schedule, ema=None, scaler=None), progress=PROGRESS)
    return folder


def put_state(checkpoint: Path, content: bytes, progress: dict[str, Any] = PROGRESS) -> None:
    """Replace the state of a checkpoint, with a checksum that matches."""
    (checkpoint / STATE).write_bytes(content)
    _write_manifest(checkpoint, {"bytes": len(content), "blake2b": _digest(content)}, progress)


def put_manifest(checkpoint: Path, body: dict[str, Any]) -> None:
    """Replace the manifest of a checkpoint, with a checksum that matches."""
    (checkpoint / MANIFEST).write_text(json.dumps(body | {"blake2b": _digest(json.dumps(body).encode())}))


def checkpoint_reader(run: Path, name: str, mutators: Sequence[Mutator]) -> Reader:
    folder = make_checkpoint(run)

    def read() -> None:
        assert verify(folder) == PROGRESS
        assert load_checkpoint(run)["trainable"]["p"].tolist() == [0, 0]

    return Reader(folder / name, [(folder / name).read_bytes()], mutators, read, (InputError, DamagedError))


def states_of_checkpoints(folder: Path) -> Reader:
    return checkpoint_reader(folder, STATE, (*BYTES, splice(saved(prompt())), empty))


def manifests_of_checkpoints(folder: Path) -> Reader:
    return checkpoint_reader(folder, MANIFEST, (*JSON, empty))


def states_with_their_checksum(folder: Path) -> Reader:
    """States with matching checksums, as in a checkpoint that somebody else prepared."""
    target = make_checkpoint(folder)

    def read() -> None:
        assert set(load_checkpoint(folder)) >= {"trainable", "waypoints", "optimizer", "schedule", "ema", "scaler", *PROGRESS}

    others = [saved(prompt()), saved([1]), saved({"trainable": 1})]
    mutators = (*BYTES, *[splice(other) for other in others], lambda content, rng: rng.choice(others))
    return Reader(target / STATE, [(target / STATE).read_bytes()], mutators, read, write=partial(put_state, target))


def manifests_with_their_checksum(folder: Path) -> Reader:
    target = make_checkpoint(folder)
    sound = (target / MANIFEST).read_bytes()

    def write(content: bytes) -> None:
        found = json.loads(content)
        found = found if isinstance(found, dict) else {}
        put_manifest(target, {"state": found.get("state"), "progress": found.get("progress")})

    def read() -> None:
        assert load_checkpoint(folder).keys() >= PROGRESS.keys()

    return Reader(target / MANIFEST, [sound], (change_json,), read, write=write)


def shards(folder: Path) -> Reader:
    keys = [key_of(i) for i in range(5)]
    rows = {"mean": torch.randn(5, 3), "embeds": torch.randint(0, 9, (5, 2, 2))}
    ShardStore(folder).write(keys, rows)
    (file,) = folder.glob("*.safetensors")

    def read() -> None:
        store = ShardStore(folder)
        for chosen in ([0], [4, 1], [0, 1, 2, 3, 4], [3, 3]):
            found = store.read([keys[i] for i in chosen])
            if found is not None:
                assert found.keys() == rows.keys() and all(torch.equal(found[name], rows[name][chosen]) for name in rows)

    return Reader(file, [file.read_bytes()], (*SAFETENSORS, *BYTES, empty), read, ())


def fingerprints(folder: Path) -> Reader:
    groups = {f"group {g}": [folder / f"{g}-{v}" for v in range(2)] for g in range(4)}
    for files in groups.values():
        for file in files:
            file.write_bytes(file.name.encode())
            os.utime(file, (1e9, 1e9))
    kept = Fingerprints(folder / "kept.safetensors", 2)
    right = {name: kept.of(name, files) for name, files in groups.items()}
    kept.save()
    (folder / "new").write_bytes(b"new")
    os.utime(folder / "new", (1e9, 1e9))

    def read() -> None:
        found = Fingerprints(folder / "kept.safetensors", 2)
        known, contents = found.known(list(groups))
        for is_known, row, name in zip(known, contents.tolist(), groups, strict=True):
            assert not is_known or [c.ljust(16, b"\0") for c in row] == right[name]
        assert {name: found.of(name, files) for name, files in groups.items()} == right
        found.of("new", [folder / "new", folder / "new"])
        found.save()

    file = folder / "kept.safetensors"
    return Reader(file, [file.read_bytes()], (*SAFETENSORS, *BYTES, empty), read, ())


def metrics(folder: Path) -> Reader:
    points = [{"step": step, "loss/train": 1 / (step + 1), "loss/validation": None} for step in range(6)]
    sound = "".join(json.dumps(point) + "\n" for point in points).encode()

    def read() -> None:
        assert all(isinstance(point["step"], int) for point in read_series(folder))

    return Reader(
        folder / FILE,
        [sound],
        (*BYTES, *TEXT, deep_nesting, empty, replace_a_word(["NaN", "[]", "{}", "1e999", '"', "}\n{"])),
        read,
    )


def parts_reader(folder: Path, wanted: Callable[[Path], bool], load: Callable[[Path], object]) -> Reader:
    """The `wanted` files of a pipeline folder, damaged one at a time."""
    model = Path(shutil.copytree(MICRO_MODEL, folder / "pipeckpts"))
    sound = {file: file.read_bytes() for file in sorted(model.rglob("*")) if file.is_file() and wanted(file)}
    turn = cycle(sound)

    def write(content: bytes) -> None:
        for file, original in sound.items():
            file.write_bytes(original)
        next(turn).write_bytes(content)

    return Reader(model, list(sound.values()), (*JSON, empty), lambda: load(model) and None, write=write)


def parts_of_a_pipeline(folder: Path) -> Reader:
    return parts_reader(folder, lambda file: file.suffix == ".json" and file.parent.name[0] != "t", load_pipeline)


def parts_that_encode_text(folder: Path) -> Reader:
    names = ("tokenizer", "text_encoder")
    return parts_reader(folder, lambda file: file.suffix != ".safetensors" and file.parent.name in names, load_text_encoder)


def unet_reader(file: Path, sound: Sequence[bytes], mutators: Sequence[Mutator]) -> Reader:
    def read() -> None:
        weights = read_weights(file.parent, file.stem)
        assert all(isinstance(name, str) and isinstance(w, Tensor) for name, w in weights.items())

    return Reader(file, sound, (*mutators, empty), read)


UNET_WEIGHTS = {"a": torch.arange(6.0).reshape(3, 2), "b.weight": torch.zeros(2, dtype=torch.float16)}


def weights_of_a_unet(folder: Path) -> Reader:
    return unet_reader(folder / "diffusion_pytorch_model.safetensors", [save(UNET_WEIGHTS)], SAFETENSORS)


def pickled_weights_of_a_unet(folder: Path) -> Reader:
    sound = [saved(UNET_WEIGHTS), saved(UNET_WEIGHTS, _use_new_zipfile_serialization=False)]
    return unet_reader(folder / "diffusion_pytorch_model.bin", sound, (*BYTES, splice(sound[0])))


READERS: dict[str, tuple[Callable[[Path], Reader], int]] = {
    "pickled prompts": (pickled_prompts, 1000),
    "safetensors prompts": (safe_prompts, 700),
    "LoRA": (loras, 250),
    "lists of samples": (lists, 500),
    "pictures": (pictures, 1500),
    "configurations": (configurations, 35),
    "texts of configurations": (texts_of_configurations, 250),
    "comparisons": (comparisons, 140),
    "states of checkpoints": (states_of_checkpoints, 300),
    "manifests of checkpoints": (manifests_of_checkpoints, 500),
    "states with their checksum": (states_with_their_checksum, 600),
    "manifests with their checksum": (manifests_with_their_checksum, 150),
    "shards": (shards, 1000),
    "fingerprints": (fingerprints, 600),
    "metrics": (metrics, 600),
    "parts of a pipeline": (parts_of_a_pipeline, 80),
    "parts that encode text": (parts_that_encode_text, 60),
    "weights of a UNet": (weights_of_a_unet, 400),
    "pickled weights of a UNet": (pickled_weights_of_a_unet, 600),
}
"""By name: the function that makes the reader, and the number of damaged files that it reads."""
