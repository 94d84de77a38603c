"""What a comparison is to run: one YAML file into a list of fully checked configurations, before the first run starts."""

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from softprompt.errors import InputError, base_of
from softprompt.prompt.templates import TEMPLATES, view_texts
from train.cli import option_kinds, suggestion
from train.options.command_line import parse, read_yaml
from train.options.config import Config, option_values

SET_BY_COMPARISON = ("train.seed", "output")
"""Options that no variant may set."""
NOT_IN_OPTIONS = ("config", "resume", "dry_run", "dry-run")
"""What the main job's command line knows besides options."""
SAME_FOR_ALL = (
    "model",
    "train.steps",
    "data.val",
    "data.original",
    "monitor.validate_every",
    "monitor.validation_timesteps",
    "monitor.preview_every",
    "monitor.preview_objects",
    "monitor.preview_steps",
    "monitor.guidance_scale",
    "monitor.eta",
)
"""Options that must be the same in all variants: with other ones, the losses could not be compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compare training strategies on your own data: each variant is trained with each seed, and measured against the baseline
    on the same seeds."""

    base: list[str] = field(default_factory=list)
    """Configuration files of train.softprompt that all variants start from, the last wins."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of train.softprompt for all variants, by dotted name; they win over files."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Every variant is trained once with each; three or more are needed for a verdict."""
    baseline: str
    """The variant that the others are measured against."""
    variants: dict[str, dict[str, Any]]
    """By name: options that make it what it is, and `config`, a file or a list of files over `base`; {} is the base itself."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise InputError("variants: there are none; expected at least the baseline, e.g. {learned: {}}")
        for name in self.variants:
            # The options' reader takes 1e9, a text in YAML, for a number.
            if not isinstance(name, str) or not re.fullmatch(r"\w([\w .+=-]{0,98}[\w+=-])?", name):
                raise InputError(
                    f"variants: {name!r} cannot be the name of a folder; expected letters, digits and _ . + = - (or spaces "
                    f"inside), 100 at most"
                )
        lower = [name.lower() for name in self.variants]
        if twice := [name for name in self.variants if lower.count(name.lower()) > 1]:
            raise InputError(f"variants: {' and '.join(twice)} differ in capitals only, and would share a folder on some disks")
        if self.baseline not in self.variants:
            raise InputError(f"baseline: {self.baseline!r} is no variant{_near(self.baseline, list(self.variants))}")
        if not self.seeds:
            raise InputError("seeds: there are none; expected one or more, e.g. [0, 1, 2]")
        if twice_seeds := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise InputError(f"seeds: {twice_seeds[0]} is there twice; expected each once: the same seed gives the same run")


@dataclass(frozen=True)
class PlannedRun:
    """One run of the comparison, and where it is kept."""

    variant: str
    seed: int
    config: Config
    root: Path
    """Of the comparison."""

    @property
    def label(self) -> str:
        """VARIANT-seed-S."""
        return f"{self.variant}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """ROOT/runs/VARIANT/seed-S: a run folder as train.softprompt leaves it."""
        return self.root / "runs" / self.variant / f"seed-{self.seed}"

    @property
    def config_file(self) -> Path:
        """ROOT/configs/VARIANT-seed-S.yaml: what it was started with."""
        return self.root / "configs" / f"{self.label}.yaml"

    @property
    def log(self) -> Path:
        """ROOT/logs/VARIANT-seed-S.log: all it said."""
        return self.root / "logs" / f"{self.label}.log"


@dataclass(frozen=True)
class Plan:
    """A comparison whose every configuration has been read and checked."""

    comparison: Comparison
    configs: Mapping[str, Config]
    """By variant, with the first seed."""
    root: Path
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Of every run."""
        return self.configs[self.comparison.baseline].train.steps

    def runs(self) -> list[PlannedRun]:
        """Seed by seed, all variants of a seed together, so that an early look compares all."""
        return [
            PlannedRun(variant, seed, replace(config, train=replace(config.train, seed=seed)), self.root)
            for seed in self.comparison.seeds
            for variant, config in self.configs.items()
        ]


def make_plan(comparison: Comparison, root: Path) -> Plan:
    """Resolve every variant: base files, its own files, the common options, its own options; the later win.

    Raises: InputError naming the variant, where one does not stand on its own or next to the others.
    """
    configs = {name: _resolve(comparison, name) for name in comparison.variants}
    for name, config in configs.items():
        _refuse_other_evaluation(comparison.baseline, configs[comparison.baseline], name, config)
    return Plan(comparison, configs, root, tuple(_twins(configs)))


def read_file(path: str) -> dict[str, Any]:
    """The comparison's YAML, its top-level names checked.

    Raises: InputError when it is missing, no YAML, or holds a name twice or one that is not known.
    """
    if not Path(path).is_file():
        raise InputError(
            f"--config {path}: no such file{base_of(path)}; expected a YAML file such as configs/compare/example.yaml"
        )
    content = read_yaml(Path(path))
    known = list(Comparison.__dataclass_fields__)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no comparison; expected {', '.join(known)}")
    for name in content:
        if name not in known:
            hint = "; it is an option of train.softprompt: put it under options" if str(name) in _groups() else ""
            raise InputError(f"{path}: unknown name {name!r}{hint or _near(str(name), known)}")
    for name in ("baseline", "variants"):
        if content.get(name) is None:
            raise InputError(f"{path}: has no {name}; expected {known[-2]} (a name) and {known[-1]} (by name)")
    if not isinstance(content["variants"], dict):
        raise InputError(f"{path}: variants: is {content['variants']}; expected options by variant, e.g. {{learned: {{}}}}")
    _check_kinds(path, content)
    for name, options in content["variants"].items():
        if not isinstance(name, str) or not isinstance(options, dict | None):
            raise InputError(f"{path}: variants: {name}: is {options}; expected a name as text, and options such as {{}}")
        files = (options or {}).get("config", [])
        if not isinstance(files, str) and not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
            raise InputError(f"{path}: variants: {name}: config: is {files}; expected a file, or a list of files")
    return content


