"""Room on the disk: a run that would fill it is refused before it begins."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from softprompt.errors import InputError
from train.export.write import check_free_space


def test_a_disk_without_room_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=3_000_000_000))
    run = tmp_path / "runs" / "micro-001"
    check_free_space(run, 3_000_000_000)
    with pytest.raises(
        InputError, match=r"output: .* has 3\.0 GB free; the run needs about 3\.5 GB more .* another disk, or --export"
    ):
        check_free_space(run, 3_500_000_000)
    assert asked == [tmp_path, tmp_path] and not run.parent.exists()


def test_what_a_resumed_run_holds_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (tmp_path / "state.pt").write_bytes(bytes(500))
    check_free_space(tmp_path, 1500)
    with pytest.raises(InputError):
        check_free_space(tmp_path, 1501)
