"""The micro world: procedural objects, rendered in six views by intersecting rays with ellipsoids in closed form.

What the objects look like is in `shapes.py`. Rays are parallel (orthographic), so the depth of an ellipsoid under a
pixel is the larger root of one quadratic.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro.shapes import SHAPES, Array, Dice, Fur, Shape

AZIMUTHS = (0.0, 45.0, 90.0, 180.0, 270.0, 315.0)
"""Degrees from the front, counter-clockwise seen from above; the order of softprompt.prompt.templates.VIEWS."""

SUPERSAMPLING = 3
"""Rays per pixel along each side."""


@dataclass(frozen=True)
class Domain:
    """A kind of objects, and how they are looked at."""

    shape: str
    """Key of SHAPES."""
    elevation: tuple[float, float]
    """Lowest and highest elevation of the camera in degrees; one is drawn per object."""
    photographic: bool
    """Lit by a sun and the sky, as footage is; otherwise flat, as an asset is rendered."""


LEVEL, ABOVE = (0.0, 0.0), (20.0, 25.0)
"""Elevations."""


COMBINATIONS = {
    f"{shape}_{style}_{height}": Domain(shape, elevation, photographic=style == "photo")
    for shape in SHAPES
    for style in ("render", "photo")
    for height, elevation in (("level", LEVEL), ("above", ABOVE))
}
"""Every body as a rendering and as a photograph, level and from above."""
DOMAINS = {
    "heads": Domain("heads", LEVEL, photographic=False),
    "heads_above": Domain("heads", ABOVE, photographic=False),
    "cats": Domain("cats", LEVEL, photographic=True),
    "cats_above": Domain("cats", ABOVE, photographic=True),
    "mice": Domain("mice", ABOVE, photographic=True),
    **COMBINATIONS,
}
"""`heads` is FaceLift's domain, `mice` the one that runs adapt to; the others are what pretraining sees."""


class MicroWorld:
    """A source (see softprompt.data.samples) of procedural objects.

    domain: a key of DOMAINS. Objects are those of the seeds first_seed ... first_seed + count - 1, and nothing else
    decides what they look like. size: side S of the pictures in pixels.
    Raises: InputError for an unknown domain, or a seed, count or size that cannot be.
    """

    def __init__(self, domain: str, first_seed: int, count: int, size: int = 64) -> None:
        if domain not in DOMAINS:
            raise InputError(f"micro world: there is no domain {domain!r}; expected one of {', '.join(DOMAINS)}")
        for name, value, least in (("first_seed", first_seed, 0), ("count", count, 1), ("size", size, 8)):
            if value < least:
                raise InputError(f"micro world: {name} is {value}; expected {least} or more")
        self.domain = domain
        self.size = size
        self._seeds = range(first_seed, first_seed + count)
        self.names = [f"{domain}-{seed:05d}" for seed in self._seeds]

    def __len__(self) -> int:
        return len(self._seeds)

    locations: Sequence[str] = ()
    """Its objects are in no files."""

    def check(self, indices: Sequence[int]) -> None:
        """They are always there."""

    def files(self, index: int) -> Sequence[Path]:
        """None."""
        return ()

    def load(self, index: int) -> Tensor:
        """Returns: uint8 [6, 4, S, S], straight RGBA; colour is 0 where alpha is."""
        return render_object(self.domain, self._seeds[index], self.size)


def render_object(domain: str, seed: int, size: int) -> Tensor:
    """The six views of one object. Returns: uint8 [6, 4, S, S], straight RGBA."""
    kind = DOMAINS[domain]
    dice = Dice(zlib.crc32(domain.encode()), seed)
    shape = SHAPES[kind.shape](dice)
    elevation = np.radians(dice(*kind.elevation))
    sun = _towards(np.radians(dice(-70, 70)), np.radians(dice(35, 60))) if kind.photographic else None
    cameras = np.stack([_camera(np.radians(azimuth), elevation) for azimuth in AZIMUTHS])  # V 3 3
    body = _fit(_Body.of(shape), cameras, fill=dice(0.86, 0.96))
    views = [_render(body, shape.fur, camera, sun, size) for camera in cameras]
    return torch.from_numpy(np.stack(views))


def _towards(azimuth: float, elevation: float) -> Array:
    """Unit vector from the object to a camera (or lamp) at that place."""
    flat = np.cos(elevation)
    return np.array([np.sin(azimuth) * flat, -np.cos(azimuth) * flat, np.sin(elevation)])


def _camera(azimuth: float, elevation: float) -> Array:
    """[3, 3], rows: the picture's right, its up, and toward the viewer, in object space."""
    viewer = _towards(azimuth, elevation)
    right = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    return np.stack([right, np.cross(viewer, right), viewer])


@dataclass(frozen=True)
class _Body:
    """The ellipsoids of an object as arrays, P of them."""

    centres: Array  # P 3
    axes: Array  # P 3 3, columns unit vectors
    radii: Array  # P 3
    colours: Array  # P 3
    below: Array  # P 3, colour of the underside
    furry: Array  # P, 0 or 1
    unit: float = 1.0
    """Length in the frame of one unit of object space."""

    @classmethod
    def of(cls, shape: Shape) -> "_Body":
        parts = shape.parts
        return cls(
            centres=np.array([p.centre for p in parts], dtype=float),
            axes=np.stack([p.axes() for p in parts]),
            radii=np.array([p.radii for p in parts]),
            colours=np.array([p.colour for p in parts]),
            below=np.array([p.below or p.colour for p in parts]),
            furry=np.array([float(p.furry) for p in parts]),
        )

    def quadrics(self) -> Array:
        """[P, 3, 3] symmetric M of q^T M q = 1, q from the ellipsoid's centre."""
        return (self.axes / self.radii[:, None] ** 2) @ self.axes.transpose(0, 2, 1)

    def extent(self, directions: Array) -> Array:
        """Half-width of every ellipsoid along unit vectors [K, 3]. Returns: [P, K]."""
        along = np.einsum("kd,pda->pka", directions, self.axes) * self.radii[:, None]
        return np.sqrt(np.square(along).sum(-1))


