"""What one picture holds, measured once from its pixels: numbers small enough to keep for all pictures of a data set.

Nothing large is imported here: every process that measures does so anew.
"""

import math
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from softprompt.data.decode import FORMATS, decode

SMALL = 16
"""Side of the picture that is kept of each: enough to tell views apart, 1 KB."""
OPAQUE = 128
"""Alpha from which on a pixel is foreground, of 255."""
SAME_COLOUR = 16
"""Largest difference of a channel, of 255, to a background's colour that is still the background: noise, JPEG."""
EVEN_SHARE = 0.8
"""Of the border's pixels, that must have the background's colour: an object may reach over the rest."""
FEW_PICTURES = 200
"""Up to so many are measured faster than processes are started."""

Files = Sequence[Path | None]
"""Of one sample, by view; None where there is none."""


@dataclass(frozen=True)
class Picture:
    """Measurements of one picture. Shares and places are those in the square that training fits it into."""

    width: int
    """In pixels, as all sides here."""
    height: int
    is_intact: bool
    """All checksums in its file are right. Decoding does not look at them."""
    content: bytes
    """Digest of the visible pixels: equal for equal pictures, however they were compressed."""
    has_alpha: bool
    """False without an alpha channel, and where it is opaque throughout."""
    is_plain: bool
    """Nothing to see: no visible pixel, or the background's colour alone."""
    even_border: bool
    """Its border is transparent or of one colour, so that the object can be told from the background."""
    share: float
    """Of the foreground in the picture, in [0, 1]; NaN where it cannot be told from the background."""
    centre: tuple[float, float]
    """Centre of mass of the foreground, right and down from the middle, in sides: [-0.5, 0.5]; NaN without a foreground."""
    at_border: float
    """Length of the picture's border that is foreground, in sides: 0 to 4."""
    small: NDArray[np.uint8]
    """[SMALL, SMALL, 4], colour premultiplied by alpha, and alpha (opaque where the foreground cannot be told)."""


def look_at(file: str | Path) -> Picture | None:
    """Measure one picture. Returns: None where it cannot be decoded."""
    try:
        picture = decode(file)
    except (OSError, SyntaxError, ValueError):
        return None
    rgba = np.array(picture)  # H W 4
    alpha = rgba[..., 3]
    content = blake2b(np.where(alpha > 0, rgba.view(np.uint32)[..., 0], 0).tobytes(), digest_size=16)
    content.update(bytes(str(picture.size), "ascii"))
    has_alpha = bool(alpha.min() < 255)
    foreground = alpha >= OPAQUE if has_alpha else _against_plain(rgba[..., :3])
    if foreground is not None and not has_alpha:
        picture.putalpha(Image.fromarray(foreground.astype(np.uint8) * 255))
    share, centre, at_border = (math.nan, (math.nan, math.nan), 0.0) if foreground is None else _place(foreground)
    return Picture(
        width=picture.width,
        height=picture.height,
        is_intact=_is_intact(file),
        content=content.digest(),
        has_alpha=has_alpha,
        is_plain=not alpha.any() if has_alpha else foreground is not None and not foreground.any(),
        even_border=foreground is not None,
        share=share,
        centre=centre,
        at_border=at_border,
        small=_small(picture),
    )


def _is_intact(file: str | Path) -> bool:
    try:
        with Image.open(file, formats=FORMATS) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _against_plain(rgb: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """What differs from the border's colour, [H, W]; None where the border has no one colour."""
    background = np.median(_border(rgb), axis=0)  # 3

    def differs(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        low, high = ((background + way * SAME_COLOUR).clip(0, 255).astype(np.uint8) for way in (-1, 1))
        beyond = (pixels < low) | (pixels > high)
        return beyond[..., 0] | beyond[..., 1] | beyond[..., 2]

    return differs(rgb) if 1 - differs(_border(rgb)).mean() >= EVEN_SHARE else None


def _border(pixels: NDArray[Any]) -> NDArray[Any]:
    """The outermost pixels: [H, W, ...] => [2 (H + W), ...], the corners twice."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _place(foreground: NDArray[np.bool_]) -> tuple[float, tuple[float, float], float]:
    """(share, centre, at_border) as `Picture` has them."""
    height, width = foreground.shape
    side = max(height, width)
    rows, columns = foreground.sum(1), foreground.sum(0)
    count = int(rows.sum())
    at_border = float(_border(foreground).sum() / side)
    if count == 0:
        return 0.0, (math.nan, math.nan), at_border
    x = float(columns @ (np.arange(width) + 0.5 - width / 2)) / count / side
    y = float(rows @ (np.arange(height) + 0.5 - height / 2)) / count / side
    return count / side**2, (x, y), at_border


def _small(picture: Image.Image) -> NDArray[np.uint8]:
    scale = SMALL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = np.zeros((SMALL, SMALL, 4), dtype=np.uint8)
    top, left = (SMALL - height) // 2, (SMALL - width) // 2
    scaled = picture.convert("RGBa").resize((width, height), Image.Resampling.BOX)
    square[top : top + height, left : left + width] = np.array(scaled)
    return square


def look_at_sample(files: Files) -> list[Picture | None]:
    """Measure a sample's pictures, by view; None for those that are missing or cannot be decoded."""
    return [None if file is None else look_at(file) for file in files]


def look_at_all(samples: Sequence[Files]) -> list[list[Picture | None]]:
    """Measure all samples, on all cores where that is worth it; a bar appears after two seconds.

    Returns: as `look_at_sample`, in the given order.
    """
    watched = partial(tqdm, total=len(samples), desc="inspecting", unit="object", delay=2, dynamic_ncols=True)
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or sum(map(len, samples)) <= FEW_PICTURES:
        return list(watched(map(look_at_sample, samples)))
    # Pillow holds Python's lock while it decodes: threads would wait for each other. Spawned, since a fork would copy the
    # locks of libraries that have threads.
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=_leave_ctrl_c) as pool:
        try:
            return list(watched(pool.map(look_at_sample, samples, chunksize=4)))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def _leave_ctrl_c() -> None:
    """To the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
