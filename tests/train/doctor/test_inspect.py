"""Measurements of pictures."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softprompt.data.decode import decode
from softprompt.data.pictures import load_picture
from tests.train.doctor.conftest import FILES, SIZE, mouse
from train.doctor import inspect
from train.doctor.inspect import inspect_all, inspect_picture, inspect_sample


def test_the_foreground_is_found_on_a_plain_background(colony: Path, tmp_path: Path) -> None:
    for name in FILES:
        blue = Image.new("RGBA", (SIZE, SIZE), "blue")
        Image.alpha_composite(blue, decode(mouse(colony) / name)).convert("RGB").save(tmp_path / name)
    before, after = (inspect_sample([folder / name for name in FILES]) for folder in (mouse(colony), tmp_path))
    for a, b in zip(before, after, strict=True):
        assert a is not None and b is not None
        assert b.share == pytest.approx(a.share, rel=0.15) and b.centre == pytest.approx(a.centre, abs=0.02)


def test_measurements_do_not_depend_on_processes(colony: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [[mouse(colony, n) / name for name in FILES] for n in range(4)]
    here = inspect_all(files)
    monkeypatch.setattr(inspect, "FEW_PICTURES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for a, b in zip(itertools.chain(*here), itertools.chain(*inspect_all(files)), strict=True):
        assert a is not None and b is not None and a.content == b.content and np.array_equal(a.small, b.small)


def test_invisible_colour_does_not_count(tmp_path: Path) -> None:
    found = []
    for hidden in (0, 200):
        pixels = np.full((8, 8, 4), hidden, dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[2:6, 2:6] = 255
        Image.fromarray(pixels).save(tmp_path / f"{hidden}.png")
        found.append(inspect_picture(tmp_path / f"{hidden}.png"))
    assert found[0] is not None and found[1] is not None and found[0].content == found[1].content
    assert found[0].share == 0.25 and found[0].centre == (0, 0) and found[0].at_border == 0


def test_pictures_are_measured_as_training_reads_them(tmp_path: Path) -> None:
    """A transparent colour of 16 bits, and a picture turned by its EXIF data."""
    samples = np.full((64, 64), 65535, dtype=np.uint16)
    samples[20:44, 8:32] = 20000
    Image.fromarray(samples).save(tmp_path / "grey.png", transparency=65535)
    grey = inspect_picture(tmp_path / "grey.png")
    assert grey is not None and grey.has_alpha and grey.share == 24**2 / 64**2 and grey.centre == (-12 / 64, 0)
    assert load_picture(tmp_path / "grey.png", 64)[3].sum() == 255 * 24**2
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    wide.paste((200, 100, 50, 255), (0, 0, 16, 32))
    for name in ("turned.png", "turned.webp", "turned.tif"):
        wide.save(tmp_path / name, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
        turned = inspect_picture(tmp_path / name)
        assert turned is not None and (turned.width, turned.height) == (32, 64) and turned.centre == (0, -24 / 64)
        assert load_picture(tmp_path / name, 64)[3, :16].sum() == 255 * 32 * 16
