"""Each fault that is planted is found, and nothing else; in what is as it should be, nothing."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from softprompt.data.decode import decode
from softprompt.data.pictures import load_picture
from softprompt.data.samples import picture_name, write_source
from softprompt.errors import InputError
from softprompt.micro.world import MicroWorld
from tests.browser import Seen
from train.doctor import look
from train.doctor.__main__ import main
from train.doctor.findings import find, not_looked_at
from train.doctor.kinds import KINDS
from train.doctor.kinds import Sample as DoctorSample
from train.doctor.look import look_at, look_at_all, look_at_sample
from train.doctor.order import better_order, exchange_gains, mirror_overlap, view_distances

MICE = 30
SIZE = 64


@pytest.fixture(scope="session")
def colony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 mice of 64x64; nothing may change it."""
    folder = tmp_path_factory.mktemp("doctor") / "colony"
    write_source(MicroWorld("mice", 0, MICE, size=SIZE), folder)
    (folder / "samples.txt").unlink()
    return folder


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 heads of 64x64; nothing may change it."""
    folder = tmp_path_factory.mktemp("doctor") / "heads"
    write_source(MicroWorld("heads", 0, 12, size=SIZE), folder)
    return folder


@pytest.fixture
def herd(colony: Path, tmp_path: Path) -> Path:
    """Twelve of the mice, copied, to plant something in."""
    for number in range(12):
        shutil.copytree(mouse(colony, number), mouse(tmp_path / "herd", number))
    return tmp_path / "herd"


def mouse(folder: Path, number: int = 7) -> Path:
    return folder / f"mice-{number:05d}"


@contextmanager
def edited(file: Path) -> Iterator[list[Image.Image]]:
    """The picture, in a list of one, written back when the block ends."""
    held = [decode(file)]
    yield held
    held[0].save(file)


def reorder(sample: Path, order: Sequence[int]) -> None:
    """View v becomes what view order[v] was."""
    pictures = [(sample / picture_name(v)).read_bytes() for v in order]
    for v, content in enumerate(pictures):
        (sample / picture_name(v)).write_bytes(content)


Said = dict[str, list[tuple[list[str], list[str]]]]
"""By kind of finding: samples, views."""
Doctor = Callable[..., tuple[int, Said]]


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """`doctor(train, **options)`: the command's exit code, and by kind of finding its samples and views."""

    def run(train: Path, **options: object) -> tuple[int, Said]:
        given = {"data.train": train, "size": SIZE, "output": tmp_path / "doctor", **options}
        code = main([f"--{name}={value}" for name, value in given.items()])
        printed = capsys.readouterr().out
        report = json.loads((Path(str(given["output"])) / "doctor.json").read_text())
        found: Said = {}
        for finding in report["findings"]:
            found.setdefault(finding["kind"], []).append((finding["samples"], finding["views"]))
            assert KINDS[finding["kind"]].title in printed
        assert report["would_run"] == (code == 0)
        return code, found

    return run


# ------------------------------------------------------------------------------------------------------ nothing is wrong


def test_nothing_is_found_in_clean_mice(colony: Path, doctor: Doctor, mice: Path) -> None:
    assert doctor(colony, **{"data.val": mice / "val"}) == (0, {})


def test_nothing_is_found_in_clean_heads(heads: Path, doctor: Doctor) -> None:
    assert doctor(heads) == (0, {})


@pytest.mark.parametrize("first", [0, 5, 10, 15, 20, 25])
def test_nothing_is_found_in_a_few_mice(colony: Path, tmp_path: Path, doctor: Doctor, first: int) -> None:
    listed = tmp_path / "few.txt"
    listed.write_text("".join(f"{mouse(colony, n)}\n" for n in range(first, first + 5)))
    assert doctor(listed) == (0, {})


def test_one_object_is_enough_and_what_is_not_compared_is_said(colony: Path, doctor: Doctor) -> None:
    assert doctor(mouse(colony)) == (0, {})
    said = not_looked_at([DoctorSample("one", True, look_at_sample([mouse(colony) / picture_name(v) for v in range(6)]))])
    assert [sentence.split(":")[0] for sentence in said[:2]] == ["Order of views", "Unusual sizes and places"]


# ------------------------------------------------------------------------------------------------- training would not run


def test_a_missing_view_is_found(herd: Path, doctor: Doctor) -> None:
    (mouse(herd) / picture_name(3)).unlink()
    assert doctor(herd) == (1, {"missing_views": [(["mice-00007"], ["back"])]})


