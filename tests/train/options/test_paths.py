"""`~` and variables, in every option of every command that is a path."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from train.benchmark.__main__ import Options as BenchmarkOptions
from train.cli import PATHS, PHRASES, PROMPTS, PlainParser, option_kinds
from train.compare.__main__ import read_request
from train.compare.plan import Comparison, make_plan
from train.doctor.__main__ import Options as DoctorOptions
from train.doctor.__main__ import read_options
from train.micro.__main__ import Settings
from train.options.command_line import parse
from train.options.config import Config, option_values, to_yaml
from train.prompts.__main__ import COMMANDS
from train.prompts.__main__ import main as prompts_main
from train.sample import Options as SampleOptions
from train.sample import main as sample_main

TEXTS = {
    "angle",
    "baseline",
    "custom.function",
    "dpo.reward",
    "draft.reward",
    "frames",
    "lora.targets",
    "monitor.objectives",
    "only",
    "prompt.angle",
    "prompt.subject",
    "step",
    "subject",
    "text",
    "views",
}
"""Options whose value is a text, and no path."""
CLASSES = (Config, SampleOptions, DoctorOptions, BenchmarkOptions, Comparison, Settings)
PLAIN = ("train.runs", "train.report.__main__", "train.replay", "train.export.__main__")
"""Commands that are no configuration, besides train.prompts."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA", "/disk/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


# ------------------------------------------------------------------------------------------------------- each is one or not


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__module__)
def test_each_option_that_takes_a_text_is_known_as_a_path_or_not(cls: type) -> None:
    taken = {name for name, kind in option_kinds(cls).items() if any(word in kind for word in ("a text", "[a, b]", "a path"))}
    assert taken <= PATHS | PROMPTS | TEXTS, taken - (PATHS | PROMPTS | TEXTS)


def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.ArgumentParser]:
    """Of the commands that are no configuration."""
    found: dict[str, argparse.ArgumentParser] = {f"train.prompts {name}": make() for name, (make, _) in COMMANDS.items()}
    for name in PLAIN:

        def keep(parser: PlainParser, *_: object, name: str = name) -> None:
            found[name] = parser
            raise SystemExit

        module: ModuleType = importlib.import_module(name)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(PlainParser, "parse_known_args", keep)
            module.main([])
    return found


def test_each_argument_that_takes_a_text_is_known_as_a_path_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parsers(monkeypatch)
    assert len(found) == len(PLAIN) + len(COMMANDS)
    for command, parser in found.items():
        for action in parser._actions:
            if action.nargs != 0 and action.type in (None, Path) and not action.choices:
                known = PATHS | PROMPTS | PHRASES | TEXTS
                assert action.dest in known and (action.type is None or action.dest in PATHS), f"{command}: {action.dest}"


# ------------------------------------------------------------------------------------------------------------ the main job


FILLED_IN = {"~/x.pt": "/home/somebody/x.pt", "$HOME/x.pt": "/home/somebody/x.pt", "${DATA}/x.pt": "/disk/data/x.pt"}


@pytest.mark.parametrize("given", FILLED_IN)
def test_paths_of_the_main_job_are_filled_in_from_yaml_and_options(given: str, place: Path) -> None:
    names = sorted((PATHS | PROMPTS) & set(option_kinds(Config)))
    assert len(names) >= 11
    options: dict[str, object] = {name: [given] if name == "prompt.waypoints" else given for name in names}
    options |= {"curriculum.at": [0], "curriculum.position": [0]}  # of one waypoint
    groups: dict[str, object] = {}
    for name, value in options.items():
        group, _, inner = name.rpartition(".")
        groups.setdefault(group, {})[inner] = value  # type: ignore[index]
    (place / "mine.yaml").write_text(yaml.safe_dump(groups.pop("", {}) | groups))  # type: ignore[operator]
    for argv in (["--config=mine.yaml"], [f"--{name}={value}" for name, value in options.items()]):
        config = parse(argv).config
        found = option_values(config)
        assert {name: found[name][0] if isinstance(found[name], list) else found[name] for name in names} == dict.fromkeys(
            names, FILLED_IN[given]
        )
        assert given not in to_yaml(config)


