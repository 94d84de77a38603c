"""Rows come back as written; damaged, half-written or missing ones are made again. A file is read when new or changed, only."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt.data import storage
from softprompt.data.storage import KEY, Fingerprints, ShardStore, key_of
from softprompt.errors import InputError


def keys(*names: object) -> list[bytes]:
    return [key_of(repr(name)) for name in names]


def rows(*values: float) -> dict[str, torch.Tensor]:
    x = torch.tensor(values, dtype=torch.float32)
    return {"mean": x[:, None, None].expand(-1, 2, 3).contiguous(), "embeds": x[:, None] * torch.arange(4)}


def test_rows_come_back_in_the_order_asked_for_and_from_any_process(tmp_path):
    store = ShardStore(tmp_path / "s")
    store.write(keys(1, 2), rows(1.5, 2.5))
    store.write(keys(3), rows(3.5))
    for reader in (store, ShardStore(tmp_path / "s")):
        assert len(reader) == 3
        found = reader.read(keys(3, 1, 3))
        for name, expected in rows(3.5, 1.5, 3.5).items():
            assert torch.equal(found[name], expected), name


def test_what_is_not_there_is_none_and_is_told_apart(tmp_path):
    store = ShardStore(tmp_path / "absent")
    assert len(store) == 0 and store.read(keys(1)) is None and not (tmp_path / "absent").exists()
    store.write(keys(1, 2), rows(1, 2))
    assert store.read(keys(1, 4)) is None
    wanted = np.array([keys(1, 4), keys(5, 2)], dtype=KEY)
    np.testing.assert_array_equal(store.has(wanted), [[True, False], [False, True]])
    assert keys(2)[0] in store and keys(4)[0] not in store


def test_keys_that_end_in_zeros_are_keys(tmp_path):
    ends = [b"x" * 15 + b"\0", b"x" * 14 + b"\0\0", b"\0" * 16]
    store = ShardStore(tmp_path)
    store.write(ends, rows(1, 2, 3))
    assert [float(ShardStore(tmp_path).read([key])["mean"][0, 0, 0]) for key in ends] == [1, 2, 3]


def test_another_process_s_shards_are_seen_after_a_refresh(tmp_path):
    mine, theirs = ShardStore(tmp_path), ShardStore(tmp_path)
    theirs.write(keys(1), rows(1))
    assert mine.read(keys(1)) is None
    assert mine.refresh() == [] and mine.read(keys(1)) is not None
    theirs.write(keys(1), rows(1))  # the same again is the same shard
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_shard_cut_short_is_removed_and_the_others_stay(tmp_path, share):
    store = ShardStore(tmp_path)
    store.write(keys(1), rows(1))
    before = set(tmp_path.iterdir())
    store.write(keys(2), rows(2))
    (cut,) = set(tmp_path.iterdir()) - before
    cut.write_bytes(cut.read_bytes()[: int(share * cut.stat().st_size)])
    fresh = ShardStore(tmp_path)
    assert not cut.exists() and len(fresh) == 1 and fresh.read(keys(1)) is not None


def test_a_changed_byte_anywhere_is_a_missing_row_never_a_wrong_one(tmp_path):
    store = ShardStore(tmp_path)
    store.write(keys(1, 2), rows(1.5, 2.5))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    wrong = []
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        found = ShardStore(tmp_path).read(keys(1, 2))
        if found is not None and not all(torch.equal(found[name], x) for name, x in rows(1.5, 2.5).items()):
            wrong.append(place)
    assert wrong == []


def test_a_row_damaged_since_it_was_opened_takes_its_shard_with_it(tmp_path):
    store = ShardStore(tmp_path)
    store.write(keys(1), rows(1))
    (path,) = tmp_path.iterdir()
    one = np.float32(1).tobytes()
    assert path.read_bytes().count(one) > 5
    path.write_bytes(path.read_bytes().replace(one, b"\0\0\0\0", 1))
    assert store.read(keys(1)) is None and not path.exists() and keys(1)[0] not in store
    store.write(keys(1), rows(1))
    assert store.read(keys(1)) is not None


def test_many_shards_are_read_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_SHARDS", 3)
    store = ShardStore(tmp_path)
    for number in range(10):
        store.write(keys(number), rows(number))
    for number in (*range(10), *range(10)):
        assert float(store.read(keys(number))["mean"][0, 0, 0]) == number
    assert len(store._open) == 3


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    store = ShardStore(tmp_path)
    store.write(keys(1), rows(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\).*disk is full or read-only"):
        store.write(keys(2), rows(2))
    assert len(list(tmp_path.iterdir())) == 1 and store.read(keys(1)) is not None and store.read(keys(2)) is None


def test_half_written_files_are_left_alone_while_they_may_be_written_and_removed_later(tmp_path):
    young, old = tmp_path / ".a.partial-1.safetensors", tmp_path / ".b.partial-2.safetensors"
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    ShardStore(tmp_path)
    assert young.exists() and not old.exists()


WRITER = """
import sys, torch
from pathlib import Path
from softprompt.data.storage import ShardStore, key_of
store = ShardStore(Path(sys.argv[1]))
for n in range(10**6):
    print(n, flush=True)
    store.write([key_of(n, i) for i in range(50)], {"mean": torch.full((50, 4, 64), float(n))})
"""


def test_a_process_killed_while_it_writes_loses_that_shard_alone(tmp_path: Path):
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        begun = [int(writer.stdout.readline()) for _ in range(40)][-1]
        writer.kill()
        writer.wait()
        store = ShardStore(tmp_path)
        assert store.refresh() == [], "nothing unreadable is left under a shard's name"
        for number in range(begun):  # all before the one it had begun
            found = store.read([key_of(number, i) for i in range(50)])
            assert found is not None and bool((found["mean"] == number).all()), number


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
    content = storage._content

    def counted(file: Path) -> bytes:
        seen.append(Path(file).name)
        return content(file)

    monkeypatch.setattr(storage, "_content", counted)
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
