"""The typed configuration: its files, its way to YAML and back, and what does not fit together."""

import ast
import re
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import train.options.config
import train.options.groups
import train.options.objectives
import train.options.preferences
from softprompt.errors import InputError
from train.cli import option_kinds
from train.options.command_line import make_parser, parse
from train.options.config import Config, to_yaml
from train.options.groups import LoraConfig

SHIPPED = Path(__file__).parents[3] / "configs"
CONFIGS = sorted([*SHIPPED.glob("*.yaml"), *SHIPPED.glob("objectives/*.yaml")])

UNUSUAL = [
    "--output=runs/a: b #c",
    "--prompt.waypoints=[facelift, 'a {subject}: {view}, \"seen\" # from above', mice.pt]",
    "--prompt.subject=12",
    "--prompt.angle=yes",
    "--prompt.learn=false",
    "--prompt.norm_band=0.1",
    "--prompt.decay=1e-12",
    "--curriculum.unit=step",
    "--curriculum.at=[0, 10, 123456.0]",
    "--curriculum.position=[0, 0.3333333333333333, 2]",
    "--lora.alpha=3",
    "--lora.learning_rate=1e-4",
    "--data.val=null",
    "--data.reference_view=[0, 2, 5]",
    "--train.ema_decay=0.9999",
    "--train.gradient_checkpointing=always",
]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not is_dataclass(value):
        return {prefix[:-1]: value}
    return {k: v for f in fields(value) for k, v in flat(getattr(value, f.name), f"{prefix}{f.name}.").items()}


def given_back(config: Config, folder: Path) -> Config:
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return parse(["--config", str(folder / "config.yaml")]).config


# ------------------------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_configuration_parses_and_is_obeyed(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    parsed = flat(parse(["--config", str(file)]).config)
    for group, options in content.items():
        for name, value in options.items() if isinstance(options, dict) else [(None, options)]:
            assert parsed[f"{group}.{name}" if name else group] == value


def test_shipped_configurations_were_found() -> None:
    names = {file.stem for file in CONFIGS}
    assert {"micro", "facelift_mouse", "single_stage", "three_stages", "facelift_fixed", "learned_interpolation"} <= names


def test_the_micro_configuration_is_the_default_written_out() -> None:
    micro = next(file for file in CONFIGS if file.stem == "micro")
    assert parse(["--config", str(micro)]).config == Config()
    written = yaml.safe_load(micro.read_text(encoding="utf-8"))
    assert {f.name: set(written[f.name]) for f in fields(Config) if isinstance(written[f.name], dict)} == {
        f.name: {g.name for g in fields(f.default_factory)} for f in fields(Config) if f.default_factory is not MISSING
    }


# -------------------------------------------------------------------------------------------------- to YAML and back


@pytest.mark.parametrize(
    "options",
    [[], UNUSUAL, *([f"--{one}"] for one in ("data.reference_view=random", "data.reference_view=3", "prompt.subject=null"))],
)
def test_a_configuration_written_out_and_given_back_is_the_same(tmp_path: Path, options: list[str]) -> None:
    config = parse(options).config
    assert (config == Config()) == (options == [])
    assert given_back(config, tmp_path) == config


def test_a_text_that_looks_like_a_number_survives_being_written_out(tmp_path: Path) -> None:
    config = parse(["--prompt.subject=1e-4"]).config
    assert config.prompt.subject == "1e-4"
    assert given_back(config, tmp_path) == config


def test_what_is_written_out_names_every_option() -> None:
    written = yaml.safe_load(to_yaml(Config()))
    names = {f"{g}.{n}" for g, group in written.items() if isinstance(group, dict) for n in group}
    assert names | {g for g, value in written.items() if not isinstance(value, dict)} == set(option_kinds(Config))


# ------------------------------------------------------------------------------------------------- options and --help


def documented() -> dict[str, str]:
    """The docstring under each field of each dataclass, by Class.field; "" where there is none."""
    found = {}
    modules = (train.options.config, train.options.groups, train.options.objectives, train.options.preferences)
    for node in [n for m in modules for n in ast.parse(Path(m.__file__).read_text(encoding="utf-8")).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign):
                text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                found[f"{node.name}.{field.target.id}"] = text
    return found


