"""A file is read when it is new or changed, and only then."""

import os
import time
from pathlib import Path

import pytest

from softprompt.data import fingerprints
from softprompt.data.fingerprints import Fingerprints

LONG_AGO = time.time() - 100


def write(path: Path, text: str, *, changed: float = LONG_AGO) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, (changed, changed))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "data" / name, name) for name in ("a", "b")]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the files that are read."""
    seen: list[str] = []
    content = fingerprints._content

    def counted(file: Path) -> bytes:
        seen.append(Path(file).name)
        return content(file)

    monkeypatch.setattr(fingerprints, "_content", counted)
    return seen


def test_contents_are_those_of_the_bytes(tmp_path: Path, files: list[Path]) -> None:
    prints = Fingerprints(tmp_path / "kept", 2)
    first, second = prints.of("x", files)
    assert len(first) == len(second) == 16 and first != second
    write(files[1], "a", changed=LONG_AGO + 1)
    assert prints.of("x", files) == [first, first]


def test_unchanged_files_are_read_once_also_by_the_next_run(tmp_path: Path, files: list[Path], read: list[str]) -> None:
    prints = Fingerprints(tmp_path / "kept", 2)
    expected = prints.of("x", files)
    assert prints.of("x", files) == expected and read == ["a", "b"]
    prints.save()
    again = Fingerprints(tmp_path / "kept", 2)
    assert again.of("x", files) == expected and read == ["a", "b"]
    assert Fingerprints(tmp_path / "other", 2).of("x", files) == expected and read == ["a", "b", "a", "b"]


def test_a_change_is_seen_by_size_or_time(tmp_path: Path, files: list[Path]) -> None:
    prints = Fingerprints(tmp_path / "kept", 2)
    first = prints.of("x", files)
    write(files[0], "c", changed=LONG_AGO + 5)  # as long as before
    second = prints.of("x", files)
    assert second[0] != first[0] and second[1] == first[1]
    write(files[0], "longer", changed=LONG_AGO + 5)  # at the same time
    assert prints.of("x", files)[0] != second[0]


def test_a_file_changed_just_now_is_not_trusted_to_stay(tmp_path: Path, files: list[Path], read: list[str]) -> None:
    now = time.time()
    write(files[0], "new", changed=now)
    prints = Fingerprints(tmp_path / "kept", 2)
    first = prints.of("x", files)
    write(files[0], "odd", changed=now)  # same size, same tick of the clock
    assert prints.of("x", files) != first


def test_what_is_known_is_told_without_a_look_at_the_files(tmp_path: Path, files: list[Path]) -> None:
    prints = Fingerprints(tmp_path / "kept", 2)
    expected = prints.of("x", files)
    prints.save()
    for file in files:
        file.unlink()
    for reader in (prints, Fingerprints(tmp_path / "kept", 2)):
        found, contents = reader.known(["y", "x"])
        assert found.tolist() == [False, True]
        assert [bytes(c).ljust(16, b"\0") for c in contents[1]] == expected
    assert Fingerprints(tmp_path / "kept", 2).known([])[0].shape == (0,)


def test_two_processes_keep_what_the_other_has_kept(tmp_path: Path, files: list[Path]) -> None:
    one, two = Fingerprints(tmp_path / "kept", 2), Fingerprints(tmp_path / "kept", 2)
    one.of("x", files)
    two.of("y", files[::-1])
    one.save()
    two.save()
    assert Fingerprints(tmp_path / "kept", 2).known(["x", "y", "z"])[0].tolist() == [True, True, False]


@pytest.mark.parametrize("damage", [b"", b"no safetensors at all", None])
def test_a_damaged_table_is_no_more_than_a_slower_start(tmp_path: Path, files: list[Path], damage: bytes | None) -> None:
    kept = tmp_path / "kept"
    prints = Fingerprints(kept, 2)
    expected = prints.of("x", files)
    prints.save()
    kept.write_bytes(kept.read_bytes()[:-7] if damage is None else damage)
    fresh = Fingerprints(kept, 2)
    assert not fresh.known(["x"])[0].any() and fresh.of("x", files) == expected
    fresh.save()
    assert Fingerprints(kept, 2).known(["x"])[0].all()
    assert not Fingerprints(kept, 3).known(["x"])[0].any(), "a table of other groups is none"


def test_a_missing_file_is_the_caller_s_to_tell(tmp_path: Path, files: list[Path]) -> None:
    files[1].unlink()
    with pytest.raises(FileNotFoundError):
        Fingerprints(tmp_path / "kept", 2).of("x", files)
