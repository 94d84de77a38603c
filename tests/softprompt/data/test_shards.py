"""Rows come back as they were written; what is damaged, half-written or missing is only made again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt.data import shards
from softprompt.data.shards import KEY, ShardStore, key_of
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
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 3)
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

    monkeypatch.setattr(shards, "save_file", full)
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
from softprompt.data.shards import ShardStore, key_of
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