def test_a_missing_first_view_in_images_is_found(herd: Path, doctor: Doctor) -> None:
    shutil.move(mouse(herd), herd.parent / "images")
    mouse(herd).mkdir()
    shutil.move(herd.parent / "images", mouse(herd) / "images")
    assert doctor(herd) == (0, {})
    (mouse(herd) / "images" / picture_name(0)).unlink()
    assert doctor(herd) == (1, {"missing_views": [(["mice-00007"], ["front"])]})


def test_a_missing_folder_of_a_list_is_found(colony: Path, tmp_path: Path, doctor: Doctor) -> None:
    listed = tmp_path / "mice.txt"
    listed.write_text("".join(f"{mouse(colony, n)}\n" for n in (1, 2, 77)))
    assert doctor(listed) == (1, {"missing_folder": [(["mice-00077"], [])]})


def test_a_folder_without_views_is_found(herd: Path, doctor: Doctor) -> None:
    (herd / "notes").mkdir()
    assert doctor(herd) == (1, {"no_views": [(["notes"], [])]})


@pytest.mark.parametrize("is_gif", [False, True])
def test_a_broken_picture_is_found(herd: Path, doctor: Doctor, is_gif: bool) -> None:
    file = mouse(herd) / picture_name(2)
    if is_gif:
        decode(file).convert("RGB").save(file, "GIF")
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert doctor(herd) == (1, {"broken": [(["mice-00007"], ["right"])]})


def test_a_view_in_two_formats_is_found(herd: Path, doctor: Doctor) -> None:
    file = mouse(herd) / picture_name(2)
    decode(file).save(file.with_suffix(".webp"), lossless=True)
    assert doctor(herd) == (1, {"mixed": [(["mice-00007"], [])]})


