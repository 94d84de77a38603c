"""The comparison: bad input is refused first; it trains what is missing, keeps what is finished, stops and resumes."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from softprompt.errors import InputError
from tests.browser import PROGRAM
from tests.train.conftest import SMALL
from train.compare.__main__ import Request, compare, comparison_folder, main, read_request
from train.compare.plan import Comparison, make_plan, read_file
from train.compare.runner import Children, last_error, prepare
from train.options.config import to_yaml

REPOSITORY = Path(__file__).parents[3]
VARIANTS = {"plain": {"prompt.learn": False}, "learned": {}}


COMPARISON = {"options": {"train.steps": 60, "kl.domain": "new"}, "seeds": [0, 1], "baseline": "plain", "variants": VARIANTS}


def request_for(root, **changed):
    return Request(
        Comparison(**COMPARISON | changed), root, jobs=1, report_only=False, command="python -m train.compare --again"
    )


def first_run(root):
    return make_plan(Comparison(**COMPARISON), root).runs()[0]


def write_comparison(folder, **changed):
    file = folder / "asked.yaml"
    file.write_text(yaml.safe_dump(COMPARISON | changed, sort_keys=False))
    return file


def finish(run):
    """Leave what a finished run leaves."""
    (run.folder / "export").mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    (run.folder / "export" / "clr_embeds.pt").touch()
    loss = 0.1 + run.seed / 100 + (0.05 if run.variant == "plain" else 0)
    points = [{"step": 0, "loss/validation": 0.4}, {"step": run.config.train.steps, "loss/validation": loss}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    return 0


def go(root, spoil=None, **changed):
    """The comparison without training; `spoil`: by label, what happens to a run instead. Returns: exit code, runs started."""
    started = []

    def run_one(run, children):
        prepare(run)
        started.append(run.label)
        return (spoil or {}).get(run.label, finish)(run)

    request = request_for(root, **changed)
    return compare(make_plan(request.comparison, root), request, run_one), started


def refused(capsys, *argv):
    """The one line with which the command refuses."""
    try:
        code = main([*map(str, argv)])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and said[0].startswith("error: "), (code, said)
    return said[0]


# ------------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"prompt.learning_rat": 1}, "unknown option 'prompt.learning_rat'; did you"),
        ({"prompt.learning_rate": "x"}, "prompt.learning_rate: is x; expected a num"),
        ({"prompt": {"learn": False}, "lora": {"rank": 0}}, "lora.rank: is 0"),
        ({"prompt.learn": True, "prompt": {"learn": False}}, "prompt.learn is given twice, dotted and under prompt"),
        ({"prompt": {"learn": False}, "prompt.learn": True}, "prompt.learn is given twice, dotted and under prompt"),
        ({"data.reference_view": []}, "data.reference_view: is []"),
        ({"config": "no.yaml"}, "--config no.yaml: no such file"),
        ({"train.seed": 1}, "train.seed is set by the comparison itself"),
        ({"train.steps": 61}, "train.steps is 61 in b, 60 in plain"),
        ({"monitor.eta": 0.5}, "monitor.eta is 0.5 in b, 0.0 in plain"),
        ({"monitor.validate_every": 7}, "monitor.validate_every is 7 in b"),
        ({"data.train": "mice", "kl.domain": "new"}, "data.train is mice in b, micro in plain"),
        ({"prompt.waypoints": ["realistic", "facelift"]}, "prompt.waypoints (the first: the pretrained model's)"),
    ],
)
def test_a_variant_that_cannot_be_compared_is_refused_by_name(variant, message, tmp_path):
    with pytest.raises(InputError) as refusal:
        make_plan(Comparison(**COMPARISON | {"variants": {"plain": {}, "b": variant}}), tmp_path)
    assert str(refusal.value).startswith("variant b: ") and message in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": {"output": "x"}}, "options: output is set by the comparison itself"),
        ({"options": {"resume": "x"}}, "options: resume is no option of a configuration"),
        ({"variants": {"plain": {}, "../b": {}}}, "variants: '../b' cannot be the name of a folder"),
        ({"variants": {"plain": {}, "Plain": {}}}, "variants: plain and Plain differ only in case"),
        ({"variants": {}}, "variants: is empty"),
        ({"baseline": "plane"}, "baseline: 'plane' is no variant; did you mean 'plain'?"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is given twice"),
        ({"seeds": []}, "seeds: is empty"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(changed, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert f"error: {message}" in refused(capsys, "--config", write_comparison(tmp_path, **changed), "--output", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variant: {}", "unknown name 'variant'; did you mean 'variants'?"),
        ("prompt: {}", "unknown name 'prompt'; it is an option of train.softprompt: put it under options"),
        ("baseline: a\nvariants: {a: {}, a: {}}", "'a' is there twice"),
        ("baseline: a", "has no variants"),
        ("baseline: a\nvariants: [a]", "expected options by variant"),
        ("baseline: a\nvariants: {a: 3}", "variants: a: is 3"),
        ("baseline: a\nvariants: {a: {config: 3}}", "variants: a: config: is 3; expected a file"),
        ("base: configs/micro.yaml", "base: is configs/micro.yaml; expected a list of files"),
        ("base:", "base: is empty; expected a list of files"),
        ("options:", "options: is empty; expected options by name"),
        ("seeds: 5", "seeds: is 5; expected a list of numbers"),
        ("- a", "holds no comparison"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_file_that_is_no_comparison_is_refused(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refusal:
        read_file(str(file))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_command_line_errors_are_one_line(tmp_path, capsys):
    file = write_comparison(tmp_path)
    assert "did you mean 'jobs'?" in refused(capsys, "--config", file, "--output", tmp_path / "o", "--job", "2")
    assert "--jobs: is 0" in refused(capsys, "--config", file, "--output", tmp_path / "o", "--jobs", "0")
    assert "no such file" in refused(capsys, "--config", tmp_path / "none.yaml", "--output", tmp_path / "o")
    assert "output" in refused(capsys, "--config", file)
    said = refused(capsys, "--config", file, "--output", tmp_path / "o", "--seeds", "5")
    assert said.startswith("error: seeds: is 5; expected a list")


def test_seeds_can_vary_the_objects_too(tmp_path):
    plan = make_plan(Comparison(**COMPARISON | {"objects_per_seed": 1000, "seeds": [0, 3]}), tmp_path)
    firsts = {(run.seed, run.config.data.micro_first) for run in plan.runs()}
    assert firsts == {(0, 0), (3, 3000)}, "all variants of a seed have the same objects"
    with pytest.raises(InputError, match=r"objects_per_seed: is -1; expected 0 or more"):
        Comparison(**COMPARISON | {"objects_per_seed": -1})


def test_seeds_on_the_command_line_win(tmp_path):
    request = read_request(["--config", str(write_comparison(tmp_path)), "--output", "o", "--seeds", "[4, 5, 6]"])
    assert request.comparison.seeds == [4, 5, 6] and "--seeds '[4, 5, 6]'" in request.command


@pytest.mark.parametrize(
    "file",
    [f for f in sorted((REPOSITORY / "configs" / "compare").glob("*.yaml")) if not f.stem.startswith("micro_")],
    ids=lambda f: f.stem,
)
def test_every_shipped_comparison_can_be_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    request = read_request(["--config", str(file), "--output", str(tmp_path)])
    plan = make_plan(request.comparison, tmp_path)
    assert request.name == file.stem and not plan.warnings
    assert len(plan.runs()) == len(request.comparison.variants) * len(request.comparison.seeds)


# ------------------------------------------------------------------------------------------------------------- planning


def test_later_settings_win_over_earlier_ones(tmp_path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("prompt: {decay: 0.1, learning_rate: 0.2, separation: 0.3}\nlora: {rank: 3}")
    own.write_text("prompt: {learning_rate: 0.4, separation: 0.5}\nlora: {rank: 4}")
    variants = {"plain": {}, "own": {"config": str(own), "lora.rank": 6}}
    comparison = Comparison(
        base=[str(base)], options={"prompt": {"separation": 0.7}, "lora.rank": 5}, baseline="plain", variants=variants
    )
    plan = make_plan(comparison, tmp_path)
    for name, expected in (("plain", (0.1, 0.2, 0.7, 5)), ("own", (0.1, 0.4, 0.7, 6))):
        config = plan.configs[name]
        assert (config.prompt.decay, config.prompt.learning_rate, config.prompt.separation, config.lora.rank) == expected


def test_runs_are_planned_seed_by_seed_and_equal_variants_warned_of(tmp_path):
    plan = make_plan(Comparison(**COMPARISON | {"variants": VARIANTS | {"same": {"prompt.learn": True}}}), tmp_path)
    labels = [f"{name}-seed-{seed}" for seed in (0, 1) for name in ("plain", "learned", "same")]
    assert [r.label for r in plan.runs()] == labels and [r.config.train.seed for r in plan.runs()] == [0, 0, 0, 1, 1, 1]
    assert len(plan.warnings) == 1 and "learned and same have the same configuration" in plan.warnings[0]


# -------------------------------------------------------------------------------------------------------------- running


def test_finished_runs_are_kept_and_new_ones_added(tmp_path):
    assert go(tmp_path) == (0, ["plain-seed-0", "learned-seed-0", "plain-seed-1", "learned-seed-1"])
    assert go(tmp_path) == (0, [])
    more = VARIANTS | {"slow": {"prompt.learning_rate": 0.01}}
    added = ["slow-seed-0", "slow-seed-1", "plain-seed-2", "learned-seed-2", "slow-seed-2"]
    assert go(tmp_path, variants=more, seeds=[0, 1, 2]) == (0, added)
    message = r"variant learned, seed 0: prompt.learning_rate is 0.3 now, 0.1 in .*another --output"
    with pytest.raises(InputError, match=message):
        go(tmp_path, variants=VARIANTS | {"learned": {"prompt.learning_rate": 0.3}})


def test_a_failed_run_is_named_and_does_not_stop_the_others(tmp_path, capsys):
    def fail(run):
        run.log.write_text("loading\nerror: step 3: the loss is not finite\nlast words\n")
        return 1

    code, started = go(tmp_path, {"learned-seed-0": fail})
    assert code == 1 and len(started) == 4
    assert "error: learned-seed-0: error: step 3: the loss is not finite" in capsys.readouterr().err
    assert "learned, seed 0: failed: error: step 3" in (tmp_path / "report.html").read_text()
    assert go(tmp_path) == (0, ["learned-seed-0"])


def test_a_stopped_comparison_reports_and_resumes(tmp_path, capsys):
    def interrupt(run):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        (run.folder / "checkpoints" / "step-000030").mkdir(parents=True)
        (run.folder / "config.yaml").write_text(to_yaml(run.config))
        return 130

    def resume(run):
        assert prepare(run)[-2:] == ["--resume", str(run.folder)]
        return finish(run)

    assert go(tmp_path, {"learned-seed-0": interrupt}) == (130, ["plain-seed-0", "learned-seed-0"])
    said = capsys.readouterr()
    assert "stopped by SIGINT with 3 runs left; continue with\n  python -m train.compare --again" in said.out
    assert "error" not in said.err and "failed: " not in (tmp_path / "report.html").read_text()
    assert go(tmp_path, {"learned-seed-0": resume}) == (0, ["learned-seed-0", "plain-seed-1", "learned-seed-1"])


def test_a_run_killed_while_it_loaded_is_started_again(tmp_path):
    run = first_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / ".lock").touch()
    command = prepare(run)
    assert "--resume" not in command and not run.folder.exists() and run.config_file.is_file()


def test_report_only_runs_nothing(tmp_path, capsys):
    file, out = write_comparison(tmp_path), tmp_path / "out"
    assert "holds no comparison to report on" in refused(capsys, "--config", file, "--output", out, "--report-only")
    go(out, {"plain-seed-1": lambda run: 1})
    (out / "report.html").unlink()
    assert main(["--config", str(file), "--output", str(out), "--report-only"]) == 0
    assert "plain, seed 1: not finished" in (out / "asked.html").read_text(), "named after the file"


def test_a_folder_in_use_or_of_something_else_is_refused(tmp_path, capsys):
    asked = ["--config", write_comparison(tmp_path), "--output"]
    assert "not the folder of a comparison" in refused(capsys, *asked, tmp_path)
    with comparison_folder(request_for(tmp_path / "out")):
        assert "another comparison is running there" in refused(capsys, *asked, tmp_path / "out")
    run = first_run(tmp_path / "out")
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        assert "variant plain, seed 0: is still running" in refused(capsys, *asked, tmp_path / "out")


def test_children_get_the_signal_and_no_more_start(tmp_path):
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    codes = []

    def work(children):
        with log.open("wb") as file:
            command = [sys.executable, "-c", script]
            codes.extend(children.run(command, log=file, environment=dict(os.environ)) for _ in range(2))

    with Children() as children:
        thread = threading.Thread(target=work, args=(children,))
        thread.start()
        while not log.is_file() or b"up" not in log.read_bytes():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join(timeout=30)
    assert codes == [7, None] and children.stopped_by == signal.SIGTERM


def test_the_last_error_of_a_log_is_found(tmp_path):
    run = first_run(tmp_path)
    assert last_error(run) == ""
    run.log.parent.mkdir()
    run.log.write_text("Traceback\nValueError: bad\nerror: out of memory\n\nsome more\n")
    assert last_error(run) == "error: out of memory"
    run.log.write_text("Killed\n")
    assert last_error(run) == "Killed"


# ----------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.slow
def test_two_variants_and_two_seeds_from_nothing_to_a_report(mice, smallest_model, tmp_path, request, capsys):
    out = tmp_path / "out"

    own = {"model": smallest_model, "data.train": mice / "train", "data.val": mice / "val", "data.original": mice / "val"}
    options = SMALL | {name: str(path) for name, path in (own | {"data.cache": tmp_path / "cache"}).items()}
    file = write_comparison(tmp_path, options=options, base=[str(REPOSITORY / "configs" / "micro.yaml")])

    def command():
        assert main(["--config", str(file), "--output", str(out), "--jobs", "2"]) == 0
        return capsys.readouterr().out

    def written():
        return {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}

    said = command()
    assert "4 runs of 4 steps: 0 are finished, 4 to do" in said and "4 of 4" in said
    report = (out / "asked.html").read_text()
    assert "4 of 4 runs are finished" in report and report.count("<svg") == 3
    if PROGRAM is not None:
        seen = request.getfixturevalue("check_page")(out / "asked.html")
        assert (seen.pictures, seen.figures) == (4, 3), "truth, pretrained, two variants"
    assert len((out / "asked-results.csv").read_text().splitlines()) == 5
    before = written()
    assert "4 are finished, 0 to do" in command()
    assert written() == before
