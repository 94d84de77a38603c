"""An export reaches FaceLift by the printed commands, and never fills a disk."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from softprompt.errors import InputError
from train.export import FACELIFT_MODEL, FACELIFT_PROMPT, check_free_space, how_to_use


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def facelift_tree(folder: Path) -> Path:
    """FaceLift's repository, as far as the commands touch it."""
    (folder / "FACELIFT" / FACELIFT_PROMPT).parent.mkdir(parents=True)
    (folder / "FACELIFT" / FACELIFT_PROMPT).write_bytes(b"their prompt")
    (folder / "FACELIFT" / FACELIFT_MODEL / "unet").mkdir(parents=True)
    (folder / "FACELIFT" / FACELIFT_MODEL / "unet" / "config.json").write_bytes(b"their unet")
    (folder / "FACELIFT" / FACELIFT_MODEL / "only_theirs.txt").write_bytes(b"theirs")
    return folder / "FACELIFT"


def some_export(folder: Path) -> Path:
    (folder / "pipeckpts" / "unet").mkdir(parents=True)
    (folder / "pipeckpts" / "unet" / "config.json").write_bytes(b"our unet")
    (folder / "clr_embeds.pt").write_bytes(b"our prompt")
    return folder


def use(export_folder: Path, cwd: Path) -> None:
    """Run what is printed, as a person would."""
    commands = [line for line in how_to_use(export_folder) if line.startswith("  ")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["sh", "-c", command], cwd=cwd, check=True, capture_output=True)


IN_PLACE = {
    FACELIFT_PROMPT: b"our prompt",
    f"{FACELIFT_PROMPT}.original": b"their prompt",
    f"{FACELIFT_MODEL}/unet/config.json": b"our unet",
    f"{FACELIFT_MODEL}.original/unet/config.json": b"their unet",
    f"{FACELIFT_MODEL}.original/only_theirs.txt": b"theirs",
}


def test_the_printed_commands_put_an_export_in_place_and_keep_the_originals(tmp_path: Path) -> None:
    tree = facelift_tree(tmp_path)
    use(some_export(tmp_path / "runs" / "micro-001" / "export"), tmp_path)
    assert contents(tree) == IN_PLACE


def test_the_printed_commands_keep_the_originals_when_run_again(tmp_path: Path) -> None:
    tree = facelift_tree(tmp_path)
    folder = some_export(tmp_path / "export")
    use(folder, tmp_path)
    (folder / "clr_embeds.pt").write_bytes(b"our second prompt")
    use(folder, tmp_path)
    assert contents(tree) == IN_PLACE | {FACELIFT_PROMPT: b"our second prompt"}


def test_the_printed_commands_work_from_a_folder_with_a_space_in_its_name(tmp_path: Path) -> None:
    tree = facelift_tree(tmp_path)
    use(some_export(tmp_path / "my runs" / "export"), tmp_path)
    assert contents(tree) == IN_PLACE


# ----------------------------------------------------------------------------------------------------------------- space


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
