"""Views of pictures: those of the training previews, and each part of what was learned by itself."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline
from softprompt.model.sampling import RISES
from softprompt.prompt.embeddings import load_prompt
from tests.pictures import ONE_LEVEL, levels_apart, pixels
from tests.runs import run_to_end
from train.export.write import LORA_WEIGHTS
from train.options.config import Config
from train.sample import Options, find_pictures, main, make_cases


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: its views can be told apart."""
    return partial(small_config, model="micro")


@pytest.fixture(scope="module")
def run(small: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned something."""
    config = small(**{"train.steps": 2, "lora.learning_rate": 0.01, "monitor.guidance_scale": 1.5})
    return run_to_end(config, tmp_path_factory.mktemp("run") / "run").folder


@pytest.fixture(scope="module")
def picture(mice: Path) -> Path:
    """The first held-out mouse, as it is given to the previews."""
    return min((mice / "val").glob("*/cam_000.png"))


QUICK = ["--steps=2", "--guidance_scale=1.5", "--eta=0", "--device=cpu"]


def written(output: Path) -> np.ndarray:
    """The six views of the picture cam_000."""
    return np.stack([pixels(output / "cam_000" / f"cam_{view:03d}.png") for view in range(6)])


def previewed(run: Path, row: int) -> np.ndarray:
    """Six views in the run's last preview. row: 0 for the truth, 1 for the pretrained model, 2 for the adapted one."""
    tiles = pixels(run / "previews" / "tiles-step-000002.png")  # the given picture is in the first column
    return np.stack(np.split(tiles[64 * row : 64 * (row + 1), 64 : 7 * 64], 6, axis=1))


def test_the_views_are_those_of_the_training_previews(run: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "views"
    assert main([f"--pictures=[{picture}]", f"--export={run / 'export'}", f"--output={out}", *QUICK]) == 0
    assert levels_apart(written(out), previewed(run, 2)) <= ONE_LEVEL
    assert sorted(p.name for p in out.iterdir()) == ["cam_000", "cam_000.gif", "cam_000.png"]
    with Image.open(out / "cam_000.gif") as turning:
        assert turning.n_frames == 6


def test_at_strength_0_they_are_those_of_the_pretrained_model(run: Path, picture: Path, tmp_path: Path) -> None:
    strengths = ["--prompt_strength=0", "--lora_strength=0"]
    given = [f"--pictures=[{picture}]", *QUICK]
    assert main([*given, f"--export={run / 'export'}", *strengths, f"--output={tmp_path / 'off'}"]) == 0
    assert main([*given, f"--output={tmp_path / 'pretrained'}"]) == 0
    off = written(tmp_path / "off")
    assert levels_apart(off, written(tmp_path / "pretrained")) <= ONE_LEVEL
    assert levels_apart(off, previewed(run, 1)) <= ONE_LEVEL


@pytest.mark.parametrize(("rows", "count"), [("strengths", 9), ("path", 5), ("ablation", 5), ("rises", 6)])
def test_several_rows_are_drawn_and_the_full_strength_written(
    run: Path, picture: Path, tmp_path: Path, rows: str, count: int
) -> None:
    given = [f"--pictures=[{picture}]", f"--export={run / 'export'}", *QUICK, "--steps=1", "--guidance_scale=1"]
    assert main([*given, f"--rows={rows}", f"--output={tmp_path / 'rows'}"]) == 0
    with Image.open(tmp_path / "rows" / "cam_000.png") as grid:
        assert grid.height > count * 128
    lora = "--lora_strength=0" if rows == "path" else "--lora_strength=1"
    assert main([*given, lora, f"--output={tmp_path / 'one'}"]) == 0
    assert levels_apart(written(tmp_path / "rows"), written(tmp_path / "one")) <= ONE_LEVEL


def test_the_ablation_is_each_part_alone_both_and_the_prompts_handed_on(run: Path, picture: Path) -> None:
    pipeline = load_pipeline(MICRO_MODEL)
    options = Options(pictures=[str(picture)], export=str(run / "export"), rows="ablation")
    pretrained, prompt, lora, both, handed_on = make_cases(options, pipeline)
    learned = load_prompt(run / "export" / "clr_embeds.safetensors")
    assert (
        torch.equal(prompt.prompt, learned)
        and torch.equal(both.prompt, learned)
        and torch.equal(pretrained.prompt, lora.prompt)
    )
    assert not torch.equal(pretrained.prompt, learned)
    assert [case.lora for case in (pretrained, prompt, lora, both, handed_on)] == [0, 0, 1, 1, 1]
    assert torch.equal(handed_on.prompt[0], learned[1]) and torch.equal(handed_on.prompt[5], learned[0])


def test_rises_are_compared_at_the_given_strengths(run: Path, picture: Path) -> None:
    given = {"pictures": [str(picture)], "export": str(run / "export"), "prompt_strength": 0.5, "lora_strength": 0.7}
    pipeline = load_pipeline(MICRO_MODEL)
    pretrained, *rows = make_cases(Options(**given, rows="rises"), pipeline)
    assert [case.label for case in rows] == [f"rise {rise}" for rise in ("none", *RISES)]
    assert pretrained.lora == 0 and pretrained.annealed is None and rows[0].annealed is None
    for case, rise in zip(rows, ("none", *RISES), strict=True):
        [one] = make_cases(Options(**given, rise=rise), pipeline)
        assert torch.equal(case.prompt, one.prompt) and case.lora == one.lora == 0.7
        if rise != "none":
            assert case.annealed is not None and one.annealed is not None
            assert torch.equal(case.annealed.pretrained, one.annealed.pretrained)
            assert torch.equal(case.annealed.pretrained, pretrained.prompt)
            assert case.annealed.weight is one.annealed.weight is RISES[rise]


@pytest.mark.parametrize("rows", ["strengths", "path", "ablation"])
def test_every_row_rises_but_that_of_the_pretrained_model(run: Path, picture: Path, rows: str) -> None:
    options = Options(pictures=[str(picture)], export=str(run / "export"), rows=rows, rise="square")
    pretrained, *others = make_cases(options, load_pipeline(MICRO_MODEL))
    assert pretrained.annealed is None
    assert all(case.annealed is not None and case.annealed.weight is RISES["square"] for case in others)


def test_what_rises_begins_as_the_pretrained_model(run: Path, picture: Path, tmp_path: Path) -> None:
    given = [f"--pictures=[{picture}]", f"--export={run / 'export'}", *QUICK, "--rows=ablation", "--rise=linear"]
    for steps, is_pretrained in ((1, True), (2, False)):  # the weights are 0, and 0 and 1/2
        out = tmp_path / f"steps-{steps}"
        assert main([*given, f"--steps={steps}", f"--output={out}"]) == 0
        grid = pixels(out / "cam_000.png")[18 : 18 + 5 * 128, 92 + 128 :]  # without names and the given picture
        pretrained, *others = np.split(grid, 5)
        apart = [levels_apart(row, pretrained) for row in others]
        assert max(apart) <= ONE_LEVEL if is_pretrained else min(apart) > 0, apart


def test_pictures_of_one_name_are_told_apart_by_their_folders(mice: Path) -> None:
    given = sorted(map(str, (mice / "val").glob("*/cam_000.png")))
    assert list(find_pictures(given)) == [f"{Path(one).parent.name}_cam_000" for one in given]


def test_a_folder_of_samples_is_refused_with_the_picture_to_give(mice: Path) -> None:
    with pytest.raises(InputError, match=r"train holds no picture; .*give the view that is given: .*cam_000\.png"):
        find_pictures([str(mice / "train")])


def test_pictures_in_a_folder_are_found_whatever_the_case_of_their_ending(picture: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG", "notes.txt"):
        shutil.copy(picture, tmp_path / name)
    assert list(find_pictures([str(tmp_path)])) == ["a", "b"]


def test_a_picture_without_transparency_is_told_of(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(picture).convert("RGB").save(tmp_path / "opaque.png")
    given = [f"--pictures=[{tmp_path / 'opaque.png'}]", "--steps=1", "--guidance_scale=1", "--device=cpu"]
    assert main([*given, f"--output={tmp_path / 'views'}"]) == 0
    assert "WARNING    1 pictures have no transparency, e.g. opaque" in capsys.readouterr().out


def test_an_export_of_another_model_is_not_sampled_with_the_embedded_one(
    run: Path, picture: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    export = Path(shutil.copytree(run / "export", tmp_path / "export"))
    about = export / "clr_embeds.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"model": "pipeckpts"}))
    error = error_of(main, f"--pictures=[{picture}]", f"--export={export}", f"--output={tmp_path / 'views'}")
    assert error == f"error: model: is micro; {export} was trained from pipeckpts: give that with --model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures=[nowhere.png]"], "error: pictures: nowhere.png: not found"),
        (["--pictures=[]"], "error: pictures: is empty"),
        (
            ["--pictures=[PICTURE]", "--export=RUN"],
            "holds no clr_embeds.safetensors or .pt; expected a run's export folder; d",
        ),
        (
            ["--pictures=[PICTURE]", "--rows=path"],
            "error: rows: is path, between the pretrained model and an adapted one; give",
        ),
        (["--pictures=[PICTURE]", "--rows=ablation"], "error: rows: is ablation, between the pretrained model and an adapted"),
        (
            ["--pictures=[PICTURE]", "--rise=step"],
            "error: rise: is step, between the pretrained model and an adapted one; give",
        ),
        (["--pictures=[PICTURE]", "--export=RUN", "--rows=rises", "--rise=step"], "error: rise: is step, and rows is rises"),
        (["--pictures=[PICTURE]", "--rise=cubic"], "error: rise: is cubic; expected"),
        (["--pictures=[PICTURE]", "--prompt=realstic"], "error: prompt: 'realstic' is no prompt file (.pt, .safetensors), no"),
        (["--pictures=[PICTURE]", "--prompt=realstic"], "did you mean 'realistic'?"),
        (["--pictures=[PICTURE]", "--setps=3"], "error: unknown option 'setps'; did you mean 'steps'?"),
        (["--pictures=[PICTURE]", "--eta=2"], "error: eta: is 2.0; expected 0 to 1"),
        (["--pictures=[PICTURE]", "--steps=1001"], "error: steps: is 1001; the model was trained with 1000 timesteps"),
        (["--pictures=[PICTURE]", "--precision=fp16"], "error: precision: is fp16, which needs a CUDA device"),
        (["--pictures=[PICTURE]", "--output=RUN"], "exists already and is not an empty folder"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(
    run: Path, picture: Path, options: list[str], message: str, error_of: Callable[..., str]
) -> None:
    argv = [option.replace("PICTURE", str(picture)).replace("RUN", str(run)) for option in options]
    before = sorted(run.rglob("*"))
    assert message in error_of(main, "--device=cpu", "--steps=1", *argv)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file, lora: file.write_bytes(b"no weights"), "cannot be loaded into "),
        (lambda file, lora: file.unlink(), "cannot be loaded into "),
        (lambda file, lora: save_file({n: w[:, :3].clone() for n, w in lora.items()}, file), "cannot be loaded into "),
        (lambda file, lora: save_file(lora | {"unet.far.lora_A.weight": torch.ones(2, 64)}, file), "1 of its .* have no place"),
        (lambda file, lora: save_file({n: w * float("nan") for n, w in lora.items()}, file), "NaN or infinite values, e.g."),
    ],
)
def test_a_lora_that_is_damaged_or_of_another_model_is_refused(
    run: Path,
    picture: Path,
    tmp_path: Path,
    spoil: Callable[[Path, dict[str, torch.Tensor]], object],
    message: str,
    error_of: Callable[..., str],
) -> None:
    export = Path(shutil.copytree(run / "export", tmp_path / "export"))
    file = export / "lora" / LORA_WEIGHTS
    spoil(file, load_file(file))
    given = [f"--pictures=[{picture}]", f"--export={export}", f"--output={tmp_path / 'views'}", *QUICK]
    assert re.fullmatch(rf"error: {export / 'lora'}: .*{message}.*", error_of(main, *given))
    assert not (tmp_path / "views").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["--pictures", "a.png"], ["a"]),
        (["--pictures=a.png"], ["a"]),
        (["--pictures", "a.png", "b.JPG"], ["a", "b"]),
        (["--pictures", "folder/"], ["c", "d"]),
        (["--pictures", "a.png", "folder"], ["a", "c", "d"]),
        (["--pictures", "folder/*.png"], ["c"]),
        (["--pictures", "*/*.*"], ["c", "d", "e"]),
        (["--pictures", "[a.png, b.JPG]"], ["a", "b"]),
        (["--pictures=[a.png, folder]"], ["a", "c", "d"]),
        (["--pictures", "with space, and [brackets].png"], ["with space, and [brackets]"]),
        (["--pictures", "a.png", "--pictures", "b.JPG"], ["a", "b"]),
        (["--pictures=[a.png]", "--pictures=b.JPG", "folder"], ["a", "b", "c", "d"]),
        (["--pictures", "[a.png, b.JPG]", "folder/c.png"], ["a", "b", "c"]),
        (["--pictures", "folder", "folder/d.webp", "a.png", "a.png"], ["c", "d", "a"]),
        (["--pictures", "folder/*"], ["c", "d"]),
        (["--pictures", "[on]"], ["e"]),
    ],
)
def test_pictures_are_given_as_a_shell_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], names: list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "on").mkdir()
    (tmp_path / "folder" / "inner.png").mkdir()
    pictures = ("a.png", "b.JPG", "folder/c.png", "folder/d.webp", "with space, and [brackets].png", "on/e.tif")
    for name in (*pictures, "folder/._c.png", "folder/notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    asked: list[Options] = []
    monkeypatch.setattr("train.sample._sample", lambda options: asked.append(options) or 0)
    for argv in ([*given, "--steps=3"], ["--steps=3", *given]):
        assert main(argv) == 0
        assert list(find_pictures(asked[-1].pictures)) == names and asked[-1].steps == 3


@pytest.mark.parametrize("argv", [["-h"], ["--pictures", "a.png", "-h"], ["--pictures", "a.png", "--help"]])
def test_help_says_how_pictures_are_given(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    printed = " ".join(capsys.readouterr().out.split())
    assert "(a.png b.png), a pattern in quotes ('mice/*.png'), or a list ('[a.png, b.png]')" in printed


def test_a_pattern_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\.png holds no picture; expected some of objects"):
        find_pictures([str(tmp_path / "*.png")])
