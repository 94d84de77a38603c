"""The README says what is there: every option with its default, every file, and commands that exist."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

import softprompt
from train.command_line import make_parser
from train.config import Config

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def defaults(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(value):
        inner = getattr(value, f.name)
        found |= defaults(inner, f"{prefix}{f.name}.") if is_dataclass(inner) else {prefix + f.name: inner}
    return found


def test_the_table_holds_every_option_with_its_default():
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \| \S.* \|$", README, re.MULTILINE)
    # YAML reads 1e-4 as a text; the options' own reader does not.
    table = {name: yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", value)) for name, value in rows}
    assert table == defaults(Config())


def test_the_tree_holds_every_module():
    tree = README.split("## Files")[1].split("```")[1]
    listed = set(re.findall(r"^\s*([a-z_]+\.py)", tree, re.MULTILINE))
    modules = {p.name for room in ("softprompt", "train") for p in (REPOSITORY / room).rglob("*.py")} - {"__init__.py"}
    assert listed == modules
    for config in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"({config.relative_to(REPOSITORY).as_posix()})" in README, config


def test_the_commands_of_the_readme_are_understood():
    commands = re.findall(r"python -m train\.softprompt( --[^`\n]*)", README)
    assert len(commands) >= 3
    parser = make_parser()
    for options in commands:
        parser.parse_args([str(REPOSITORY / o) if o.endswith(".yaml") else o for o in shlex.split(options)])


def test_linked_files_are_there():
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (REPOSITORY / link).is_file(), link


def test_the_package_exports_what_a_notebook_needs():
    for name in softprompt.__all__:
        assert getattr(softprompt, name) is not None
        assert f"`{name}`" in README or f" {name}" in README
