"""Samples in and out: layouts, lists, and every error a user's data can cause."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softprompt.data.pictures import composite
from softprompt.data.samples import Subset, open_source, what_moved, write_source
from softprompt.errors import InputError


def random_picture(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)


def write_sample(folder: Path, *, views: range = range(6), seed: int = 0, mouse_layout: bool = False) -> Path:
    pictures = folder / "images" if mouse_layout else folder
    pictures.mkdir(parents=True)
    for view in views:
        Image.fromarray(random_picture(seed * 100 + view)).save(pictures / f"cam_{view:03d}.png")
    return folder


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ opening


def test_facelift_layout_is_read_as_it_is_in_the_files(tmp_path):
    source = open_source(write_sample(tmp_path / "cat_1"), size=16)
    assert source.names == ["cat_1"] and len(source) == 1
    views = source.load(0)
    assert views.dtype == torch.uint8 and views.shape == (6, 4, 16, 16) and views.is_contiguous()
    for view in range(6):
        np.testing.assert_array_equal(views[view].permute(1, 2, 0).numpy(), random_picture(view))


def test_mouse_layout_gives_the_same_as_facelift_s(tmp_path):
    plain = open_source(write_sample(tmp_path / "a"), size=16)
    mouse = open_source(write_sample(tmp_path / "b", mouse_layout=True), size=16)
    assert mouse.names == ["b"]
    assert torch.equal(plain.load(0), mouse.load(0))


def test_both_layouts_may_be_mixed_in_one_folder_and_are_sorted_by_name(tmp_path):
    write_sample(tmp_path / "m_2", seed=2, mouse_layout=True)
    write_sample(tmp_path / "m_1", seed=1)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("not a sample")
    source = open_source(tmp_path, size=16)
    assert source.names == ["m_1", "m_2"]
    np.testing.assert_array_equal(source.load(1)[3].permute(1, 2, 0).numpy(), random_picture(203))


def test_list_skips_blank_lines_and_comments_and_keeps_its_order(tmp_path):
    write_sample(tmp_path / "s_1")
    write_sample(tmp_path / "s_2")
    path = write_list(tmp_path / "list.txt", "\ufeff# two mice", "", "  s_2 ", "s_1\r", "#s_3")
    assert open_source(path, size=16).names == ["s_2", "s_1"]


def test_list_entries_are_looked_up_beside_the_list_then_in_the_working_directory(tmp_path, monkeypatch):
    write_sample(tmp_path / "lists" / "both", seed=1)
    write_sample(tmp_path / "work" / "both", seed=2)
    write_sample(tmp_path / "work" / "here", seed=3)
    write_sample(tmp_path / "far" / "away", seed=4)
    monkeypatch.chdir(tmp_path / "work")
    path = write_list(tmp_path / "lists" / "list.txt", "both", "here", str(tmp_path / "far" / "away"))
    source = open_source(path, size=16)
    assert source.names == ["both", "here", "away"]
    for index, seed in enumerate([1, 3, 4]):
        np.testing.assert_array_equal(source.load(index)[0].permute(1, 2, 0).numpy(), random_picture(seed * 100))


def test_equal_folder_names_are_led_by_as_many_parents_as_needed(tmp_path):
    folders = ["june/s", "july/s", "x/may/s", "y/may/s", "other"]
    for folder in folders:
        write_sample(tmp_path / folder)
    names = open_source(write_list(tmp_path / "list.txt", *folders), size=16).names
    assert names == ["june/s", "july/s", "x/may/s", "y/may/s", "other"]


def test_opening_decodes_nothing_and_lists_each_sample_once(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_sample(tmp_path / name)
        (tmp_path / name / "cam_000.png").write_bytes(b"no picture")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or scandir(path))
    source = open_source(write_list(tmp_path / "list.txt", "a", "b", "c"), size=16)
    assert listed == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"a/cam_000.png: cannot be decoded"):
        source.load(0)


def test_fewer_views_and_views_left_over(tmp_path):
    sample = write_sample(tmp_path / "s", views=range(8))
    assert open_source(sample, size=16, num_views=3).load(0).shape == (3, 4, 16, 16)
    assert open_source(sample, size=16).load(0).shape == (6, 4, 16, 16)


def test_facelift_s_own_sample_is_read_and_made_smaller(facelift):
    sample = facelift / "sample_000"
    full = open_source(sample, size=512).load(0)
    small = open_source(sample, size=64).load(0)
    for view in range(6):
        picture = np.array(Image.open(sample / f"cam_{view:03d}.png"))
        np.testing.assert_array_equal(full[view].permute(1, 2, 0).numpy(), picture)
    white = torch.ones(3)
    averaged = torch.nn.functional.avg_pool2d(composite(full, white), 8)
    assert (composite(small, white) - averaged).abs().mean() < 0.01


# ------------------------------------------------------------------------------------------------------------ writing


def test_what_is_written_reads_back_identical_from_the_list_and_from_the_folder(tmp_path):
    folders = ["june/s", "july/s", "other"]
    for seed, folder in enumerate(folders):
        write_sample(tmp_path / folder, seed=seed, mouse_layout=seed == 1)
    source = open_source(write_list(tmp_path / "list.txt", *folders), size=16)
    listing = write_source(source, tmp_path / "out")
    assert listing == tmp_path / "out" / "samples.txt"
    back = open_source(listing, size=16)
    assert back.names == ["june__s", "july__s", "other"]
    for index in range(3):
        assert torch.equal(back.load(index), source.load(index))
    assert open_source(tmp_path / "out", size=16).names == sorted(back.names)
    assert sorted(os.listdir(tmp_path / "out" / "other")) == [f"cam_{view:03d}.png" for view in range(6)]


def test_writing_into_a_folder_that_holds_something_is_refused_and_nothing_is_left(tmp_path):
    source = open_source(write_sample(tmp_path / "s"), size=16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"out: exists already"):
        write_source(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    (tmp_path / "s" / "cam_004.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"cam_004.png"):
        write_source(source, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["out", "s"]


# ------------------------------------------------------------------------------------------------------------- errors


def failing_open(path: Path, match: str, **options) -> str:
    with pytest.raises(InputError, match=match) as caught:
        open_source(path, size=16, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_path(tmp_path):
    failing_open(tmp_path / "nowhere", r"nowhere: not found; expected a list of samples or a folder")


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing yet\n"])
def test_empty_list(tmp_path, content):
    (tmp_path / "list.txt").write_text(content)
    failing_open(tmp_path / "list.txt", r"list.txt: lists no sample; expected .* one sample folder a line")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x80\x02PK\xff\xfe", "cannot be read as a list .*can't decode"),
        ("Mäuse\n".encode("latin-1"), "can't decode"),
        (b"a\0b", "NUL characters"),
    ],
)
def test_list_that_is_no_text(tmp_path, content, found):
    (tmp_path / "list.txt").write_bytes(content)
    failing_open(tmp_path / "list.txt", rf"list.txt: .*{found}.*expected a UTF-8 text .*likely another kind of file")


def test_folder_without_samples(tmp_path):
    failing_open(tmp_path, r"no samples in 0 sub-folders, no pictures; expected sub-folders with cam_000.png")
    (tmp_path / "a" / "b").mkdir(parents=True)
    failing_open(tmp_path, r"no samples in 1 sub-folders, no pictures; .* a level too high or too low")
    for view in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"view{view}.png")
    failing_open(tmp_path, r"6 pictures \(view0.png, view1.png, view2.png, view3.png and 2 more\).*named otherwise")


def test_folder_where_some_sub_folders_are_no_samples(tmp_path):
    write_sample(tmp_path / "s_1")
    (tmp_path / "logs").mkdir()
    failing_open(tmp_path, r"1 of 2 sub-folders have no cam_ pictures \(logs\).*give a list file")


def test_list_with_missing_samples_names_the_line_the_number_and_both_folders(tmp_path, monkeypatch):
    write_sample(tmp_path / "lists" / "s_1")
    (tmp_path / "lists" / "file").write_text("")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = write_list(tmp_path / "lists" / "list.txt", "# mice", "s_1", "s_2", "file", "/no/such/place")
    message = failing_open(path, r"list.txt: line 3: 's_2' \(No such file.*3 of 4 samples listed are missing")
    assert f"{tmp_path / 'lists'} (the list's folder)" in message
    assert f"{tmp_path / 'work'} (the working directory)" in message


def test_list_with_a_sample_twice(tmp_path):
    write_sample(tmp_path / "s")
    path = write_list(tmp_path / "list.txt", "s", "", "./s/")
    failing_open(path, r"list.txt: line 3 names './s/' again, after line 1; expected every sample once")


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("mouse_layout", [False, True])
def test_sample_with_five_pictures_names_the_missing_one(tmp_path, as_list, mouse_layout):
    sample = write_sample(tmp_path / "s", mouse_layout=mouse_layout)
    next(sample.rglob("cam_003.png")).unlink()
    path = write_list(tmp_path / "list.txt", "s") if as_list else sample
    where = "s/images" if mouse_layout else "s"
    failing_open(path, rf"{where}: cam_003.png missing, 5 of 6 views found; expected cam_000.png to cam_005.png")


def test_sample_numbered_from_one_is_recognised(tmp_path):
    write_sample(tmp_path / "s", views=range(1, 7))
    failing_open(tmp_path / "s", r"cam_000.png missing, .* numbered or named otherwise \(cam_006.png\)")


def test_all_incomplete_samples_are_counted(tmp_path):
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b", views=range(4))
    write_sample(tmp_path / "c", views=range(5))
    failing_open(tmp_path, r"b: cam_004.png, cam_005.png missing, 4 of 6 .*a view was not exported; 1 more samples are")


def test_picture_name_that_is_a_folder_is_missing(tmp_path):
    sample = write_sample(tmp_path / "s", views=range(5))
    (sample / "cam_005.png").mkdir()
    failing_open(sample, r"cam_005.png missing")


def test_picture_deleted_after_opening(tmp_path):
    source = open_source(write_sample(tmp_path / "s"), size=16)
    (tmp_path / "s" / "cam_001.png").unlink()
    with pytest.raises(InputError, match=r"cam_001.png: not found"):
        source.load(0)


@pytest.mark.parametrize("size", [16, 8])
def test_picture_without_foreground(tmp_path, size):
    sample = write_sample(tmp_path / "s")
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(sample / "cam_005.png")
    with pytest.raises(InputError, match=rf"cam_005.png: no visible pixel at {size}x{size} .*likely the segmentation"):
        open_source(sample, size=size).load(0)


# ----------------------------------------------------------------------------------------------------- formats and endings


def write_as(folder, ending, views=range(6)):
    """Opaque views, of sizes that tell them apart where the format loses something."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in views:
        Image.new("RGB", (16, 16), (40 * view, 100, 200)).save(folder / f"cam_{view:03d}{ending}")
    return folder


