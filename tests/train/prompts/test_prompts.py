"""Prompt files looked at, checked, made, mixed and converted: the numbers, each command end to end, and each refusal."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.prompt.embeddings import load_prompt, save_prompt
from softprompt.prompt.similarity import words_before_padding
from softprompt.prompt.soft_prompt import slerp
from softprompt.prompt.templates import VIEWS
from tests.browser import Seen
from train.prompts.__main__ import COMMANDS, main
from train.prompts.cameras import in_words, read_angles
from train.prompts.make import reproduce
from train.prompts.measure import drift, in_ranges, measure, nearest_phrases, start_distance
from train.prompts.sources import Encoder, Source, fill_in, open_encoder, open_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("show", file, ...)`: exit code, what was printed, and the error."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The embedded model's."""
    return open_encoder("micro")


@pytest.fixture(scope="module")
def facelift_texts(encoder: Encoder) -> Source:
    """FaceLift's six texts by the embedded model's encoder."""
    return encoder.encode("facelift", fill_in("facelift", subject="", angles=""), VIEWS)


def random_prompt(views: int = 6, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(views, 77, width, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, prompt: torch.Tensor) -> Path:
    """As FaceLift has it: a bare tensor, and nothing beside it."""
    if path.suffix == ".pt":
        torch.save(prompt.half(), path)
    else:
        save_file({"prompt": prompt}, path)
    return path


def one_line(error: str) -> bool:
    return error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


# --------------------------------------------------------------------------------------------------------------- numbers


def test_measures_are_those_of_slow_loops() -> None:
    prompt = random_prompt(views=4)
    prompt[:, :5] = prompt[0, :5]
    m = measure(prompt, "abcd")
    x = prompt.double().numpy()
    flat = [view.ravel() for view in x]
    cosine = {
        (i, j): flat[i] @ flat[j] / math.sqrt(flat[i] @ flat[i] * (flat[j] @ flat[j])) for i, j in combinations(range(4), 2)
    }
    for (i, j), value in cosine.items():
        assert float(m.cosines[i, j]) == float(m.cosines[j, i]) == pytest.approx(value, abs=1e-6)
    best = max(cosine, key=lambda pair: cosine[pair])
    assert m.closest[:2] == ("abcd"[best[0]], "abcd"[best[1]])
    for t in range(77):
        mean = sum(x[v, t] for v in range(4)) / 4
        spread = sum(np.sum((x[v, t] - mean) ** 2) for v in range(4)) / sum(np.sum(x[v, t] ** 2) for v in range(4))
        telling = 0.0
        for v in range(4):
            near = max((w for w in range(4) if w != v), key=lambda w: cosine[min(v, w), max(v, w)])
            telling += float(np.linalg.norm(x[v, t] - x[near, t]) / np.linalg.norm(x[v, t])) / 4
        assert float(m.spread[t]) == pytest.approx(math.sqrt(spread), abs=1e-6)
        assert float(m.telling[t]) == pytest.approx(telling, abs=1e-5)
        assert float(m.norms[2, t]) == pytest.approx(float(np.linalg.norm(x[2, t])), abs=1e-5)
    assert m.shared == 5
    assert m.rounding[0] == float(np.abs(x - x.astype(np.float16)).max())


def test_drift_is_that_of_slow_loops() -> None:
    reference, change = random_prompt(views=3), 0.1 * random_prompt(views=3, seed=1)
    d = drift(reference + change, reference, words=[10, 10, 12])
    x, r = (reference + change).double().numpy(), reference.double().numpy()
    squares = [[float(np.sum((x[v, t] - r[v, t]) ** 2)) for t in range(77)] for v in range(3)]
    words = sum(sum(squares[v][:count]) for v, count in enumerate((10, 10, 12)))
    assert d.in_words == pytest.approx(words / sum(map(sum, squares)), rel=1e-6)
    for v in range(3):
        assert float(d.by_view[v]) == pytest.approx(math.sqrt(sum(squares[v]) / np.sum(r[v] ** 2)), rel=1e-5)
    for t in range(77):
        each = [math.sqrt(squares[v][t] / np.sum(r[v, t] ** 2)) for v in range(3)]
        assert float(d.by_token[t]) == pytest.approx(sum(each) / 3, rel=1e-5)
    rounding = np.sum((x - (reference + change).half().double().numpy()) ** 2)
    assert d.rounded_away == pytest.approx(math.sqrt(rounding / sum(map(sum, squares))), rel=1e-3)
    none = drift(reference, reference, words=None)
    assert none.in_words is none.rounded_away is None and not none.change.any()


def test_planted_tokens_are_found_to_carry_the_view() -> None:
    prompt = random_prompt(views=1).repeat(5, 1, 1)
    prompt += 0.01 * random_prompt(views=5, seed=1)
    prompt[:, [20, 21, 40]] = random_prompt(views=5, seed=2)[:, [20, 21, 40]]
    assert measure(prompt, "abcde").carriers == [20, 21, 40]
    assert in_ranges([20, 21, 40]) == "20-21, 40" and in_ranges(range(9)) == "0-8" and in_ranges([]) == ""


def test_names_of_unequal_length_are_told_from_the_view() -> None:
    """Two views, one with a word more: over all views everything after it differs, against its like a view's own word alone."""
    words = random_prompt(views=1, seed=3)[0]
    short, long = words.clone(), torch.cat([words[:10], words[60:61], words[10:-1]])
    prompt = torch.stack([short, short, long, long])
    prompt[1, 9], prompt[3, 10] = words[70], words[71]
    m = measure(prompt, "abcd")
    assert m.carriers == [9, 10] and len(m.spread_over) > 30


def test_the_padding_of_facelift_s_prompts_begins_after_its_texts(facelift: Path) -> None:
    prompt = load_prompt(facelift / "clr_embeds.pt")
    # start, "a rendering image of 3 d models , front view , color map .", end; two words more in front_right and front_left
    assert words_before_padding(prompt) == [16, 18, 16, 16, 16, 18]
    assert words_before_padding(random_prompt()) is None


# ------------------------------------------------------------------------------------------------------------------ show


def test_show_says_of_facelift_s_prompts_what_is_known_of_them(facelift: Path, tmp_path: Path, run: Run) -> None:
    code, said, _ = run("show", facelift / "clr_embeds.pt", "--output", tmp_path / "page.html")
    assert code == 0
    for line in (
        "6 views x 77 tokens x 1024, float16",
        "tokens 9-11 carry it; 0-8 are the same in all views",
        "front_right and front_left, cosine 0.995",
        "rounding to it changes nothing: it is stored so",
        "front             1.000       0.891       0.973       0.979       0.971       0.889",
    ):
        assert line in said
    page = (tmp_path / "page.html").read_text()
    assert "tokens 9-11 carry it" in page and page.count(">0.995<") == 2


def test_show_compares_with_the_first(tmp_path: Path, run: Run, facelift_texts: Source) -> None:
    first = tmp_path / "first.safetensors"
    save_prompt(facelift_texts.prompt, first, metadata={"text_tokens": list(facelift_texts.words or ())})
    learned = facelift_texts.prompt.clone()
    learned[:, 9] *= 1.5  # a word
    saved(tmp_path / "learned.safetensors", learned)
    save_prompt(random_prompt(views=4), tmp_path / "other.pt")
    given = [first, tmp_path / "learned.safetensors", tmp_path / "other.pt", first]
    code, said, _ = run("show", *given, "--output", tmp_path / "page.html")
    assert code == 0
    assert "padding   from token 16 or 18 on (by its texts)" in said
    assert "most in token" in said and "100.0% of it (squared) in word tokens, 0.0% in padding" in said
    said = " ".join(said.split())  # lines are broken where the paths are long
    assert f"not comparable with {first}: another shape" in said and f"from {first}: none" in said


def test_show_takes_templates_and_folders(facelift: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(facelift / "clr_embeds.pt", tmp_path)
    code, said, _ = run("show", "realistic", tmp_path, "--subject", "rat", "--output", tmp_path / "page.html")
    assert code == 0 and "the embedded toy's text encoder" in said and str(tmp_path / "clr_embeds.pt") in said
    assert "a photograph of a rat, front right view" in (tmp_path / "page.html").read_text()


def test_the_page_opens_on_a_telephone_and_on_a_desk(
    facelift: Path, tmp_path: Path, run: Run, check_page: Callable[[Path], Seen]
) -> None:
    odd = tmp_path / "<b>again & again.safetensors"
    saved(odd, random_prompt(width=1024))
    page = tmp_path / "page.html"
    assert run("show", facelift / "clr_embeds.pt", odd, "facelift", "--output", page)[0] == 0
    assert "<b>" not in page.read_text()
    assert check_page(page).figures == 2 + 3 + 3


def test_an_earlier_page_is_replaced_and_nothing_else(tmp_path: Path, run: Run) -> None:
    prompt = saved(tmp_path / "a.pt", random_prompt())
    page = tmp_path / "page.html"
    assert run("show", prompt, "--output", page)[0] == run("show", prompt, "--output", page)[0] == 0
    page.write_text("mine")
    for output, said in ((page, "is no earlier page"), (tmp_path, "is a folder")):
        code, _, error = run("show", prompt, "--output", output)
        assert code == 2 and said in error and one_line(error)
    assert page.read_text() == "mine"


def test_prompts_of_two_encoders_are_told_by_their_start(facelift: Path, tmp_path: Path, run: Run, encoder: Encoder) -> None:
    made = [encoder.encode("", [f"{text}, {n}" for n in "12"], "ab").prompt for text in ("a mouse", "from behind, a house")]
    assert start_distance(made[0], made[1]) < 1e-4
    real, toy = facelift / "clr_embeds.pt", tmp_path / "toy.safetensors"
    assert run("make", "--text", "facelift", "--output", toy)[0] == 0
    code, said, _ = run("show", real, toy, "--output", tmp_path / "page.html")
    assert code == 0 and "likely made with another text encoder" in " ".join(said.split())
    code, said, _ = run("mix", real, toy, "--position", 0.5, "--output", tmp_path / "mix.pt")
    assert code == 0 and f"warning    {toy} is likely of another text encoder than {real}" in said


def test_show_says_which_phrase_each_view_reads_nearest_to(tmp_path: Path, run: Run, encoder: Encoder) -> None:
    realistic = encoder.encode("realistic", fill_in("realistic", subject="mouse", angles="from above at an angle"), VIEWS)
    turned = realistic.prompt[[3, 1, 2, 0, 4, 5]]  # front and back have changed places
    save_prompt(turned, tmp_path / "turned.safetensors")
    (tmp_path / "words.txt").write_text("a photograph of a hat\n\nsimple\n")
    argv = ["show", tmp_path / "turned.safetensors", "--output", tmp_path / "p.html", "--phrases", "realistic"]
    code, said, _ = run(*argv, str(tmp_path / "words.txt"))
    said = " ".join(said.split())
    assert code == 0
    for view, text in (("front", "back"), ("back", "front"), ("left", "left")):
        assert f"{view} reads nearest to 'a photograph of a mouse, {text} view, from above at an angle.' (1.00), then" in said
    assert "front reads nearest to" in (tmp_path / "p.html").read_text()
    save_prompt(turned.flip(-1), tmp_path / "other.safetensors")
    _, said, _ = run("show", tmp_path / "other.safetensors", *argv[2:], "simple")
    assert "not comparable: the prompt was likely made with another text encoder" in " ".join(said.split())
    for given, problem in (
        (["a photograph of a hat"], r"--phrases: are 1; expected two or more"),
        ([str(tmp_path / "none.txt")], r"--phrases .*none\.txt: cannot be read"),
        (["realistic", "{vew} of it"], r"no \{view\}"),
    ):
        code, _, error = run(*argv[:-1], *given)
        assert code == 2 and re.search(problem, error) and error.count("\n") == 1, error


def test_nearness_to_phrases_leaves_out_what_they_have_in_common() -> None:
    phrases = torch.tensor([[[10.0, 1.0, 0.0]], [[10.0, -1.0, 0.0]], [[10.0, 0.0, 1.0]], [[10.0, 0.0, -1.0]]])
    cosines = nearest_phrases(torch.tensor([[[11.0, 3.0, 0.0]], [[9.0, 0.0, -2.0]]]), phrases)
    centred = torch.tensor([[1.0, 3.0, 0.0], [-1.0, 0.0, -2.0]])
    slow = [[float(v @ (p[0] - torch.tensor([10.0, 0, 0]))) / float(v.norm()) for p in phrases] for v in centred]
    assert cosines.tolist() == [pytest.approx(row, abs=1e-6) for row in slow]


def test_a_learned_prompt_is_not_taken_for_one_of_another_encoder(tmp_path: Path, run: Run, facelift_texts: Source) -> None:
    start, learned = tmp_path / "start.safetensors", tmp_path / "learned.safetensors"
    save_prompt(facelift_texts.prompt, start)
    save_prompt(facelift_texts.prompt.roll(1, dims=1) * 2, learned, metadata={"origin": "softprompt", "steps": 100})
    code, said, _ = run("show", start, learned, "--output", tmp_path / "page.html")
    said = " ".join(said.split())
    assert code == 0 and f"from {start}, learned in 100 steps" in said and "another text encoder" not in said
    code, said, _ = run("mix", start, learned, "--position", 0.5, "--output", tmp_path / "mix.pt")
    assert code == 0 and "warning" not in said


# ----------------------------------------------------------------------------------------------------------------- check


def test_a_file_that_fits_and_one_that_does_not(facelift: Path, tiny_folder: Path, run: Run) -> None:
    code, said, _ = run("check", facelift / "clr_embeds.pt", "--model", tiny_folder)
    assert code == 0 and said.count("\n") == 1 and "fits" in said and "6 views x 77 tokens x 1024" in said
    assert "off that of the model's own text encoder: it was trained, or made with another" in said  # its weights are random
    code, said, error = run("check", facelift / "mouse_prompt_embeds_768.pt", "--model", tiny_folder)
    assert code == 2 and not said and one_line(error)
    assert "is 768 wide" in error and "CLIP ViT-L/14 (Stable Diffusion 1.x)" in error


def test_a_prompt_of_the_toy_is_refused_for_another_model(tmp_path: Path, tiny_folder: Path, run: Run) -> None:
    made = tmp_path / "toy.pt"
    assert run("make", "--text", "simple", "--output", made)[0] == 0
    code, said, _ = run("check", made, "--model", "micro")
    assert code == 0 and "its own text encoder made it, by the start token" in said
    code, _, error = run("check", made, "--model", tiny_folder)
    assert code == 2 and "was made with the embedded toy's text encoder" in error and one_line(error)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "unet/config.json: not found"),
        ({"num_views": 4, "cross_attention_dim": 8}, "has 6 views ([6, 77, 8] float16); the model has 4"),
        ({"num_views": 6}, "cross_attention_dim is None; expected a whole number"),
        ({"num_views": 6, "cross_attention_dim": [8, 8]}, "cross_attention_dim is [8, 8]"),
    ],
)
def test_models_that_do_not_say_or_take_something_else(tmp_path: Path, run: Run, config: object, said: str) -> None:
    prompt = saved(tmp_path / "a.pt", random_prompt())
    (tmp_path / "model" / "unet").mkdir(parents=True)
    if config is not None:
        (tmp_path / "model" / "unet" / "config.json").write_text(json.dumps(config))
    code, _, error = run("check", prompt, "--model", tmp_path / "model")
    assert code == 2 and said in error and one_line(error)


