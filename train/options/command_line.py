"""The command line of the main job: YAML files and options in, one typed configuration out, every error in one line."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from softprompt.errors import InputError, base_of, no_folder
from train.options.config import Config
from train.options.groups import MICRO
from train.options.paths import expand_given, expand_values

FREE_ON_RESUME = (
    "model",
    "unet",
    "init_from",
    "data.train",
    "data.val",
    "data.original",
    "data.cache",
    "data.on_bad_sample",
    "data.bad_share",
    "train.steps",
    "train.batch_size",
    "train.accumulation",
    "train.max_skipped",
    "train.device",
    "train.gradient_checkpointing",
    "train.compile",
    "monitor.log_every",
    "monitor.preview_every",
    "monitor.checkpoint_every",
    "monitor.checkpoints_kept",
    "export",
)
"""Options that may change when a run is resumed: its length, where it runs, how often it is looked at, and paths, since folders
move. Batch size and accumulation may as far as the objects of a step stay as many, data as far as the samples are the same
(see `train.softprompt`)."""
OF_A_BATCH = ("train.batch_size", "train.accumulation")
"""Those of them that may not where an objective compares the objects of a batch with each other."""


_MOST_VALUES, _DEEPEST, _LONGEST = 10_000, 20, 3500
"""Values in a YAML file, inside each other, and characters of one; the largest comparison has a few hundred, 4 deep."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: Config
    name: str
    """Of the run, after the YAML it came from."""
    resume: Path | None
    """Run folder to go on with."""
    dry_run: bool
    resume_override: bool = False
    """Whether a resumed run may change what its numbers depend on."""
    changed: tuple[str, ...] = ()
    """Which settings a resumed run changes, in words."""


