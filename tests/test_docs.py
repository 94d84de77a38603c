"""The documents name tests, files and commands that are there."""

import re
from pathlib import Path

import pytest

from train.command_line import FREE_ON_RESUME

REPOSITORY = Path(__file__).parents[1]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_tests_and_files_that_are_named_are_there(doc):
    text = doc.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(tests/[\w/.]+(?:::\w+)?)`", text)):
        file, _, test = name.partition("::")
        assert (REPOSITORY / file).exists(), name
        assert not test or f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), name
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (doc.parent / link).exists(), link
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
