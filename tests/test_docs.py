"""The pages name what exists: files, tests, links, anchors, every option with its default, every series and configuration."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import softprompt
from train.log.logger import GROUPS
from train.options.command_line import FREE_ON_RESUME
from train.options.config import Config

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    page.relative_to(REPOSITORY).as_posix(): page.read_text(encoding="utf-8")
    for page in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def defaults(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(value):
        inner = getattr(value, f.name)
        found |= defaults(inner, f"{prefix}{f.name}.") if is_dataclass(inner) else {prefix + f.name: inner}
    return found


@pytest.mark.parametrize("name", PAGES)
def test_files_tests_links_and_commands_of_a_page_exist(name):
    page, text = REPOSITORY / name, PAGES[name]
    for test in set(re.findall(r"`(tests/[\w/.]+(?:::\w+)?)`", text)):
        file, _, function = test.partition("::")
        assert (REPOSITORY / file).exists(), test
        assert not function or f"def {function}(" in (REPOSITORY / file).read_text(encoding="utf-8"), test
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
    for path in set(re.findall(r"(?:configs|softprompt|train|docs|tests)/[\w/.-]*\.(?:yaml|py|md|png|svg|csv)\b", text)):
        assert (REPOSITORY / path).is_file() or (page.parent / path).is_file(), path
    for module in set(re.findall(r"python -m ((?:train|tests)\.\w+)", text)):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_readme_is_one_page_and_links_every_other():
    assert PAGES["README.md"].count("\n") < 150
    assert all(f"({name})" in PAGES["README.md"] for name in PAGES if name.startswith("docs/"))


def test_the_page_of_options_has_each_with_its_default_and_help():
    page = PAGES["docs/options.md"]
    items = re.findall(r"^- `([a-z_.]+): (.*?)`  \S", page, re.MULTILINE)
    # YAML reads 1e-4 as a text; the options' own reader does not.
    assert {name: yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", value)) for name, value in items} == defaults(Config())
    spec = importlib.util.spec_from_file_location("remake", REPOSITORY / "docs" / "remake.py")
    assert spec is not None and spec.loader is not None
    remake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(remake)
    assert remake.LISTS.search(page).group() == remake.option_lists(), "run python docs/remake.py options"


def test_the_table_of_what_may_change_on_a_resume_is_complete():
    table = PAGES["docs/guarantees.md"].split("| may change on a resume |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert named == set(FREE_ON_RESUME)


def test_every_group_of_series_is_in_the_guide():
    table = PAGES["docs/guide.md"].split("## All series")[1].split("\n## ")[0]
    assert set(GROUPS) <= {name.removesuffix("_N") for name in re.findall(r"`([a-zA-Z_]+)/", table)}


def test_every_configuration_is_linked():
    pages = "".join(PAGES.values()).replace("](../", "](")
    for config in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"({config.relative_to(REPOSITORY).as_posix()})" in pages, config


def test_every_exported_name_is_documented():
    for name in softprompt.__all__:
        assert getattr(softprompt, name) is not None
        assert re.search(rf"[` ]{name}\b", PAGES["docs/commands.md"]), name
