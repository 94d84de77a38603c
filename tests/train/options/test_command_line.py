"""The command line: what is given is what is taken, and what cannot be is said in one line."""

import re
from pathlib import Path

import pytest

from softprompt.errors import InputError
from train.cli import option_kinds, suggestion
from train.options.command_line import FREE_ON_RESUME, parse
from train.options.config import Config, to_yaml
from train.softprompt import main


def yaml_file(folder: Path, content: str | bytes, name: str = "mine.yaml") -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints when it refuses: one line on stderr, exit code 2, nothing on stdout."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("error: ") and printed.err.endswith("\n") and printed.err.count("\n") == 1, printed.err
    return printed.err


# ---------------------------------------------------------------------------------------------------------- what is taken


def test_no_options_are_the_micro_run() -> None:
    request = parse([])
    assert (request.config, request.name, request.resume, request.dry_run) == (Config(), "micro", None, False)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", ".1e-3"])
def test_small_numbers_are_floats_from_yaml_and_from_the_command_line(tmp_path: Path, text: str) -> None:
    file = yaml_file(tmp_path, f"lora:\n  learning_rate: {text}\ncurriculum:\n  at: [{text}, 0.5]\n")
    for argv in (["--config", file], [f"--lora.learning_rate={text}", f"--curriculum.at=[{text}, 0.5]"]):
        config = parse(argv).config
        assert config.lora.learning_rate == 1e-4 and type(config.lora.learning_rate) is float
        assert config.curriculum.at == [1e-4, 0.5]


def test_a_whole_number_is_taken_where_a_number_is_expected(tmp_path: Path) -> None:
    assert type(parse(["--config", yaml_file(tmp_path, "lora:\n  alpha: 16\n")]).config.lora.alpha) is float


def test_the_last_of_several_files_wins_and_the_command_line_over_all(tmp_path: Path) -> None:
    first = yaml_file(tmp_path, "lora:\n  rank: 3\n  alpha: 3\ntrain:\n  steps: 33\n", "first.yaml")
    last = yaml_file(tmp_path, "lora:\n  rank: 5\n  alpha: 5\n", "last.yaml")
    request = parse(["--config", first, f"--config={last}", "--lora.rank=7"])
    config = request.config
    assert (config.lora.rank, config.lora.alpha, config.train.steps) == (7, 5, 33)
    assert request.name == "last"
    assert parse(["--config", last, "--config", first]).config.lora.rank == 3


def test_files_that_fit_only_together_are_taken_together(tmp_path: Path) -> None:
    three = yaml_file(tmp_path, "prompt:\n  waypoints: [facelift, hybrid, realistic]\n", "three.yaml")
    far = yaml_file(tmp_path, "curriculum:\n  position: [0, 2]\n", "far.yaml")
    for files in ([three, far], [far, three]):
        assert parse([f"--config={file}" for file in files]).config.curriculum.position == [0, 2]
    with pytest.raises(InputError, match=r"curriculum\.position"):
        parse(["--config", far])


def test_a_run_is_named_after_its_file_or_its_model(tmp_path: Path) -> None:
    assert parse(["--config", yaml_file(tmp_path, "model: /x/pipeckpts\n", "tuesday.yaml")]).name == "tuesday"
    assert parse(["--model=/x/pipeckpts"]).name == "pipeckpts"
    assert parse(["--lora.rank=3"]).name == "micro"


def test_resuming_takes_the_run_s_own_configuration_and_options_over_it(tmp_path: Path) -> None:
    other = parse(["--lora.rank=3", "--train.steps=33"]).config
    yaml_file(tmp_path, to_yaml(other), "config.yaml")
    for argv in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        request = parse(argv)
        assert (request.resume, request.config) == (tmp_path, other)
    assert parse(["--resume", str(tmp_path), "--train.steps=44"]).config.train.steps == 44
    assert parse(["--train.steps=44", "--resume", str(tmp_path)]).config.train.steps == 44
    assert parse(["--lora.rank=2"]).resume is None