class Parser(ArgumentParser):
    """Errors in one line, with the file and the nearest option named."""

    reading: str | None = None
    """The YAML file that is being read."""
    options: type = Config
    """What its options are the fields of."""
    also: tuple[str, ...] = ("config", "resume", "resume-or-start", "resume-override", "dry-run")
    """Its other options."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **named: Any) -> Namespace:  # type: ignore[override]
        """As its parent's, with `~` and variables in paths filled in; YAML's tags, as `!!timestamp`, are refused, since its
        reader breaks at some of them."""
        given = list(sys.argv[1:] if args is None else args)
        for before, argument in pairwise(["", *given]):
            option, equals, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
            if equals and re.search(r"(^|[\s,:\[{])!!\w", value):
                self.error(f"{option.lstrip('-')}: is {value}; expected a value without YAML tags (!!)")
        read: Namespace = super().parse_args(given, *others, **named)
        try:
            expand_values(read)
        except InputError as error:
            self.error(str(error))
        return read

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: --?([\w.\-]+)|ption '([\w.\-]+)'", message, re.IGNORECASE)
        group_of = re.match(r'Parser key "(\w+)": Unable to load config', message)
        value = re.match(r'Parser key "([\w.]+)": .*(?:Got|Given) value: ?(.*)$', message)
        kinds = option_kinds(self.options)
        if unknown:
            key = unknown.group(1) or unknown.group(2)
            group = re.search(r"Group '([\w.]+)'", message)
            wanted = f"{group.group(1)}.{key}" if group and not key.startswith(group.group(1)) else key
            message = f"unknown option {wanted!r}{suggestion(wanted, [*kinds, *self.also])}"
        elif group_of and (inside := [kind for kind in kinds if kind.startswith(f"{group_of.group(1)}.")]):
            weight = f"{group_of.group(1)}.weight"
            likely = weight if weight in inside else inside[0]
            message = f"{group_of.group(1)}: is a group of options; give one of them, e.g. --{likely}"
        elif value and value.group(1) in kinds:
            message = f"{value.group(1)}: is {value.group(2) or 'empty'}; expected {kinds[value.group(1)]}"
        print(f"error: {f'{self.reading}: ' if self.reading else ''}{message}", file=sys.stderr)
        raise SystemExit(2)


class PlainParser(argparse.ArgumentParser):
    """Of commands whose options are no configuration: errors in one line, with the nearest option named."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, which reads all command lines by it; with `~` and variables in paths filled in."""
        given, others = super().parse_known_args(args, namespace)
        try:
            expand_values(given)
        except InputError as error:
            self.error(str(error))
        return given, others

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (-\S+)", message)
        if unknown:
            known = [option.lstrip("-") for option in self._option_string_actions if option.startswith("--")]
            wanted = unknown.group(1).partition("=")[0].lstrip("-")
            message = f"unknown option {wanted!r}{suggestion(wanted, known)}"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def option_kinds(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Every option's dotted name, and what its value may be, in words."""
    found: dict[str, str] = {}
    for name, kind in get_type_hints(cls).items():
        found |= (
            option_kinds(kind, f"{prefix}{name}.")
            if isinstance(kind, type) and is_dataclass(kind)
            else {prefix + name: _in_words(kind)}
        )
    return found


def _in_words(kind: Any) -> str:
    """`Literal["random"] | int` => "random or int"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list such as " + ("[a, b]" if get_args(kind)[0] is str else "[0, 1]")
    return {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(
        kind, str(kind)
    )


def suggestion(wanted: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' where a known name is near, by its whole or by its last part; else nothing."""
    last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(wanted, known, n=1) or [
        last[m] for m in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], list(last), n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else "; --help lists the options"


@cache
def make_parser() -> Parser:
    """The command line of the main job; built once, since that takes most of the time of reading a line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="python -m train.softprompt",
        description="Adapt FaceLift's six-view diffusion model to a new subject and camera by learning its prompt, jointly "
        "with LoRA. With no options: a full run on the embedded micro model, on a CPU.",
        epilog="Examples: python -m train.softprompt | python -m train.softprompt --config configs/facelift_mouse.yaml --model "
        "pipeckpts --data.train mice/ | python -m train.softprompt --resume runs/micro-001",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the options below; several may be given, the last wins."
    )
    parser.add_argument("--resume", type=str, default=None, help="Run folder to go on with; its own configuration is taken.")
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="Start the run in --output, or resume it where it has begun: one line for a job that is submitted repeatedly.",
    )
    parser.add_argument(
        "--resume-override", action="store_true", help="Let a resumed run change settings that its numbers depend on."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Load everything, do one step, say what the run will need, and stop."
    )
    parser.add_class_arguments(Config)
    return parser


def parse(argv: Sequence[str] | None = None) -> Request:
    """Read the command line. Bad options end the program with code 2 and one line.

    Raises: InputError for values that do not fit together, or a resumed folder that holds no run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = expand_given(argv, ("config", "resume"))
    parser = make_parser()
    parser.reading = None
    resume = _resume_folder(argv)
    if resume is not None:
        argv = ["--config", str(resume / "config.yaml"), *argv]
    _check_files(parser, argv)
    namespace = parser.parse_args(argv)
    if namespace.resume_or_start:
        resume = _begun_folder(namespace)
        if resume is not None:
            argv = ["--config", str(resume / "config.yaml"), *argv]
            _check_files(parser, argv[:2])
            namespace = parser.parse_args(argv)
    config = parser.instantiate(namespace)
    changed = {} if resume is None else _changed(parser.parse_args(argv[:2]), namespace)
    if namespace.resume_or_start:
        changed.pop("output", None)  # it is where the run lies now
    free = tuple(name for name in FREE_ON_RESUME if not (config.studio.compares_objects and name in OF_A_BATCH))
    refused = [said for name, said in changed.items() if not name.startswith(free)]
    if refused and not namespace.resume_override:
        raise InputError(
            f"--resume {resume}: {'; '.join(refused)}. A resumed run keeps its settings, but for {', '.join(free)}; "
            f"leave the option out, start a new run, or change it on purpose with --resume-override"
        )
    if resume is None and namespace.resume_override and not namespace.resume_or_start:
        raise InputError("--resume-override: there is no --resume; it changes settings of a run that is resumed")
    files = tuple(str(c) for c in (namespace.config or []))
    name = MICRO if config.model == MICRO and not files else Path(files[-1]).stem if files else Path(config.model).name
    return Request(
        config=Config(**{f.name: getattr(config, f.name) for f in fields(Config)}),
        name=name,
        resume=resume,
        dry_run=namespace.dry_run,
        resume_override=namespace.resume_override,
        changed=tuple(changed.values()),
    )


def _check_files(parser: Parser, argv: Sequence[str]) -> None:
    """Each file of options by itself, so that an error can name it."""
    for parser.reading in _values(argv, "--config"):
        _check_file(parser.reading)
        parser.parse_args(["--config", parser.reading])
    parser.reading = None


def _changed(before: Namespace, now: Namespace) -> dict[str, str]:
    """Of each option that a resumed run would change, both values in words."""
    return {name: f"{name}: is {now[name]}; the run has {before[name]}" for name in option_kinds() if now[name] != before[name]}


def _check_file(file: str) -> None:
    """What the parser says badly, or not at all. Raises: InputError naming the file."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--config {file}: no such file{base_of(file)}; expected a YAML file, e.g. configs/micro.yaml")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no options; expected them by name, as in configs/micro.yaml")
    kinds = option_kinds()
    for key, value in content.items():
        if key in ("resume", "resume_or_start", "resume_override", "dry_run", "config"):
            raise InputError(f"{file}: {key} belongs on the command line, not into a file")
        is_group = any(name.startswith(f"{key}.") for name in kinds)
        if is_group and not isinstance(value, dict):
            raise InputError(f"{file}: {key}: is {_shown(value)}; expected a group of options under it")
        for name, inner in value.items() if is_group else [(None, value)]:
            kind = kinds.get(f"{key}.{name}" if is_group else key)
            if kind is not None and inner is None and "null" not in kind:
                raise InputError(f"{file}: {key}.{name}: is null; expected {kind}")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises: InputError when it is no YAML, holds a name twice, or is far too large or deep."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_CarefulLoader)
    except Exception as error:  # which one depends on the tag whose value is wrong, e.g. a day that there is not
        problem = " ".join(f"{'' if isinstance(error, yaml.YAMLError) else type(error).__name__} {error}".split())
        raise InputError(f"{path}: is no YAML ({problem[:300]})") from error


class _CarefulLoader(yaml.SafeLoader):
    """Refuses a name that is there twice (YAML itself would keep the last and say nothing), and a few lines that stand for
    millions of values, or for ones inside themselves, by way of aliases."""

    def get_single_node(self) -> Any:
        document = super().get_single_node()
        waiting, count = [(document, 0)], 0
        while waiting:
            node, depth = waiting.pop()
            count += 1
            if count > _MOST_VALUES or depth > _DEEPEST:
                raise yaml.MarkedYAMLError(None, None, f"more than {_MOST_VALUES} values, or {_DEEPEST} inside each other")
            if isinstance(node, yaml.ScalarNode) and len(node.value) > _LONGEST:
                raise yaml.MarkedYAMLError(None, None, f"a value of {len(node.value)} characters", node.start_mark)
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            waiting += [(part, depth + 1) for parts in inside for part in (parts if isinstance(parts, tuple) else (parts,))]
        return document

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _shown(value: Any) -> str:
    return "empty" if value is None else str(value)


def _values(argv: Sequence[str], option: str) -> list[str]:
    """What was given to an option, before the command line as a whole is read."""
    return [
        argument.partition("=")[2] or "".join(argv[i + 1 : i + 2])
        for i, argument in enumerate(argv)
        if argument == option or argument.startswith(f"{option}=")
    ]


def _resume_folder(argv: Sequence[str]) -> Path | None:
    """The value of --resume: its configuration comes first, the command line overrides it."""
    values = _values(argv, "--resume")
    if not values:
        return None
    folder = Path(values[-1])
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"--resume {folder}: holds no config.yaml; expected the folder of an earlier run, e.g. runs/micro-001"
            f"{no_folder(folder)}"
        )
    return folder


def _begun_folder(namespace: Namespace) -> Path | None:
    """Of `--resume-or-start`: the run in `output`, where one has begun. Raises: InputError where it cannot be told."""
    if namespace.resume is not None:
        raise InputError("--resume-or-start: there is --resume as well; expected --output RUN, whether RUN is there or not")
    if namespace.output is None:
        raise InputError("--resume-or-start: output is null; expected --output RUN, the same each time the job is submitted")
    folder = Path(namespace.output)
    return folder if (folder / "config.yaml").is_file() else None
