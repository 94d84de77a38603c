"""Measurements of pictures: one small record for each, so that those of a whole data set fit into memory.

Nothing large is imported, since every process that measures imports this anew.
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
"""Side of the thumbnail that is compared between objects: enough to distinguish views, 1 KB."""
OPAQUE = 128
"""Alpha, of 255, from which a pixel is foreground."""
SAME_COLOUR = 16
"""Largest difference of a channel, of 255, from the background's colour that is still background: noise, JPEG."""
EVEN_SHARE = 0.8
"""Share of the border's pixels that must have the background's colour: the object may cover the rest."""
FEW_PICTURES = 200
"""Up to this number, measuring takes less time than starting processes."""

Files = Sequence[Path | None]
"""A sample's pictures, by view; None where there is no file."""


@dataclass(frozen=True)
class Picture:
    """Measurements of one picture. Shares and positions refer to the square that training fits it into."""

    width: int
    """In pixels."""
    height: int
    is_intact: bool
    """All checksums in the file are right; decoding does not check them."""
    content: bytes
    """Digest of the visible pixels: equal for equal pictures, however they are compressed."""
    has_alpha: bool
    """False without an alpha channel, or with one that is opaque throughout."""
    is_plain: bool
    """No visible pixel, or nothing but the background's colour."""
    share: float
    """Share of the foreground in the picture, in [0, 1]; NaN without alpha on an uneven background."""
    centre: tuple[float, float]
    """Foreground's centre of mass, right and down from the middle, in sides: [-0.5, 0.5]; NaN without foreground."""
    at_border: float
    """Length of the picture's border that is foreground, in sides: 0 to 4."""
    small: NDArray[np.uint8]
    """[SMALL, SMALL, 4], premultiplied colour and alpha (opaque where the foreground is not known)."""

    @property
    def has_foreground(self) -> bool:
        """Whether object and background can be separated: by alpha, or by a border of one colour."""
        return not math.isnan(self.share)


def inspect_picture(file: str | Path) -> Picture | None:
    """Measure one picture. Returns: None if it cannot be decoded."""
    try:
        picture = decode(file)
    except (OSError, SyntaxError, ValueError):
        return None
    rgba = np.array(picture)  # H W 4
    alpha = rgba[..., 3]
    content = blake2b(np.where(alpha > 0, rgba.view(np.uint32)[..., 0], 0).tobytes(), digest_size=16)
    content.update(bytes(str(picture.size), "ascii"))
    has_alpha = bool(alpha.min() < 255)
    foreground = alpha >= OPAQUE if has_alpha else _differs_from_border(rgba[..., :3])
    if foreground is not None and not has_alpha:
        picture.putalpha(Image.fromarray(foreground.astype(np.uint8) * 255))
    share, centre, at_border = (math.nan, (math.nan, math.nan), 0.0) if foreground is None else _position(foreground)
    return Picture(
        width=picture.width,
        height=picture.height,
        is_intact=_is_intact(file),
        content=content.digest(),
        has_alpha=has_alpha,
        is_plain=not alpha.any() if has_alpha else foreground is not None and not foreground.any(),
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


def _differs_from_border(rgb: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Pixels that differ from the border's colour, [H, W]; None if the border has no single colour."""
    background = np.median(_border(rgb), axis=0)  # 3

    def differs(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        low, high = ((background + way * SAME_COLOUR).clip(0, 255).astype(np.uint8) for way in (-1, 1))
        beyond = (pixels < low) | (pixels > high)
        return beyond[..., 0] | beyond[..., 1] | beyond[..., 2]

    return differs(rgb) if 1 - differs(_border(rgb)).mean() >= EVEN_SHARE else None


def _border(pixels: NDArray[Any]) -> NDArray[Any]:
    """The outermost pixels: [H, W, ...] => [2 (H + W), ...], the corners twice."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _position(foreground: NDArray[np.bool_]) -> tuple[float, tuple[float, float], float]:
    """(share, centre, at_border) as in `Picture`."""
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


def inspect_sample(files: Files) -> list[Picture | None]:
    """Measure a sample's pictures, by view; None for those that are missing or cannot be decoded."""
    return [None if file is None else inspect_picture(file) for file in files]


def inspect_all(samples: Sequence[Files]) -> list[list[Picture | None]]:
    """`inspect_sample` for all samples, in order, on all cores if there are many; a progress bar appears after two seconds."""
    progress = partial(tqdm, total=len(samples), desc="inspecting", unit="object", delay=2, dynamic_ncols=True)
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or sum(map(len, samples)) <= FEW_PICTURES:
        return list(progress(map(inspect_sample, samples)))
    # Processes, since Pillow holds Python's lock while it decodes; spawned, since a fork would copy locks that threads hold.
    # Ctrl-C is for this process alone.
    ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=ignore_ctrl_c) as pool:
        try:
            return list(progress(pool.map(inspect_sample, samples, chunksize=4)))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