@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".PNG", ".JPG"])
@pytest.mark.parametrize("inside", ["", "images"])
def test_frames_of_every_format_are_read(tmp_path, ending, inside):
    write_as(tmp_path / "s" / inside, ending)
    views = open_source(tmp_path / "s", size=16).load(0)
    for view in range(6):
        assert (views[view, 3] == 255).all()
        assert abs(int(views[view, 0].float().mean()) - 40 * view) <= 4, "a lossy format may move a colour a little"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (range(6), [3], r"s: view 3 is there 2 times \(cam_003\.jpg, cam_003\.png\); expected one picture a view"),
        (range(4), [4, 5], r"s: mixed formats \(cam_000\.png, cam_004\.jpg\); expected one picture a view, all of one format"),
    ],
)
def test_a_sample_of_two_formats_is_refused(tmp_path, first, second, message):
    write_as(tmp_path / "s", ".png", first)
    write_as(tmp_path / "s", ".jpg", second)
    failing_open(tmp_path / "s", message)


def test_one_format_in_two_spellings_is_one(tmp_path):
    write_as(tmp_path / "s", ".jpg", range(3))
    write_as(tmp_path / "s", ".JPEG", range(3, 6))
    assert open_source(tmp_path / "s", size=16).load(0).shape == (6, 4, 16, 16)


