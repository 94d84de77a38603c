"""Pictures as files have them: PNGs of every kind, with the answer of the PNG specification; EXIF orientation."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softprompt.data.decode import decode
from tests.conftest import SHARED
from tests.pictures import png_chunk

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
KINDS = [(GREY, bits) for bits in (1, 2, 4, 8, 16)] + [(PALETTE, bits) for bits in (1, 2, 4, 8)]
KINDS += [(colour, bits) for colour in (COLOUR, GREY_ALPHA, COLOUR_ALPHA) for bits in (8, 16)]
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""The passes of Adam7: first column and row, and the steps between columns and rows."""


def scanlines(samples: np.ndarray, bits: int) -> bytes:
    """[H, W, C] without a filter, each line filled up to a whole byte."""
    lines = []
    for row in samples:
        digits = "".join(f"{int(sample):0{bits}b}" for sample in row.ravel())
        digits += "0" * (-len(digits) % 8)
        lines.append(b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)))
    return b"".join(lines)


def png(
    samples: np.ndarray, colour: int, bits: int, *, transparent: bytes = b"", palette: bytes = b"", interlaced: bool = False
) -> bytes:
    height, width = samples.shape[:2]
    parts = [samples[y::down, x::right] for x, y, right, down in PASSES] if interlaced else [samples]
    data = b"".join(scanlines(part, bits) for part in parts if part.size)
    chunks = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))]
    chunks += [png_chunk(b"PLTE", palette)] if palette else []
    chunks += [png_chunk(b"tRNS", transparent)] if transparent else []
    chunks += [png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("has_trns", [False, True])
@pytest.mark.parametrize(("colour", "bits"), KINDS)
def test_a_png_of_every_kind_is_what_the_specification_says(
    tmp_path: Path, colour: int, bits: int, has_trns: bool, interlaced: bool
) -> None:
    random, levels, extra = np.random.default_rng(bits + 100 * colour), 2**bits, {}
    samples = random.integers(0, levels, (9, 7, CHANNELS[colour]))
    alpha = np.full((9, 7), 255)
    scaled = samples >> 8 if bits == 16 else samples * 255 // (levels - 1)
    if colour == PALETTE:
        entries = random.integers(0, 256, (levels, 4))
        extra["palette"] = entries[:, :3].astype(np.uint8).tobytes()
        rgb = entries[samples[..., 0], :3]
        if has_trns:
            extra["transparent"] = entries[:, 3].astype(np.uint8).tobytes()
            alpha = entries[samples[..., 0], 3]
    else:
        rgb = scaled[..., :3] if CHANNELS[colour] >= 3 else scaled[..., :1].repeat(3, axis=2)
        if colour in (GREY_ALPHA, COLOUR_ALPHA):
            alpha = scaled[..., -1]
        elif has_trns:
            key = samples[3, 4].copy()
            samples[5, 5] = key
            rgb[5, 5] = rgb[3, 4]
            if bits == 16:  # one that differs in its lowest bit is another, although its high byte is the same
                samples[6, 6] = key ^ 1
                rgb[6, 6] = rgb[3, 4]
            extra["transparent"] = b"".join(struct.pack(">H", int(value)) for value in key)
            alpha = np.where((samples == key).all(axis=2), 0, 255)
    (tmp_path / "x.png").write_bytes(png(samples, colour, bits, interlaced=interlaced, **extra))
    found = np.array(decode(tmp_path / "x.png"))
    np.testing.assert_array_equal(found[..., 3], alpha)
    np.testing.assert_array_equal(found[..., :3], rgb)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_each_grey_can_be_the_transparent_one(tmp_path: Path, bits: int) -> None:
    samples = np.arange(2**bits).reshape(1, -1, 1)
    for key in range(2**bits):
        (tmp_path / "x.png").write_bytes(png(samples, GREY, bits, transparent=struct.pack(">H", key)))
        alpha = np.array(decode(tmp_path / "x.png"))[0, :, 3]
        np.testing.assert_array_equal(alpha, np.where(samples[0, :, 0] == key, 0, 255))


def test_colours_of_a_palette_after_the_last_alpha_are_opaque(tmp_path: Path) -> None:
    samples = np.arange(4).reshape(1, 4, 1)
    (tmp_path / "x.png").write_bytes(png(samples, PALETTE, 2, palette=bytes(range(12)), transparent=b"\xff\x80"))
    assert np.array(decode(tmp_path / "x.png"))[0, :, 3].tolist() == [255, 128, 255, 255]


def test_the_reported_16_bit_grey_has_its_object_alone() -> None:
    file = SHARED.parent / "cases" / "grey16_trns.png"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    expected = np.zeros((64, 64), dtype=np.uint8)
    expected[20:44, 20:44] = 255
    np.testing.assert_array_equal(np.array(decode(file))[..., 3], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path, form: str, orientation: int) -> None:
    levels = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50, np.ones((8, 8), dtype=np.uint8))
    upright = [
        levels,
        levels[:, ::-1],
        levels[::-1, ::-1],
        levels[::-1],
        levels.T,
        np.rot90(levels, -1),
        levels[::-1, ::-1].T,
        np.rot90(levels),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("L", "RGB") if form == "JPEG" else ("L", "RGB", "RGBA"):  # those that Pillow maps into memory, and others
        Image.fromarray(levels).convert(mode).save(tmp_path / "x", form, exif=exif)
        found = np.array(decode(tmp_path / "x")).astype(int)
        assert found.shape == (*upright.shape, 4)
        assert np.abs(found[..., 0] - upright).max() <= 6, "JPEG and WebP move a level a little"


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_is_turned_once(tmp_path: Path, compression: str) -> None:
    levels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "x.tif", compression=compression, exif=exif)
    np.testing.assert_array_equal(np.array(decode(tmp_path / "x.tif"))[..., 0], np.rot90(levels, -1))


def test_a_jpeg_of_a_camera_with_a_second_picture_in_it_is_its_first(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = Image.new("RGB", (24, 16), (200, 0, 0)), Image.new("RGB", (12, 8))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second], exif=exif)
    found = np.array(decode(tmp_path / "x.jpg"))
    assert found.shape == (24, 16, 4) and found[12, 8, 0] > 190


def test_the_reported_orientation_6_stands_upright() -> None:
    file = SHARED.parent / "cases" / "orientation6.png"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with Image.open(file) as stored:
        expected = np.rot90(np.array(stored.convert("RGBA")), -1)
    np.testing.assert_array_equal(np.array(decode(file)), expected)


def test_exif_data_that_are_damaged_are_a_damaged_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    content = buffer.getvalue()
    for exif in (b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\xff\xff\0\0", b"no TIFF"):
        (tmp_path / "x.png").write_bytes(content[:33] + png_chunk(b"eXIf", exif) + content[33:])
        try:
            assert decode(tmp_path / "x.png").size == (4, 4)
        except (OSError, SyntaxError, ValueError) as error:
            assert str(error)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_numbers_that_are_no_levels_are_refused(tmp_path: Path, mode: str) -> None:
    Image.fromarray(np.full((4, 4), 300, {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode])).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"it has one channel of (16|32)-bit numbers, .*; save it with 8 bits"):
        decode(tmp_path / "x.tif")
