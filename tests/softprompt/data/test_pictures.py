"""One picture: sizes, damage, backgrounds; test_decode.py has the colour modes."""

import numpy as np
import pytest
import torch
from PIL import Image

from softprompt.data import pictures
from softprompt.data.pictures import composite, load_picture
from softprompt.errors import InputError


def random_picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 4), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(32, 16), (16, 32), (5, 10), (7, 7), (100, 1), (8, 4)])
def test_any_aspect_is_kept_and_centred_on_transparency(tmp_path, width, height):
    Image.new("RGB", (width, height), (200, 100, 50)).save(tmp_path / "p.png")
    rgba = load_picture(tmp_path / "p.png", 8)
    inside_width = max(1, round(8 * width / max(width, height)))
    inside_height = max(1, round(8 * height / max(width, height)))
    left, top = (8 - inside_width) // 2, (8 - inside_height) // 2
    expected = torch.zeros(4, 8, 8, dtype=torch.uint8)
    expected[:, top : top + inside_height, left : left + inside_width] = torch.tensor([200, 100, 50, 255])[:, None, None]
    assert torch.equal(rgba, expected)


def test_colour_under_transparent_pixels_does_not_bleed_when_resized(tmp_path):
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:] = (0, 255, 0, 0)
    pixels[8:21, 8:21] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    rgba = load_picture(tmp_path / "p.png", 16)
    assert (rgba[1] == 0).all(), "green lies under transparent pixels only"
    assert (rgba[0][rgba[3] > 8] > 240).all(), "the edge keeps the object's colour"
    assert ((rgba[3] > 0) & (rgba[3] < 255)).any(), "the edge itself is soft"


def test_composite_is_alpha_blending(tmp_path):
    rgba = torch.from_numpy(random_picture(3)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    background = torch.tensor([0.2, 0.5, 0.9])
    result = composite(rgba, background)
    assert result.shape == (2, 3, 16, 16) and result.dtype == torch.float32
    for row, column, channel in [(0, 0, 0), (3, 7, 1), (15, 2, 2)]:
        colour, alpha = float(rgba[0, channel, row, column]) / 255, float(rgba[0, 3, row, column]) / 255
        expected = colour * alpha + float(background[channel]) * (1 - alpha)
        assert float(result[1, channel, row, column]) == pytest.approx(expected, abs=1e-6)
    assert result.min() >= 0 and result.max() <= 1


def test_damaged_picture_is_an_input_error_wherever_it_is_cut(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(random_picture(0)).save(whole)
    content = whole.read_bytes()
    path = tmp_path / "cam_002.png"
    for length in [0, 1, 8, 20, 33, 40, 200, len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cam_002.png: cannot be decoded \(.*copied incompletely"):
            load_picture(path, 16)
    for position in range(8, 33):  # the header; a byte of the pixels themselves may change unnoticed
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        with pytest.raises(InputError, match=r"cam_002.png: cannot be decoded \("):
            load_picture(path, 16)


def test_other_format_named_png_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png", format="GIF")
    with pytest.raises(InputError, match=r"p.png: cannot be decoded .*another format was given its name"):
        load_picture(tmp_path / "p.png", 8)


# -------------------------------------------------------------------------------------------------------- backgrounds


def test_backgrounds_lists_the_fixed_colours():
    for name, value in (("white", 1.0), ("black", 0.0), ("gray", 0.5)):
        assert [colour.tolist() for colour in pictures.backgrounds(name)] == [[value] * 3]
    assert [colour[0].item() for colour in pictures.backgrounds("three_choices")] == [1.0, 0.0, 0.5]
    assert pictures.backgrounds("random") is None


def test_pick_background_draws_what_the_choice_allows_and_repeats_by_seed():
    def draw(choice: str, seed: int = 0) -> list[tuple[float, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [tuple(pictures.pick_background(choice, generator).tolist()) for _ in range(300)]

    assert set(draw("gray")) == {(0.5, 0.5, 0.5)}
    counts = [draw("three_choices").count((level,) * 3) for level in (0.0, 0.5, 1.0)]
    assert sum(counts) == 300 and min(counts) > 60
    drawn = torch.tensor(draw("random"))
    assert drawn.min() >= 0 and drawn.max() <= 1 and (drawn.mean(dim=0) - 0.5).abs().max() < 0.1
    assert draw("random", 1) == draw("random", 1) != draw("random", 2)


@pytest.mark.parametrize("choose", [pictures.backgrounds, lambda name: pictures.pick_background(name, torch.Generator())])
def test_unknown_background_names_the_known(choose):
    with pytest.raises(InputError, match=r"background: 'grey' is unknown; .* white, black, gray, three_choices, random"):
        choose("grey")
