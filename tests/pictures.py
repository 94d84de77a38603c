"""Pictures in tests, and the largest difference between two that should be equal."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ONE_LEVEL = 1
"""One of 255 levels. A picture computed in another batch, by other kernels (another instruction set) or by more threads
differs in the last bits of its floats, and by a level where those lie at the boundary of two."""


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, body, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pixels(picture: Path | Image.Image) -> np.ndarray:
    """[H, W, 3] uint8."""
    return np.asarray((Image.open(picture) if isinstance(picture, Path) else picture).convert("RGB"))


def levels_apart(found: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two pictures of one size, in levels of 255."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return int(np.abs(found.astype(np.int16) - expected.astype(np.int16)).max())
