"""`make`: texts and cameras."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.templates import VIEWS
from tests.train.prompts.conftest import Run, saved
from train.prompts.make import camera_text, read_angles, relative_angles, reproduce
from train.prompts.sources import Encoder, Source, fill_in, open_encoder, open_file


def test_make_writes_the_encoded_texts_and_names_the_encoder(tmp_path: Path, run: Run, encoder: Encoder) -> None:
    output = tmp_path / "rat.safetensors"
    printed = run("make", "--text", "realistic", "--subject", "rat", "--output", output)
    assert "the embedded toy's text encoder" in printed and "fits only the embedded model" in printed
    assert "no --reference" in printed and "a photograph of a rat, front-right view, from above at an angle." in printed
    expected = encoder.encode("", fill_in("realistic", subject="rat", angles="from above at an angle"), VIEWS).prompt
    assert torch.equal(load_prompt(output, width=1024), expected)
    source = open_file(output)
    assert source.toy is True and source.words == (17, 19, 17, 17, 17, 19)
    assert source.texts[0].startswith("a photograph of a rat")


def test_make_takes_other_views_and_warns_that_the_model_does_not(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "four.pt"
    printed = run("make", "--text", "a {view} mouse", "--views", "front, back,top,low side", "--output", output)
    assert "takes 6 views, 1024 wide: not this file" in printed
    assert open_file(output).views == ("front", "back", "top", "low side")
    assert torch.load(output, weights_only=True).shape == (4, 77, 1024)


def test_make_warns_that_a_long_text_is_cut(tmp_path: Path, run: Run) -> None:
    printed = run("make", "--text", "{view} " + "mouse " * 90, "--output", tmp_path / "long.pt")
    assert "warning text of" in printed and "is cut to 77" in printed


def test_a_reference_is_reproduced_or_the_cause_is_named(
    tmp_path: Path, run: Run, refused: Run, facelift_texts: Source, facelift: Path, tiny_folder: Path
) -> None:
    reference, given = saved(tmp_path / "reference.pt", facelift_texts.prompt), ["make", "--text", "simple", "--reference"]
    printed = run(*given, reference, "--output", tmp_path / "a.pt")
    assert "is reproduced from FaceLift's six texts: no number differs by more than" in printed
    output = ["--output", tmp_path / "b.pt"]
    error = refused(*given, facelift / "clr_embeds.pt", *output, "--model", "micro")
    assert "that is the embedded toy's text encoder" in error
    error = refused(*given, facelift / "clr_embeds.pt", *output, "--model", tiny_folder)
    assert "made with another text encoder" in error
    error = refused(*given, facelift / "mouse_prompt_embeds_768.pt", *output)
    assert "is [6, 77, 768]" in error and "likely it was made with another text encoder" in error
    assert not list(tmp_path.glob("b.*"))


def test_another_padding_token_is_named(tmp_path: Path, facelift_texts: Source) -> None:
    """P27: the same encoder, whose tokenizer pads with the end of the text as those of Stable Diffusion 1 do."""
    folder = tmp_path / "model"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(MICRO_MODEL / part, folder / part)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / "tokenizer" / name
        content = json.loads(file.read_text())
        content["pad_token"] = content["eos_token"]
        file.write_text(json.dumps(content))
    weights = folder / "text_encoder" / "model.safetensors"
    changed = {"format": "pt", "changed": "so that it is no longer the toy's, byte for byte"}
    save_file(load_file(weights) | {}, weights, metadata=changed)
    expected = r"it is with the padding token '!' in place of '<\|endoftext\|>': set pad_token in .*"
    with pytest.raises(InputError, match=expected):
        reproduce(open_encoder(str(folder)), facelift_texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "realstic"], "did you mean 'realistic'?"),
        (["--text", "a mouse"], "is no template"),
        (["--text", "a {subject}"], "has no {view}"),
        (["--text", "a {viev} {view}"], "its fields may be {view}, {subject} and {angle}"),
        (["--text", "simple", "--views", "front,front"], "expected two names or more, all different"),
        (["--text", "simple", "--views", "front"], "expected two names or more"),
        (["--text", "simple", "--frames", "0,1"], "needs --cameras"),
        (["--text", "simple", "--cameras", "c.json"], "has no {angle}, so cameras would change nothing"),
        (["--text", "realistic", "--cameras", "c.json", "--angle", "up"], "--cameras is given too"),
        (["--text", "realistic", "--cameras", "c.json", "--frames", "a"], "expected numbers from 0 up"),
        (["--text", "realistic", "--cameras", "c.json"], "c.json: not found in the working directory "),
        (["--text", "simple", "--model", "no/where"], "--model no/where: no such folder"),
        (["--text", "simple", "--model", "."], "cannot encode text, missing tokenizer/vocab.json"),
        (["--text", "simple", "--reference", "no.pt"], "no.pt: no such prompt file"),
        (["--text", "simple", "--modle", "micro"], "unknown option 'modle'; did you mean 'model'?"),
        (["--text"], "argument --text: expected one argument"),
        ([], "the following arguments are required: --text"),
    ],
)
def test_bad_options_of_make_are_errors_in_one_line(
    tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("make", "--output", "a.pt", *options)
    assert not list(tmp_path.iterdir())


def camera(elevation: float, azimuth: float) -> list[list[float]]:
    """w2c of a camera that looks at the origin, azimuth anticlockwise from above, in degrees."""
    e, a = math.radians(elevation), math.radians(azimuth)
    forward = -np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    matrix = np.eye(4)
    matrix[:3, :3] = [right, np.cross(forward, right), forward]
    matrix[:3, 3] = [0, 0, 2.7]
    rows: list[list[float]] = matrix.tolist()
    return rows


def cameras(path: Path, matrices: list[list[list[float]]]) -> Path:
    path.write_text(json.dumps({"id": "sample", "frames": [{"w": 512, "w2c": matrix} for matrix in matrices]}))
    return path


def test_cameras_are_put_into_words(tmp_path: Path, run: Run) -> None:
    around = [0, 45, 90, 180, 270, 315]
    file = cameras(tmp_path / "opencv_cameras.json", [camera(20, 30 + a) for a in around])
    found = read_angles(file, None, 6)
    assert np.allclose(found, [(20, a if a <= 180 else a - 360) for a in around], atol=1e-6)
    printed = run("make", "--text", "realistic", "--cameras", file, "--output", tmp_path / "a.pt")
    for words in (
        "front view, from 20 degrees above.",
        "front-right view, from 20 degrees above, turned 45 degrees to the right.",
        "back view, from 20 degrees above, turned 180 degrees.",
        "left view, from 20 degrees above, turned 90 degrees to the left.",
    ):
        assert words in printed
    assert camera_text(-3, 0.2) == "at eye level" and camera_text(88, -1) == "from straight above, turned 1 degree to the left"
    assert camera_text(-30, 0) == "from 30 degrees below"


def test_facelift_s_own_camera_is_read() -> None:
    """The first two of FaceLift's data_sample/gslrm/sample_000/opencv_cameras.json: 20 degrees up, 11.25 apart."""
    first = [[0, 1, 0], [0.34202015, 0, -0.93969262], [-0.93969262, 0, -0.34202015]]
    second = [[-0.19509033, 0.98078531, 0], [0.33544834, 0.06672472, -0.93969262], [-0.92163666, -0.18332497, -0.34202015]]
    assert np.allclose(relative_angles([np.array(first), np.array(second)]), [(20, 0), (20, 11.25)], atol=1e-4)


