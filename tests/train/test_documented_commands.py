"""Each command of the pages is run, shortened, in order and in a folder of its page, or at least parsed by its own parser.

HOW decides which of the two.
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
from tests.runs import exit_code
from train.cli import option_kinds
from train.compare.__main__ import read_request
from train.options.command_line import parse
from train.options.config import Config
from train.prompts.__main__ import COMMANDS as PROMPTS

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"

SHORT = (
    "--train.steps=2 --train.batch_size=1 --train.accumulation=1 --train.warmup_steps=0 --monitor.log_every=1 "
    "--monitor.validate_every=2 --monitor.validation_timesteps=1 --monitor.preview_every=2 --monitor.preview_objects=1 "
    "--monitor.preview_steps=2 --monitor.checkpoint_every=1"
).split()
"""Options of the shortest training run."""

# How a command is tested; the first pattern that matches it counts:
#   run        run with these options added; the exit code must be 0
#   read       parsed by its own parser, but its work is not done; a finished run is put where a training would leave one
#   shell      run unchanged
#   elsewhere  not this project's, or tested elsewhere
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
    ("python docs/remake.py *", "elsewhere", "tests/test_docs.py, and the tutorial's test below"),
    ("ls *", "shell", []),
    ("cp *", "shell", []),
    ("tensorboard *", "elsewhere", "tensorboard's"),
    ("python -c *xformers*", "elsewhere", "FaceLift's environment"),
    ("python3 -m venv *", "elsewhere", ".ci/run"),
    (".venv/bin/*", "elsewhere", ".ci/run"),
]

READERS: dict[str, Callable[[list[str]], object]] = {"train.softprompt": parse, "train.compare": read_request}
"""Functions that only parse the options of a command."""
WORK: dict[str, Sequence[str]] = {
    "train.benchmark": ["_measure", "_count", "_growth", "_write"],
    "train.gpu": ["_all"],
    "train.replay": ["replay"],
    "train.micro": ["build", "report"],
}
"""For commands without one: the functions that do the work after parsing. They are replaced."""

VARIABLES = {
    "FACELIFT": "FACELIFT",
    "PIPECKPTS": "FACELIFT/checkpoints/mvdiffusion/pipeckpts",
    "SAMPLES": "SAMPLES",
    "PICTURE": "PICTURE",
}
"""Values of the variables that a page tells its reader to set."""


def name_of(page: Path) -> str:
    """Path within the repository, for the names of tests."""
    return page.relative_to(REPOSITORY).as_posix()


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    text: str

    @property
    def argv(self) -> list[str]:
        """Words of the command, without leading environment variables."""
        words = shlex.split(self.text, comments=True)
        return words[next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word)) :]

    @property
    def rule(self) -> tuple[str, Sequence[str] | str]:
        """Its entry of HOW. Fails if there is none."""
        plain = shlex.join(self.argv)
        for pattern, how, what in HOW:
            if fnmatchcase(plain, pattern):
                return how, what
        pytest.fail(f"{self.page}: {plain}: matches no pattern of HOW")


def load(name: str) -> ModuleType:
    """Import a script of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REMAKE = load("remake")


def commands(page: Path) -> list[Command]:
    """The commands of a page's bash blocks, in order."""
    blocks = REMAKE.blocks(page.read_text(encoding="utf-8"))
    return [command for block in blocks if block.kind == "bash" for command in commands_of(page, block.body)]


def commands_of(page: Path, body: str) -> list[Command]:
    """The commands of a block, without lines that only set a variable."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not all(re.fullmatch(r"[A-Z]+=.*", word) for word in words):
            found.append(Command(name_of(page), re.sub(r"\$([A-Z]+)", lambda m: VARIABLES[m[1]], line)))
    return found


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the capital words of the pages stand for: pictures, FaceLift's repository, a finished run of two steps."""
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
    """Working directory of one page, with everything that its commands may name."""
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
    """The module with `main` of `python -m MODULE`."""
    return importlib.import_module(f"{module}.__main__" if (REPOSITORY / module.replace(".", "/")).is_dir() else module)


def call(module: str, argv: Sequence[str]) -> object:
    """Run a command in this process. Returns: its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return exit_code(home(module).main, argv)


def check(command: Command, monkeypatch: pytest.MonkeyPatch, ground: Path) -> None:
    """Run or parse a command, as its rule says."""
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


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and commands(page)], ids=name_of)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, place: Path, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in commands(page):
        check(command, monkeypatch, ground)


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
    """Text in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", REMAKE.FENCE.sub("", page.read_text(encoding="utf-8")))


ELSEWHERE = {"--train_text_encoder_ti_frac", "--signal", "--logdir", "--numprocesses"}
"""Options of diffusers' scripts, SLURM, TensorBoard and pytest that the pages name."""


@pytest.fixture(scope="module")
def known_options(ground: Path) -> dict[str, set[str]]:
    """The options in the --help of each command, and those of the launcher."""
    found = {"accelerate": set(launch_command_parser()._option_string_actions)}
    for name in "softprompt compare benchmark doctor export gpu micro replay report runs sample".split():
        found[f"train.{name}"] = options_of(f"train.{name}", [])
    harness = (REPOSITORY / "tests" / "faults" / "__main__.py").read_text(encoding="utf-8")
    found["tests.faults"] = set(re.findall(r'"(--[\w-]+)"', harness))
    found["train.softprompt"] |= {f"--{name}" for name in option_kinds(Config)}
    found["train.prompts"] = set().union(*(options_of("train.prompts", [name]) for name in PROMPTS))
    return found


def options_of(module: str, argv: list[str]) -> set[str]:
    """Options in a command's --help."""
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
            if name.split(".")[0] in groups and not (REPOSITORY / f"{name.replace('.', '/')}.py").is_file():
                assert name in option_kinds(Config) or name in known_options, f"{code}: {name} is no option"


def test_the_tutorial_runs_and_its_pictures_are_made(place: Path, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = TUTORIAL.read_text(encoding="utf-8")
    blocks = REMAKE.blocks(page)
    for block in blocks:
        if block.kind == "python":  # fewer objects than there
            exec(re.sub(r'(MicroWorld\("\w+", [\d_]+), \d+\)', r"\1, 2)", block.body), {})
        for command in commands_of(TUTORIAL, block.body) if block.kind == "bash" else []:
            check(command, monkeypatch, ground)
    made = list(REMAKE.pictures(page))
    assert len(made) == 3 and page.count("![") == len(made)
    for source, shown in made:
        assert (place / source).is_file() and (TUTORIAL.parent / shown).is_file(), source
    assert all(block.body.strip() for block in blocks), "run python docs/remake.py tutorial"


def test_output_replaces_the_text_block_after_a_command(tmp_path: Path) -> None:
    page = "```bash\nls\n```\n\n```text lines=b\nold\n```\n\n```\nkept\n```\n\n```python\n1\n```\n\n```text\n```\n"
    printed = iter(["a\nc\nb yes\nd\n", "2\n"])
    filled = REMAKE.filled_in(page, lambda block: next(printed))
    assert filled == page.replace("old", "...\nb yes\n...").replace("```text\n", "```text\n2\n")
    with pytest.raises(SystemExit, match="no line begins with b"):
        REMAKE.filled_in(page, lambda block: "nothing")
