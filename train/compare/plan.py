"""Planning a comparison: one YAML file becomes the checked configurations of all runs before the first one starts."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from softprompt.errors import InputError, base_of
from softprompt.prompt.templates import TEMPLATES, view_texts
from train.cli import option_kinds, suggestion
from train.options.command_line import parse
from train.options.config import Config, option_values
from train.options.yaml_file import read_yaml

SET_BY_COMPARISON = ("train.seed", "output")
"""Options that no variant may set."""
NOT_IN_OPTIONS = ("config", "resume", "dry_run", "dry-run")
"""Names on the main job's command line that are no options of a configuration."""
SAME_FOR_ALL = (
    "model",
    "train.steps",
    "data.val",
    "data.micro_first",
    "data.original",
    "monitor.validate_every",
    "monitor.validation_timesteps",
    "monitor.preview_every",
    "monitor.preview_objects",
    "monitor.preview_steps",
    "monitor.guidance_scale",
    "monitor.eta",
)
"""Options that must be the same in all variants; otherwise their losses could not be compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of a comparison."""

    base: list[str] = field(default_factory=list)
    """Configuration files of train.softprompt that all variants start from; the last wins."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of train.softprompt for all variants, by dotted name; they override the files."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Every variant is trained once with each seed; a verdict needs three or more."""
    objects_per_seed: int = 0
    """Embedded world: `data.micro_first` grows by this much with each seed, so that seeds vary the objects, too."""
    baseline: str
    """The variant that the others are compared with."""
    variants: dict[str, dict[str, Any]]
    """By name: the options of the variant, and `config`, a file or a list of files read after `base`; {} is the base itself."""

    def __post_init__(self) -> None:
        names = list(self.variants)
        if not names:
            raise InputError("variants: is empty; expected at least the baseline, e.g. {learned: {}}")
        for name in names:
            # The options' reader takes 1e9, a text in YAML, for a number.
            if not isinstance(name, str) or not re.fullmatch(r"\w([\w .+=-]{0,98}[\w+=-])?", name):
                raise InputError(
                    f"variants: {name!r} cannot be the name of a folder; expected letters, digits and _ . + = - (or spaces "
                    f"inside), 100 at most"
                )
        lower = [name.lower() for name in names]
        if twice := [name for name in names if lower.count(name.lower()) > 1]:
            raise InputError(f"variants: {' and '.join(twice)} differ only in case, and would share a folder on some disks")
        if self.baseline not in names:
            raise InputError(f"baseline: {self.baseline!r} is no variant{_near(self.baseline, names)}")
        if self.objects_per_seed < 0:
            raise InputError(f"objects_per_seed: is {self.objects_per_seed}; expected 0 or more")
        if not self.seeds:
            raise InputError("seeds: is empty; expected one or more, e.g. [0, 1, 2]")
        if repeated := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise InputError(f"seeds: {repeated[0]} is given twice; expected each once: the same seed gives the same run")


@dataclass(frozen=True)
class PlannedRun:
    """One run of the comparison, and its files."""

    variant: str
    seed: int
    config: Config
    root: Path
    """Folder of the comparison."""

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
        """ROOT/configs/VARIANT-seed-S.yaml: the configuration it was started with."""
        return self.root / "configs" / f"{self.label}.yaml"

    @property
    def log(self) -> Path:
        """ROOT/logs/VARIANT-seed-S.log: its output."""
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
        """Steps of each run."""
        return self.configs[self.comparison.baseline].train.steps

    def runs(self) -> list[PlannedRun]:
        """Seed by seed, all variants of a seed together, so that an early report compares all."""
        return [
            PlannedRun(variant, seed, self._with_seed(config, seed), self.root)
            for seed in self.comparison.seeds
            for variant, config in self.configs.items()
        ]

    def _with_seed(self, config: Config, seed: int) -> Config:
        first = config.data.micro_first + self.comparison.objects_per_seed * seed
        return replace(config, train=replace(config.train, seed=seed), data=replace(config.data, micro_first=first))


def make_plan(comparison: Comparison, root: Path) -> Plan:
    """Resolve every variant: base files, its own files, the common options, its own options; the later win.

    Raises: InputError naming the variant whose configuration is wrong, or is evaluated differently from the baseline's.
    """
    configs = {name: _resolve(comparison, name) for name in comparison.variants}
    expected = _evaluation(configs[comparison.baseline])
    for variant, config in configs.items():
        found = _evaluation(config)
        both = [name for name in expected if name in found]  # data.train counts where it holds the held-out objects
        other = [
            f"{name} is {found[name]} in {variant}, {expected[name]} in {comparison.baseline}"
            for name in both
            if found[name] != expected[name]
        ]
        if other:
            raise InputError(
                f"variant {variant}: {'; '.join(other)}. Variants that are evaluated differently cannot be compared: give "
                f"all the same value, e.g. under options"
            )
    twins = [(a, b) for a, b in combinations(configs, 2) if not differences(configs[a], configs[b])]
    warnings = [f"WARNING: variants {a} and {b} have the same configuration and will give the same numbers" for a, b in twins]
    return Plan(comparison, configs, root, tuple(warnings))


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base": (_list_of(str), "a list of files, e.g. [configs/micro.yaml]"),
    "options": (lambda value: isinstance(value, dict), "options by name, or {}"),
    "seeds": (_list_of(int), "a list of numbers, e.g. [0, 1, 2]"),
    "objects_per_seed": (lambda value: isinstance(value, int), "a number, 0 or more"),
    "baseline": (lambda value: isinstance(value, str), "the name of a variant"),
    "variants": (lambda value: isinstance(value, dict), "options by variant, e.g. {learned: {}}"),
}
"""A test of each value of a comparison's file, and what it expects."""


