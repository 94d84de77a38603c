"""Each picture is encoded once, unless any colour may be behind it; on disk it is found again by what is in its file."""

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from softprompt.data import cache, storage
from softprompt.data.batch import EncodedViews
from softprompt.data.cache import EncodedObjects, PictureCache
from softprompt.data.pictures import BACKGROUNDS, composite
from softprompt.data.samples import FolderSource, Source, open_source
from softprompt.errors import InputError
from softprompt.model.pipeline import Pipeline


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
    broken = Path(source.locations[1]) / "cam_004.png"
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
        with Image.open(Path(source.locations[1]) / f"cam_{view:03d}.png") as picture:
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


# ---------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def open_objects(
    source: FolderSource, micro_models: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., EncodedObjects]:
    """A new process, as it were: everything opened again."""
    folder = tmp_path_factory.mktemp("kept")

    def build(background: str = "white", *, pipeline: Pipeline = micro_models, opened: Source = source) -> EncodedObjects:
        return EncodedObjects(opened, pipeline, background, PictureCache(folder, pipeline))

    return build


Open = Callable[..., EncodedObjects]


def settle(source: FolderSource, index: int, view: int = 0, *, change: bool = False) -> Path:
    """A picture file's time of change is long ago; changed: other pixels, a little later."""
    path = source.files(index)[view]
    if change:
        Image.fromarray(np.random.default_rng(99).integers(1, 255, (64, 64, 4), dtype=np.uint8)).save(path)
    os.utime(path, (1e9 + change, 1e9 + change))
    return path


@pytest.mark.parametrize(("background", "colours"), [("white", 1), ("three_choices", 3)])
def test_a_second_run_encodes_and_reads_nothing(
    source: FolderSource,
    open_objects: Open,
    encodings: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    background: str,
    colours: int,
) -> None:
    for index in range(2):
        for view in range(6):
            settle(source, index, view)
    first = open_objects(background)
    assert first.fill(progress=False) == 12 * colours and len(encodings) == 2 * colours
    with monkeypatch.context() as patch:
        patch.setattr(cache, "encode_views", None)
        patch.setattr(FolderSource, "load", None)
        patch.setattr(storage, "_content", None)
        again = open_objects(background)
        assert again.fill(progress=False) == 0
        found = [again.get(index, generator(seed)) for index in range(2) for seed in range(4)]
    expected = [encode(again.pictures(index, generator(seed))) for index in range(2) for seed in range(4)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_an_edited_picture_alone_is_encoded_again(
    source: FolderSource, open_objects: Open, encodings: list[torch.Tensor]
) -> None:
    for view in range(6):
        settle(source, 0, view)
    open_objects().fill(progress=False)
    settle(source, 0, 4, change=True)
    encodings.clear()
    objects = open_objects()
    objects.fill(progress=False)
    found = objects.get(0, generator())  # the change is seen when the object is used
    assert_same(found, encode(objects.pictures(0, generator())))
    assert [len(pictures) for pictures in encodings] == [1]
    encodings.clear()
    assert_same(open_objects().get(0, generator()), found)
    assert encodings == []


def test_what_decides_the_encoding_decides_the_cache(
    source: FolderSource, open_objects: Open, micro_models: Pipeline, tmp_path: Path
) -> None:
    assert open_objects().fill(progress=False) == 12
    assert open_objects("black").fill(progress=False) == 12, "another background"
    assert open_objects().fill(progress=False) == 0
    folder = tmp_path / "other"
    shutil.copytree(micro_models.folder, folder)
    same = replace(micro_models, folder=folder)
    assert open_objects(pipeline=same).fill(progress=False) == 0, "the same weights elsewhere"
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights)
    assert open_objects(pipeline=same).fill(progress=False) == 12, "one weight of the VAE"


def test_renaming_a_sample_encodes_nothing(
    source: FolderSource, open_objects: Open, encodings: list[torch.Tensor], tmp_path: Path
) -> None:
    open_objects().fill(progress=False)
    (tmp_path / "mouse_a").rename(tmp_path / "mouse_z")
    encodings.clear()
    moved = open_objects(opened=open_source(tmp_path, size=64))
    assert moved.fill(progress=False) == 0 and encodings == [] and list(moved.names) == ["mouse_b", "mouse_z"]


def test_a_damaged_shard_is_made_again(open_objects: Open, encodings: list[torch.Tensor]) -> None:
    objects = open_objects()
    objects.fill(progress=False)
    assert objects.cache is not None
    (shard,) = objects.cache.folder.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    encodings.clear()
    again = open_objects()
    assert again.fill(progress=False) == 12
    assert_same(again.get(1, generator()), encode(again.pictures(1, generator())))


def test_what_was_encoded_before_a_broken_picture_is_kept(source: FolderSource, open_objects: Open) -> None:
    broken = source.files(1)[4]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:2000])
    with pytest.raises(InputError, match=r"mouse_b/cam_004\.png: cannot be decoded"):
        open_objects().fill(progress=False)
    broken.write_bytes(whole)
    assert open_objects().fill(progress=False) == 6


def test_two_processes_share_the_work(open_objects: Open) -> None:
    one, two = open_objects(), open_objects()
    assert [objects.fill(progress=False, share=(rank, 2)) for rank, objects in enumerate((one, two))] == [6, 6]
    for objects in (one, two):
        assert objects.cache is not None
        objects.cache.refresh()
        assert len(objects.cache.store(torch.ones(3))) == 12


def test_the_same_picture_twice_is_kept_once(source: FolderSource, open_objects: Open) -> None:
    for view in range(1, 6):
        shutil.copy(source.files(0)[0], source.files(0)[view])
    objects = open_objects()
    assert objects.fill(progress=False) == 7
    found = objects.get(0, generator())
    assert_same(found, encode(objects.pictures(0, generator())))


def test_too_little_room_is_said_before_anything_is_encoded(
    open_objects: Open, encodings: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**28 + 100))
    with pytest.raises(InputError, match=r"data\.cache: .* has 0\.3 GB free; 12 pictures to encode take 0\.0 GB\. Make room"):
        open_objects().fill(progress=False)
    assert encodings == []


def test_a_cache_may_be_removed_while_it_is_open(open_objects: Open) -> None:
    objects = open_objects()
    assert objects.cache is not None
    shutil.rmtree(objects.cache.folder)
    assert objects.fill(progress=False) == 12


def test_random_backgrounds_leave_the_disk_alone(open_objects: Open) -> None:
    objects = open_objects("random")
    assert objects.cache is None and objects.fill(progress=False) == 0


def test_a_picture_that_goes_away_in_the_run_is_named(source: FolderSource, open_objects: Open) -> None:
    objects = open_objects()
    objects.fill(progress=False)
    source.files(0)[3].unlink()
    with pytest.raises(InputError, match=r"mouse_a/cam_003\.png: cannot be read \(No such file or directory\)"):
        objects.get(0, generator())


def test_a_disk_that_gives_back_something_else_is_said(open_objects: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects()
    objects.fill(progress=False)
    never_twice = itertools.count()
    monkeypatch.setattr(storage, "_checksum", lambda row: next(never_twice))
    with pytest.raises(InputError, match=r"read back damaged 3 times; likely the disk is failing"):
        objects.get(0, generator())


def test_a_cache_folder_that_is_a_file_is_refused(source: FolderSource, micro_models: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no folder")
    with pytest.raises(InputError, match=r"notes\.txt/.*: cannot be written .*likely the folder given .* is a file"):
        PictureCache(tmp_path / "notes.txt", micro_models)
