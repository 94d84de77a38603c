"""Files that `make`, `mix` and `convert` write."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt.prompt.embeddings import load_prompt, save_prompt
from softprompt.prompt.soft_prompt import slerp
from tests.train.prompts.conftest import Run, random_prompt, saved


def test_outputs_replace_nothing_unless_asked_to(tmp_path: Path, run: Run, refused: Run) -> None:
    output = tmp_path / "a.pt"
    output.with_suffix(".json").write_text("mine")
    given = ["make", "--text", "simple", "--output"]
    error = refused(*given, output)
    assert "a.json: exists already; choose another --output, or replace it with --overwrite" in error
    run(*given, output, "--overwrite")
    before = output.read_bytes()
    refused(*given, output)
    assert output.read_bytes() == before
    assert "is saved as .pt" in refused(*given, tmp_path / "a.bin")
    (tmp_path / "file").write_text("no folder")
    assert "cannot be written" in refused(*given, tmp_path / "file" / "a.pt")


def test_mix_writes_a_point_on_the_path(tmp_path: Path, run: Run) -> None:
    a, b, c = (saved(tmp_path / f"{n}.safetensors", random_prompt(seed=n)) for n in range(3))
    output = tmp_path / "mix.safetensors"
    assert "written" in run("mix", a, b, c, "--position", 1.25, "--output", output)
    assert torch.allclose(load_prompt(output), 0.75 * random_prompt(seed=1) + 0.25 * random_prompt(seed=2), atol=1e-6)
    assert json.loads(output.with_suffix(".json").read_text())["position"] == 1.25
    run("mix", a, b, "--position", 0.25, "--interpolation", "slerp", "--output", output, "--overwrite")
    assert torch.equal(load_prompt(output), slerp(random_prompt(seed=0), random_prompt(seed=1), 0.25))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.pt four.pt --position 0.5", "is [4, 77, 8]"),
        ("a.pt --position 0", "is one prompt"),
        ("a.pt a.pt --position 1.5", "is not on the path; expected 0"),
        ("a.pt a.pt --position nan", "is not on the path"),
        ("a.pt realstic --position 0", "did you mean 'realistic'?"),
        ("real.pt toy.pt --position 0.5", "was made with another text encoder"),
        ("a.pt a.pt --position 0.5 --interpolation cubic", "invalid choice: 'cubic'"),
    ],
)
def test_prompts_that_cannot_be_mixed_are_errors_in_one_line(
    tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("a.pt"), random_prompt())
    saved(Path("four.pt"), random_prompt(views=4))
    save_prompt(random_prompt(), "real.pt", metadata={"toy_encoder": False})
    save_prompt(random_prompt(seed=1), "toy.pt", metadata={"toy_encoder": True})
    assert message in refused("mix", *given.split(), "--output", "out.pt")
    assert not Path("out.pt").exists()


def test_converting_there_and_back_changes_nothing(facelift: Path, tmp_path: Path, run: Run) -> None:
    there, back = tmp_path / "a.safetensors", tmp_path / "b.pt"
    printed = run("convert", facelift / "clr_embeds.pt", there)
    assert "found" in printed and "6 views x 77 tokens x 1024, float16" in printed
    run("convert", there, back)
    stored = torch.load(back, weights_only=True)
    assert stored.dtype == torch.float16 and torch.equal(stored, torch.load(facelift / "clr_embeds.pt", weights_only=True))


def test_convert_keeps_the_json_beside_a_file(tmp_path: Path, run: Run, refused: Run) -> None:
    save_prompt(random_prompt(), tmp_path / "a.safetensors", metadata={"origin": "a run", "steps": 7})
    assert "rounding to float16 changes a number by" in run("convert", tmp_path / "a.safetensors", tmp_path / "a.pt")
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["steps"] == 7 and beside["file"] == "a.pt" and beside["dtype"] == "float16"
    np.save(tmp_path / "b.npy", random_prompt().numpy())  # the JSON beside it describes something else
    (tmp_path / "b.json").write_text("{}")
    assert "b.json: exists already" in refused("convert", tmp_path / "b.npy", tmp_path / "b.pt")
    assert (tmp_path / "b.json").read_text() == "{}" and not (tmp_path / "b.pt").exists()


def test_convert_reads_formats_of_other_programs_and_names_them(tmp_path: Path, run: Run, refused: Run) -> None:
    prompt = random_prompt()
    given = {
        "dict.pt": {"prompt_embeds": prompt},
        "list.pt": list(prompt.half()),
        "batch.pt": torch.nn.Parameter(prompt[None]),
        "state.bin": {"module._orig_mod.prompt": prompt},
    }
    for name, content in given.items():
        torch.save(content, tmp_path / name)
    np.save(tmp_path / "array.npy", prompt.numpy())
    np.savez(tmp_path / "arrays.npz", prompt.half().numpy())
    found = {
        "dict.pt": "a dict with 'prompt_embeds' [6, 77, 8] float32",
        "list.pt": "a list of 6 tensors [77, 8] float16",
        "batch.pt": "a tensor [1, 6, 77, 8] float32",
        "state.bin": "a dict with 'prompt' [6, 77, 8] float32",
        "array.npy": "a NumPy array [6, 77, 8] float32",
        "arrays.npz": "a file of arrays with 'arr_0' [6, 77, 8] float16",
    }
    for name, what in found.items():
        command = shlex.split(refused("show", tmp_path / name).partition("; convert it with: ")[2])
        assert command[:4] == ["python", "-m", "train.prompts", "convert"]
        assert run(*command[3:]).startswith(f"found {tmp_path / name}: {what}: 6 views x 77 tokens x 8, ")
        assert torch.equal(load_prompt(command[5]), prompt.half().float())


def test_folders_of_other_numbers_of_views_are_converted(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "fixed_prompt_embeds_7view"
    folder.mkdir()
    for seed, name in enumerate(("clr_embeds", "normal_embeds")):
        saved(folder / f"{name}.pt", random_prompt(views=7, seed=seed))
    printed = run("convert", folder, tmp_path / "out")
    assert "clr_embeds.pt of color pictures: 7 views x 77" in printed and "normal_embeds.pt of normal maps" in printed
    for seed, name in enumerate(("clr_embeds", "normal_embeds")):
        found = load_prompt(tmp_path / "out" / f"{name}.safetensors", num_views=7)
        assert torch.equal(found, random_prompt(views=7, seed=seed).half().float())
    assert "left out normal_embeds.pt" in run("convert", folder, tmp_path / "one.safetensors")
    run("convert", tmp_path / "one.safetensors", tmp_path / "facelift")
    assert (tmp_path / "facelift" / "clr_embeds.pt").is_file()


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("a.pt", "a.pt", "is the input file"),
        ("a.pt", "b.bin", "ends in .bin; expected .pt, .safetensors, or the name of a folder"),
        ("a.pt", "full", "exists already"),
        ("full", "full", "is not an empty folder"),
        ("empty", "b.pt", "holds no clr_embeds.pt or .safetensors (but nothing)"),
        ("dict.pt", "b.pt", "holds a dict with keys front"),
        ("single.pt", "b.pt", "has 1 view; expected 2 or more"),
        ("flat.pt", "b.pt", "holds a tensor [77, 8]"),
        ("broken.safetensors", "b.pt", "cannot be read as a prompt file"),
        ("no.pt", "b.pt", "no such prompt file"),
    ],
)
def test_files_that_cannot_be_converted_are_errors_in_one_line(
    tmp_path: Path, refused: Run, given: str, output: str, message: str
) -> None:
    a = saved(tmp_path / "a.pt", random_prompt())
    torch.save({"front": torch.zeros(3)}, tmp_path / "dict.pt")
    torch.save(random_prompt(views=1), tmp_path / "single.pt")
    torch.save(random_prompt()[0], tmp_path / "flat.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    saved(tmp_path / "full" / "clr_embeds.pt", random_prompt())
    assert message in refused("convert", tmp_path / given, tmp_path / output)
    assert a.is_file() and not list(tmp_path.glob("b.*"))