OTHER_VALUES: dict[str, object] = {
    "model": "/elsewhere/pipeckpts",
    "unet": "checkpoint-2000/unet",
    "init_from": "/elsewhere/export",
    "output": "/elsewhere/run",
    "prompt.waypoints": ["facelift", "hybrid"],
    "prompt.subject": "rat",
    "prompt.angle": "from below",
    "prompt.matching": "shared",
    "prompt.interpolation": "slerp",
    "prompt.carry": "fade",
    "prompt.learn": False,
    "prompt.learning_rate": 0.25,
    "prompt.decay": 0.5,
    "prompt.norm_band": 0.125,
    "prompt.separation": 0.5,
    "prompt.train_from": 0.25,
    "prompt.train_until": 0.5,
    "curriculum.pacing": "plateau",
    "curriculum.unit": "step",
    "curriculum.at": [0.0, 0.5],
    "curriculum.position": [0.0, 0.75],
    "curriculum.easing": "cosine",
    "curriculum.watch": "train",
    "curriculum.patience": 5,
    "curriculum.min_gain": 0.25,
    "curriculum.smoothing": 0.5,
    "curriculum.max_stage_steps": 9,
    "curriculum.glide_steps": 3,
    "curriculum.kl_budget": 0.5,
    "curriculum.fastest": 0.25,
    "timesteps.clusters": 4,
    "timesteps.edges": "uniform",
    "timesteps.patience": 5,
    "timesteps.smoothing": 0.5,
    "timesteps.max_stage_steps": 9,
    "lora.rank": 3,
    "lora.alpha": 3.0,
    "lora.dropout": 0.5,
    "lora.targets": ["to_q"],
    "lora.learning_rate": 0.25,
    "lora.weight_decay": 0.5,
    "lora.train_from": 0.25,
    "lora.train_until": 0.5,
    "loss.weight": 0.5,
    "loss.snr_weighting": "none",
    "loss.snr_gamma": 3.0,
    "loss.condition_drop_rate": 0.25,
    "loss.own_view": False,
    "kl.weight": 0.5,
    "kl.target": 0.5,
    "kl.rate": 0.5,
    "kl.domain": "both",
    "kl.weighting": "posterior",
    "kl.clip": 0.5,
    "kl.every": 2,
    "draft.weight": 0.5,
    "draft.reward": "ssim",
    "draft.encoder": "/elsewhere/image_encoder",
    "draft.steps": 4,
    "draft.guidance_scale": 3.0,
    "draft.backward_steps": 2,
    "draft.truncation": "random",
    "draft.renoise": 2,
    "draft.kl": 0.5,
    "draft.every": 2,
    "draft.guard": 0.25,
    "dpo.weight": 0.5,
    "dpo.beta": 500.0,
    "dpo.pairs": "/elsewhere/others.csv",
    "dpo.held_out_pairs": "/elsewhere/held_out.jsonl",
    "dpo.samples": 3,
    "dpo.sample_steps": 4,
    "dpo.guidance_scales": [1.0, 5.0],
    "dpo.objects": 3,
    "dpo.held_out_objects": 3,
    "dpo.reward": "ssim",
    "dpo.encoder": "/elsewhere/image_encoder",
    "dpo.min_gap": 0.5,
    "dpo.chunks": 2,
    "dpo.difficulty": "reward_gap",
    "dpo.chunk_by": "equal_count",
    "dpo.chunk_steps": 3,
    "spin.weight": 0.5,
    "spin.beta": 500.0,
    "spin.iterations": 2,
    "spin.start": 0.5,
    "spin.sample_steps": 4,
    "spin.objects": 3,
    "spin.held_out_objects": 3,
    "studio.weight": 0.5,
    "studio.over": "views",
    "studio.space": "pictures",
    "studio.pairs": 2.0,
    "studio.detail_pairs": 2.0,
    "studio.detail": 0.5,
    "separate.weight": 0.25,
    "separate.presence": 0.25,
    "separate.side": 16,
    "custom.weight": 0.5,
    "custom.function": "elsewhere:another",
    "data.train": "/elsewhere/train",
    "data.val": "/elsewhere/val",
    "data.limit": 9,
    "data.micro_first": 50,
    "data.cache": "/elsewhere/cache",
    "data.original": "/elsewhere/original",
    "data.background": "gray",
    "data.on_bad_sample": "skip",
    "data.bad_share": 0.5,
    "data.reference_view": 2,
    "train.steps": 44,
    "train.batch_size": 3,
    "train.accumulation": 2,
    "train.seed": 7,
    "train.warmup_steps": 3,
    "train.schedule": "linear",
    "train.max_grad_norm": 0.5,
    "train.max_skipped": 3,
    "train.ema_decay": 0.5,
    "train.gradient_checkpointing": "always",
    "train.compile": True,
    "train.device": "cpu",
    "train.precision": "bf16",
    "monitor.log_every": 3,
    "monitor.validate_every": 3,
    "monitor.validation_timesteps": 3,
    "monitor.preview_every": 3,
    "monitor.preview_objects": 2,
    "monitor.preview_steps": 3,
    "monitor.guidance_scale": 3.0,
    "monitor.eta": 0.5,
    "monitor.objectives": ["custom"],
    "monitor.checkpoint_every": 3,
    "monitor.checkpoints_kept": 2,
    "export.pipeline": False,
    "export.report": False,
    "export.tolerance": 0.5,
}
"""Of every option, one that is not its default."""
FREE = {
    *"model unet init_from data.train data.val data.original data.cache data.on_bad_sample data.bad_share train.steps".split(),
    *"train.batch_size train.accumulation train.max_skipped train.device train.gradient_checkpointing train.compile".split(),
    *"monitor.log_every monitor.preview_every monitor.checkpoint_every monitor.checkpoints_kept".split(),
    *"export.pipeline export.report export.tolerance".split(),
}
"""What may change when a run is resumed."""


