"""The procedural world: the same everywhere, well-formed, and its views worth telling apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from softprompt.data.pictures import composite
from softprompt.errors import InputError
from softprompt.micro import world
from softprompt.micro.shapes import SHAPES, Dice
from softprompt.micro.world import DOMAINS, MicroWorld


def on_white(rgba: Tensor) -> Tensor:
    return composite(rgba, torch.ones(3))


@pytest.mark.parametrize("domain", DOMAINS)
def test_objects_are_rgba_in_six_views(domain: str) -> None:
    source = MicroWorld(domain, first_seed=7, count=2)
    assert len(source) == 2 and list(source.names) == [f"{domain}-00007", f"{domain}-00008"]
    rgba = source.load(1)
    assert rgba.shape == (6, 4, 64, 64) and rgba.dtype == torch.uint8
    alpha = rgba[:, 3]
    assert not (rgba[:, :3] * (alpha == 0)[:, None]).any(), "colour where nothing is"
    covered = (alpha == 255).float().mean(dim=(1, 2))
    assert (covered > 0.04).all() and (covered < 0.7).all()
    edge = (alpha > 0) & (alpha < 255)
    assert edge.float().mean() > 0.01, "no soft edge: not anti-aliased"
    border = torch.cat([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]])
    assert not border.any(), "the object is cut off by the frame"


@pytest.mark.parametrize("domain", DOMAINS)
def test_views_of_an_object_differ_and_fill_the_frame_alike(domain: str) -> None:
    rgba = MicroWorld(domain, 0, 1).load(0)
    pictures = on_white(rgba)
    for a in range(6):
        for b in range(a):
            assert (pictures[a] - pictures[b]).abs().mean() > 0.004, f"views {a} and {b} look the same"
    heights = (rgba[:, 3] > 0).any(dim=2).sum(dim=1).float()
    assert heights.max() / heights.min() < 2


def test_an_object_depends_on_nothing_but_domain_and_seed() -> None:
    alone = MicroWorld("mice", 12, 1).load(0)
    torch.manual_seed(5)
    np.random.seed(5)
    among_others = MicroWorld("mice", 10, 5)
    among_others.load(0)
    assert torch.equal(among_others.load(2), alone)
    assert not torch.equal(among_others.load(3), alone)


EXPECTED_MEANS = {
    "heads": [90.8, 69.69, 45.57, 99.89],
    "heads_above": [57.02, 32.86, 21.12, 78.77],
    "cats": [13.31, 8.67, 6.23, 55.84],
    "cats_above": [16.2, 13.54, 10.78, 33.6],
    "mice": [18.06, 15.03, 15.43, 29.7],
}
"""RGBA of the front view of each domain's object 3."""


def test_pictures_are_these_on_every_machine() -> None:
    # A change of the world makes the packaged weights those of another one: train them again.
    found = {domain: MicroWorld(domain, 3, 1).load(0)[0].float().mean(dim=(1, 2)) for domain in DOMAINS}
    for domain, expected in EXPECTED_MEANS.items():
        torch.testing.assert_close(found[domain], torch.tensor(expected), atol=0.05, rtol=0)


def test_mice_seen_from_above_differ_from_level_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    above = on_white(MicroWorld("mice", 0, 1).load(0))
    level = world.Domain("mice", (0, 0), photographic=True)
    monkeypatch.setitem(world.DOMAINS, "mice", level)
    assert (on_white(MicroWorld("mice", 0, 1).load(0)) - above).abs().mean() > 0.01


def test_size_scales_the_picture_and_not_the_object() -> None:
    small, large = (on_white(MicroWorld("cats", 4, 1, size=size).load(0)) for size in (32, 64))
    assert small.shape == (6, 3, 32, 32)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01


def test_depth_matches_the_slow_intersection() -> None:
    body = world._fit(world._Body.of(SHAPES["cats"](Dice(1))), camera := world._camera(0.6, 0.4)[None], fill=0.9)
    depth, hit = world._intersect(body, camera[0], 24)
    for row in range(0, 24, 3):
        for column in range(0, 24, 3):
            x, y = (column + 0.5) / 12 - 1, 1 - (row + 0.5) / 12
            nearest = -np.inf
            for centre, axes, radii in zip(body.centres, body.axes, body.radii, strict=True):
                start = (np.array([x, y, 0.0]) @ camera[0] - centre) @ axes / radii  # in the unit sphere's space
                along = camera[0, 2] @ axes / radii
                a, b, c = along @ along, start @ along, start @ start - 1
                if b * b > a * c:
                    nearest = max(nearest, (-b + np.sqrt(b * b - a * c)) / a)
            assert (hit[row, column] >= 0) == np.isfinite(nearest)
            if np.isfinite(nearest):
                assert depth[row, column] == pytest.approx(nearest, abs=1e-9)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MicroWorld("heads", 0, 1).load(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dogs", 0, 1), "no domain 'dogs'; expected one of heads"),
        (("mice", -1, 1), "first_seed is -1"),
        (("mice", 0, 0), "count is 0"),
        (("mice", 0, 1, 4), "size is 4"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MicroWorld(*arguments)
