"""An export in FaceLift's repository, and out of it again: not a byte of what was there is lost, wherever it is killed."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from softprompt.errors import InputError, RunError
from softprompt.prompt.embeddings import save_prompt
from tests.models import write_facelift
from train.export import facelift as facelift_module
from train.export.__main__ import main
from train.export.facelift import CHECK_XFORMERS, FACELIFT_MODEL, FACELIFT_PROMPT, how_to_use, put_in, undo

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")
PLACES = [FACELIFT_PROMPT, FACELIFT_MODEL]
UNET = "unet/config.json"
LOOKED_UP = "checkpoints/gslrm/weights.pt"


def tree(folder: Path) -> dict[str, bytes]:
    """The path of every file and folder, also the empty ones, and a digest of its content."""
    return {
        str(path.relative_to(folder)): blake2b(path.read_bytes()).digest() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Asserts that a folder is after the block as it was before."""
    before = tree(folder)
    yield
    assert tree(folder) == before


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def config(width: int) -> bytes:
    return b'{"cross_attention_dim": %d}' % width


def an_export(folder: Path, seed: int, *, model: str = "pipeckpts", width: int = 8) -> Path:
    """An export: the parts of prompt, LoRA and merged pipeline folder that are read here."""
    prompt = torch.randn(6, 77, width, generator=torch.Generator().manual_seed(seed))
    folder.mkdir(parents=True)
    save_prompt(prompt, folder / "clr_embeds.pt", metadata={"model": model})
    ours = {f"pipeckpts/{UNET}": config(width), "pipeckpts/unet/ours": b"weights %d" % seed, "lora/lora": b"lora"}
    return write(folder, ours)


@pytest.fixture
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk, which takes most of the time of these tests; they test no loss of power."""
    monkeypatch.setattr("softprompt.files._onto_the_disk", lambda _: None)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return an_export(tmp_path / "runs" / "mice-001" / "export", 1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return an_export(tmp_path / "runs" / "mice-002" / "export", 2)


EVERYTHING = {
    FACELIFT_PROMPT: b"their prompt",
    f"{FACELIFT_MODEL}/{UNET}": config(8),
    f"{FACELIFT_MODEL}/only_theirs": b"theirs",
    LOOKED_UP: b"",
}
"""FaceLift's own files in the places of an export."""


@pytest.fixture(params=["everything", "no pipeline", "no prompt", "nothing"])
def facelift_repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """FaceLift's repository, with the files that an export replaces, or without some."""
    without = {"everything": [], "no pipeline": [FACELIFT_MODEL], "no prompt": [FACELIFT_PROMPT]}
    kept = {n: c for n, c in EVERYTHING.items() if not n.startswith(tuple(without.get(request.param, PLACES)))}
    kept = {} if request.param == "nothing" else kept
    return write(write_facelift(tmp_path / "FaceLift"), kept)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """FaceLift's repository with its own prompt and pipeline."""
    return write(write_facelift(tmp_path / "whole"), EVERYTHING)


def is_in(repository: Path, export: Path, *, pipeline: bool = True) -> bool:
    """Whether FaceLift would load this export, and nothing half-written lies about."""
    same = (repository / FACELIFT_PROMPT).read_bytes() == (export / "clr_embeds.pt").read_bytes()
    if pipeline:
        same = same and tree(repository / FACELIFT_MODEL) == tree(export / "pipeckpts")
    return same and not list(repository.rglob("*.partial-*"))


def test_what_is_put_in_is_the_export_and_undone_it_is_what_was_there(facelift_repository: Path, export: Path) -> None:
    before = tree(facelift_repository)
    put_in(facelift_repository, export, with_pipeline=True)
    assert is_in(facelift_repository, export)
    after = tree(facelift_repository)
    for name in before.keys() & {FACELIFT_PROMPT, f"{FACELIFT_MODEL}/only_theirs"}:
        kept = name.replace(FACELIFT_MODEL, f"{FACELIFT_MODEL}.original").replace("embeds.pt", "embeds.pt.original")
        assert after[kept] == before[name]
    undo(facelift_repository)
    assert tree(facelift_repository) == before


def test_put_in_twice_it_is_the_second_and_undone_it_is_what_was_there_first(
    facelift_repository: Path, export: Path, other: Path
) -> None:
    with unchanged(facelift_repository):
        put_in(facelift_repository, export, with_pipeline=True)
        put_in(facelift_repository, other, with_pipeline=True)
        assert is_in(facelift_repository, other)
        undo(facelift_repository)


def test_a_prompt_alone_is_not_left_beside_another_export_s_pipeline(
    facelift_repository: Path, export: Path, other: Path
) -> None:
    before = tree(facelift_repository)
    put_in(facelift_repository, export, with_pipeline=True)
    lines = put_in(facelift_repository, other, with_pipeline=False)
    assert is_in(facelift_repository, other, pipeline=False) and any(
        "it belonged to an earlier prompt" in line for line in lines
    )
    ours = ("mvdiffusion/data", "mvdiffusion/data.no-original")  # where there was no prompt either
    assert {n: c for n, c in tree(facelift_repository).items() if not n.startswith(ours)} == {
        n: c for n, c in before.items() if not n.startswith(ours)
    }
    undo(facelift_repository)
    assert tree(facelift_repository) == before