# ------------------------------------------------------------------------------------------------------------------ make


def test_make_writes_what_the_encoder_says_and_whose_it_is(tmp_path: Path, run: Run, encoder: Encoder) -> None:
    output = tmp_path / "rat.safetensors"
    code, said, _ = run("make", "--text", "realistic", "--subject", "rat", "--output", output)
    assert code == 0 and "the embedded toy's text encoder" in said and "fits the embedded model alone" in said
    assert "no --reference" in said and "a photograph of a rat, front right view, from above at an angle." in said
    expected = encoder.encode("", fill_in("realistic", subject="rat", angles="from above at an angle"), VIEWS).prompt
    assert torch.equal(load_prompt(output, width=1024), expected)
    source = open_file(output)
    assert (
        source.toy is True and source.texts[0].startswith("a photograph of a rat") and source.words == (17, 18, 17, 17, 17, 18)
    )


def test_make_takes_other_views_and_says_that_the_model_does_not(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "four.pt"
    code, said, _ = run("make", "--text", "a {view} mouse", "--views", "front, back,top,low side", "--output", output)
    assert code == 0 and "takes 6 views, 1024 wide: not this file" in said
    assert open_file(output).views == ("front", "back", "top", "low side")
    assert torch.load(output, weights_only=True).shape == (4, 77, 1024)


def test_a_text_that_is_cut_is_said(tmp_path: Path, run: Run) -> None:
    text = "{view} " + "mouse " * 90
    code, said, _ = run("make", "--text", text, "--output", tmp_path / "long.pt")
    assert code == 0 and "warning    text of" in said and "is cut to 77" in said


def test_a_reference_is_reproduced_or_the_cause_is_said(
    tmp_path: Path, run: Run, encoder: Encoder, facelift_texts: Source, facelift: Path, tiny_folder: Path
) -> None:
    reference = saved(tmp_path / "reference.pt", facelift_texts.prompt)
    code, said, _ = run("make", "--text", "simple", "--reference", reference, "--output", tmp_path / "a.pt")
    assert code == 0 and "is reproduced from FaceLift's six texts: no number differs by more than" in said
    output = tmp_path / "b.pt"
    for model, cause in (("micro", "that is the embedded toy's text encoder"), (tiny_folder, "made with another text encoder")):
        given = ["--model", model, "--reference", facelift / "clr_embeds.pt", "--output", output]
        code, _, error = run("make", "--text", "simple", *given)
        assert code == 2 and cause in error and one_line(error)
    given = ["--reference", facelift / "mouse_prompt_embeds_768.pt", "--output", output]
    code, _, error = run("make", "--text", "simple", *given)
    assert code == 2 and "is [6, 77, 768]" in error and "likely it was made with another text encoder" in error
    assert not output.exists() and not output.with_suffix(".json").exists()


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
    save_file(
        load_file(weights) | {},
        weights,
        metadata={"format": "pt", "changed": "so that it is no longer the toy's, byte for byte"},
    )
    with pytest.raises(
        InputError, match=r"it is, with the padding token '!' in place of '<\|endoftext\|>': set pad_token in .*"
    ):
        reproduce(open_encoder(str(folder)), facelift_texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "realstic"], "did you mean 'realistic'?"),
        (["--text", "a mouse"], "is no template"),
        (["--text", "a {subject}"], "has no {view}"),
        (["--text", "a {viev} {view}"], "its fields may be {view}, {subject} and {angle}"),
        (["--text", "simple", "--views", "front,front"], "expected two names or more, all different"),
        (["--text", "simple", "--views", "front"], "expected two names or more"),
        (["--text", "simple", "--frames", "0,1"], "there is no --cameras"),
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
def test_what_cannot_be_made_is_said_in_one_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run("make", "--output", "a.pt", *options)
    assert code == 2 and said in error and one_line(error)
    assert not list(tmp_path.iterdir())


