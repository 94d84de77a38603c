"""Each picture is encoded once, unless any colour may be behind it; a broken picture is found before the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softprompt import cache
from softprompt.cache import EncodedObjects
from softprompt.conditioning import EncodedViews
from softprompt.data import BACKGROUNDS, FolderSource, composite, open_source
from softprompt.errors import InputError
from softprompt.pipeline import Pipeline


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    """Two objects, half transparent."""
    for index, name in enumerate(("mouse_a", "mouse_b")):
        (tmp_path / name).mkdir()
        for view in range(6):
            pixels = np.random.default_rng(10 * index + view).integers(1, 255, (64, 64, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"cam_{view:03d}.png")
    return open_source(tmp_path, size=64)


def encode(pictures: torch.Tensor) -> EncodedViews:
    """In place of the models, which take a second an object."""
    return EncodedViews(mean=pictures + 1, std=pictures + 2, embeds=pictures.mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fills with the pictures of every object that is encoded."""
    seen: list[torch.Tensor] = []

    def counted(pipeline: Pipeline, pictures: torch.Tensor) -> EncodedViews:
        assert isinstance(pipeline, Pipeline)
        seen.append(pictures)
        return encode(pictures)

    monkeypatch.setattr(cache, "encode_views", counted)
    return seen


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(found: EncodedViews, expected: EncodedViews) -> None:
    for name in ("mean", "std", "embeds"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(("background", "colours"), [("white", 1), ("gray", 1), ("three_choices", 3)])
def test_an_object_is_encoded_once_on_each_colour(
    source: FolderSource, micro_models: Pipeline, encodings: list[torch.Tensor], background: str, colours: int
) -> None:
    objects = EncodedObjects(source, micro_models, background)
    assert len(objects) == 2 and list(objects.names) == ["mouse_a", "mouse_b"]
    assert encodings == [], "nothing is read before it is asked for"
    objects.fill(progress=False)
    assert len(encodings) == 2 * colours
    for seed in range(10):
        objects.get(seed % 2, generator(seed))
    assert len(encodings) == 2 * colours


def test_what_is_kept_is_the_object_on_the_colour_drawn(source: FolderSource, micro_models: Pipeline) -> None:
    objects = EncodedObjects(source, micro_models, "three_choices")
    objects.fill(progress=False)
    seen = set()
    for seed in range(12):
        pictures = objects.pictures(1, generator(seed))
        name = next(n for n, c in BACKGROUNDS.items() if torch.equal(pictures, composite(source.load(1), torch.tensor(c))))
        seen.add(name)
        assert_same(objects.get(1, generator(seed)), encode(pictures))
    assert seen == set(BACKGROUNDS)


def test_random_backgrounds_are_encoded_anew_each_time(
    source: FolderSource, micro_models: Pipeline, encodings: list[torch.Tensor]
) -> None:
    objects = EncodedObjects(source, micro_models, "random")
    objects.fill(progress=False)
    assert encodings == []
    first, second, again = (objects.get(0, generator(seed)) for seed in (0, 1, 0))
    assert len(encodings) == 3
    assert not torch.equal(encodings[0], encodings[1]) and torch.equal(encodings[0], encodings[2])
    assert (first.mean - second.mean).abs().max() > 1e-3
    assert_same(again, first)
    assert torch.equal(objects.pictures(0, generator(0)), encodings[0])


def test_an_object_not_filled_is_encoded_when_asked_for(
    source: FolderSource, micro_models: Pipeline, encodings: list[torch.Tensor]
) -> None:
    found = EncodedObjects(source, micro_models, "black").get(1, generator())
    assert len(encodings) == 1
    assert_same(found, encode(composite(source.load(1), torch.zeros(3))))


@pytest.mark.parametrize("background", ["white", "random"])
def test_a_broken_picture_stops_before_the_run_starts(source: FolderSource, micro_models: Pipeline, background: str) -> None:
    broken = source.folders[1] / "cam_004.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"mouse_b/cam_004\.png: cannot be decoded"):
        EncodedObjects(source, micro_models, background).fill(progress=False)


@pytest.mark.parametrize("background", ["white", "random"])
def test_masks_are_the_alpha_of_the_files_whatever_is_behind(
    source: FolderSource, micro_models: Pipeline, encodings: list[torch.Tensor], background: str
) -> None:
    masks = EncodedObjects(source, micro_models, background).masks(1)
    assert masks.shape == (6, 1, 64, 64) and masks.dtype == torch.float32 and encodings == []
    for view in range(6):
        with Image.open(source.folders[1] / f"cam_{view:03d}.png") as picture:
            alpha = np.asarray(picture, dtype=np.float32)[:, :, 3] / 255
        assert np.array_equal(masks[view, 0].numpy(), alpha)


def test_pictures_without_alpha_are_foreground_throughout(micro_models: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "opaque").mkdir()
    for view in range(6):
        Image.new("RGB", (64, 64), (view, 0, 255)).save(tmp_path / "opaque" / f"cam_{view:03d}.png")
    masks = EncodedObjects(open_source(tmp_path, size=64), micro_models, "white").masks(0)
    assert torch.equal(masks, torch.ones(6, 1, 64, 64))


def test_an_unknown_background_is_refused(source: FolderSource, micro_models: Pipeline) -> None:
    with pytest.raises(InputError, match=r"background: 'whit' is unknown; expected one of white, black, gray"):
        EncodedObjects(source, micro_models, "whit").fill(progress=False)