def a_run(folder: Path) -> Path:
    """A run in which every other option can be changed by itself: its curriculum ends early, and it needs no original data."""
    options = [
        "--curriculum.position=[0.0, 0.5]",
        "--kl.domain=new",
        "--custom.function=elsewhere:one",
        "--dpo.pairs=some.jsonl",
    ]
    yaml_file(folder, to_yaml(parse(options).config), "config.yaml")
    return folder


def value_of(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def option(name: str) -> str:
    value = OTHER_VALUES[name]
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def test_the_options_that_may_change_on_a_resume_are_known_one_by_one() -> None:
    assert OTHER_VALUES.keys() == option_kinds(Config).keys(), "a new option must be put among the free or the fixed"
    assert {n for n in option_kinds(Config) if any(n == free or n.startswith(f"{free}.") for free in FREE_ON_RESUME)} == FREE


@pytest.mark.parametrize("name", sorted(FREE))
def test_length_paths_and_what_is_looked_at_may_change_on_a_resume(tmp_path: Path, name: str) -> None:
    run = a_run(tmp_path)
    before, after = parse(["--resume", str(run)]).config, parse(["--resume", str(run), option(name)]).config
    assert {n for n in OTHER_VALUES if value_of(before, n) != value_of(after, n)} == {name}
    assert value_of(after, name) == OTHER_VALUES[name]


@pytest.mark.parametrize("name", sorted(OTHER_VALUES.keys() - FREE))
def test_what_a_run_s_numbers_depend_on_cannot_change_on_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = a_run(tmp_path)
    before = value_of(parse(["--resume", str(run)]).config, name)
    said = refusal([option(name), f"--resume={run}"], capsys)
    assert said.startswith(
        f"error: --resume {run}: {name}: is {OTHER_VALUES[name]}; the run has {before}. A resumed run keeps its settings, "
        f"but for model, unet, init_from, data.train, data.val, data.original, data.cache,"
    )
    assert said.endswith("leave the option out, start a new run, or change it on purpose with --resume-override\n")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_what_is_changed_on_purpose_on_a_resume_is_taken_and_said(tmp_path: Path) -> None:
    request = parse(["--resume", str(a_run(tmp_path)), "--lora.learning_rate=0.25", "--train.steps=44", "--resume-override"])
    assert request.config.lora.learning_rate == 0.25
    both = {"lora.learning_rate: is 0.25; the run has 0.003", "train.steps: is 44; the run has 150"}
    assert set(request.changed) == both


def test_an_override_without_a_resume_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(["--resume-override"], capsys).startswith("error: --resume-override: there is no --resume")


def test_resume_or_start_starts_what_is_not_there_and_resumes_what_is(tmp_path: Path) -> None:
    line = [f"--output={tmp_path / 'run'}", "--lora.rank=2", "--resume-or-start"]
    first = parse(line)
    assert (first.resume, first.config.lora.rank) == (None, 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert parse(line).resume is None, "killed before its configuration was written"
    yaml_file(tmp_path / "run", to_yaml(first.config), "config.yaml")
    again = parse(line)
    assert (again.resume, again.config, again.changed) == (tmp_path / "run", first.config, ())
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = parse([f"--output={tmp_path / 'moved'}", *line[1:]])
    assert (moved.resume, moved.changed) == (tmp_path / "moved", ())
    with pytest.raises(InputError, match=r"moved: lora\.rank: is 3; the run has 2"):
        parse([f"--output={tmp_path / 'moved'}", "--lora.rank=3", "--resume-or-start"])
    overridden = parse([f"--output={tmp_path / 'moved'}", "--lora.rank=3", "--resume-or-start", "--resume-override"])
    assert overridden.config.lora.rank == 3


@pytest.mark.parametrize("also", [[], ["--resume=RUN", "--output=RUN"]])
def test_resume_or_start_without_a_folder_of_its_own_is_refused(tmp_path: Path, also: list[str]) -> None:
    given = [option.replace("RUN", str(a_run(tmp_path))) for option in also]
    with pytest.raises(InputError, match=r"^--resume-or-start: .*; expected --output RUN"):
        parse(["--resume-or-start", *given])


def test_all_that_cannot_change_on_a_resume_is_named_at_once_and_nothing_else(tmp_path: Path) -> None:
    names = ("lora.rank", "train.steps", "prompt.learning_rate", "monitor.log_every")
    with pytest.raises(InputError) as refused:
        parse(["--resume", str(a_run(tmp_path)), *map(option, names)])
    assert "prompt.learning_rate: is 0.25; the run has 0.1; lora.rank: is 3; the run has 8. " in str(refused.value)
    assert "log_every: is" not in str(refused.value) and "44" not in str(refused.value)


def test_a_file_s_settings_are_refused_on_a_resume_as_options_are(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    file = yaml_file(tmp_path, "lora:\n  rank: 3\n")
    with pytest.raises(InputError, match=r"lora\.rank: is 3; the run has 8"):
        parse(["--resume", str(run), "--config", file])


def test_a_setting_given_again_as_it_was_is_no_change(tmp_path: Path) -> None:
    same = ["--lora.rank=8", "--prompt.learning_rate=1e-1", "--lora.alpha=8", "--prompt.waypoints=[facelift, realistic]"]
    request = parse(["--resume", str(a_run(tmp_path)), *same])
    assert request.config == parse(["--resume", str(tmp_path)]).config


def test_a_dry_run_is_asked_for_by_name() -> None:
    assert parse(["--dry-run"]).dry_run and not parse(["--lora.rank=2"]).dry_run


# ---------------------------------------------------------------------------------------------------------- what is refused

UNKNOWN = [
    ("lora.rnk", "lora.rank"),
    ("trian.steps", "train.steps"),
    ("learning_rate", "lora.learning_rate"),
    ("data.reference_veiw", "data.reference_view"),
    ("modle", "model"),
]


@pytest.mark.parametrize(("wrong", "near"), UNKNOWN)
def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str], wrong: str, near: str) -> None:
    for argv in ([f"--{wrong}=3"], [f"--{wrong}", "3"]):
        assert refusal(argv, capsys) == f"error: unknown option '{wrong}'; did you mean '{near}'?\n"


@pytest.mark.parametrize(("wrong", "near"), [*UNKNOWN, ("train.step", "train.steps")])
def test_an_unknown_key_names_its_file_and_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, near: str
) -> None:
    group, _, name = wrong.rpartition(".")
    good = yaml_file(tmp_path, "lora:\n  rank: 2\n", "good.yaml")
    bad = yaml_file(tmp_path, f"{group}:\n  {name}: 3\n" if group else f"{name}: 3\n", "bad.yaml")
    for argv in (["--config", good, "--config", bad], [f"--config={bad}", f"--config={good}"]):
        assert refusal(argv, capsys) == f"error: {bad}: unknown option '{wrong}'; did you mean '{near}'?\n"


