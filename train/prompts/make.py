"""Texts => a prompt: the test of the text encoder against FaceLift's own prompt, and cameras as words for {angle}."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import read_json
from softprompt.prompt.templates import VIEWS
from train.prompts.sources import TOY, Encoder, Source, fill_in

SAME = 0.01
"""Largest distance between tokens of one text, relative to the norm: FaceLift's prompt was encoded in float16, layer by layer.
Another padding token or encoder gives 0.2 and more."""
LEVEL = 15
"""Largest roll of a camera, in degrees; with more, likely another axis than z points up."""
EYE_LEVEL = 5
"""Largest elevation, in degrees, that counts as neither above nor below."""


def reproduce(encoder: Encoder, reference: Source) -> str:
    """Encode FaceLift's six texts and compare them with a file that was made of them.

    Returns: the largest difference, in a sentence. Raises: InputError saying why they are not the same.
    """
    texts = fill_in("facelift", subject="", angles="")
    made = encoder.encode("facelift", texts, VIEWS).prompt
    origin = f"--reference {reference.name}"
    if made.shape != reference.prompt.shape:
        raise InputError(
            f"{origin}: is {list(reference.prompt.shape)}; {encoder.name} encodes FaceLift's six texts to {list(made.shape)}; "
            f"likely it was made with another text encoder"
        )
    distance = _largest_distance(made, reference.prompt)
    if distance <= SAME:
        largest = float((made - reference.prompt).abs().max())
        return f"{reference.name} is reproduced from FaceLift's six texts: no number differs by more than {largest:.1g}"
    text = f"{origin}: is not what {encoder.name} makes of FaceLift's six texts (a token differs by {distance:.0%} of its norm)"
    if encoder.is_toy:
        raise InputError(
            f"{text}; that is {TOY}, whose prompts fit only the embedded model; give FaceLift's pipeline as --model"
        )
    used = encoder.tokenizer.pad_token
    # Stable Diffusion 2 pads with "!", number 0; Stable Diffusion 1 with the end of a text.
    for padding in (encoder.tokenizer.convert_ids_to_tokens(0), encoder.tokenizer.eos_token):
        if padding == used:
            continue
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.pad_token = padding
        padded = Encoder(encoder.folder, tokenizer, encoder.model).embed(texts)
        if _largest_distance(padded, reference.prompt) <= SAME:
            raise InputError(
                f"{text}; it is with the padding token {padding!r} in place of {used!r}: set pad_token in "
                f"{encoder.folder / 'tokenizer'}"
            )
    raise InputError(f"{text}, with any padding token; likely it was made with another text encoder, or from other texts")


def _largest_distance(made: Tensor, reference: Tensor) -> float:
    """The largest distance between tokens, relative to the reference's norm. Both: [V, T, D]."""
    return float(((made - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def metadata(source: Source, *, model: str, text: str) -> dict[str, object]:
    """For the JSON beside the file."""
    return {
        "origin": "made from texts",
        "text": text,
        "texts": list(source.texts),
        "text_tokens": list(source.words or ()),
        "model": model,
        "toy_encoder": source.toy,
    }


def read_angles(path: str | Path, frames: Sequence[int] | None, num_views: int) -> list[tuple[float, float]]:
    """Elevation and azimuth of each view's camera.

    path: a JSON with `frames`, each with `w2c`, a 4x4 matrix [world => camera, OpenCV's axes], z up in the world.
    frames: numbers of those to use, one a view; None: all.
    Returns: (elevation, azimuth) in degrees: above the horizon; relative to the first camera, positive to the right as seen
    through it.
    Raises: InputError naming the frame.
    """
    content = read_json(path, what="cameras in FaceLift's format (opencv_cameras.json)")
    listed = content.get("frames")
    if not isinstance(listed, list):
        raise InputError(
            f"{path}: frames: is {_kind(listed)}; expected a list of cameras, as FaceLift's opencv_cameras.json has"
        )
    numbers = list(range(len(listed))) if frames is None else list(frames)
    for number in numbers:
        if not 0 <= number < len(listed):
            raise InputError(f"--frames: {number} is not in {path}, which has {len(listed)}, counted from 0")
    if len(numbers) != num_views:
        given = f"{path}: has {len(numbers)} frames" if frames is None else f"--frames: are {len(numbers)}"
        raise InputError(f"{given}; expected {num_views}, one a view; choose with --frames, e.g. --frames 0,4,8,16,24,28")
    return relative_angles([_rotation(listed[number], f"{path}: frame {number}") for number in numbers])


def relative_angles(rotations: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """rotations: [3, 3] each, world => camera (OpenCV: x right, y down, z forward), z up in the world. See `read_angles`."""
    found = []
    for rotation in rotations:
        right, _, forward = rotation
        elevation = math.degrees(math.asin(float(np.clip(-forward[2], -1, 1))))
        # The azimuth is that of the right-hand axis, turned: it is defined even for a camera straight above.
        found.append((elevation, math.degrees(math.atan2(-right[0], right[1]))))
    first = found[0][1]
    return [(elevation, 180 - (180 - azimuth + first) % 360) for elevation, azimuth in found]  # in (-180, 180]


def camera_text(elevation: float, azimuth: float) -> str:
    """20, 45 => "from 20 degrees above, turned 45 degrees to the right"."""
    height, turn = round(abs(elevation)), round(abs(azimuth))
    where = f"{'straight' if height >= 90 - EYE_LEVEL else f'{height} degrees'} {'above' if elevation > 0 else 'below'}"
    text = "at eye level" if height <= EYE_LEVEL else f"from {where}"
    if turn == 0:
        return text
    side = "" if turn == 180 else " to the right" if azimuth > 0 else " to the left"
    return f"{text}, turned {turn} degree{'s' * (turn != 1)}{side}"


def _rotation(frame: Any, origin: str) -> np.ndarray:
    """The rotation in a frame's w2c. Raises: InputError if there is none, or the camera is not upright."""
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
            f"{origin}: the upper left 3x3 of w2c is no rotation; likely it includes a scale, or OpenGL's axes mirrored"
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