def test_every_option_is_explained_in_help() -> None:
    texts = documented()
    groups = {f"Config.{f.name}" for f in fields(Config) if f.default_factory is not MISSING}
    assert {name for name, text in texts.items() if not text} == groups
    assert len(texts) - len(groups) == len(option_kinds(Config))
    shown = re.sub(r"\s", "", make_parser().format_help())
    missing = [name for name, text in texts.items() if re.sub(r"\s", "", text) not in shown]
    assert not missing
    assert not [name for name in option_kinds(Config) if f"--{name}" not in shown]


def test_the_kinds_are_those_of_the_options() -> None:
    real = set(make_parser().get_defaults().keys()) - {"config", "resume", "resume_or_start", "resume_override", "dry_run"}
    assert set(option_kinds(Config)) == real == set(flat(Config()))
    assert option_kinds(Config)["lora.rank"] == "a whole number"
    assert option_kinds(Config)["prompt.norm_band"] == "a number or null"
    assert option_kinds(Config)["data.reference_view"] == "random or a whole number or a list such as [0, 1]"


# ------------------------------------------------------------------------------------------ what does not fit together


REFUSED = {
    "a positive number": "prompt.learning_rate=0 lora.alpha=0 lora.learning_rate=-1 loss.snr_gamma=0 kl.clip=0 dpo.beta=0 "
    "spin.beta=0 train.max_grad_norm=0 export.tolerance=0 curriculum.kl_budget=0 curriculum.fastest=0",
    "a positive number, or null": "kl.target=0",
    "0 or more": "prompt.decay=-1 prompt.separation=-1 prompt.train_from=-1 lora.rank=-1 lora.train_from=-1 loss.weight=-1 "
    "kl.weight=-1 draft.weight=-1 draft.renoise=-1 draft.kl=-1 dpo.weight=-1 dpo.min_gap=-1 spin.weight=-1 spin.start=-1 "
    "studio.weight=-1 studio.pairs=-1 studio.detail_pairs=-1 studio.detail=-1 separate.weight=-1 separate.presence=-1 "
    "custom.weight=-1 train.warmup_steps=-1 data.micro_first=-1 "
    "curriculum.patience=-1 curriculum.glide_steps=-1 timesteps.patience=-1",
    "1 or more": "kl.every=0 train.steps=0 train.batch_size=0 train.accumulation=0 train.max_skipped=0 timesteps.clusters=0 "
    "draft.steps=0 draft.every=0 draft.guidance_scale=0 dpo.chunks=0 dpo.sample_steps=0 dpo.held_out_objects=0 "
    "spin.iterations=0 spin.sample_steps=0 spin.held_out_objects=0 monitor.log_every=0 monitor.validate_every=0 "
    "monitor.validation_timesteps=0 monitor.preview_every=0 monitor.preview_objects=0 monitor.preview_steps=0 "
    "monitor.checkpoint_every=0 monitor.checkpoints_kept=0",
    "1 or more, or null": "timesteps.max_stage_steps=0 data.limit=0 dpo.objects=0 dpo.chunk_steps=0 spin.objects=0",
    "2 or more": "dpo.samples=1",
    "2 or more, or null": "separate.side=1",
    "a share in [0, 1)": "lora.dropout=1 curriculum.min_gain=1 curriculum.smoothing=1 timesteps.smoothing=1 data.bad_share=1",
    "a share in (0, 1]": "kl.rate=5 kl.rate=0",
    "a share in (0, 1], or null": "prompt.norm_band=0",
    "between 0 and 1, or null": "train.ema_decay=1 draft.guard=1",
    "0 to 1": "monitor.eta=1.1",
    "0 to 1/3": "loss.condition_drop_rate=0.34",
    "module:function": "custom.function=smooth",
    "psnr, ssim, silhouette, consistency, sharpness, clip, or module:function": "draft.reward=lpips dpo.reward=lpips",
    "`own`, or a list of pairs": "dpo.pairs=",
    "a finite number": "lora.weight_decay=.inf monitor.guidance_scale=.inf kl.weight=.inf curriculum.position=[.inf,1]",
}
"""What is expected => options with a value that is not."""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(*one.split("="), expected) for expected, several in REFUSED.items() for one in several.split()],
)
def test_a_value_out_of_its_range_is_refused_by_name(name: str, value: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        parse([f"--{name}={value}"])
    assert str(refused.value).startswith(f"{name}: is ") and f"; expected {expected}" in str(refused.value)


def test_every_option_with_a_range_has_a_value_out_of_it_tried() -> None:
    groups = [(f.name, f.default_factory) for f in fields(Config) if f.default_factory is not MISSING]
    checked = {f"{name}.{f.name}" for name, group in groups for f in fields(group) if "check" in f.metadata}
    tried = {one.partition("=")[0] for several in REFUSED.values() for one in several.split()}
    assert checked - tried == {"data.reference_view"}


def test_a_range_holds_for_options_that_are_made_in_python() -> None:
    with pytest.raises(InputError, match=r"^lora\.alpha: is 0; expected a positive number$"):
        LoraConfig(alpha=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt.waypoints=[]"], r"prompt\.waypoints: is \[\]; expected at least one"),
        (["--curriculum.at=[0, 0.5, 0.2]", "--curriculum.position=[0, 1, 1]"], r"curriculum\.at: is \[0\.0, 0\.5, 0\.2\]"),
        (
            ["--data.train=mice", "--kl.domain=new", "--data.micro_first=9"],
            r"data\.micro_first: is 9; expected 0 with other samples than micro",
        ),
        (["--curriculum.at=[0.5, 0.5]"], r"curriculum\.at: .*each larger than the one before"),
        (["--curriculum.at=[-0.1, 0.5]"], r"curriculum\.at: .*values from 0 up"),
        (["--curriculum.at=[0, 2000]"], r"curriculum\.at: .*fractions of the run, at most 1 \(unit: run\)"),
        (["--curriculum.at=[0, 0.5, 1]"], r"curriculum\.at and curriculum\.position: is 3 and 2 values; expected the same"),
        (["--curriculum.at=[]", "--curriculum.position=[]"], r"curriculum\.at and .* 0 and 0 values; .*one or more"),
        (
            ["--curriculum.position=[0, 2]"],
            r"curriculum\.position: is \[0\.0, 2\.0\]; expected 0 to 1, since prompt\.waypoints",
        ),
        (["--curriculum.position=[-1, 1]"], r"curriculum\.position: is \[-1\.0, 1\.0\]; expected 0 to 1"),
        (["--prompt.waypoints=[facelift]"], r"curriculum\.position: .*expected 0 to 0, since prompt\.waypoints has 1"),
        (
            ["--prompt.separation=1", "--prompt.learn=false"],
            r"prompt\.separation: is 1\.0; expected 0 where prompt\.learn is false",
        ),
        (
            ["--lora.train_from=0.5", "--lora.train_until=0.5"],
            r"lora\.train_until: is 0\.5; expected more than lora\.train_from, 0\.5",
        ),
        (
            ["--prompt.train_until=0.3", "--lora.train_from=0.5"],
            r"train_from and train_until: is such that nothing trains at step 45",
        ),
        (["--lora.train_from=1"], r"lora\.train_from and train_until: is no step of the run"),
        (["--prompt.train_until=75"], r"prompt\.train_until: is 75\.0; expected a fraction of the run, at most 1"),
        (["--curriculum.unit=step"], r"curriculum\.at: is \[0\.0, 0\.25\]; expected whole numbers of steps"),
        (
            ["--curriculum.unit=step", "--curriculum.at=[0, 9]", "--lora.train_from=0.5"],
            r"lora\.train_from: is 0\.5; expected a whole number of steps",
        ),
        (["--data.reference_view=[]"], r"data\.reference_view: is \[\]; expected a view"),
        (["--data.reference_view=-1"], r"data\.reference_view: is -1"),
        (
            ["--curriculum.glide_steps=9", "--curriculum.max_stage_steps=5"],
            r"curriculum\.max_stage_steps: is 5; .*at least curriculum\.glide",
        ),
        (["--curriculum.pacing=kl_budget", "--kl.weight=0"], r"kl\.weight: is 0\.0; .*kl_budget, which needs the KL"),
        (["--curriculum.pacing=kl_budget", "--curriculum.position=[1, 0]"], r"curriculum\.position: .*rising values"),
        (["--kl.target=1", "--kl.weight=0"], r"kl\.weight: is 0\.0; expected a positive number where kl\.target is given"),
        (
            ["--data.train=mice"],
            r"data\.original: is null; expected objects of the original domain.* with kl\.domain: original; .*kl\.domain: new",
        ),
        (["--spin.weight=1", "--spin.start=0.999"], r"spin\.start: is 0\.999; expected a time that leaves steps"),
        (["--loss.weight=0", "--spin.weight=1", "--spin.start=0.5"], r"spin\.start: is 0\.5; expected 0 with loss\.weight 0"),
        (["--loss.weight=0", "--draft.weight=1", "--draft.every=2"], r"draft\.every: is 2; expected 1 with loss\.weight 0"),
        (["--dpo.weight=1", "--train.steps=3", "--dpo.samples=9", "--dpo.chunks=4"], r"dpo\.chunks: is 4; expected 3 at most"),
        (["--prompt.learn=false", "--lora.rank=0"], r"lora\.rank: is 0; expected 1 or more .*nothing would train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be_are_refused_by_name(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(options)


def test_windows_are_steps_of_the_run_in_the_unit_of_the_curriculum() -> None:
    config = parse(["--prompt.train_until=0.5", "--lora.train_from=0.25"]).config
    assert (config.window("prompt"), config.window("lora")) == ((0, 75), (38, 150))
    steps = ["--curriculum.unit=step", "--curriculum.at=[0, 40]", "--prompt.train_until=60", "--lora.train_until=9999"]
    config = parse(steps).config
    assert (config.window("prompt"), config.window("lora")) == ((0, 60), (0, 150))


def test_alpha_at_1_is_refused_with_fade_alone() -> None:
    fade = ["--prompt.carry=fade"]
    with pytest.raises(
        InputError, match=r"curriculum\.position: is 1\.0; expected less than 1 .*carry: fade.*gradient is zero"
    ):
        parse(fade)
    assert parse([*fade, "--curriculum.position=[0, 0.8]"]).config.curriculum.position == [0, 0.8]
    assert parse(["--prompt.carry=keep"]).config.curriculum.position == [0, 1]
    assert not parse([*fade, "--prompt.learn=false"]).config.prompt.learn, "nothing that is learned can fade out"
    three = [*fade, "--prompt.waypoints=[facelift, hybrid, realistic]"]
    assert parse(three).config.curriculum.position == [0, 1], "1 is half way on a path of two"
    with pytest.raises(InputError, match=r"less than 2 \(e\.g\. 1\.6\)"):
        parse([*three, "--curriculum.position=[0, 2]"])


def test_either_part_may_train_alone() -> None:
    assert parse(["--lora.rank=0"]).config.prompt.learn
    assert not parse(["--prompt.learn=false"]).config.prompt.learn


@pytest.mark.parametrize(("given", "views"), [("random", [0, 1, 2, 3]), ("2", [2]), ("[0, 3]", [0, 3])])
def test_reference_views_are_those_asked_for(given: str, views: list[int]) -> None:
    assert parse([f"--data.reference_view={given}"]).config.data.references(4) == views


@pytest.mark.parametrize("given", ["4", "[0, 4]"])
def test_a_reference_view_the_model_does_not_have_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"data\.reference_view: is .*; expected views from 0 to 3"):
        parse([f"--data.reference_view={given}"]).config.data.references(4)


@pytest.mark.parametrize(("gigabytes", "at_once"), [(12, 1), (24, 2), (80, 8)])
def test_a_gpu_s_size_changes_how_a_batch_is_shared_out_and_nothing_else(gigabytes: int, at_once: int) -> None:
    plain = parse(["--config", str(CONFIGS[0].with_name("facelift_mouse.yaml"))]).config
    sized = parse(["--config", str(CONFIGS[0].with_name(f"facelift_mouse_{gigabytes}gb.yaml"))]).config
    assert sized.train.batch_size == at_once
    assert sized.train.batch_size * sized.train.accumulation == plain.train.batch_size * plain.train.accumulation == 8
    shared_out = {name: getattr(plain.train, name) for name in ("batch_size", "accumulation", "gradient_checkpointing")}
    assert replace(sized, train=replace(sized.train, **shared_out)) == plain
