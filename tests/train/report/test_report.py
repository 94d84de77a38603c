"""The report of a run, and what is measured at its end for it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.similarity import prompt_cosines
from softprompt.prompt.templates import VIEWS
from tests.runs import run_to_end
from train.evaluation.ablation import ablation_series, views_follow
from train.log.logger import WORKING
from train.log.series import read_series
from train.loop import train
from train.options.command_line import parse
from train.report.__main__ import main
from train.report.page import commands, headline, view_rows, warnings, write_report
from train.report.read import read_story
from train.setup import prepare
from train.state.checkpoint import load_checkpoint
from train.state.stop import StopSignal

OPTIONS = {"train.steps": 3, "monitor.validate_every": 1, "monitor.preview_every": 3, "kl.every": 1, "export.report": "true"}


@pytest.fixture(scope="module")
def reported(small_config, mice, tmp_path_factory) -> Path:
    """A finished run with its report; nothing may change it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other modules' tests
    folder = tmp_path_factory.mktemp("reported") / "mice & rats"
    run_to_end(small_config(mice, **OPTIONS), folder)
    return folder


@pytest.fixture
def copy(reported, tmp_path) -> Path:
    return Path(shutil.copytree(reported, tmp_path / "run"))


def rewrite(run: Path, change) -> None:
    """Each point of the log changed."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**p, **change(p)}) + "\n" for p in points))


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_run_leaves_a_report_that_says_what_its_log_says(reported):
    page, story = (reported / "report.html").read_text(), read_story(reported)
    assert headline(story) in page and f"to {story.last['loss/validation']:.4g}" in headline(story)
    for name, _, value in story.changed:
        assert re.search(rf"{re.escape(name)}</th><td class=\"words\">.*?{re.escape(str(value)[:4].lower())}", page, re.I), name
    psnr = {view: story.last[f"views_psnr/{view}"] for view in VIEWS[1:]}
    worst = min(psnr, key=psnr.__getitem__)
    assert f"The worst view is {worst.replace('_', ' ')} " in page
    for view, value in psnr.items():
        assert f">{view.replace('_', ' ')}</th>" in page and f"<td>{value:.2f}</td>" in page
    for title in ("Loss", "Learning rates", "Gradient norms", "KL to the pretrained model"):
        assert f'aria-label="{title}"><h3>' in page
    for row in ("pretrained", "prompt alone", "LoRA alone", "both", "shifted prompts"):
        assert f'<span class="name">{row}</span>' in page
    assert "mice &amp; rats" in page


def test_the_matrices_are_of_the_first_and_the_exported_prompt(reported):
    page = (reported / "report.html").read_text()
    start = load_checkpoint(reported)["waypoints"][0]
    exported = load_prompt(reported / "export" / "clr_embeds.safetensors")
    shown = [float(cosine) for cosine in re.findall(r"<td style=\"background[^>]*>([\d.]+)</td>", page)]
    expected = torch.cat([prompt_cosines(start), prompt_cosines(exported)]).flatten().tolist()
    assert shown == pytest.approx(expected, abs=6e-4)
    assert not torch.equal(prompt_cosines(start), prompt_cosines(exported))


def test_the_page_opens_from_the_disk_without_a_network(reported, check_page):
    seen = check_page(reported / "report.html")
    assert seen.pictures == 3 + 6, "truth, pretrained, now; the ablation"
    assert seen.figures >= 7


def test_the_commands_it_gives_are_understood(reported):
    by_module: dict[str, list[list[str]]] = {}
    for _, command in commands(read_story(reported)):
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            by_module.setdefault(words[2], []).append(words[3:])
    assert by_module.keys() == {"train.sample", "train.export", "train.prompts", "train.softprompt"}
    (longer,) = by_module["train.softprompt"]
    assert parse(longer).config.train.steps == 6, "twice as long"
    outputs = [words[words.index("--output") + 1] for words in by_module["train.sample"]]
    assert len(set(outputs)) == 2, "one after the other, neither is in the other's way"
    assert by_module["train.export"] == [
        [str(reported / "export"), "--pipeline", "--output", "FOLDER", "--into", "FACELIFT"]
    ], "the LoRA has to be merged"


def test_a_run_that_is_not_finished_says_so_and_how_to_go_on(small_config, mice, tmp_path, stop_after):
    run = run_to_end(small_config(mice, **OPTIONS), tmp_path / "run", stop=stop_after(1))
    assert run.step == 1
    story, page = read_story(tmp_path / "run"), (tmp_path / "run" / "report.html").read_text()
    assert "The run is not finished: it stands at step 1 of 3." in page
    assert any("--resume" in command for _, command in commands(story))
    assert not story.ablation and "shifted prompts" not in page


def test_a_run_that_overfitted_is_told_so(copy):
    losses = {0: 0.2, 1: 0.1, 2: 0.12, 3: 0.15}
    rewrite(copy, lambda p: {"loss/validation": losses[p["step"]]} if "loss/validation" in p else {})
    (warning,) = [w for w in warnings(read_story(copy)) if "overfitted" in w]
    assert "33% lower at step 1 than at the end" in warning
    assert str(copy / "export" / "best") in warning


def test_what_is_not_finite_is_shown_as_such(copy):
    rewrite(copy, lambda p: {"loss/validation": None, "views_psnr/back": None} if "loss/validation" in p else {})
    story = read_story(copy)
    assert "not finite" in headline(story)
    (back,) = [row for row in view_rows(story) if row["view"] == "back"]
    assert back["cells"][2] == "-" and not back["worst"]
    write_report(read_story(copy))


def test_a_run_that_was_killed_before_its_export_has_a_report_on_request(copy, capsys):
    shutil.rmtree(copy / "export")
    (copy / "report.html").unlink()
    assert main([str(copy)]) == 0
    assert "no export yet" in (copy / "report.html").read_text()
    lines = [command for _, command in commands(read_story(copy))]
    assert f"python -m train.export {copy} --output FOLDER" in lines
    assert not any(str(copy / "export") in command for command in lines), "nothing is there"
    assert str(copy / "report.html") in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_damaged_is_told_without_them(copy):
    for state in (copy / "checkpoints").glob("step-*/state.pt"):
        state.write_bytes(b"x")
    write_report(read_story(copy))
    page = (copy / "report.html").read_text()
    assert "holds no sound checkpoint" in page and "View by view" in page


def test_a_picture_of_the_run_at_a_glance_is_drawn_on_request(copy, tmp_path):
    assert main([str(copy), "--picture", str(tmp_path / "glance.png")]) == 0
    with Image.open(tmp_path / "glance.png") as picture:
        with_views = picture.size
    shutil.rmtree(copy / "previews")
    assert main([str(copy), "--picture", str(tmp_path / "curves.png")]) == 0
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == with_views[0] and picture.height < with_views[1], "the curves alone"


def test_a_run_that_lacks_options_of_a_later_version_has_a_report(copy):
    file = copy / "config.yaml"
    options = yaml.safe_load(file.read_text())
    del options["kl"], options["export"], options["lora"]["targets"]
    file.write_text(yaml.safe_dump(options | {"an_earlier_option": 1}))
    assert main([str(copy)]) == 0
    assert "an_earlier_option" in (copy / "report.html").read_text()


def test_a_run_that_was_only_evaluated_at_its_start_says_so(copy):
    first = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (copy / "metrics.jsonl").write_text(first)
    assert headline(read_story(copy)).startswith("Nothing has been evaluated since the start")
    write_report(read_story(copy))


def test_a_report_of_real_weights_names_their_folder_and_the_prompt_it_began_with(copy):
    options = yaml.safe_load((copy / "config.yaml").read_text())
    options["prompt"]["waypoints"][0] = "my start.pt"
    (copy / "config.yaml").write_text(yaml.safe_dump(options | {"model": "pipeckpts"}))
    split = [shlex.split(command) for _, command in commands(read_story(copy))]
    given = {words[3] if words[2] == "train.prompts" else words[2]: words[3:] for words in split}
    assert given["probe"][:3] == ["probe", "--model", "pipeckpts"] and given["probe"][-2:] == ["--subject", "mouse"]
    assert given["show"] == [
        "show",
        "my start.pt",
        f"{copy}/export/clr_embeds.safetensors",
        "--model",
        "pipeckpts",
    ]
    assert given["train.sample"][4:] == [
        *("--model", "pipeckpts", "--rows", "strengths", "--pretrained", "my start.pt", "--output", "strengths")
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), r"holds no config\.yaml; expected the folder of a run"),
        (lambda run: (run / "config.yaml").write_text("[1]"), r"config\.yaml: holds no options"),
        (lambda run: (run / "previews" / "tiles-step-000003.png").write_bytes(b"x"), r"tiles-step-000003\.png: cannot be read"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"has no evaluation yet"),
        (lambda run: (run / "report.html").write_text("mine"), r"is no earlier page of this command"),
        (lambda run: (run / "export" / "clr_embeds.safetensors").write_bytes(b"x"), r"clr_embeds\.safetensors"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_a_line(copy, error_of, spoil, message):
    spoil(copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert re.search(message, error_of(main, copy))
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


# --------------------------------------------------------------------------------------------- measured at a run's end


def test_a_finished_run_resumed_is_not_ablated_twice(small_config, mice, copy):
    before = (copy / "metrics.jsonl").read_bytes()
    train(prepare(small_config(mice, **OPTIONS), resumed=True), copy, state=load_checkpoint(copy), stop=StopSignal())
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert before.count(b"ablation/views_follow") == 1


def test_the_ablation_takes_prompt_and_lora_apart(small_config, mice):
    job = prepare(small_config(mice))
    prompt = job.adapted.prompt
    with torch.no_grad():
        prompt.learned.add_(torch.randn(prompt.learned.shape, generator=torch.Generator().manual_seed(0)))
    job.adapted.eval()
    shown = job.evaluator.preview(prompt(0.0).detach(), None)
    rows = job.evaluator.ablation(prompt(0.0).detach(), shown)
    assert list(rows) == ["pretrained", "prompt_alone", "lora_alone", "both", "next_prompt"]
    assert torch.equal(rows["lora_alone"], rows["pretrained"]), "a fresh LoRA does nothing"
    assert torch.equal(rows["prompt_alone"], rows["both"])
    assert not torch.equal(rows["both"], rows["pretrained"])
    assert not torch.equal(rows["next_prompt"], rows["both"])
    series = ablation_series(rows, shown.truth)
    assert series["ablation_psnr/both"] == series["ablation_psnr/prompt_alone"] != series["ablation_psnr/pretrained"]


def test_views_follow_the_prompt_or_their_place():
    truth = torch.rand(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert views_follow(truth.roll(-1, dims=1), truth) == 1
    assert views_follow(truth, truth) == 0
    half = torch.cat([truth.roll(-1, dims=1)[:1], truth[1:]])
    assert views_follow(half, truth) == 0.5


def test_the_projector_keeps_the_distances_of_prompts_and_waypoints(reported):
    (tensors,) = (reported / "tensorboard").rglob("tensors.tsv")
    points = torch.tensor([[float(x) for x in line.split("\t")] for line in tensors.read_text().splitlines()])
    exported = load_prompt(reported / "export" / "clr_embeds.safetensors")
    whole = torch.cat([exported[None], load_checkpoint(reported)["waypoints"]]).flatten(2).flatten(0, 1)
    assert torch.pdist(points) == pytest.approx(torch.pdist(whole), rel=1e-3)
    labels = tensors.with_name("metadata.tsv").read_text().splitlines()
    assert labels[:3] == ["prompt\tview", "E\tfront", "E\tfront_right"] and labels[-1] == "realistic\tfront_left"


def test_ten_series_that_say_whether_it_works_come_first_in_tensorboard(reported):
    measured = {name for point in read_series(reported) for name in point} | {"loss/original"}  # mice alone have no original
    assert len(WORKING) == 10 and WORKING.keys() <= measured
    assert [int(name.split("_")[0]) for name in WORKING.values()] == list(range(1, 11))
    events = EventAccumulator(str(reported / "tensorboard")).Reload()
    first = [tag for tag in sorted(events.Tags()["scalars"]) if tag.startswith("00_is_it_working/")]
    assert len(first) == 9 and events.Scalars("00_is_it_working/6_PSNR_rises")[-1].step == 3