def test_undone_twice_is_refused_and_so_is_what_was_never_put_in(facelift_repository: Path, export: Path) -> None:
    with unchanged(facelift_repository):
        with pytest.raises(InputError, match=r"--undo: .* holds nothing that --into put there"):
            undo(facelift_repository)
        put_in(facelift_repository, export, with_pipeline=False)
        undo(facelift_repository)
        with pytest.raises(InputError, match="likely it was undone already"):
            undo(facelift_repository)


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that is killed, as by kill -9, before the change of the disk with this number.

    Returns: whether it was killed; False where it made fewer changes.
    """
    child = os.fork()
    if child == 0:
        left = number

        def look(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            opened_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_CREAT)
            if event in CHANGES or opened_to_write:
                if left == 0:
                    os._exit(9)
                left -= 1

        sys.addaudithook(look)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the work itself failed"
    return code == 9


def test_killed_anywhere_it_is_undone_or_done_again(
    facelift_repository: Path, export: Path, other: Path, tmp_path: Path
) -> None:
    before, number = tree(facelift_repository), 0
    while killed_at(number, lambda: put_in(facelift_repository, export, with_pipeline=True)):
        again = Path(shutil.copytree(facelift_repository, tmp_path / "again" / str(number)))
        put_in(again, other, with_pipeline=True)
        assert is_in(again, other), number
        undo(again)
        assert tree(again) == before, number
        if tree(facelift_repository) != before:
            undo(facelift_repository)
        assert tree(facelift_repository) == before, number
        number += 1
    assert number > 10, "it was killed nowhere, so this test shows nothing"


def test_an_undo_that_is_killed_anywhere_is_done_again(facelift_repository: Path, export: Path, tmp_path: Path) -> None:
    before, number = tree(facelift_repository), 0
    put_in(facelift_repository, export, with_pipeline=True)
    while True:
        copy = Path(shutil.copytree(facelift_repository, tmp_path / "copies" / str(number)))
        killed = killed_at(number, lambda copy=copy: undo(copy))
        if tree(copy) != before:
            undo(copy)
        assert tree(copy) == before, number
        if not killed:
            break
        number += 1
    assert number > 3, "it was killed nowhere, so this test shows nothing"


def test_links_to_other_disks_are_kept_as_links(whole: Path, export: Path, tmp_path: Path) -> None:
    (whole / FACELIFT_MODEL).rename(tmp_path / "on_a_large_disk")
    (whole / FACELIFT_MODEL).symlink_to(tmp_path / "on_a_large_disk")
    theirs = tree(tmp_path / "on_a_large_disk")
    put_in(whole, export, with_pipeline=True)
    assert is_in(whole, export) and not (whole / FACELIFT_MODEL).is_symlink()
    undo(whole)
    assert (whole / FACELIFT_MODEL).is_symlink() and tree(tmp_path / "on_a_large_disk") == theirs


def test_what_came_into_a_new_folder_since_is_not_taken_away(whole: Path, export: Path) -> None:
    shutil.rmtree(whole / "checkpoints")
    put_in(whole, export, with_pipeline=True)
    (whole / LOOKED_UP).parent.mkdir()
    (whole / LOOKED_UP).write_bytes(b"downloaded meanwhile")
    undo(whole)
    assert [str(p.relative_to(whole)) for p in (whole / "checkpoints").rglob("*")] == ["checkpoints/gslrm", LOOKED_UP]
    assert not list(whole.rglob("*original"))


def test_a_copy_that_is_another_takes_nobody_s_place(whole: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copyfile = shutil.copyfile

    def damaged(source: Path, target: Path) -> None:
        copyfile(source, target)
        target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(facelift_module.shutil, "copyfile", damaged)
    with unchanged(whole), pytest.raises(RunError, match=r"clr_embeds\.pt was read back another than .*the disk is failing"):
        put_in(whole, export, with_pipeline=True)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("missing", ["inference.py", "mvdiffusion"])
def test_another_folder_than_facelift_s_is_refused(whole: Path, export: Path, missing: str) -> None:
    (whole / missing).rename(whole / "elsewhere")
    for call in (lambda: put_in(whole, export, with_pipeline=True), lambda: undo(whole)):
        message = rf"is not FaceLift's repository, it has no {missing}; expected a clone of"
        with unchanged(whole), pytest.raises(InputError, match=message):
            call()


def test_a_prompt_that_facelift_s_model_cannot_take_is_refused(whole: Path, tmp_path: Path) -> None:
    narrow = an_export(tmp_path / "narrow", 3, width=4)
    with unchanged(whole), pytest.raises(InputError, match=r"narrow: its prompt is 4 wide; .*unet/config\.json takes 8"):
        put_in(whole, narrow, with_pipeline=False)
    put_in(whole, narrow, with_pipeline=True)  # with a model that takes it
    with pytest.raises(InputError, match=r"pipeckpts\.original/unet/config\.json takes 8"):
        put_in(whole, narrow, with_pipeline=False)


def test_a_pipeline_that_the_export_has_not_is_refused_with_the_command_that_makes_it(whole: Path, export: Path) -> None:
    shutil.rmtree(export / "pipeckpts")
    with pytest.raises(
        InputError, match=r"holds no pipeckpts; .* python -m train\.export \S+ --pipeline --output FOLDER --into"
    ):
        put_in(whole, export, with_pipeline=True)


def test_a_disk_without_room_for_the_pipeline_is_refused(whole: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facelift_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 5))
    with unchanged(whole), pytest.raises(InputError, match=r"--into: .* has 0\.0 GB free"):
        put_in(whole, export, with_pipeline=True)


# ----------------------------------------------------------------------------------------------------- what is to be minded


def test_a_prompt_without_its_lora_is_told_of(whole: Path, export: Path) -> None:
    text = "\n".join(put_in(whole, export, with_pipeline=False))
    assert "WARNING    the LoRA is not in it" in text and "--pipeline" in text
    assert not any("WARNING" in line for line in put_in(whole, export, with_pipeline=True))
    shutil.rmtree(export / "lora")
    assert not any("WARNING" in line for line in put_in(whole, export, with_pipeline=False))


def test_a_prompt_of_the_micro_model_is_told_of(whole: Path, tmp_path: Path) -> None:
    micro = an_export(tmp_path / "micro", 4, model="micro")
    assert any("the embedded micro model" in line for line in put_in(whole, micro, with_pipeline=False))


@pytest.mark.parametrize("with_pipeline", [True, False])
def test_what_facelift_needs_for_these_views_is_told_with_the_command_that_checks_it(
    whole: Path, export: Path, with_pipeline: bool
) -> None:
    (text,) = [line for line in put_in(whole, export, with_pipeline=with_pipeline) if "xformers" in line]
    assert text.startswith("mind       ") and CHECK_XFORMERS in text and "sparse_mv_attention" in text


@pytest.mark.parametrize("flag", ["sparse_mv_attention", "multiview_attention"])
def test_a_model_that_does_not_attend_sparsely_needs_no_xformers(whole: Path, export: Path, flag: str) -> None:
    config = export / "pipeckpts" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {flag: False}))
    assert not any("xformers" in line for line in put_in(whole, export, with_pipeline=True))


def test_weights_that_facelift_would_download_over_ours_are_told_of(whole: Path, export: Path) -> None:
    shutil.rmtree(whole / "checkpoints" / "gslrm")
    assert any("will download its weights" in line for line in put_in(whole, export, with_pipeline=True))


# ------------------------------------------------------------------------------------------------------- the printed lines


def printed(export: Path) -> list[str]:
    return [line.strip() for line in how_to_use(export) if line.startswith("  python -m train.export")]


def run(command: str, repository: Path) -> int:
    """Run a printed command; FACELIFT stands for the repository."""
    words = shlex.split(command.replace("FACELIFT", shlex.quote(str(repository))))
    assert words[:3] == ["python", "-m", "train.export"]
    return main(words[3:])


@pytest.mark.parametrize("folder", ["export", "an export's folder"])
def test_the_printed_command_puts_an_export_in(
    whole: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export = an_export(tmp_path / folder, 5)
    with unchanged(whole):
        assert run(printed(export)[0], whole) == 0
        assert is_in(whole, export)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"to undo it: python -m train.export --undo {whole}"
        assert run(last.removeprefix("to undo it: "), whole) == 0
    assert run("python -m train.export --undo FACELIFT", whole) == 2
    assert "likely it was undone already" in capsys.readouterr().err


def test_it_works_inside_facelift_s_repository(whole: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole)
    with unchanged(whole):
        assert main([str(export), "--pipeline", "--into", "."]) == 0
        assert is_in(whole, export)
        assert main(["--undo", "."]) == 0


def test_the_printed_commands_name_what_the_export_has(export: Path) -> None:
    assert printed(export) == [
        f"python -m train.export {export} --into FACELIFT --pipeline",
        f"python -m train.export {export} --output FOLDER --lora peft kohya",
    ]
    shutil.rmtree(export / "pipeckpts")
    assert printed(export)[0] == f"python -m train.export {export} --pipeline --output FOLDER --into FACELIFT"
    shutil.rmtree(export / "lora")
    assert printed(export) == [
        f"python -m train.export {export} --into FACELIFT",
        f"python -m train.export {export} --output FOLDER",
    ]
    (export / "README.md").touch()
    assert printed(export) == [f"python -m train.export {export} --into FACELIFT"]