def read_file(path: str) -> dict[str, Any]:
    """The comparison's YAML, its names and the kinds of its values checked: the command line's parser explains these badly.

    Raises: InputError when it is missing, no YAML, or holds a name twice or one that is not known.
    """
    if not Path(path).is_file():
        raise InputError(
            f"--config {path}: no such file{base_of(path)}; expected a YAML file such as configs/compare/example.yaml"
        )
    content = read_yaml(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no comparison; expected {', '.join(_KINDS)}")
    for name, value in content.items():
        if name not in _KINDS:
            hint = "; it is an option of train.softprompt: put it under options" if str(name) in _groups() else ""
            raise InputError(f"{path}: unknown name {name!r}{hint or _near(str(name), list(_KINDS))}")
        is_right, expected = _KINDS[name]
        if not is_right(value):
            raise InputError(f"{path}: {name}: is {'empty' if value is None else value}; expected {expected}")
    for name in ("baseline", "variants"):
        if name not in content:
            raise InputError(f"{path}: has no {name}; expected {_KINDS[name][1]}")
    for name, options in content["variants"].items():
        if not isinstance(name, str) or not isinstance(options, dict | None):
            raise InputError(f"{path}: variants: {name}: is {options}; expected a name as text, and options such as {{}}")
        files = (options or {}).get("config", [])
        if not isinstance(files, str) and not _list_of(str)(files):
            raise InputError(f"{path}: variants: {name}: config: is {files}; expected a file, or a list of files")
    return content


def flat_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested or dotted options by their dotted names.

    Raises: InputError for one that is given twice, that a comparison sets itself, or that is no option of a configuration.
    """
    flat: dict[str, Any] = {}
    for outer, inside in options.items():
        is_group = isinstance(inside, Mapping) and outer in _groups()
        for name, value in {f"{outer}.{inner}": v for inner, v in inside.items()}.items() if is_group else [(outer, inside)]:
            if name in flat:
                raise InputError(f"{where}: {name} is given twice, dotted and under {name.split('.')[0]}; expected it once")
            if name in SET_BY_COMPARISON:
                raise InputError(f"{where}: {name} is set by the comparison itself (seeds, --output); leave it out")
            if name in NOT_IN_OPTIONS:
                raise InputError(f"{where}: {name} is no option of a configuration; files go into base, or a variant's config")
            if name not in option_kinds(Config):
                raise InputError(f"{where}: unknown option {name!r}{suggestion(str(name), list(option_kinds(Config)))}")
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
    """The configuration that a command line of the main job asks for. Raises: InputError that begins with `where`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(argv).config
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except SystemExit as error:
        raise InputError(f"{where}: {said.getvalue().strip().removeprefix('error: ')}") from error


def differences(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """The options whose values differ, except `output`: both values by dotted name."""
    one, two = option_values(first), option_values(second)
    return {name: (one[name], two[name]) for name in one if name != "output" and one[name] != two[name]}


def _evaluation(config: Config) -> dict[str, Any]:
    """The settings that the final numbers are measured with, by dotted name: model, objects and evaluation."""
    values = option_values(config)
    names = [*SAME_FOR_ALL, *(["data.train"] if values["data.val"] is None else [])]  # whose last objects are held out
    pretrained = config.prompt.waypoints[0]
    if "{" in str(TEMPLATES.get(pretrained, pretrained)):
        pretrained = view_texts(pretrained, subject=config.prompt.subject, angle=config.prompt.angle)[0]
    return {name: values[name] for name in names} | {
        "data.background (of held-out objects)": config.data.still_background,
        "data.reference_view (the first)": config.data.first_reference,
        "prompt.waypoints (the first: the pretrained model's)": pretrained,
    }


def _groups() -> set[str]:
    return {name.split(".")[0] for name in option_kinds(Config) if "." in name}


def _near(wanted: str, known: Sequence[str]) -> str:
    found = suggestion(wanted, known)
    return found if "did you mean" in found else f"; expected one of {', '.join(known)}"


def comparison_yaml(comparison: Comparison) -> str:
    """The comparison as YAML that `--config` takes back."""
    return yaml.safe_dump(asdict(comparison), sort_keys=False, allow_unicode=True)
