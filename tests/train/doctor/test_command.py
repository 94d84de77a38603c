"""The command, its page, and its errors in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from softprompt.data.decode import decode
from tests.browser import Seen
from tests.train.doctor.conftest import FILES, SIZE, Doctor, mouse, reorder
from train.doctor.__main__ import main


def test_the_page_opens_on_a_telephone_and_on_a_desk(herd: Path, doctor: Doctor, check_page: Callable[[Path], Seen]) -> None:
    (mouse(herd, 1) / FILES[3]).unlink()
    reorder(mouse(herd, 2), (1, 0, 2, 3, 4, 5))
    shutil.copytree(mouse(herd, 3), herd / "<b>again & again")
    doctor(herd)
    page = herd.parent / "doctor" / "doctor.html"
    assert "<b>" not in page.read_text()
    assert check_page(page).pictures == 4 * 6 - 1


def test_the_page_shows_some_of_each_kind_where_there_are_many(
    herd: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.doctor.report.MOST_STRIPS", 3)
    for file in (mouse(herd, n) / name for n in range(10) for name in FILES):
        white = Image.new("RGBA", (SIZE, SIZE), "white")
        Image.alpha_composite(white, decode(file)).convert("RGB").save(file)
    reorder(mouse(herd, 11), (1, 0, 2, 3, 4, 5))
    doctor(herd)
    page = (herd.parent / "doctor" / "doctor.html").read_text()
    assert page.count('class="sample"') == 3 and "<h3>mice-00011</h3>" in page and "8 more have findings" in page


def test_an_earlier_report_is_replaced_and_nothing_else(
    colony: Path, tmp_path: Path, doctor: Doctor, error_of: Callable[..., str]
) -> None:
    doctor(mouse(colony))
    doctor(mouse(colony, 8))
    assert "mice-00008" in (tmp_path / "doctor" / "doctor.html").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "doctor.html").write_text("of a physician")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "doctor.html", colony):
        assert "something else than an earlier report" in error_of(main, f"--data.train={colony}", f"--output={folder}")
    assert (tmp_path / "mine" / "doctor.html").read_text() == "of a physician"


def test_a_list_from_another_machine_is_read_and_named(herd: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = sorted(path.name for path in herd.iterdir())
    (herd / "list.txt").write_text("".join(f"/elsewhere/{name}\n" for name in names))
    argv = [f"--data.train={herd / 'list.txt'}", f"--size={SIZE}", f"--output={tmp_path / 'doctor'}"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"WARNING    {herd / 'list.txt'}: its 12 absolute paths are another machine's") == 1
    shutil.rmtree(herd / names[0])
    assert main(argv) == 2
    assert "beside the list are 11 of its 12 folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ([], "no samples in 0 sub-folders, no pictures"),
        (["a/", "b/"], "no samples in 2 sub-folders"),
        (["front.png"], "1 pictures (front.png); expected sub-folders with cam_000.png"),
    ],
)
def test_a_folder_without_samples_is_an_error_in_one_line(
    tmp_path: Path, error_of: Callable[..., str], inside: list[str], message: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in inside:
        (folder / name).mkdir() if name.endswith("/") else Image.new("RGBA", (8, 8)).save(folder / name)
    error = error_of(main, f"--data.train={folder}", f"--output={tmp_path / 'doctor'}")
    assert error.startswith("error: --data.train: ") and message in error
    assert not (tmp_path / "doctor").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "data.train"),
        (["--data.train=x", "--siz=3"], "unknown option 'siz'; did you mean 'size'?"),
        (["--data.train=x", "--size=0"], "size: is 0; expected 1 or more"),
        (["--data.train=x", "--views=six"], "views: is six; expected a whole number"),
        (["--data.train=no/where"], "--data.train: no/where: not found"),
        (["--data.train=micro"], "--data.train: is micro, the embedded world"),
    ],
)
def test_bad_options_are_errors_in_one_line(
    options: list[str], message: str, error_of: Callable[..., str], tmp_path: Path
) -> None:
    assert message in error_of(main, *options, f"--output={tmp_path / 'doctor'}")