def _check_kinds(path: str, content: Mapping[str, Any]) -> None:
    """What the parser says badly. Raises: InputError."""
    lists = {"base": (str, "a list of files, e.g. [configs/micro.yaml]"), "seeds": (int, "a list of numbers, e.g. [0, 1, 2]")}
    for name, (kind, expected) in lists.items():
        value = content.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise InputError(f"{path}: {name}: is {'empty' if value is None else value}; expected {expected}")
    options = content.get("options", {})
    if not isinstance(options, dict):
        raise InputError(f"{path}: options: is {'empty' if options is None else options}; expected options by name, or {{}}")


def flat_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested or dotted options by their dotted names.

    Raises: InputError for one that a comparison sets itself, or that is no option of a configuration.
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and name in _groups():
            nested = flat_options({f"{name}.{inner}": v for inner, v in value.items()}, where)
            if twice := [inner for inner in nested if inner in options or inner in flat]:
                raise InputError(f"{where}: {twice[0]} is there twice, dotted and under {name}; expected it once")
            flat |= nested
        elif name in SET_BY_COMPARISON:
            raise InputError(f"{where}: {name} is set by the comparison itself (seeds, --output); leave it out")
        elif name in NOT_IN_OPTIONS:
            raise InputError(f"{where}: {name} is no option of a configuration; files go into base, or a variant's config")
        elif name not in option_kinds(Config):
            raise InputError(f"{where}: unknown option {name!r}{suggestion(str(name), list(option_kinds(Config)))}")
        else:
            flat[name] = value
    return flat


def own_files(options: Mapping[str, Any]) -> list[str]:
    """The files under a variant's `config`."""
    files = options.get("config") or []
    return [files] if isinstance(files, str) else list(files)


def _resolve(comparison: Comparison, variant: str) -> Config:
    own = comparison.variants[variant]
    options = flat_options(comparison.options, "options")
    options |= flat_options({name: value for name, value in own.items() if name != "config"}, f"variant {variant}")
    argv = [part for file in [*comparison.base, *own_files(own)] for part in ("--config", str(file))]
    argv += [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    argv.append(f"--train.seed={comparison.seeds[0]}")
    return replace(parse_quietly(argv, f"variant {variant}"), output=None)


def parse_quietly(argv: Sequence[str], where: str) -> Config:
    """What train.options.command_line.parse reads; whatever it would print becomes an InputError that begins with `where`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(argv).config
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except SystemExit as error:
        raise InputError(f"{where}: {said.getvalue().strip().removeprefix('error: ')}") from error


def differences(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """By dotted name, the two values of each option that is not the same, `output` left out."""
    one, two = option_values(first), option_values(second)
    return {name: (one[name], two[name]) for name in one if name != "output" and one[name] != two[name]}


def evaluation_of(config: Config) -> dict[str, Any]:
    """By dotted name, what the final numbers are measured with: the model, the objects, how they are looked at."""
    values = option_values(config)
    found = {name: values[name] for name in SAME_FOR_ALL}
    if values["data.val"] is None:
        found["data.train"] = values["data.train"]  # whose last objects are held out
    pretrained = config.prompt.waypoints[0]
    if "{" in str(TEMPLATES.get(pretrained, pretrained)):
        pretrained = view_texts(pretrained, subject=config.prompt.subject, angle=config.prompt.angle)[0]
    return found | {
        "data.background (of held-out objects)": config.data.still_background,
        "data.reference_view (the first)": config.data.first_reference,
        "prompt.waypoints (the first: what the untouched model is)": pretrained,
    }


def _refuse_other_evaluation(baseline: str, expected: Config, variant: str, config: Config) -> None:
    one, two = evaluation_of(expected), evaluation_of(config)
    both = [name for name in one if name in two]  # data.train counts where it holds the held-out objects
    other = [f"{name} is {two[name]} in {variant}, {one[name]} in {baseline}" for name in both if one[name] != two[name]]
    if other:
        raise InputError(
            f"variant {variant}: {'; '.join(other)}. Numbers measured in different ways cannot be compared: give all variants "
            f"the same value, e.g. under options"
        )


def _twins(configs: Mapping[str, Config]) -> list[str]:
    names = list(configs)
    return [
        f"WARNING: variants {first} and {second} are the same configuration; they will give the same numbers"
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        if not differences(configs[first], configs[second])
    ]


def _groups() -> set[str]:
    return {name.split(".")[0] for name in option_kinds(Config) if "." in name}


def _near(wanted: str, known: Sequence[str]) -> str:
    found = suggestion(wanted, known)
    return found if "did you mean" in found else f"; expected one of {', '.join(known)}"


def comparison_yaml(comparison: Comparison) -> str:
    """The comparison as YAML that `--config` takes back."""
    return yaml.safe_dump(asdict(comparison), sort_keys=False, allow_unicode=True)
