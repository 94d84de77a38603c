"""The command line of the main job: YAML files and options in, one typed configuration out, every error in one line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from jsonargparse import Namespace

from softprompt.errors import InputError, base_of, no_folder
from train.cli import Parser, expand_given, option_kinds, unknown
from train.options.config import Config
from train.options.groups import MICRO
from train.options.yaml_file import read_yaml

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
"""Options that may change when a run is resumed: its length, its device, how often it is evaluated and saved, and paths. Batch
size and accumulation may change if the number of objects per step stays, data if the samples stay (see `train.softprompt`)."""
OF_A_BATCH = ("train.batch_size", "train.accumulation")
"""Those of them that may not change where an objective compares the objects of a batch with each other."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    config: Config
    name: str
    """Name of the run, after its last YAML file or its model."""
    resume: Path | None
    """Run folder to resume."""
    dry_run: bool
    resume_override: bool = False
    """Whether a resumed run may change settings that its numbers depend on."""
    changed: tuple[str, ...] = ()
    """Settings that a resumed run changes, each with both values."""


@cache
def make_parser() -> Parser:
    """The parser of the main job; made once, since that takes longer than parsing."""
    parser = Parser(
        prog="python -m train.softprompt",
        description="Adapt FaceLift's six-view diffusion model to a new subject and camera by learning its prompt, jointly "
        "with LoRA. With no options: a full run on the embedded micro model, on a CPU.",
        epilog="Examples: python -m train.softprompt | python -m train.softprompt --config configs/facelift_mouse.yaml --model "
        "pipeckpts --data.train mice/ | python -m train.softprompt --resume runs/micro-001",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the options below; several may be given, the last wins."
    )
    parser.add_argument("--resume", type=str, default=None, help="Run folder to resume, with its own configuration.")
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="Resume the run in --output if there is one, else start it: one line for a job that is submitted repeatedly.",
    )
    parser.add_argument(
        "--resume-override", action="store_true", help="Allow a resumed run to change settings that its numbers depend on."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Load everything, do one step, print what the run will need, and stop."
    )
    parser.add_class_arguments(Config)
    return parser


def parse(argv: Sequence[str] | None = None) -> Request:
    """Parse the command line. Bad options end the program with code 2 and one line.

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
    """Check each file of options by itself, so that an error can name it."""
    for parser.reading in _values(argv, "--config"):
        _check_file(parser.reading)
        parser.parse_args(["--config", parser.reading])
    parser.reading = None


def _changed(before: Namespace, now: Namespace) -> dict[str, str]:
    """Name of each option that a resumed run would change => both values in words."""
    names = option_kinds(Config)
    return {name: f"{name}: is {now[name]}; the run has {before[name]}" for name in names if now[name] != before[name]}


def _check_file(file: str) -> None:
    """Errors that the parser reports badly, or not at all. Raises: InputError naming the file."""
    path, command_line = Path(file), ("resume", "resume_or_start", "resume_override", "dry_run", "config")
    if not path.is_file():
        raise InputError(f"--config {file}: no such file{base_of(file)}; expected a YAML file, e.g. configs/micro.yaml")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no options; expected them by name, as in configs/micro.yaml")
    kinds = option_kinds(Config)
    groups = {name.partition(".")[0] for name in kinds if "." in name}
    for key, value in content.items():
        if key in command_line:
            raise InputError(f"{file}: {key} belongs on the command line, not into a file")
        if key in groups and not isinstance(value, dict):
            raise InputError(f"{file}: {key}: is {'empty' if value is None else value}; expected a group of options under it")
        inside = value.items() if isinstance(value, dict) else [("", value)]
        for name, inner in [(f"{key}.{name}" if name else str(key), inner) for name, inner in inside]:
            if name not in kinds:
                raise InputError(f"{file}: {unknown(name, [f'--{kind}' for kind in kinds])}")
            if inner is None and "null" not in kinds[name]:
                raise InputError(f"{file}: {name}: is null; expected {kinds[name]}")


def _values(argv: Sequence[str], option: str) -> list[str]:
    """The values of an option, before the command line as a whole is parsed."""
    return [
        argument.partition("=")[2] or "".join(argv[i + 1 : i + 2])
        for i, argument in enumerate(argv)
        if argument == option or argument.startswith(f"{option}=")
    ]


def _resume_folder(argv: Sequence[str]) -> Path | None:
    """The value of --resume. Raises: InputError where it is no run."""
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
    """The run in `output` that `--resume-or-start` resumes, if there is one. Raises: InputError where that is not clear."""
    if namespace.resume is not None:
        raise InputError("--resume-or-start: there is --resume as well; expected --output RUN, whether RUN is there or not")
    if namespace.output is None:
        raise InputError("--resume-or-start: output is null; expected --output RUN, the same each time the job is submitted")
    folder = Path(namespace.output)
    return folder if (folder / "config.yaml").is_file() else None
