"""Prompt files as other programs write them: recognized where it is certain what is meant, refused in one line where not."""

import re
from collections import OrderedDict
from collections.abc import Callable
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
    """By what it is and what the file is called."""
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


SHAPE = r"\[6, 77, 8\] float32"
FOREIGN: dict[str, tuple[str, Callable[[], Any], str]] = {
    "a dict": ("p.pt", lambda: {"prompt_embeds": PROMPT}, f"a dict with 'prompt_embeds' {SHAPE}$"),
    "a dict with other things": ("p.pt", lambda: {"name": "x", "e": PROMPT, "n": 3}, f"a dict with 'e' {SHAPE}, and 2 more$"),
    "of diffusers' pipelines": (
        "p.pt",
        lambda: {"negative_prompt_embeds": OTHER, "prompt_embeds": PROMPT},
        f"a dict with 'prompt_embeds' {SHAPE}, and 1 more$",
    ),
    "a parameter in a dict": ("p.pt", lambda: {"p": nn.Parameter(PROMPT)}, f"a dict with 'p' {SHAPE}$"),
    "a state dict": ("p.bin", lambda: nn.ParameterDict({"p": PROMPT}).state_dict(), f"a dict with 'p' {SHAPE}$"),
    "of DDP and compile": (
        "p.pt",
        lambda: OrderedDict({"module._orig_mod.p": PROMPT}),
        f"a dict with 'p' {SHAPE}$",
    ),
    "a trainer's checkpoint": (
        "p.ckpt",
        lambda: {
            "state_dict": {"model.prompt": PROMPT, "model.scale": torch.ones(3)},
            "optimizer": {"state": {0: {"exp_avg": OTHER, "exp_avg_sq": OTHER}}},
            "epoch": 3,
        },
        r"a dict with 'state_dict\.model\.prompt'",
    ),
    "one a view by name": ("p.pt", lambda: dict(zip(reversed(VIEWS), PROMPT.flip(0), strict=True)), "for each of front, "),
    "one a view by number": ("p.pt", lambda: {str(v): PROMPT[v] for v in (3, 1, 2, 0, 5, 4)}, "for each of 0, 1, 2, 3, 4, 5"),
    "a list of views": ("p.pt", lambda: list(PROMPT), r"a list of 6 tensors \[77, 8\] float32"),
    "a tuple of batches": ("p.pt", lambda: tuple(p[None] for p in PROMPT), r"a tuple of 6 tensors \[1, 77, 8\] float32"),
    "a list of parameters": ("p.pt", lambda: [nn.Parameter(p) for p in PROMPT], r"a list of 6 tensors"),
    "a list of one": ("p.pt", lambda: [PROMPT], f"a list of one tensor {SHAPE}"),
    "a batch of one": ("p.pt", lambda: PROMPT[None], r"a tensor \[1, 6, 77, 8\] float32"),
    "views that are batches": ("p.pt", lambda: PROMPT[:, None], r"a tensor \[6, 1, 77, 8\] float32"),
    "a batch of one as safetensors": ("p.safetensors", lambda: {"x": PROMPT[None].clone()}, r"a tensor \[1, 6, 77, 8\]"),
    "safetensors of two": ("p.safetensors", lambda: {"prompt": PROMPT, "loss": torch.ones(2)}, "a dict with 'prompt'"),
    "npy": ("p.npy", lambda: PROMPT.numpy(), f"a NumPy array {SHAPE}"),
    "npy of a batch": ("p.npy", lambda: PROMPT.numpy()[None], r"a NumPy array \[1, 6, 77, 8\] float32"),
    "npy, big-endian": ("p.npy", lambda: PROMPT.numpy().astype(">f4"), f"a NumPy array {SHAPE}"),
    "npy, long double": ("p.npy", lambda: PROMPT.numpy().astype(np.longdouble), r"a NumPy array \[6, 77, 8\] float64"),
    "npy, order of columns": ("p.npy", lambda: np.asfortranarray(PROMPT.numpy()), f"a NumPy array {SHAPE}"),
    "npz": ("p.npz", lambda: {"arr_0": PROMPT.numpy()}, f"a file of arrays with 'arr_0' {SHAPE}$"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_program_wrote_is_read_and_said(tmp_path: Path, name: str) -> None:
    file, content, found = FOREIGN[name]
    read = read_prompt_file(write(content(), tmp_path / file))
    assert torch.equal(read.tensor.float(), PROMPT) and not read.tensor.requires_grad
    assert not read.is_bare and re.search(found, read.found), read.found


@pytest.mark.parametrize(
    "content",
    [PROMPT, nn.Parameter(PROMPT), nn.Buffer(PROMPT), PROMPT.clone().requires_grad_()],
    ids=lambda c: type(c).__name__,
)
def test_a_tensor_is_bare_whatever_trained_it(tmp_path: Path, content: Tensor) -> None:
    read = read_prompt_file(write(content, tmp_path / "p.pt"))
    assert read.is_bare and type(read.tensor) is Tensor and not read.tensor.requires_grad and torch.equal(read.tensor, PROMPT)


def test_numpy_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    write(PROMPT.numpy(), tmp_path / "p.npy").rename(tmp_path / "p.pt")
    assert "a NumPy array" in read_prompt_file(tmp_path / "p.pt").found


class Hostile:
    """Pickled, it touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "two prompts": (
        "p.pt",
        lambda: {"a": PROMPT, "b": OTHER},
        r"holds a dict with keys a, b; .*2 tensors in it have a prompt's",
    ),
    "two known names": ("p.pt", lambda: {"prompt": PROMPT, "clr_embeds": OTHER}, r"which is meant is not known"),
    "no prompt": (
        "p.pt",
        lambda: {"<cat>": torch.ones(768)},
        r"holds a dict with keys <cat>; .*no tensor in it has a prompt's",
    ),
    "an empty dict": ("p.pt", dict, r"holds a dict with nothing in it; "),
    "an empty list": ("p.pt", list, r"holds a list of 0 with nothing; expected one bare tensor"),
    "a list of unlike ones": (
        "p.pt",
        lambda: [torch.ones(77, 8), torch.ones(77, 9)],
        r"holds a list of 2 with a tensor \[77, 8\]",
    ),
    "a list of numbers": ("p.pt", lambda: [1.0, 2.0], r"holds a list of 2 with something else"),
    "views under other names": (
        "p.pt",
        lambda: {f"v{v}": PROMPT[v] for v in range(6)},
        r"no tensor in it has a prompt's shape",
    ),
    "a number": ("p.pt", lambda: 3, r"holds a int; expected one bare tensor"),
    "objects in an array": (
        "p.npy",
        lambda: np.array([Path("x")], dtype=object),
        r"cannot be read as a prompt file \(ValueError",
    ),
    "texts in an array": ("p.npy", lambda: np.array(["x"]), r"holds a NumPy array of <U1; expected floating-point"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, said = REFUSED[name]
    path = write(content(), tmp_path / file)
    with pytest.raises(InputError, match=said) as refused:
        read_prompt_file(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_code_in_an_array_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.save(tmp_path / "p.npy", np.array([Hostile(marker)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "p.npz", a=np.array([Hostile(marker)], dtype=object))
    for name in ("p.npy", "p.npz"):
        with pytest.raises(InputError, match="cannot be read as a prompt file"):
            read_prompt_file(tmp_path / name)
    assert not marker.exists()
    np.load(tmp_path / "p.npy", allow_pickle=True)
    assert marker.exists(), "the trap does not work, so this test shows nothing"


@pytest.mark.parametrize("name", ["p.npy", "p.npz"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"PK\x03\x04 cut", b"hello\nworld"])
def test_damaged_arrays_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a prompt file") as refused:
        read_prompt_file(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_a_run_is_refused_with_the_command_that_exports_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mice" / "checkpoints" / "step-000120"
    folder.mkdir(parents=True)
    state = {"trainable": {"prompt.learned": PROMPT}, "waypoints": PROMPT[None], "optimizer": {}, "schedule": {}}
    with pytest.raises(
        InputError, match=r"holds a checkpoint of a run, .*: python -m train\.export \S+/mice --step 120 --output"
    ):
        read_prompt_file(write(state, folder / "state.pt"))


def test_a_file_that_is_not_there_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^p\.pt: no such prompt file in the working directory {re.escape(str(tmp_path))}; "):
        read_prompt_file("p.pt")