def test_a_missing_frame_of_another_format_is_missing(tmp_path):
    write_as(tmp_path / "s", ".jpg", range(5))
    failing_open(
        tmp_path / "s", r"cam_005\.jpg missing, 5 of 6 views found; expected cam_000\.jpg to cam_005\.jpg; likely a view"
    )


def test_pictures_in_the_sample_come_before_those_in_its_images_whatever_the_formats(tmp_path):
    """The files that are loaded are those that were found."""
    write_as(tmp_path / "s", ".jpg", range(6))
    write_sample(tmp_path / "s" / "images")
    assert open_source(tmp_path / "s", size=16).files(0) == [tmp_path / "s" / f"cam_{view:03d}.jpg" for view in range(6)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "view{}.jpg",
            r"6 pictures in s \(view0\.jpg, .*\); expected sub-folders with cam_000\.png, .*, each a PNG, JPEG, WebP",
        ),
        ("CAM_00{}.png", r"6 pictures in s \(CAM_000\.png, .*; likely pictures numbered or named otherwise"),
        ("cam_00{}.bmp", r"6 pictures in s \(cam_000\.bmp, .*; likely pictures of a format that is not read"),
        ("images/cam_00{}.HEIC", r"6 pictures in s/images \(cam_000\.HEIC, .*; likely pictures of a format that is not read"),
    ],
)
def test_pictures_that_are_taken_for_no_view_are_named(tmp_path, names, message):
    (tmp_path / "s" / "images").mkdir(parents=True)
    for view in range(6):
        (tmp_path / "s" / names.format(view)).touch()
    failing_open(tmp_path, "no samples in 1 sub-folders, " + message)