def test_frames_are_chosen_and_missing_ones_named(tmp_path: Path) -> None:
    file = cameras(tmp_path / "c.json", [camera(10 * n, 0) for n in range(8)])
    assert [round(e) for e, _ in read_angles(file, [0, 2, 7], 3)] == [0, 20, 70]
    for frames, message in (
        (None, "has 8 frames; expected 6"),
        ([0, 8], "--frames: 8 is not in"),
        ([0, 1], "--frames: are 2; expected 6"),
    ):
        with pytest.raises(InputError, match=message):
            read_angles(file, frames, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "frames: is not there"),
        ({"frames": {}}, "frames: is a dict"),
        ({"frames": [{}]}, "frame 0: w2c is not there"),
        ({"frames": [3]}, "frame 0: w2c is not there"),
        ({"frames": [{"w2c": [[1, 2], [3]]}]}, "frame 0: w2c is a list; expected a matrix"),
        ({"frames": [{"w2c": (2 * np.eye(4)).tolist()}]}, "is no rotation"),
        ({"frames": [{"w2c": np.diag([1, -1, -1, 1]).tolist()}]}, None),
        ({"frames": [{"w2c": np.eye(4)[[2, 0, 1, 3]].tolist()}]}, "is not upright if z is up"),
        ({"frames": [{"w2c": (np.diag([1, -1, -1, 1]) @ camera(20, 0)).tolist()}]}, "w2c has OpenGL's axes"),
    ],
)
def test_cameras_that_cannot_be_used_are_named(tmp_path: Path, content: object, message: str | None) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    if message is None:  # straight down is not tilted
        assert camera_text(*read_angles(tmp_path / "c.json", None, 1)[0]) == "from straight above"
        return
    with pytest.raises(InputError, match=message):
        read_angles(tmp_path / "c.json", None, 1)