def test_a_view_that_lies_on_its_side_in_its_file_is_looked_at_upright(herd: Path, doctor: Doctor) -> None:
    for sample in herd.iterdir():
        for file in sample.glob("*.png") if sample.is_dir() else []:
            exif = Image.Exif()
            exif[0x0112] = 6
            decode(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert doctor(herd) == (0, {})


def test_an_empty_alpha_is_found(herd: Path, doctor: Doctor) -> None:
    with edited(mouse(herd) / picture_name(4)) as picture:
        picture[0].putalpha(0)
    assert doctor(herd) == (1, {"empty": [(["mice-00007"], ["left"])]})


def test_training_decides_what_is_empty(herd: Path, doctor: Doctor) -> None:
    file = mouse(herd) / picture_name(4)
    speck = np.zeros((1024, 1024, 4), dtype=np.uint8)
    speck[500, 500] = 255, 255, 255, 1  # gone when made smaller
    Image.fromarray(speck).save(file)
    with pytest.raises(InputError, match="no visible pixel"):
        load_picture(file, SIZE)
    assert doctor(herd) == (1, {"empty": [(["mice-00007"], ["left"])]})


# ------------------------------------------------------------------------------------ training would run, and learn from it


def test_a_damaged_picture_that_can_be_decoded_is_found(herd: Path, doctor: Doctor) -> None:
    file = mouse(herd) / picture_name(2)
    content = bytearray(file.read_bytes())
    content[content.rindex(b"IEND") - 5] ^= 0xFF  # the last byte of the pixels' checksum
    file.write_bytes(content)
    load_picture(file, SIZE)
    assert doctor(herd) == (0, {"damaged": [(["mice-00007"], ["right"])]})


def test_a_nearly_empty_picture_is_found(herd: Path, doctor: Doctor) -> None:
    speck = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    speck[30, 30:33] = 255
    Image.fromarray(speck).save(mouse(herd) / picture_name(4))
    assert doctor(herd) == (0, {"nearly_empty": [(["mice-00007"], ["left"])]})


def test_a_picture_that_is_not_square_is_found(herd: Path, doctor: Doctor) -> None:
    with edited(mouse(herd) / picture_name(1)) as picture:
        wide = Image.new("RGBA", (SIZE + 16, SIZE), (0, 0, 0, 0))
        wide.paste(picture[0], (8, 0))
        picture[0] = wide
    assert doctor(herd) == (0, {"not_square": [(["mice-00007"], ["front_right"])]})


@pytest.mark.parametrize(("side", "kind"), [(96, "other_size"), (32, "small")])
def test_a_picture_of_another_size_is_found(herd: Path, doctor: Doctor, side: int, kind: str) -> None:
    with edited(mouse(herd) / picture_name(1)) as picture:
        picture[0] = picture[0].resize((side, side))
    assert doctor(herd) == (0, {kind: [(["mice-00007"], ["front_right"])]})


def on(sample: Path, background: Callable[[], Image.Image]) -> None:
    """Lay a sample's pictures on a background, without alpha."""
    for view in range(6):
        file = sample / picture_name(view)
        Image.alpha_composite(background(), decode(file)).convert("RGB").save(file)


def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert("RGBA")


def slope() -> Image.Image:
    return Image.merge("RGB", [Image.linear_gradient("L").resize((SIZE, SIZE))] * 3).convert("RGBA")


def plain() -> Image.Image:
    return Image.new("RGBA", (SIZE, SIZE), "white")


def test_missing_alpha_is_found(herd: Path, doctor: Doctor) -> None:
    on(mouse(herd), plain)
    code, found = doctor(herd)
    assert code == 0 and list(found) == ["no_alpha"] and found["no_alpha"][0][0] == ["mice-00007"]


@pytest.mark.parametrize("background", [noise, slope])
def test_an_uneven_background_is_found(herd: Path, doctor: Doctor, background: Callable[[], Image.Image]) -> None:
    on(mouse(herd), background)
    code, found = doctor(herd)
    assert code == 0 and list(found) == ["uneven_background"] and found["uneven_background"][0][0] == ["mice-00007"]


def test_the_foreground_is_found_on_a_plain_background(herd: Path) -> None:
    files = [mouse(herd) / picture_name(view) for view in range(6)]
    before = look_at_sample(files)
    on(mouse(herd), lambda: Image.new("RGBA", (SIZE, SIZE), "blue"))
    for a, b in zip(before, look_at_sample(files), strict=True):
        assert a is not None and b is not None
        assert b.share == pytest.approx(a.share, rel=0.15) and b.centre == pytest.approx(a.centre, abs=0.02)


def test_a_white_picture_without_alpha_is_found(herd: Path, doctor: Doctor) -> None:
    for view in (1, 2):  # two of them are no duplicates of each other
        Image.new("RGB", (SIZE, SIZE), "white").save(mouse(herd) / picture_name(view))
    views = ["front_right", "right"]
    assert doctor(herd) == (0, {"nearly_empty": [(["mice-00007"], views)], "no_alpha": [(["mice-00007"], views)]})


def test_an_object_cut_at_the_border_is_found(herd: Path, doctor: Doctor) -> None:
    with edited(mouse(herd) / picture_name(2)) as picture:
        picture[0] = picture[0].resize((84, 84)).crop((10, 10, 74, 74))
    assert doctor(herd) == (0, {"cut": [(["mice-00007"], ["right"])]})


def test_an_object_of_unusual_size_is_found(herd: Path, doctor: Doctor) -> None:
    with edited(mouse(herd) / picture_name(2)) as picture:
        shrunk = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
        shrunk.paste(picture[0].resize((32, 32)), (16, 16))
        picture[0] = shrunk
    assert doctor(herd) == (0, {"size": [(["mice-00007"], ["right"])]})


def test_an_object_in_an_unusual_place_is_found(herd: Path, doctor: Doctor) -> None:
    with edited(mouse(herd) / picture_name(0)) as picture:  # from the front a mouse is narrow
        free = picture[0].getchannel("A").getbbox()[0]
        assert free >= 10
        picture[0] = ImageChops.offset(picture[0], 1 - free, 0)
    assert doctor(herd) == (0, {"place": [(["mice-00007"], ["front"])]})


def test_duplicates_are_found_however_they_are_compressed(herd: Path, doctor: Doctor) -> None:
    shutil.copytree(mouse(herd), herd / "again")
    for file in (herd / "again").iterdir():
        decode(file).save(file, compress_level=1)
        assert file.read_bytes() != (mouse(herd) / file.name).read_bytes()
    code, found = doctor(herd)
    assert code == 0 and [(kind, [samples for samples, _ in f]) for kind, f in found.items()] == [
        ("duplicates", [["again", "mice-00007"]])
    ]


def test_one_picture_as_two_views_is_found(herd: Path, doctor: Doctor) -> None:
    shutil.copy(mouse(herd) / picture_name(1), mouse(herd) / picture_name(0))
    assert doctor(herd) == (0, {"same_views": [(["mice-00007"], ["front", "front_right"])]})


def test_what_is_trained_and_validated_on_is_found_by_its_pictures(colony: Path, tmp_path: Path, doctor: Doctor) -> None:
    write_source(MicroWorld("mice", 10_000, 2, size=SIZE), tmp_path / "held")
    shutil.copytree(mouse(colony), tmp_path / "held" / "another-name")
    code, found = doctor(colony, **{"data.val": tmp_path / "held"})
    assert code == 0 and [(kind, [samples for samples, _ in f]) for kind, f in found.items()] == [
        ("leak", [["mice-00007", "another-name (val)"]])
    ]


def test_a_list_of_another_machine_is_read_and_said(
    herd: Path, doctor: Doctor, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = sorted(path.name for path in herd.iterdir())
    (herd / "list.txt").write_text("".join(f"/elsewhere/{name}\n" for name in names))
    assert main([f"--data.train={herd / 'list.txt'}", f"--size={SIZE}", f"--output={tmp_path / 'doctor'}"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"WARNING    {herd / 'list.txt'}: its 12 absolute paths are another machine's") == 1
    shutil.rmtree(herd / names[0])
    assert main([f"--data.train={herd / 'list.txt'}", f"--size={SIZE}", f"--output={tmp_path / 'doctor'}"]) == 2
    assert "beside the list are 11 of its 12 folders" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- order of the views


def measured(folder: Path) -> list[list[look.Picture | None]]:
    samples = sorted(path for path in folder.iterdir() if path.is_dir())
    return look_at_all([[sample / picture_name(view) for view in range(6)] for sample in samples])


def orders(pictures: Sequence[Sequence[look.Picture | None]]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """All findings, as kind, samples, views."""
    samples = [DoctorSample(str(n), True, list(views)) for n, views in enumerate(pictures)]
    return [(f.kind, f.samples, f.views) for f in find(samples, 6, SIZE)]


def test_every_exchange_of_two_views_is_found(colony: Path) -> None:
    pictures = measured(colony)
    for number, (a, b) in enumerate(itertools.combinations(range(6), 2)):
        order = list(range(6))
        order[a], order[b] = b, a
        planted = [[views[v] for v in order] if n == number else views for n, views in enumerate(pictures)]
        assert orders(planted) == [("order", (number,), (a, b))]


@pytest.mark.parametrize("order", [(0, 5, 4, 3, 2, 1), (5, 4, 3, 2, 1, 0), (1, 2, 3, 4, 5, 0), (3, 4, 5, 0, 1, 2)])
def test_a_ring_that_is_reversed_or_turned_is_found(herd: Path, doctor: Doctor, order: Sequence[int]) -> None:
    reorder(mouse(herd), order)
    code, found = doctor(herd)
    assert code == 0 and list(found) == ["order"] and [samples for samples, _ in found["order"]] == [["mice-00007"]]
    detail = json.loads((herd.parent / "doctor" / "doctor.json").read_text())["findings"][0]["detail"]
    assert f"the ring looks {'reversed' if order[0] - order[1] in (1, -5) else 'turned'}" in detail


def test_an_order_that_all_share_is_found_where_opposite_views_are_not(colony: Path, heads: Path) -> None:
    for folder in (colony, heads):
        pictures = [[*views[1:], views[0]] for views in measured(folder)]
        assert [kind for kind, *_ in orders(pictures)] == ["order_of_all"]


def test_better_order_saves_what_it_says() -> None:
    distance = np.array([[4.0, 1, 9], [1, 4, 9], [9, 9, 2]])
    assert better_order(distance) == ([1, 0, 2], pytest.approx(1 - 4 / 10))
    assert better_order(np.eye(3) * -1 + 1) == ([0, 1, 2], 0.0)


def test_exchange_gains_are_what_better_order_finds() -> None:
    distance = np.random.default_rng(0).random((4, 3, 3)) + 1 - np.eye(3)
    gains = exchange_gains(distance)
    for one, expected in zip(distance, gains, strict=True):
        for (a, b), gain in zip(((0, 1), (0, 2), (1, 2)), expected, strict=True):
            order = [0, 1, 2]
            order[a], order[b] = b, a
            assert better_order(one[order]) == (order, pytest.approx(gain))


def test_views_that_cannot_be_told_apart_are_said(colony: Path) -> None:
    samples = [DoctorSample(str(n), True, [*views[n % 6 :], *views[: n % 6]]) for n, views in enumerate(measured(colony))]
    assert any("0% would be noticed" in sentence for sentence in not_looked_at(samples))


def test_views_are_compared_by_silhouette_and_pattern_not_by_brightness() -> None:
    generator = np.random.default_rng(0)
    alpha = (generator.random((1, 6, 16, 16, 1)) > 0.5).astype(float)
    colour = generator.random((1, 6, 16, 16, 3)) * 0.4 * alpha
    light = np.concatenate([colour, alpha], -1)
    dark = np.concatenate([colour + 0.5 * alpha, alpha], -1)
    distance = view_distances(np.concatenate([light, dark]))
    assert distance[:, range(6), range(6)] == pytest.approx(0)
    assert distance[:, 0, 1:].min() > 50  # about half of 256 pixels


def test_mirror_overlap_is_one_for_mirror_images() -> None:
    alpha = np.zeros((1, 2, 4, 4))
    alpha[0, 0, :, :2], alpha[0, 1, :, 2:] = 1, 1
    assert mirror_overlap(alpha)[0].tolist() == [[0, 1], [1, 0]]


# ------------------------------------------------------------------------------------------------------------ the command


def test_measurements_do_not_depend_on_processes(colony: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [[mouse(colony, n) / picture_name(v) for v in range(6)] for n in range(4)]
    here = look_at_all(files)
    monkeypatch.setattr(look, "FEW_PICTURES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for a, b in zip(itertools.chain(*here), itertools.chain(*look_at_all(files)), strict=True):
        assert a is not None and b is not None and a.content == b.content and np.array_equal(a.small, b.small)


def test_colour_that_cannot_be_seen_does_not_count(tmp_path: Path) -> None:
    found = []
    for hidden in (0, 200):
        pixels = np.full((8, 8, 4), hidden, dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[2:6, 2:6] = 255
        Image.fromarray(pixels).save(tmp_path / f"{hidden}.png")
        found.append(look_at(tmp_path / f"{hidden}.png"))
    assert found[0] is not None and found[1] is not None and found[0].content == found[1].content
    assert found[0].share == 0.25 and found[0].centre == (0, 0) and found[0].at_border == 0


def test_what_is_measured_is_what_training_reads(tmp_path: Path) -> None:
    """A transparent colour of 16 bits, and a picture that its EXIF data turn."""
    samples = np.full((64, 64), 65535, dtype=np.uint16)
    samples[20:44, 8:32] = 20000
    Image.fromarray(samples).save(tmp_path / "grey.png", transparency=65535)
    grey = look_at(tmp_path / "grey.png")
    assert grey is not None and grey.has_alpha and grey.share == 24**2 / 64**2 and grey.centre == (-12 / 64, 0)
    assert load_picture(tmp_path / "grey.png", 64)[3].sum() == 255 * 24**2
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    wide.paste((200, 100, 50, 255), (0, 0, 16, 32))
    for name in ("turned.png", "turned.webp", "turned.tif"):
        wide.save(tmp_path / name, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
        turned = look_at(tmp_path / name)
        assert turned is not None and (turned.width, turned.height) == (32, 64) and turned.centre == (0, -24 / 64)
        assert load_picture(tmp_path / name, 64)[3, :16].sum() == 255 * 32 * 16


def test_the_page_opens_on_a_telephone_and_on_a_desk(herd: Path, doctor: Doctor, check_page: Callable[[Path], Seen]) -> None:
    (mouse(herd, 1) / picture_name(3)).unlink()
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
    for n in range(10):
        on(mouse(herd, n), plain)
    reorder(mouse(herd, 11), (1, 0, 2, 3, 4, 5))
    doctor(herd)
    page = (herd.parent / "doctor" / "doctor.html").read_text()
    assert page.count('class="sample"') == 3 and "<h3>mice-00011</h3>" in page and "8 more have findings" in page


def test_an_earlier_report_is_replaced_and_nothing_else(
    colony: Path, tmp_path: Path, doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(mouse(colony))
    doctor(mouse(colony, 8))
    assert "mice-00008" in (tmp_path / "doctor" / "doctor.html").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "doctor.html").write_text("of a physician")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "doctor.html", colony):
        assert main([f"--data.train={colony}", f"--output={folder}"]) == 2
        assert "something else than an earlier report" in capsys.readouterr().err
    assert (tmp_path / "mine" / "doctor.html").read_text() == "of a physician"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nothing", "no samples in 0 sub-folders, no pictures"),
        ("folders", "no samples in 2 sub-folders"),
        ("names", "1 pictures (front.png); expected sub-folders with cam_000.png"),
    ],
)
def test_a_folder_without_samples_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if content == "folders":
        (folder / "a").mkdir()
        (folder / "b").mkdir()
    if content == "names":
        Image.new("RGBA", (8, 8)).save(folder / "front.png")
    assert main([f"--data.train={folder}", f"--output={tmp_path / 'doctor'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data.train: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "doctor").exists()


@pytest.mark.parametrize(
    ("options", "said"),
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
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        code = main([*options, f"--output={tmp_path / 'doctor'}"])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_help_names_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--data.train" in said and "--data.val" in said
