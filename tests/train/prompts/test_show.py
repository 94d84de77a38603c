"""`show`, `check`, and the command line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.prompt.embeddings import save_prompt
from softprompt.prompt.templates import VIEWS
from tests.browser import Seen
from tests.train.prompts.conftest import Run, random_prompt, saved
from train.prompts.__main__ import COMMANDS, main
from train.prompts.measure import start_distance
from train.prompts.sources import Encoder, Source, fill_in


def test_show_describes_facelift_s_prompts(facelift: Path, tmp_path: Path, run: Run) -> None:
    printed = run("show", facelift / "clr_embeds.pt", "--output", tmp_path / "page.html")
    for line in (
        "6 views x 77 tokens x 1024, float16",
        "tokens 9-11 carry it; 0-8 are the same in all views",
        "front_right and front_left, cosine 0.995",
        "rounding to it changes nothing: it is stored so",
        "front 1.000 0.891 0.973 0.979 0.971 0.889",
    ):
        assert line in printed
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
    printed = run("show", *given, "--output", tmp_path / "page.html")
    assert "padding from token 16 or 18 on (by its texts)" in printed
    assert "most in token" in printed and "100.0% of it (squared) in word tokens, 0.0% in padding" in printed
    assert f"not comparable with {first}: another shape" in printed and f"from {first}: none" in printed


def test_show_takes_templates_and_folders(facelift: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(facelift / "clr_embeds.pt", tmp_path)
    printed = run("show", "realistic", tmp_path, "--subject", "rat", "--output", tmp_path / "page.html")
    assert "the embedded toy's text encoder" in printed and str(tmp_path / "clr_embeds.pt") in printed
    assert "a photograph of a rat, front-right view" in (tmp_path / "page.html").read_text()


def test_the_page_opens_on_a_telephone_and_on_a_desk(
    facelift: Path, tmp_path: Path, run: Run, check_page: Callable[[Path], Seen]
) -> None:
    odd = saved(tmp_path / "<b>again & again.safetensors", random_prompt(width=1024))
    page = tmp_path / "page.html"
    run("show", facelift / "clr_embeds.pt", odd, "facelift", "--output", page)
    assert "<b>" not in page.read_text()
    assert check_page(page).figures == 2 + 3 + 3


def test_an_earlier_page_is_replaced_and_nothing_else(tmp_path: Path, run: Run, refused: Run) -> None:
    prompt, page = saved(tmp_path / "a.pt", random_prompt()), tmp_path / "page.html"
    for _ in range(2):
        run("show", prompt, "--output", page)
    page.write_text("mine")
    assert "is no earlier page" in refused("show", prompt, "--output", page)
    assert "is a folder" in refused("show", prompt, "--output", tmp_path)
    assert page.read_text() == "mine"


def test_prompts_of_two_encoders_are_recognised_by_their_start_token(
    facelift: Path, tmp_path: Path, run: Run, encoder: Encoder
) -> None:
    made = [encoder.encode("", [f"{text}, {n}" for n in "12"], "ab").prompt for text in ("a mouse", "from behind, a house")]
    assert start_distance(made[0], made[1]) < 1e-4
    real, toy = facelift / "clr_embeds.pt", tmp_path / "toy.safetensors"
    run("make", "--text", "facelift", "--output", toy)
    assert "likely made with another text encoder" in run("show", real, toy, "--output", tmp_path / "page.html")
    printed = run("mix", real, toy, "--position", 0.5, "--output", tmp_path / "mix.pt")
    assert f"warning {toy} is likely of another text encoder than {real}" in printed


def test_a_learned_prompt_is_not_taken_for_one_of_another_encoder(tmp_path: Path, run: Run, facelift_texts: Source) -> None:
    start, learned = tmp_path / "start.safetensors", tmp_path / "learned.safetensors"
    save_prompt(facelift_texts.prompt, start)
    save_prompt(facelift_texts.prompt.roll(1, dims=1) * 2, learned, metadata={"origin": "softprompt", "steps": 100})
    printed = run("show", start, learned, "--output", tmp_path / "page.html")
    assert f"from {start}, learned in 100 steps" in printed and "another text encoder" not in printed
    assert "warning" not in run("mix", start, learned, "--position", 0.5, "--output", tmp_path / "mix.pt")


def test_show_names_the_phrase_nearest_to_each_view(tmp_path: Path, run: Run, refused: Run, encoder: Encoder) -> None:
    realistic = encoder.encode("realistic", fill_in("realistic", subject="mouse", angles="from above at an angle"), VIEWS)
    turned = realistic.prompt[[3, 1, 2, 0, 4, 5]]  # front and back have changed places
    save_prompt(turned, tmp_path / "turned.safetensors")
    (tmp_path / "words.txt").write_text("a photograph of a hat\n\nsimple\n")
    options = ["--output", tmp_path / "p.html", "--phrases"]
    printed = run("show", tmp_path / "turned.safetensors", *options, "realistic", tmp_path / "words.txt")
    for view, text in (("front", "back"), ("back", "front"), ("left", "left")):
        assert (
            f"{view} reads nearest to 'a photograph of a mouse, {text} view, from above at an angle.' (1.00), then" in printed
        )
    assert "front reads nearest to" in (tmp_path / "p.html").read_text()
    save_prompt(turned.flip(-1), tmp_path / "other.safetensors")
    printed = run("show", tmp_path / "other.safetensors", *options, "realistic", "simple")
    assert "not comparable: the prompt was likely made with another text encoder" in printed
    for given, problem in (
        (["a photograph of a hat"], r"--phrases: are 1; expected two or more"),
        ([tmp_path / "none.txt"], r"--phrases .*none\.txt: cannot be read"),
        (["realistic", "{vew} of it"], r"no \{view\}"),
    ):
        assert re.search(problem, refused("show", tmp_path / "turned.safetensors", *options, *given))


def test_check_says_in_one_line_whether_a_file_fits_a_model(
    facelift: Path, tiny_folder: Path, refused: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(facelift / "clr_embeds.pt"), "--model", str(tiny_folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "fits" in printed and "6 views x 77 tokens x 1024" in printed
    assert "off that of the model's own text encoder: it was trained, or made with another" in printed  # its weights are random
    error = refused("check", facelift / "mouse_prompt_embeds_768.pt", "--model", tiny_folder)
    assert "is 768 wide" in error and "CLIP ViT-L/14 (Stable Diffusion 1.x)" in error


def test_a_prompt_of_the_toy_is_refused_for_another_model(tmp_path: Path, tiny_folder: Path, run: Run, refused: Run) -> None:
    made = tmp_path / "toy.pt"
    run("make", "--text", "simple", "--output", made)
    assert "its own text encoder made it, by the start token" in run("check", made, "--model", "micro")
    assert "was made with the embedded toy's text encoder" in refused("check", made, "--model", tiny_folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "unet/config.json: not found"),
        ({"num_views": 4, "cross_attention_dim": 8}, "has 6 views ([6, 77, 8] float16); the model has 4"),
        ({"num_views": 6}, "cross_attention_dim is None; expected a whole number"),
        ({"num_views": 6, "cross_attention_dim": [8, 8]}, "cross_attention_dim is [8, 8]"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, refused: Run, config: object, message: str) -> None:
    prompt = saved(tmp_path / "a.pt", random_prompt())
    (tmp_path / "model" / "unet").mkdir(parents=True)
    if config is not None:
        (tmp_path / "model" / "unet" / "config.json").write_text(json.dumps(config))
    assert message in refused("check", prompt, "--model", tmp_path / "model")


def test_commands_and_their_options_are_suggested(refused: Run) -> None:
    assert "did you mean 'show'?" in refused("shwo", "a.pt")
    error = refused("mix", "a", "b", "--position", "0", "--output", "c.pt", "--interpolate=slerp")
    assert "unknown option 'interpolate'; did you mean 'interpolation'?" in error
    assert main([]) == 2


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
    assert done.stdout.count("examples:") == len(COMMANDS) == 6