@pytest.mark.parametrize("argv", [["--resum", "runs/micro-001"], ["--train.step=3"]])
def test_part_of_an_option_s_name_is_not_taken_for_it(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert "did you mean" in refusal(argv, capsys)


def test_a_name_like_no_other_points_to_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(["--zzzzzz=1"], capsys) == "error: unknown option 'zzzzzz'; --help lists the options\n"
    assert suggestion("zzzzzz", list(option_kinds(Config))) == "; --help lists the options"


WRONG = [
    ("lora.rank", "abc", "a whole number"),
    ("lora.rank", "2.5", "a whole number"),
    ("lora.learning_rate", "fast", "a number"),
    ("kl.weight", "nan", "a number"),
    ("prompt.learn", "maybe", "true or false"),
    ("prompt.norm_band", "x", "a number or null"),
    ("prompt.waypoints", "facelift", "a list such as [a, b]"),
    ("data.reference_view", "rand", "random or a whole number or a list such as [0, 1]"),
    ("loss.snr_weighting", "w", "facelift or v or none"),
    ("prompt.carry", "drop", "keep or fade"),
    ("train.device", "gpu", "auto or cpu or cuda"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG, ids=lambda v: str(v))
def test_a_value_of_the_wrong_kind_is_refused_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, expected: str
) -> None:
    assert refusal([f"--{name}={value}"], capsys) == f"error: {name}: is {value}; expected {expected}\n"
    group, option = name.split(".")
    file = yaml_file(tmp_path, f"{group}:\n  {option}: {value}\n")
    assert refusal(["--config", file], capsys) == f"error: {file}: {name}: is {value}; expected {expected}\n"


def test_values_that_do_not_fit_together_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "curriculum.position: is 1.0; expected less than 1" in refusal(["--prompt.carry=fade"], capsys)


@pytest.mark.parametrize(
    "content",
    [
        "a: b: c\n",
        "\t- x: [",
        "just text",
        "- 1\n- 2\n",
        "",
        "lora: [rank",
        "lora: 3\n",
        "lora: null\n",
        "lora:\n  rank: null\n",
    ]
    + [b"\xff\xfe\x00\x01"],
)
def test_a_garbled_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes) -> None:
    file = yaml_file(tmp_path, content)
    assert refusal(["--config", file], capsys).startswith(f"error: {file}: ")


