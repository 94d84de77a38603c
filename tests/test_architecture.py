"""The rules of docs/architecture.md that a machine can hold."""

import re

from tests.architecture import PACKAGES, ROOT, circle, imports, longest_chain, modules, modules_in_folders

LONGEST_CHAIN, WIDEST_FOLDER, LONGEST_FILE = 8, 14, 400


def test_the_library_imports_nothing_of_the_commands() -> None:
    graph = imports()
    assert {m: o for m, others in graph.items() for o in others if m.startswith("softprompt") and o.startswith("train")} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(imports()) == []


def test_no_chain_of_imports_is_longer_than_a_reader_can_follow() -> None:
    chain = longest_chain(imports())
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_no_folder_is_wider_and_no_file_longer_than_allowed() -> None:
    assert {folder: count for folder, count in modules_in_folders().items() if count > WIDEST_FOLDER} == {}
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules(*PACKAGES).items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_page_names_every_folder_and_no_module_that_is_not_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page[: page.index("## Rules")]
    known = {file.name for file in modules(*PACKAGES).values()}
    assert set(re.findall(r"\b\w+\.py\b", tree)) <= known
    assert {folder for folder in modules_in_folders() if f"{folder.split('/')[-1]}/" not in tree} == set()