def _fit(body: _Body, cameras: Array, fill: float) -> _Body:
    """Centre an object and scale it so that it spans at most `fill` of the frame [-1, 1] in every view."""
    width = body.extent(np.eye(3))
    middle = ((body.centres - width).min(0) + (body.centres + width).max(0)) / 2
    centres = body.centres - middle
    screen = cameras[:, :2].reshape(-1, 3)  # right and up of every view
    reach = (np.abs(centres @ screen.T) + body.extent(screen)).max()
    unit = fill / reach
    return _Body(centres * unit, body.axes, body.radii * unit, body.colours, body.below, body.furry, unit)


def _render(body: _Body, fur: Fur, camera: Array, sun: Array | None, size: int) -> NDArray[np.uint8]:
    """One view. camera: [3, 3] of `_camera`. sun: toward the lamp, None for flat light. Returns: uint8 [4, S, S]."""
    fine = size * SUPERSAMPLING
    depth, hit = _intersect(body, camera, fine)
    rows, columns = np.nonzero(hit >= 0)
    part = hit[rows, columns]
    place = np.stack([(columns + 0.5) * 2 / fine - 1, 1 - (rows + 0.5) * 2 / fine, depth[rows, columns]], -1) @ camera  # K 3
    normal = np.empty_like(place)
    for p, quadric in enumerate(body.quadrics()):
        mine = part == p
        normal[mine] = (place[mine] - body.centres[p]) @ quadric
    normal /= np.sqrt(np.square(normal).sum(-1, keepdims=True))

    colour = _paint(body, fur, part, place / body.unit, normal) * _light(normal, camera[2], sun)[:, None]
    pixel = rows // SUPERSAMPLING * size + columns // SUPERSAMPLING
    covered = np.bincount(pixel, minlength=size * size)
    totals = [np.bincount(pixel, channel, minlength=size * size) for channel in colour.clip(0, 1).T]
    rgba = np.stack([*(total / covered.clip(1) for total in totals), covered / SUPERSAMPLING**2])
    return (rgba * 255).round().astype(np.uint8).reshape(4, size, size)


def _intersect(body: _Body, camera: Array, fine: int) -> tuple[Array, NDArray[np.int64]]:
    """Nearest ellipsoid under every ray of one view.

    An ellipsoid is q^T M q = 1 for q from its centre; in the camera's axes M's third row gives the two depths at which
    a ray (x, y) crosses it, and what is left of M (its Schur complement) the silhouette.
    Returns: depth toward the viewer [fine, fine] and the ellipsoid's index, -1 where there is none.
    """
    m = camera @ body.quadrics() @ camera.T
    centres, reach = body.centres @ camera.T, body.extent(camera[:2])
    depth, hit = np.full((fine, fine), -np.inf), np.full((fine, fine), -1)
    ticks = (np.arange(fine) + 0.5) * 2 / fine - 1
    for p, (cx, cy, cz) in enumerate(centres):
        left, right = np.searchsorted(ticks, (cx - reach[p, 0], cx + reach[p, 0]))
        top, bottom = np.searchsorted(ticks, (-cy - reach[p, 1], -cy + reach[p, 1]))
        x, y = ticks[None, left:right] - cx, -ticks[top:bottom, None] - cy
        mzz, mxz, myz = m[p, 2, 2], m[p, 0, 2], m[p, 1, 2]
        sxx, sxy, syy = m[p, 0, 0] - mxz**2 / mzz, m[p, 0, 1] - mxz * myz / mzz, m[p, 1, 1] - myz**2 / mzz
        inside = (1 - sxx * x**2 - 2 * sxy * x * y - syy * y**2) / mzz
        z = np.where(inside > 0, cz - (mxz * x + myz * y) / mzz + np.sqrt(inside.clip(0)), -np.inf)
        window = np.s_[top:bottom, left:right]
        nearer = z > depth[window]
        depth[window][nearer] = z[nearer]
        hit[window][nearer] = p
    return depth, hit


def _paint(body: _Body, fur: Fur, part: NDArray[np.int64], place: Array, normal: Array) -> Array:
    """Colour of the surface before light: [K, 3]. place: [K, 3] in object space, normal: [K, 3]."""
    under = ((-0.15 - normal[:, 2:]) / 0.4).clip(0, 1)
    colour = body.colours[part] * (1 - under) + body.below[part] * under
    if not body.furry.any():
        return colour
    x, y, z = (place + np.array(fur.phases)).T
    stripes = (np.sin(fur.stripe_frequency * (y + 0.15 * np.sin(3 * z))) * 1.5 + 0.3).clip(0, 1)
    mottle = np.sin(5.1 * x + 2.3 * z) * np.sin(4.3 * y - 1.7 * x) + 0.5 * np.sin(11 * y + 7 * z) * np.sin(9 * x)
    pattern = (1 - fur.stripes * stripes) * (1 + fur.mottle * mottle)
    return colour * (1 + body.furry[part] * (pattern - 1))[:, None]


def _light(normal: Array, viewer: Array, sun: Array | None) -> Array:
    """How bright a surface is: [K]. Flat light only tells edges; daylight is a sun, a sky, and shade underneath."""
    if sun is None:
        return 0.86 + 0.14 * (normal @ viewer).clip(0, 1)
    sky = 0.5 + 0.5 * normal[:, 2]
    return 0.30 + 0.30 * sky + 0.50 * (normal @ sun).clip(0, 1)