def test_the_file_of_options_and_the_run_to_resume_are_filled_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(place))
    (place / "config.yaml").write_text(to_yaml(Config()))
    for given in (["--config=$DATA/config.yaml"], ["--config", "${DATA}/config.yaml"]):
        assert parse(given).name == "config"
    for given in (["--resume=$DATA"], ["--resume", "${DATA}"]):
        assert parse(given).resume == place


def test_texts_and_templates_stay_as_they_are() -> None:
    texts = ["facelift", "a ${view} of 5$ {subject}, $HOME"]
    config = parse([f"--prompt.waypoints={texts}", "--prompt.angle=$HOME", "--prompt.subject=~"]).config
    assert (config.prompt.waypoints, config.prompt.angle, config.prompt.subject) == (texts, "$HOME", "~")
    assert (config.model, config.data.train, config.dpo.pairs) == ("micro", "micro", "own")


def test_a_variable_that_is_not_set_is_named_with_its_option_and_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text("data:\n  train: $NOT_SET/mice\n")
    for argv, begin in (
        (["--config=mine.yaml"], "mine.yaml: data.train: is $NOT_SET/mice; "),
        (["--data.train=$NOT_SET/mice"], "data.train: is $NOT_SET/mice; "),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(argv)
        said = capsys.readouterr().err
        assert said.startswith(f"error: {begin}the environment variable NOT_SET is not set; ") and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- other commands


def test_paths_of_a_comparison_are_filled_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(place))
    (place / "base.yaml").write_text("train:\n  steps: 9\n")
    (place / "own.yaml").write_text("lora:\n  rank: 3\n")
    (place / "all.yaml").write_text(
        yaml.safe_dump(
            {
                "base": ["$DATA/base.yaml"],
                "options": {"data.train": "${DATA}/mice", "kl.domain": "new"},
                "baseline": "one",
                "variants": {"one": {}, "two": {"config": "$DATA/own.yaml", "init_from": "~/export"}},
            }
        )
    )
    request = read_request(["--config=$DATA/all.yaml", "--output=$DATA/out"])
    assert request.output == place / "out"
    configs = make_plan(request.comparison, request.output).configs
    assert [config.train.steps for config in configs.values()] == [9, 9]
    assert {config.data.train for config in configs.values()} == {f"{place}/mice"}
    assert (configs["two"].lora.rank, configs["two"].init_from) == (3, "/home/somebody/export")


def test_paths_of_the_doctor_are_filled_in() -> None:
    options = read_options(["--data.train=~/mice", "--output=$DATA/doctor"])
    assert (options.data.train, options.output) == ("/home/somebody/mice", "/disk/data/doctor")


@pytest.mark.parametrize(
    "argv, found",
    [
        (["--pictures=[$DATA/x.png]"], "/disk/data/x.png"),
        (["--pictures", "['~/x.png']"], "/home/somebody/x.png"),
    ],
)
def test_pictures_are_filled_in(argv: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_main(argv) == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize("module", PLAIN)
def test_arguments_are_filled_in(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given, found in (("$DATA/x", "/disk/data/x"), ("~/x", "/home/somebody/x")):
        assert importlib.import_module(module).main([given]) == 2
        assert found in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).main(["$NOT_SET/x"])
    assert "NOT_SET is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["show", "$DATA/x.pt"],
        ["show", "facelift", "--phrases", "$DATA/x.txt", "--output=$DATA/page.html"],
        ["check", "$DATA/x.pt", "--model=micro"],
        ["check", "x.pt", "--model=$DATA/x"],
        ["make", "--text=simple", "--output=$DATA/x.pt", "--model=$DATA/x"],
        ["make", "--text=realistic", "--output=x.pt", "--cameras=$DATA/x.json"],
        ["make", "--text=simple", "--output=x.pt", "--reference=$DATA/x.pt"],
        ["mix", "facelift", "$DATA/x.pt", "--position=1", "--output=x.pt"],
        ["convert", "$DATA/x.pt", "x.pt"],
    ],
)
def test_paths_of_prompts_are_filled_in(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prompts_main(argv) == 2
    assert "/disk/data/x" in capsys.readouterr().err
