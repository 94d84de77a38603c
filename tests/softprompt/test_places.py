"""Paths as users write them."""

from pathlib import Path

import pytest

from softprompt.errors import InputError, base_of, no_folder
from softprompt.files import expanded
from softprompt.prompt.templates import is_prompt_file


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA", "/disk/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "given, meant",
    [
        ("~/mice", "/home/somebody/mice"),
        ("~", "/home/somebody"),
        ("$HOME/mice", "/home/somebody/mice"),
        ("${DATA}/mice", "/disk/data/mice"),
        ("$DATA", "/disk/data"),
        ("runs/${DATA}x", "runs//disk/datax"),
        ("mice/", "mice/"),
        ("mice~", "mice~"),
        ("a/~/b", "a/~/b"),
        ("micro", "micro"),
        ("", ""),
    ],
)
def test_home_and_variables_are_filled_in_as_a_shell_does(given: str, meant: str) -> None:
    assert expanded(given, option="x") == meant


@pytest.mark.parametrize("given", ["$NOT_SET/mice", "${NOT_SET}", "$DATA/${NOT_SET}/x"])
def test_a_variable_that_is_not_set_is_named(given: str) -> None:
    with pytest.raises(
        InputError, match=r"^data\.train: is \S+; the environment variable NOT_SET is not set; expected [^\n]*$"
    ):
        expanded(given, option="data.train")


def test_a_user_that_there_is_not_is_named() -> None:
    with pytest.raises(InputError, match=r"^output: is ~nobody_at_all/x; this machine has no user 'nobody_at_all'[^\n]*$"):
        expanded("~nobody_at_all/x", option="output")


def test_a_name_that_is_there_and_cannot_be_filled_in_stays(place: Path) -> None:
    for name in ("price$NOT_SET", "~nobody_at_all"):
        (place / name).mkdir()
        assert expanded(name, option="x") == name


def test_a_folder_named_like_home_does_not_hide_it(place: Path) -> None:
    (place / "~").mkdir()
    assert expanded("~", option="x") == "/home/somebody"


def test_what_names_a_prompt_is_a_file_or_a_text() -> None:
    files = ("clr_embeds.pt", "$DATA/x.safetensors", "${DATA}/x", "${DATA}/clr_embeds.pt", "mine.npy", "folder", "~/folder")
    texts = ("facelift", "a ${view} of 5$ mice", "$HOME, {view} view", "a {subject}, {view}")
    assert [name for name in (*files, *texts) if is_prompt_file(name)] == list(files)


def test_a_relative_path_is_said_with_the_folder_it_is_relative_to(place: Path) -> None:
    assert base_of("mice") == f" in the working directory {place}"
    assert base_of(place / "mice") == ""
    assert no_folder("mice") == f"; there is no such folder in the working directory {place}" and no_folder(place) == ""
