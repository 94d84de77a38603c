"""Files and folders appear whole or not at all; paths as users write them."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softprompt.errors import InputError
from softprompt.files import expanded, new_file, new_folder, read_json, remove_partial, write_json


class Stop(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert partial.parent == target.parent and not target.exists()
    assert (target / "sub" / "x").read_text() == "1" and names(target.parent) == ["b"]


@pytest.mark.parametrize("empty_there", [False, True])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, empty_there: bool) -> None:
    if empty_there:
        (tmp_path / "b").mkdir()
    with pytest.raises(Stop), new_folder(tmp_path / "b") as partial:
        (partial / "x").write_text("half")
        raise Stop
    assert names(tmp_path) == (["b"] if empty_there else [])
    assert not empty_there or names(tmp_path / "b") == []


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with new_folder(tmp_path / "b") as partial:
        (partial / "x").write_text("1")
    assert names(tmp_path / "b") == ["x"]


@pytest.mark.parametrize("kind", ["full folder", "file"])
def test_what_is_there_is_not_written_over(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "b"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / ".hidden").write_text("precious")
    with pytest.raises(InputError, match=r"b: exists already and is not an empty folder"), new_folder(target):
        pytest.fail("the block was entered")
    assert (target if kind == "file" else target / ".hidden").read_text() == "precious"
    assert names(tmp_path) == ["b"]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.json"
    with new_file(target) as partial:
        partial.write_text("old")
        assert partial.suffix == ".json" and not target.exists()
    with pytest.raises(Stop), new_file(target) as partial:
        partial.write_text("half")
        raise Stop
    assert target.read_text() == "old"
    with new_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and names(target.parent) == ["x.json"]


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with new_file(tmp_path / "f.safetensors") as partial:
        save_file({"x": torch.ones(1)}, partial)
        os.chmod(partial, 0o600)
    with new_folder(tmp_path / "folder") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "f").touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) != 0o700, "readable by its owner alone, as tempfile makes it"
    for file in (tmp_path / "f.safetensors", tmp_path / "folder" / "sub" / "f"):
        assert stat.S_IMODE(file.stat().st_mode) == expected, file


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """os.umask, put back after the test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_folders_have_the_permissions_of_any_new_folder(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "f").touch()
    with new_folder(tmp_path / "a" / "folder") as partial:
        (partial / "sub").mkdir(mode=0o700)
        (partial / "sub" / "f").touch(mode=0o600)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").rglob("*")}
    assert modes == {"folder": 0o777 & ~mask, "sub": 0o777 & ~mask, "f": 0o666 & ~mask}
    assert modes["folder"] == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert modes["f"] == stat.S_IMODE((tmp_path / "plain" / "f").stat().st_mode)
    assert umask(mask) == mask, "the process has another umask than before"


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    file_manager = new_file(tmp_path / "run" / "config.yaml")
    folder_manager = new_folder(tmp_path / "run" / "checkpoints" / "step-000002")
    hidden_manager = new_folder(tmp_path / "run" / ".export.new")
    partial = [manager.__enter__() for manager in (file_manager, folder_manager, hidden_manager)]  # and never left
    partial[0].write_text("half")
    for folder in partial[1:]:
        (folder / "sub").mkdir()
        (folder / "sub" / "state.pt").write_text("half")
        (folder / "sub" / ".progress.partial-7.json").write_text("half")  # in what is removed with it
    stay = ["config.yaml", "checkpoints/step-000001/state.pt", "export/.hidden", "partial-1", ".partial", "a.partial-1"]
    for name in stay:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("whole")
    (tmp_path / ".beside.partial-1").write_text("of another run")
    remove_partial(tmp_path / "run")
    assert {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()} == set(stay)
    assert not any(p.exists() for p in partial)
    assert (tmp_path / ".beside.partial-1").exists()
    remove_partial(tmp_path / "run")  # nothing left to do
    remove_partial(tmp_path / "none")


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json", what="a test") == content
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json: not found; the index was expected there"),
        (b"{", r"x\.json: cannot be read as JSON \(.*\); the index was expected there"),
        (b"\xff\xfe{}", r"x\.json: cannot be read as JSON"),
        (b"[1]", r"x\.json: holds a JSON list; the index was expected there"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json", what="the index")


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the environment variables of these tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA", "/disk/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


@pytest.mark.usefixtures("place")
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


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("given", ["$NOT_SET/mice", "${NOT_SET}", "$DATA/${NOT_SET}/x"])
def test_a_variable_that_is_not_set_is_named(given: str) -> None:
    with pytest.raises(
        InputError, match=r"^data\.train: is \S+; the environment variable NOT_SET is not set; expected [^\n]*$"
    ):
        expanded(given, option="data.train")


@pytest.mark.usefixtures("place")
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