def test_a_format_that_is_not_read_in_a_listed_sample_is_named(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "cam_000.bmp").touch()
    message = (
        r"0 of 6 views found; expected cam_000\.png to cam_005\.png, each a PNG, JPEG, WebP or TIFF; likely the pictures are"
    )
    failing_open(write_list(tmp_path / "list.txt", "s"), message + r" of a format that is not read \(cam_000\.bmp\)")


# ------------------------------------------------------------------------------------------- lists from another machine


def test_a_list_of_another_machine_finds_its_samples_beside_it(tmp_path):
    for name in ("a", "b"):
        write_sample(tmp_path / name)
    (tmp_path / "list.txt").write_text("/elsewhere/data/a\n/elsewhere/data/b\n")
    source = open_source(tmp_path / "list.txt", size=16)
    assert source.locations == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert what_moved(source, Subset(source, [1])) == [source.moved] and "its 2 absolute paths" in source.moved
    (tmp_path / "right.txt").write_text("a\nb\n")
    assert open_source(tmp_path / "right.txt", size=16).moved == ""


def test_a_list_of_another_machine_keeps_the_folders_that_tell_its_samples_apart(tmp_path):
    for name in ("june/mouse", "july/mouse"):
        write_sample(tmp_path / name)
    (tmp_path / "list.txt").write_text("/elsewhere/june/mouse\n/elsewhere/july/mouse/\n")
    assert open_source(tmp_path / "list.txt", size=16).names == ["june/mouse", "july/mouse"]


@pytest.mark.parametrize(
    ("lines", "there"),
    [
        (["/elsewhere/a", "/elsewhere/x/b"], ["a", "x/b"]),  # folders of any depth
        (["/disk1/a", "/disk2/b"], ["a", "b"]),  # collected from two places
        ([r"D:\mice\a", r"D:\mice\b"], ["a", "b"]),
        ([r"D:\mice\a", r"\\server\share\b"], ["mice/a", "b"]),
        (["/elsewhere/a", "b"], ["a", "b"]),  # the second needs no help
    ],
)
def test_folders_of_another_machine_are_found_by_their_last_names(tmp_path, lines, there):
    for name in there:
        write_sample(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(tmp_path / "list.txt", size=16)
    assert source.locations == [str(tmp_path / name) for name in there]
    assert f"its {sum(line != 'b' for line in lines)} absolute paths are another machine's" in source.moved


def test_a_list_of_folders_that_were_deleted_here_is_as_one_of_another_machine(tmp_path):
    (tmp_path / "old").mkdir()
    write_sample(tmp_path / "new" / "a")
    (tmp_path / "new" / "list.txt").write_text(f"{tmp_path}/old/a\n")
    assert open_source(tmp_path / "new" / "list.txt", size=16).locations == [str(tmp_path / "new" / "a")]


@pytest.mark.parametrize(
    ("there", "lines", "message"),
    [
        (["a"], ["/x/a", "/x/b"], r"e\.g\. /x/a, and beside the list are 1 of its 2 folders \(e\.g\. .*/a\); expected each"),
        (["b"], ["/x/a", "/x/b"], r"beside the list are 1 of its 2 folders \(e\.g\. .*/b\); expected each folder once"),
        (["a", "x/a"], ["/y/x/a"], r"/y/x/a might be .*/a or .*/x/a beside the list; expected each folder once"),
        (["a", "b", "x/b"], ["/y/x/a", "/y/x/b"], r"/y/x/b might be .*/b or .*/x/b beside the list"),
        (["mouse"], ["/x/june/mouse", "/x/july/mouse"], r"/x/june/mouse and /x/july/mouse would both be .*/mouse; expected"),
        (["b"], ["/x/a"], r"line 1: '/x/a' \(No such file or directory\): no such sample folder"),
    ],
)
def test_a_list_of_another_machine_that_is_not_certain_is_refused(tmp_path, there, lines, message):
    for name in there:
        write_sample(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(lines))
    failing_open(tmp_path / "list.txt", message)


def test_a_list_whose_folders_are_partly_there_is_no_other_machine_s(tmp_path):
    write_sample(tmp_path / "here" / "a")
    write_sample(tmp_path / "b")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/here/a\n/gone/b\n")
    failing_open(tmp_path / "list.txt", r"line 2: '/gone/b'")