@pytest.mark.parametrize(("key", "value"), [("resume", "runs/micro-001"), ("dry_run", "true"), ("config", "other.yaml")])
def test_a_key_that_has_no_place_in_a_file_is_refused(tmp_path: Path, key: str, value: str) -> None:
    file = yaml_file(tmp_path, f"lora:\n  rank: 2\n{key}: {value}\n")
    with pytest.raises(InputError, match=rf"^{re.escape(file)}: {key} belongs on the command line, not into a file$"):
        parse(["--config", file])


def test_a_missing_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal([f"--config={tmp_path / 'none.yaml'}"], capsys)
    assert said.startswith(f"error: --config {tmp_path / 'none.yaml'}: no such file; expected a YAML file")


def test_a_word_without_an_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "stray" in refusal(["stray"], capsys)


def test_resuming_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        said = refusal(["--resume", str(folder)], capsys)
        assert said.startswith(f"error: --resume {folder}: holds no config.yaml; expected the folder of an earlier run")
    assert list(tmp_path.iterdir()) == []


def test_a_spoilt_configuration_of_a_resumed_run_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = yaml_file(tmp_path, "lora:\n  rnk: 3\n", "config.yaml")
    assert refusal(["--resume", str(tmp_path)], capsys).startswith(f"error: {file}: unknown option 'lora.rnk'; did you mean")


# -------------------------------------------------------------------------------------------------------------------- help


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in option_kinds(Config))