def test_outputs_are_not_written_over_something_else(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "a.pt"
    output.with_suffix(".json").write_text("mine")
    given = ["make", "--text", "simple", "--output"]
    code, _, error = run(*given, output)
    assert code == 2 and "a.json: exists already; choose another --output, or replace it with --overwrite" in error
    assert run(*given, output, "--overwrite")[0] == 0
    before = output.read_bytes()
    assert run(*given, output)[0] == 2 and output.read_bytes() == before
    assert "is saved as .pt" in run(*given, tmp_path / "a.bin")[2]
    (tmp_path / "file").write_text("no folder")
    code, _, error = run(*given, tmp_path / "file" / "a.pt")
    assert code == 2 and "cannot be written" in error and one_line(error)


# --------------------------------------------------------------------------------------------------------------- cameras


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
    code, said, _ = run("make", "--text", "realistic", "--cameras", file, "--output", tmp_path / "a.pt")
    assert code == 0
    for words in (
        "front view, from 20 degrees above.",
        "front right view, from 20 degrees above, turned 45 degrees to the right.",
        "back view, from 20 degrees above, turned 180 degrees.",
        "left view, from 20 degrees above, turned 90 degrees to the left.",
    ):
        assert words in said
    assert in_words(-3, 0.2) == "at eye level" and in_words(88, -1) == "from straight above, turned 1 degree to the left"
    assert in_words(-30, 0) == "from 30 degrees below"


def test_facelift_s_own_camera_is_read() -> None:
    """The first two of FaceLift's data_sample/gslrm/sample_000/opencv_cameras.json: 20 degrees up, 11.25 apart."""
    from train.prompts.cameras import relative_angles

    first = [[0, 1, 0], [0.34202015, 0, -0.93969262], [-0.93969262, 0, -0.34202015]]
    second = [[-0.19509033, 0.98078531, 0], [0.33544834, 0.06672472, -0.93969262], [-0.92163666, -0.18332497, -0.34202015]]
    assert np.allclose(relative_angles([np.array(first), np.array(second)]), [(20, 0), (20, 11.25)], atol=1e-4)


def test_frames_are_chosen_and_missing_ones_named(tmp_path: Path) -> None:
    file = cameras(tmp_path / "c.json", [camera(10 * n, 0) for n in range(8)])
    assert [round(e) for e, _ in read_angles(file, [0, 2, 7], 3)] == [0, 20, 70]
    for frames, said in (
        (None, "has 8 frames; expected 6"),
        ([0, 8], "--frames: 8 is none of"),
        ([0, 1], "--frames: are 2; expected 6"),
    ):
        with pytest.raises(InputError, match=said):
            read_angles(file, frames, 6)


@pytest.mark.parametrize(
    ("content", "said"),
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
def test_cameras_that_cannot_be_used_are_named(tmp_path: Path, content: object, said: str | None) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    if said is None:  # straight down is not tilted
        assert in_words(*read_angles(tmp_path / "c.json", None, 1)[0]) == "from straight above"
        return
    with pytest.raises(InputError, match=said):
        read_angles(tmp_path / "c.json", None, 1)


# ------------------------------------------------------------------------------------------------------- mix and convert


def test_mix_is_a_point_of_the_path(tmp_path: Path, run: Run) -> None:
    a, b, c = (saved(tmp_path / f"{n}.safetensors", random_prompt(seed=n)) for n in range(3))
    output = tmp_path / "mix.safetensors"
    code, said, _ = run("mix", a, b, c, "--position", 1.25, "--output", output)
    assert code == 0 and "written" in said
    assert torch.allclose(load_prompt(output), 0.75 * random_prompt(seed=1) + 0.25 * random_prompt(seed=2), atol=1e-6)
    assert json.loads(output.with_suffix(".json").read_text())["position"] == 1.25
    run("mix", a, b, "--position", 0.25, "--interpolation", "slerp", "--output", output, "--overwrite")
    assert torch.equal(load_prompt(output), slerp(random_prompt(seed=0), random_prompt(seed=1), 0.25))


def test_what_cannot_be_mixed_is_said_in_one_line(tmp_path: Path, run: Run) -> None:
    a = saved(tmp_path / "a.pt", random_prompt())
    four = saved(tmp_path / "four.pt", random_prompt(views=4))
    real, toy = (tmp_path / f"{name}.pt" for name in ("real", "toy"))
    save_prompt(random_prompt(), real, metadata={"toy_encoder": False})
    save_prompt(random_prompt(seed=1), toy, metadata={"toy_encoder": True})
    cases = [
        ((a, four, "--position", 0.5), "is [4, 77, 8]"),
        ((a, "--position", 0), "is one prompt"),
        ((a, a, "--position", 1.5), "is not on the path; expected 0"),
        ((a, a, "--position", "nan"), "is not on the path"),
        ((a, "realstic", "--position", 0), "did you mean 'realistic'?"),
        ((real, toy, "--position", 0.5), "was made with another text encoder"),
        ((a, a, "--position", 0.5, "--interpolation", "cubic"), "invalid choice: 'cubic'"),
    ]
    for given, said in cases:
        code, _, error = run("mix", *given, "--output", tmp_path / "out.pt")
        assert code == 2 and said in error and one_line(error)
    assert not (tmp_path / "out.pt").exists()


def test_convert_there_and_back_changes_nothing(facelift: Path, tmp_path: Path, run: Run) -> None:
    there, back = tmp_path / "a.safetensors", tmp_path / "b.pt"
    code, said, _ = run("convert", facelift / "clr_embeds.pt", there)
    assert code == 0 and "found" in said and "6 views x 77 tokens x 1024, float16" in said
    assert run("convert", there, back)[0] == 0
    stored = torch.load(back, weights_only=True)
    assert stored.dtype == torch.float16 and torch.equal(stored, torch.load(facelift / "clr_embeds.pt", weights_only=True))


def test_convert_keeps_what_is_written_beside_a_file(tmp_path: Path, run: Run) -> None:
    save_prompt(random_prompt(), tmp_path / "a.safetensors", metadata={"origin": "a run", "steps": 7})
    code, said, _ = run("convert", tmp_path / "a.safetensors", tmp_path / "a.pt")
    assert code == 0 and "rounding to float16 changes a number by" in said
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["steps"] == 7 and beside["file"] == "a.pt" and beside["dtype"] == "float16"


def test_convert_takes_what_other_programs_write_and_says_what_it_found(tmp_path: Path, run: Run) -> None:
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
        code, _, refused = run("show", tmp_path / name)
        assert code == 2 and one_line(refused), refused
        command = shlex.split(refused.partition("; convert it with: ")[2])
        assert command[:4] == ["python", "-m", "train.prompts", "convert"], refused
        code, said, error = run(*command[3:])
        assert (code, error) == (0, "")
        assert said.startswith(f"found      {tmp_path / name}: {what}: 6 views x 77 tokens x 8, ")
        assert torch.equal(load_prompt(command[5]), prompt.half().float())


def test_convert_leaves_a_json_that_describes_something_else(tmp_path: Path, run: Run) -> None:
    np.save(tmp_path / "a.npy", random_prompt().numpy())
    (tmp_path / "a.json").write_text("{}")
    code, _, error = run("convert", tmp_path / "a.npy", tmp_path / "a.pt")
    assert code == 2 and "a.json: exists already" in error
    assert (tmp_path / "a.json").read_text() == "{}" and not (tmp_path / "a.pt").exists()


def test_folders_of_other_numbers_of_views_are_converted(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "fixed_prompt_embeds_7view"
    folder.mkdir()
    for seed, name in enumerate(("clr_embeds", "normal_embeds")):
        saved(folder / f"{name}.pt", random_prompt(views=7, seed=seed))
    code, said, _ = run("convert", folder, tmp_path / "out")
    assert code == 0 and "clr_embeds.pt of color pictures: 7 views x 77" in said and "normal_embeds.pt of normal maps" in said
    for seed, name in enumerate(("clr_embeds", "normal_embeds")):
        found = load_prompt(tmp_path / "out" / f"{name}.safetensors", num_views=7)
        assert torch.equal(found, random_prompt(views=7, seed=seed).half().float())
    code, said, _ = run("convert", folder, tmp_path / "one.safetensors")
    assert code == 0 and "left out   normal_embeds.pt" in said
    assert run("convert", tmp_path / "one.safetensors", tmp_path / "facelift")[0] == 0
    assert (tmp_path / "facelift" / "clr_embeds.pt").is_file()


def test_what_cannot_be_converted_is_said_in_one_line(tmp_path: Path, run: Run) -> None:
    a = saved(tmp_path / "a.pt", random_prompt())
    torch.save({"front": torch.zeros(3)}, tmp_path / "dict.pt")
    torch.save(random_prompt(views=1), tmp_path / "single.pt")
    torch.save(random_prompt()[0], tmp_path / "flat.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    saved(tmp_path / "full" / "clr_embeds.pt", random_prompt())
    cases = [
        (a, a, "is the file that is given"),
        (a, tmp_path / "b.bin", "ends in .bin; expected .pt, .safetensors, or the name of a folder"),
        (a, tmp_path / "full", "exists already"),
        (tmp_path / "full", tmp_path / "full", "is not an empty folder"),
        (tmp_path / "empty", tmp_path / "b.pt", "holds no clr_embeds.pt or .safetensors (but nothing)"),
        (tmp_path / "dict.pt", tmp_path / "b.pt", "holds a dict with keys front"),
        (tmp_path / "single.pt", tmp_path / "b.pt", "has 1 view; expected 2 or more"),
        (tmp_path / "flat.pt", tmp_path / "b.pt", "holds a tensor [77, 8]"),
        (tmp_path / "broken.safetensors", tmp_path / "b.pt", "cannot be read as a prompt file"),
        (tmp_path / "no.pt", tmp_path / "b.pt", "no such prompt file"),
    ]
    for given, output, said in cases:
        code, _, error = run("convert", given, output)
        assert code == 2 and said in error and one_line(error), error
    assert not list(tmp_path.glob("b.*"))


# ---------------------------------------------------------------------------------------------------------- command line


def test_commands_and_their_options_are_suggested(run: Run) -> None:
    code, _, error = run("shwo", "a.pt")
    assert code == 2 and "did you mean 'show'?" in error and one_line(error)
    code, _, error = run("mix", "a", "b", "--position", "0", "--output", "c.pt", "--interpolate=slerp")
    assert code == 2 and "unknown option 'interpolate'; did you mean 'interpolation'?" in error and one_line(error)
    assert run()[0] == 2


def test_help_imports_nothing_large() -> None:
    program = (
        "import sys\nfrom train.prompts.__main__ import COMMANDS, main\n"
        "for argv in [['--help'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "large = {'torch', 'diffusers', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {large}' if large else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:") == len(COMMANDS) == 5
