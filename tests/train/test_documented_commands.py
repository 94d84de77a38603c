"""Each command of README.md and docs/: run, shortened, in a folder made for its page, or at least read by its own parser.

A page's commands are run in their order, in one folder, as a reader does. HOW decides for each whether it is run.
"""

import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

from softprompt.data.samples import write_source
from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import MicroWorld
from softprompt.prompt.embeddings import save_prompt
from softprompt.prompt.encoding import load_waypoints
from train.cli import option_kinds
from train.compare.__main__ import read_request
from train.options.command_line import parse
from train.options.config import Config
from train.prompts.__main__ import COMMANDS as PROMPTS

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"

SHORT = (
    "--train.steps=2 --train.batch_size=1 --train.accumulation=1 --train.warmup_steps=0 --monitor.log_every=1 "
    "--monitor.validate_every=2 --monitor.validation_timesteps=1 --monitor.preview_every=2 --monitor.preview_objects=1 "
    "--monitor.preview_steps=2 --monitor.checkpoint_every=1"
).split()
"""Makes a training run as small as it gets."""

# How each command is held, by the first of these patterns that it is like:
#   run        it is run, with these options added, and has to end with exit code 0
#   read       its own parser reads it, and what it would do is not done; what a training would leave is put there
#   shell      it is run as it is
#   elsewhere  it is not this project's, or another test's: where, is said
HOW: list[tuple[str, str, Sequence[str] | str]] = [
    ("python -m train.softprompt *--dry-run", "run", SHORT),
    ("python -m train.softprompt *--output runs/mice", "run", [*SHORT, "--export.pipeline=false", "--export.report=false"]),
    ("python -m train.softprompt --resume runs/mice", "run", ["--train.steps=3", "--export.pipeline=true"]),
    ("python -m train.softprompt *--resume-or-start", "run", [*SHORT, "--train.steps=3", "--export.report=false"]),
    ("python -m train.softprompt*", "read", []),
    ("accelerate launch *", "read", []),
    ("python -m train.doctor *", "run", ["--size=64"]),
    ("python -m train.prompts *", "run", []),
    ("python -m train.sample *", "run", ["--steps=1", "--guidance_scale=1", "--device=cpu"]),
    ("python -m train.export *", "run", []),
    ("python -m train.runs*", "run", []),
    ("python -m train.report *", "run", []),
    ("python -m train.compare *", "read", []),
    ("python -m train.benchmark*", "read", []),
    ("python -m train.gpu *", "read", []),
    (".ci/wheels *", "elsewhere", "gathers packages from a registry; CI does not"),
    ("tar xf *", "elsewhere", "a GPU node's"),
    ("python -m train.replay *", "read", []),
    ("python -m train.micro*", "read", []),
    ("python docs/formula.py *", "run", []),
    ("python docs/remake.py *", "elsewhere", "tests/test_readme.py, and the tutorial's test below"),
    ("ls *", "shell", []),
    ("cp *", "shell", []),
    ("tensorboard *", "elsewhere", "tensorboard's"),
    ("python -c *xformers*", "elsewhere", "FaceLift's environment"),
    ("python3 -m venv *", "elsewhere", ".ci/run"),
    (".venv/bin/*", "elsewhere", ".ci/run"),
]

READERS: dict[str, Callable[[list[str]], object]] = {"train.softprompt": parse, "train.compare": read_request}
"""What reads the options of a command that is only read, where that is a function of its own."""
WORK: dict[str, Sequence[str]] = {
    "train.benchmark": ["_measure", "_count", "_growth", "_write"],
    "train.gpu": ["_all"],
    "train.replay": ["replay"],
    "train.micro": ["build", "report"],
}
"""Where it is none: the functions that do the work of a command, once its options are read. They are left out."""

VARIABLES = {
    "FACELIFT": "FACELIFT",
    "PIPECKPTS": "FACELIFT/checkpoints/mvdiffusion/pipeckpts",
    "SAMPLES": "SAMPLES",
    "PICTURE": "PICTURE",
}
"""What stands for the paths that a page has its reader set."""


