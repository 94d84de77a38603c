"""Each planted fault is found and nothing else; in a clean data set nothing is found."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from softprompt.data.decode import decode
from softprompt.data.pictures import load_picture
from softprompt.data.samples import write_source
from softprompt.errors import InputError
from softprompt.micro.world import MicroWorld
from softprompt.prompt.templates import VIEWS
from tests.train.doctor.conftest import FILES, SIZE, Doctor, mouse
from train.doctor.checks import not_inspected
from train.doctor.inspect import inspect_sample
from train.doctor.samples import Sample

Change = Callable[[Path], object]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
WHITE = Image.new("RGB", (SIZE, SIZE), "white")


def edit(view: int, change: Callable[[Image.Image], Image.Image]) -> Change:
    """Replaces a picture of a sample."""
    return lambda sample: change(decode(sample / FILES[view])).save(sample / FILES[view])


def on(background: Image.Image) -> Change:
    """Lays all pictures of a sample on a background, without alpha."""

    def change(sample: Path) -> None:
        for file in (sample / name for name in FILES):
            Image.alpha_composite(background.convert("RGBA"), decode(file)).convert("RGB").save(file)

    return change


def rewrite(change: Callable[[bytearray], bytes | bytearray]) -> Change:
    """Changes the bytes of view 2."""
    return lambda sample: (sample / FILES[2]).write_bytes(change(bytearray((sample / FILES[2]).read_bytes())))


def flip_checksum(content: bytearray) -> bytearray:
    content[content.rindex(b"IEND") - 5] ^= 0xFF  # the last byte of the pixels' checksum
    return content


def speck(side: int, width: int, alpha: int) -> Image.Image:
    return Image.new("RGBA", (width, 1), (255, 255, 255, alpha)).crop((-side // 2, -side // 2, side // 2, side // 2))


@pytest.mark.parametrize(
    ("code", "kind", "views", "change"),
    [
        (1, "missing_views", [3], lambda sample: (sample / FILES[3]).unlink()),
        (1, "broken", [2], rewrite(lambda content: content[: len(content) // 2])),
        (1, "broken", [2], lambda sample: decode(sample / FILES[2]).convert("RGB").save(sample / FILES[2], "GIF")),
        (1, "mixed_files", [], lambda sample: decode(sample / FILES[2]).save(sample / "cam_002.webp", lossless=True)),
        (1, "empty", [4], edit(4, lambda picture: Image.new("RGBA", picture.size))),
        (1, "empty", [4], edit(4, lambda _: speck(1024, 1, 1))),  # training loses it where it scales the picture down
        (0, "damaged", [2], rewrite(flip_checksum)),
        (0, "nearly_empty", [4], edit(4, lambda _: speck(SIZE, 3, 255))),
        (0, "not_square", [1], edit(1, lambda picture: picture.crop((-8, 0, SIZE + 8, SIZE)))),
        (0, "other_size", [1], edit(1, lambda picture: picture.resize((96, 96)))),
        (0, "too_small", [1], edit(1, lambda picture: picture.resize((32, 32)))),
        (0, "no_alpha", range(6), on(WHITE)),
        (0, "uneven_background", range(6), on(NOISE)),
        (0, "uneven_background", range(6), on(Image.linear_gradient("L").resize((SIZE, SIZE)))),
        (0, "cut", [2], edit(2, lambda picture: picture.resize((84, 84)).crop((10, 10, 74, 74)))),
        (0, "unusual_size", [2], edit(2, lambda picture: picture.resize((32, 32)).crop((-16, -16, 48, 48)))),
        (0, "unusual_position", [0], edit(0, lambda p: ImageChops.offset(p, 1 - p.getchannel("A").getbbox()[0], 0))),
        (0, "identical_views", [0, 1], lambda sample: shutil.copy(sample / FILES[1], sample / FILES[0])),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(
    herd: Path, doctor: Doctor, code: int, kind: str, views: Sequence[int], change: Change
) -> None:
    change(mouse(herd))
    if views and kind != "missing_views":
        with pytest.raises(InputError) if code else nullcontext():  # as training reads it
            load_picture(mouse(herd) / FILES[views[0]], SIZE)
    assert doctor(herd) == (code, {kind: [(["mice-00007"], [VIEWS[v] for v in views])]})


def test_a_missing_first_view_in_images_is_found(herd: Path, doctor: Doctor) -> None:
    shutil.move(mouse(herd), herd.parent / "images")
    mouse(herd).mkdir()
    shutil.move(herd.parent / "images", mouse(herd) / "images")
    assert doctor(herd) == (0, {})
    (mouse(herd) / "images" / FILES[0]).unlink()
    assert doctor(herd) == (1, {"missing_views": [(["mice-00007"], ["front"])]})


def test_a_view_that_its_exif_data_turn_is_inspected_upright(herd: Path, doctor: Doctor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in herd.glob("*/*.png"):
        decode(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert doctor(herd) == (0, {})


def test_white_pictures_are_no_duplicates(herd: Path, doctor: Doctor) -> None:
    for view in (1, 2):
        WHITE.save(mouse(herd) / FILES[view])
    found = [(["mice-00007"], ["front_right", "right"])]
    assert doctor(herd) == (0, {"nearly_empty": found, "no_alpha": found})


def test_nothing_is_found_in_clean_data(colony: Path, heads: Path, doctor: Doctor, mice: Path) -> None:
    assert doctor(colony, mice / "val") == (0, {})
    assert doctor(heads) == (0, {})


@pytest.mark.parametrize("first", [0, 5, 10, 15, 20, 25])
def test_nothing_is_found_in_a_few_mice(colony: Path, tmp_path: Path, doctor: Doctor, first: int) -> None:
    listed = tmp_path / "few.txt"
    listed.write_text("".join(f"{mouse(colony, n)}\n" for n in range(first, first + 5)))
    assert doctor(listed) == (0, {})


def test_one_object_is_enough_and_checks_that_need_more_are_named(colony: Path, doctor: Doctor) -> None:
    assert doctor(mouse(colony)) == (0, {})
    sentences = not_inspected([Sample("one", True, inspect_sample([mouse(colony) / name for name in FILES]))])
    assert [sentence.split(":")[0] for sentence in sentences[:2]] == ["Order of views", "Unusual sizes and positions"]


def test_folders_that_are_missing_or_have_no_views_are_found(herd: Path, tmp_path: Path, doctor: Doctor) -> None:
    listed = tmp_path / "mice.txt"
    listed.write_text("".join(f"{mouse(herd, n)}\n" for n in (1, 2, 77)))
    assert doctor(listed) == (1, {"missing_folder": [(["mice-00077"], [])]})
    (herd / "notes").mkdir()
    assert doctor(herd) == (1, {"no_views": [(["notes"], [])]})


def test_duplicates_are_found_however_they_are_compressed(herd: Path, doctor: Doctor) -> None:
    shutil.copytree(mouse(herd), herd / "again")
    for file in (herd / "again").iterdir():
        decode(file).save(file, compress_level=1)
        assert file.read_bytes() != (mouse(herd) / file.name).read_bytes()
    assert doctor(herd) == (0, {"duplicates": [(["again", "mice-00007"], list(VIEWS))]})


def test_training_objects_in_validation_are_found_by_their_pictures(colony: Path, tmp_path: Path, doctor: Doctor) -> None:
    write_source(MicroWorld("mice", 10_000, 2, size=SIZE), tmp_path / "held")
    shutil.copytree(mouse(colony), tmp_path / "held" / "another-name")
    assert doctor(colony, tmp_path / "held") == (0, {"leak": [(["mice-00007", "another-name (val)"], list(VIEWS))]})
