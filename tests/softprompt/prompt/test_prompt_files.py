"""Prompt files of any format: recognized where the meaning is certain, refused in one line otherwise.

tests/fuzz/test_hostile.py tests that no code in them is run.
"""

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softprompt.errors import InputError
from softprompt.prompt.prompt_files import read_prompt_file
from softprompt.prompt.templates import VIEWS

PROMPT = torch.randn(6, 77, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(6, 77, 8, generator=torch.Generator().manual_seed(1))


def write(content: Any, path: Path) -> Path:
    """Write a file in the format of its content's type and suffix."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


SHAPE = r"\[6, 77, 8\] float32"
CHECKPOINT = {
    "state_dict": {"model.prompt": PROMPT, "model.scale": torch.ones(3)},
    "optimizer": {"state": {0: {"exp_avg": OTHER, "exp_avg_sq": OTHER}}},
    "epoch": 3,
}
FOREIGN: dict[str, tuple[str, Any, str]] = {
    "a dict": ("p.pt", {"prompt_embeds": PROMPT}, f"a dict with 'prompt_embeds' {SHAPE}$"),
    "a dict with other things": ("p.pt", {"name": "x", "e": PROMPT, "n": 3}, f"a dict with 'e' {SHAPE}, and 2 more$"),
    "of diffusers' pipelines": (
        "p.pt",
        {"negative_prompt_embeds": OTHER, "prompt_embeds": PROMPT},
        f"a dict with 'prompt_embeds' {SHAPE}, and 1 more$",
    ),
    "a parameter in a dict": ("p.pt", {"p": nn.Parameter(PROMPT)}, f"a dict with 'p' {SHAPE}$"),
    "a state dict": ("p.bin", nn.ParameterDict({"p": PROMPT}).state_dict(), f"a dict with 'p' {SHAPE}$"),
    "of DDP and compile": ("p.pt", OrderedDict({"module._orig_mod.p": PROMPT}), f"a dict with 'p' {SHAPE}$"),
    "a trainer's checkpoint": ("p.ckpt", CHECKPOINT, r"a dict with 'state_dict\.model\.prompt'"),
    "one a view by name": ("p.pt", dict(zip(reversed(VIEWS), PROMPT.flip(0), strict=True)), "for each of front, "),
    "one a view by number": ("p.pt", {str(v): PROMPT[v] for v in (3, 1, 2, 0, 5, 4)}, "for each of 0, 1, 2, 3, 4, 5"),
    "a list of views": ("p.pt", list(PROMPT), r"a list of 6 tensors \[77, 8\] float32"),
    "a tuple of batches": ("p.pt", tuple(p[None] for p in PROMPT), r"a tuple of 6 tensors \[1, 77, 8\] float32"),
    "a list of parameters": ("p.pt", [nn.Parameter(p) for p in PROMPT], r"a list of 6 tensors"),
    "a list of one": ("p.pt", [PROMPT], f"a list with '0' {SHAPE}"),
    "a batch of one": ("p.pt", PROMPT[None], r"a tensor \[1, 6, 77, 8\] float32"),
    "views that are batches": ("p.pt", PROMPT[:, None], r"a tensor \[6, 1, 77, 8\] float32"),
    "a batch of one as safetensors": ("p.safetensors", {"x": PROMPT[None].clone()}, r"a tensor \[1, 6, 77, 8\]"),
    "safetensors of two": ("p.safetensors", {"prompt": PROMPT, "loss": torch.ones(2)}, "a dict with 'prompt'"),
    "npy": ("p.npy", PROMPT.numpy(), f"a NumPy array {SHAPE}"),
    "npy of a batch": ("p.npy", PROMPT.numpy()[None], r"a NumPy array \[1, 6, 77, 8\] float32"),
    "npy, big-endian": ("p.npy", PROMPT.numpy().astype(">f4"), f"a NumPy array {SHAPE}"),
    "npy, long double": ("p.npy", PROMPT.numpy().astype(np.longdouble), r"a NumPy array \[6, 77, 8\] float64"),
    "npy, order of columns": ("p.npy", np.asfortranarray(PROMPT.numpy()), f"a NumPy array {SHAPE}"),
    "npz": ("p.npz", {"arr_0": PROMPT.numpy()}, f"a file of arrays with 'arr_0' {SHAPE}$"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_program_wrote_is_read_and_named(tmp_path: Path, name: str) -> None:
    file, content, found = FOREIGN[name]
    read = read_prompt_file(write(content, tmp_path / file))
    assert torch.equal(read.tensor.float(), PROMPT) and not read.tensor.requires_grad
    assert not read.is_bare and re.search(found, read.found), read.found


@pytest.mark.parametrize("content", [PROMPT, nn.Parameter(PROMPT), nn.Buffer(PROMPT), PROMPT.clone().requires_grad_()])
def test_a_tensor_is_bare_whatever_trained_it(tmp_path: Path, content: Tensor) -> None:
    read = read_prompt_file(write(content, tmp_path / "p.pt"))
    assert read.is_bare and type(read.tensor) is Tensor and not read.tensor.requires_grad and torch.equal(read.tensor, PROMPT)


def test_numpy_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    write(PROMPT.numpy(), tmp_path / "p.npy").rename(tmp_path / "p.pt")
    assert "a NumPy array" in read_prompt_file(tmp_path / "p.pt").found


def whole_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


NO_PROMPT, UNREADABLE = r"no tensor in it has a prompt's shape", r": (is no plain tensor file|cannot be read as a prompt file)"
REFUSED: dict[str, tuple[str, Any, str]] = {
    "two prompts": (
        "p.pt",
        {"a": PROMPT, "b": OTHER},
        rf"holds a dict with keys a \({SHAPE}\), b .*2 tensors in it have a pro",
    ),
    "two known names": ("p.pt", {"prompt": PROMPT, "clr_embeds": OTHER}, r"which is meant is not known"),
    "two as safetensors": (
        "p.safetensors",
        {"a": PROMPT, "b": OTHER},
        r"holds a dict with keys a .*which is meant is not known",
    ),
    "no prompt": ("p.pt", {"<cat>": torch.ones(768)}, rf"holds a dict with keys <cat> \(\[768\] float32\); .*{NO_PROMPT}"),
    "an empty dict": ("p.pt", {}, r"holds a dict with nothing in it; expected one bare tensor"),
    "an empty list": ("p.pt", [], r"holds a list with nothing in it; expected one bare tensor"),
    "a list of unlike ones": ("p.pt", [torch.ones(77, 8), torch.ones(77, 9)], r"holds a list with 0 \(\[77, 8\] float32\), 1 "),
    "a list of numbers": ("p.pt", [1.0, 2.0], r"holds a list with 0 \(float\), 1 \(float\); expected one bare"),
    "views under other names": ("p.pt", {f"v{v}": PROMPT[v] for v in range(6)}, NO_PROMPT),
    "a number": ("p.pt", 3, r"holds a int; expected one bare tensor"),
    "a string": ("p.pt", "a cat", r"holds a str; expected one bare tensor \[6, 77, D\]"),
    "an object": ("p.pt", Path("x"), r"is no plain tensor file \(it holds pickled objects other than tensors"),
    "a plain pickle": ("p.pt", pickle.dumps([1, 2], protocol=2), r"p\.pt: (is no plain|cannot be read|holds a list)"),
    "cut short": ("p.pt", whole_file(PROMPT)[:9000], r"cannot be read as a prompt file"),
    "objects in an array": ("p.npy", np.array([Path("x")], dtype=object), r"cannot be read as a prompt file \(ValueError"),
    "texts in an array": ("p.npy", np.array(["x"]), r"holds a NumPy array of <U1; expected floating-point"),
}
REFUSED |= {
    f"{suffix} that begins with {content[:8]!r}": (f"p.{suffix}", content, UNREADABLE)
    for suffix in ("pt", "safetensors", "npy", "npz")
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"PK\x03\x04 cut", b"hello\nworld", b"\x89PNG\r\n\x1a\n")
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    path = write(content, tmp_path / file)
    with pytest.raises(InputError, match=message) as refused:
        read_prompt_file(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_a_checkpoint_of_a_run_is_refused_with_the_command_that_exports_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mice" / "checkpoints" / "step-000120"
    folder.mkdir(parents=True)
    state = {"trainable": {"prompt.learned": PROMPT}, "waypoints": PROMPT[None], "optimizer": {}, "schedule": {}}
    with pytest.raises(
        InputError, match=r"holds a checkpoint of a run, .*: python -m train\.export \S+/mice --step 120 --output"
    ):
        read_prompt_file(write(state, folder / "state.pt"))


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", "folder.pt"])
def test_a_missing_file_is_never_replaced_by_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match=rf"{name}: no such prompt file; expected a \.pt or \.safetensors file"):
        read_prompt_file(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=rf"^{name}: no such prompt file in the working directory {re.escape(str(tmp_path))}; "
    ):
        read_prompt_file(name)