def name_of(page: Path) -> str:
    """In the names of tests."""
    return page.relative_to(REPOSITORY).as_posix()


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    text: str

    @property
    def argv(self) -> list[str]:
        """Without environment variables before it."""
        words = shlex.split(self.text, comments=True)
        return words[next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word)) :]

    @property
    def rule(self) -> tuple[str, Sequence[str] | str]:
        """How it is held, of HOW; fails where there is no rule."""
        plain = shlex.join(self.argv)
        for pattern, how, what in HOW:
            if fnmatchcase(plain, pattern):
                return how, what
        pytest.fail(f"{self.page}: {plain}: is like no pattern of HOW")


def load(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REMAKE = load("remake")


def commands(page: Path) -> list[Command]:
    """Those of its bash blocks, in order."""
    blocks = REMAKE.blocks(page.read_text(encoding="utf-8"))
    return [command for block in blocks if block.kind == "bash" for command in commands_of(page, block.body)]


def commands_of(page: Path, body: str) -> list[Command]:
    """Those of a block; lines that only set a variable are none."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not all(re.fullmatch(r"[A-Z]+=.*", word) for word in words):
            found.append(Command(name_of(page), re.sub(r"\$([A-Z]+)", lambda m: VARIABLES[m[1]], line)))
    return found


# ------------------------------------------------------------------------------------------------------------- the ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the capital words of the docs stand for: pictures, FaceLift's repository, and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("ground")
    write_source(MicroWorld("mice", 0, 3), folder / "SAMPLES")
    write_source(MicroWorld("mice", 10_000, 1), folder / "HELD_OUT")
    shutil.copy(next((folder / "HELD_OUT").glob("*/cam_000.png")), folder / "PICTURE")
    repository = folder / "FACELIFT"
    place = repository / "mvdiffusion" / "data" / "fixed_prompt_embeds_6view"
    place.mkdir(parents=True)
    (repository / "inference.py").touch()
    start = load_waypoints(["facelift"], folder=MICRO_MODEL, subject="mouse", angle="", num_views=6, width=1024)[0]
    save_prompt(start, place / "clr_embeds.pt")
    shutil.copytree(MICRO_MODEL, folder / VARIABLES["PIPECKPTS"])
    options = [f"--data.train={folder / 'SAMPLES'}", f"--data.val={folder / 'HELD_OUT'}", "--kl.domain=new", "--lora.rank=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train.softprompt", [*options, *SHORT, f"--output={folder / 'RUN'}"]) == 0
    return folder


@pytest.fixture
def place(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a page's own, with all that its commands may name in it; it is the working directory."""
    for name in ("SAMPLES", "HELD_OUT", "PICTURE"):
        (tmp_path / name).symlink_to(ground / name)
    for name in ("FACELIFT", "RUN"):
        shutil.copytree(ground / name, tmp_path / name)
    (tmp_path / "PIPECKPTS").symlink_to(MICRO_MODEL)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def home(module: str) -> ModuleType:
    """Where `main` of `python -m MODULE` is."""
    return importlib.import_module(f"{module}.__main__" if (REPOSITORY / module.replace(".", "/")).is_dir() else module)


def call(module: str, argv: Sequence[str]) -> object:
    """A command in this process. Returns: its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return home(module).main(list(argv))
    except SystemExit as stopped:
        return stopped.code


def hold(command: Command, monkeypatch: pytest.MonkeyPatch, ground: Path) -> None:
    """Run it or read it, as its rule says."""
    (how, what), argv = command.rule, command.argv
    if how == "elsewhere":
        return
    if how == "shell":
        subprocess.run(command.text, shell=True, check=True)
        return
    if argv[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(argv[2:])
        assert launched.module, command
        argv = ["python", "-m", launched.training_script, *launched.training_script_args]
    if argv[1].endswith(".py"):
        script = load(Path(argv[1]).stem)
        script.main(*map(Path, argv[2:]))
        return
    module, options = argv[2], argv[3:]
    if how == "run":
        assert call(module, [*options, *what]) == 0, command
    elif module in READERS:
        READERS[module](options)
    else:
        with monkeypatch.context() as patch:
            for name in WORK[module]:
                patch.setattr(home(module), name, lambda *_, **__: 0)
            assert call(module, options) == 0, command
    if how == "read" and module == "train.softprompt" and "--resume" not in options:
        request = parse(options)
        left = Path(request.config.output or f"runs/{request.name}-001")
        if not left.exists():
            shutil.copytree(ground / "RUN", left)


# --------------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and commands(page)], ids=name_of)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, place: Path, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in commands(page):
        hold(command, monkeypatch, ground)


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and "```python" in page.read_text()], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, place: Path) -> None:
    names: dict[str, object] = {}
    for block in REMAKE.blocks(page.read_text(encoding="utf-8")):
        if block.kind == "python":
            exec(re.sub(r"steps=\d+", "steps=1", block.body), names)


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in page.read_text()], ids=name_of)
def test_the_yaml_of_a_page_is_a_configuration(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(REMAKE.blocks(page.read_text(encoding="utf-8"))):
        if block.kind == "yaml":
            file = tmp_path / f"{number}.yaml"
            file.write_text(block.body)
            parse(["--config", str(file)])


def inline(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", REMAKE.FENCE.sub("", page.read_text(encoding="utf-8")))


ELSEWHERE = {"--train_text_encoder_ti_frac", "--signal", "--logdir"}
"""Options of diffusers' scripts, of SLURM and of TensorBoard that the docs name."""


@pytest.fixture(scope="module")
def known_options(ground: Path) -> dict[str, set[str]]:
    """By command, the options that its --help names; those of the launcher under its own name."""
    found = {"accelerate": set(launch_command_parser()._option_string_actions)}
    for module in (
        "softprompt",
        "compare",
        "benchmark",
        "doctor",
        "export",
        "gpu",
        "micro",
        "replay",
        "report",
        "runs",
        "sample",
    ):
        found[f"train.{module}"] = options_of(f"train.{module}", [])
    harness = (REPOSITORY / "tests" / "faults" / "__main__.py").read_text(encoding="utf-8")
    found["tests.faults"] = set(re.findall(r'"(--[\w-]+)"', harness))
    found["train.softprompt"] |= {f"--{name}" for name in option_kinds(Config)}
    found["train.prompts"] = set().union(*(options_of("train.prompts", [name]) for name in PROMPTS))
    return found


def options_of(module: str, argv: list[str]) -> set[str]:
    """Those that its --help names."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert call(module, [*argv, "--help"]) == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_a_page_names_are_there(page: Path, known_options: dict[str, set[str]]) -> None:
    everywhere = set().union(*known_options.values(), ELSEWHERE)
    groups = {name.split(".")[0] for name in option_kinds(Config) if "." in name}
    for code in inline(page):
        options = {option.rstrip(".") for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)}
        module = re.search(r"python -m ((?:train|tests)\.\w+)|^(accelerate) launch", code)
        known = everywhere
        if module and module[1]:
            known = known_options.get(module[1], everywhere) | (known_options["accelerate"] if "accelerate" in code else set())
        assert options <= known, f"{code}: {sorted(options - known)}"
        for name in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_]+)(?![\w./(])", code):
            if name.split(".")[0] in groups:
                assert name in option_kinds(Config) or name in known_options, f"{code}: {name} is no option"


def test_the_tutorial_runs_and_its_pictures_are_made(place: Path, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = TUTORIAL.read_text(encoding="utf-8")
    blocks = REMAKE.blocks(page)
    for block in blocks:
        if block.kind == "python":  # fewer objects than there
            exec(re.sub(r'(MicroWorld\("\w+", [\d_]+), \d+\)', r"\1, 2)", block.body), {})
        for command in commands_of(TUTORIAL, block.body) if block.kind == "bash" else []:
            hold(command, monkeypatch, ground)
    made = list(REMAKE.pictures(page))
    assert len(made) == 3 and page.count("![") == len(made)
    for source, shown in made:
        assert (place / source).is_file() and (TUTORIAL.parent / shown).is_file(), source
    assert all(block.body.strip() for block in blocks), "python docs/remake.py tutorial puts the output in"


def test_what_is_printed_takes_the_place_of_what_was(tmp_path: Path) -> None:
    page = "```bash\nls\n```\n\n```text from=b\nold\n```\n\n```\nkept\n```\n\n```python\n1\n```\n\n```text\n```\n"
    printed = iter(["a\nb: no\nb yes\nc\n", "2\n"])
    assert REMAKE.filled_in(page, lambda block: next(printed)) == page.replace("old", "...\nb yes\nc").replace(
        "```text\n", "```text\n2\n"
    )
    with pytest.raises(SystemExit, match="no line's first word is 'b'"):
        REMAKE.filled_in(page, lambda block: "nothing")
