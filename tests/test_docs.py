"""The documents name tests, files and commands that are there."""

import re
from pathlib import Path

import pytest

from train.options.command_line import FREE_ON_RESUME

REPOSITORY = Path(__file__).parents[1]
DOCS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.relative_to(REPOSITORY).as_posix())
def test_tests_and_files_that_are_named_are_there(doc):
    text = doc.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(tests/[\w/.]+(?:::\w+)?)`", text)):
        file, _, test = name.partition("::")
        assert (REPOSITORY / file).exists(), name
        assert not test or f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), name
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = doc.parent / file if file else doc
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
    for path in set(re.findall(r"(?:configs|softprompt|train|docs|tests)/[\w/.-]*\.(?:yaml|py|md|png|svg|csv)\b", text)):
        assert (REPOSITORY / path).is_file() or (doc.parent / path).is_file(), path
    for module in set(re.findall(r"python -m ((?:train|tests)\.\w+)", text)):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_table_of_what_may_change_on_a_resume_is_what_may():
    table = (
        (REPOSITORY / "docs" / "guarantees.md")
        .read_text(encoding="utf-8")
        .split("| may change on a resume |")[1]
        .split("\n\n")[0]
    )
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert named == set(FREE_ON_RESUME)
