"""README and docs/ say what is there: every option with its default, every module, every configuration."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

import softprompt
from train.log.logger import GROUPS
from train.options.config import Config

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCS = {page.name: page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs").glob("*.md")}


def defaults(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(value):
        inner = getattr(value, f.name)
        found |= defaults(inner, f"{prefix}{f.name}.") if is_dataclass(inner) else {prefix + f.name: inner}
    return found


def test_the_readme_is_one_page():
    assert README.count("\n") < 150


def test_the_tables_hold_every_option_with_its_default():
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \| \S.* \|$", DOCS["options.md"], re.MULTILINE)
    # YAML reads 1e-4 as a text; the options' own reader does not.
    table = {name: yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", value)) for name, value in rows}
    assert table == defaults(Config())


def test_the_tables_of_options_are_in_the_options_own_words():
    spec = importlib.util.spec_from_file_location("remake", REPOSITORY / "docs" / "remake.py")
    assert spec is not None and spec.loader is not None
    remake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(remake)
    tables = remake.TABLES.search(DOCS["options.md"])
    assert tables is not None and tables.group() == remake.option_tables(), "python docs/remake.py options makes them again"


def test_the_tree_holds_every_module():
    tree = DOCS["files.md"].split("```")[1]
    listed: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        name = re.match(r"^( *)([\w.]+?)(/|\.py)(?=\s)", line)
        if name:
            depth = len(name[1]) // 2
            folders[depth:] = [name[2]] if name[3] == "/" else []
            listed += ["/".join([*folders[:depth], f"{name[2]}.py"])] if name[3] == ".py" else []
    rooms = ("softprompt", "train")
    modules = {p.relative_to(REPOSITORY).as_posix() for room in rooms for p in (REPOSITORY / room).rglob("*.py")}
    assert sorted(name for name in listed if name.startswith(rooms)) == sorted(m for m in modules if "__init__" not in m)


def test_every_group_of_series_is_in_the_table_of_what_is_logged():
    table = DOCS["commands.md"].split("### What is logged")[1].split("###")[0]
    named = {name.rstrip("_N") for name in re.findall(r"`([a-zA-Z_]+)/", table)}
    assert set(GROUPS) <= named


def test_every_configuration_is_linked():
    pages = "".join([README, *DOCS.values()])
    for config in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"({config.relative_to(REPOSITORY).as_posix()})" in pages.replace("](../", "]("), config


def test_every_page_is_in_the_index_and_in_the_readme():
    for name in DOCS.keys() - {"README.md"}:
        assert f"({name})" in DOCS["README.md"] and f"(docs/{name})" in README, name


def test_the_package_exports_what_a_notebook_needs():
    for name in softprompt.__all__:
        assert getattr(softprompt, name) is not None
        assert re.search(rf"[` ]{name}\b", DOCS["commands.md"]), name
