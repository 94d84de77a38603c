"""Cameras in FaceLift's format => words for {angle}: how far from above, and how far turned from the first."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.errors import InputError
from softprompt.files import read_json

LEVEL = 15
"""Degrees that a camera may be rolled; more, and likely another axis than z points up."""
EYE_LEVEL = 5
"""Degrees up to which a camera is not said to be above or below."""


def read_angles(path: str | Path, frames: Sequence[int] | None, num_views: int) -> list[tuple[float, float]]:
    """Elevation and azimuth of each view's camera.

    path: a JSON with `frames`, each with `w2c`, a 4x4 matrix [world => camera, OpenCV's axes], z up in the world.
    frames: numbers of those to take, one a view; None: all.
    Returns: (elevation, azimuth) in degrees: above the horizon; turned from the first camera's side, positive to the right of
    one who looks through it.
    Raises: InputError naming the frame.
    """
    content = read_json(path, what="cameras in FaceLift's format (opencv_cameras.json)")
    listed = content.get("frames")
    if not isinstance(listed, list):
        raise InputError(
            f"{path}: frames: is {_kind(listed)}; expected a list of cameras, as FaceLift's opencv_cameras.json has"
        )
    for number in frames or []:
        if not 0 <= number < len(listed):
            raise InputError(f"--frames: {number} is none of {path}, which has {len(listed)}, counted from 0")
    numbers = list(range(len(listed))) if frames is None else list(frames)
    if len(numbers) != num_views:
        given = f"{path}: has {len(numbers)} frames" if frames is None else f"--frames: are {len(numbers)}"
        raise InputError(f"{given}; expected {num_views}, one a view; say which with --frames, e.g. --frames 0,4,8,16,24,28")
    return relative_angles([_rotation(listed[number], f"{path}: frame {number}") for number in numbers])


def relative_angles(rotations: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """rotations: [3, 3] each, world => camera (OpenCV: x right, y down, z forward), z up in the world. See `read_angles`."""
    found = []
    for rotation in rotations:
        right, _, forward = rotation
        elevation = math.degrees(math.asin(float(np.clip(-forward[2], -1, 1))))
        # The side from which a camera looks is that of its right-hand axis, turned: known even from straight above.
        found.append((elevation, math.degrees(math.atan2(-right[0], right[1]))))
    first = found[0][1]
    return [(elevation, 180 - (180 - azimuth + first) % 360) for elevation, azimuth in found]  # in (-180, 180]


def in_words(elevation: float, azimuth: float) -> str:
    """20, 45 => "from 20 degrees above, turned 45 degrees to the right"."""
    height, turn = round(abs(elevation)), round(abs(azimuth))
    if height <= EYE_LEVEL:
        said = "at eye level"
    elif height >= 90 - EYE_LEVEL:
        said = "from straight " + ("above" if elevation > 0 else "below")
    else:
        said = f"from {height} degrees " + ("above" if elevation > 0 else "below")
    if turn == 0:
        return said
    side = "" if turn == 180 else " to the right" if azimuth > 0 else " to the left"
    return f"{said}, turned {turn} degree{'s' * (turn != 1)}{side}"


def _rotation(frame: Any, origin: str) -> np.ndarray:
    """Of a frame's w2c. Raises: InputError when it is no rotation, or the camera lies on its side."""
    given = frame.get("w2c") if isinstance(frame, dict) else None
    try:
        matrix = np.array(given, dtype=float)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise InputError(f"{origin}: w2c is {_kind(given)}; expected a matrix of 4 rows of 4 numbers, world to camera")
    rotation = matrix[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise InputError(
            f"{origin}: the upper left 3x3 of w2c is no rotation; likely it holds a scale, or OpenGL's axes mirrored"
        )
    roll = math.degrees(math.asin(float(np.clip(rotation[0, 2], -1, 1))))
    if abs(roll) > LEVEL or rotation[1, 2] > math.sin(math.radians(LEVEL)):
        raise InputError(
            f"{origin}: the camera is not upright if z is up in the world (its right-hand axis is {roll:.0f} degrees from "
            f"level, its upper edge points {'down' if rotation[1, 2] > 0 else 'up'}); likely y is up, or w2c has OpenGL's axes"
        )
    return rotation


def _kind(value: Any) -> str:
    return "not there" if value is None else f"a {type(value).__name__}"
