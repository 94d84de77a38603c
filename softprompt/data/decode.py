"""A picture's file to 8-bit RGBA. Nothing large is imported here: processes that only decode start at once."""

import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
"""Endings of the picture files that are read, in lower case; a file's own may be in upper case."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
"""Pillow's names of them."""
WANTED = "a PNG, JPEG, WebP or TIFF"
MOST_PIXELS = 8192**2
"""Limit of a picture's pixels in its file: a file of a few bytes can claim any number, and decoding takes 16 bytes for each."""


def decode(path: str | Path) -> Image.Image:
    """Read a picture of any colour mode and bit depth, turned upright where its EXIF data say how it was held.

    16-bit samples keep their high byte, as libpng does it. A colour that a PNG names as transparent (tRNS) has alpha 0, at any
    bit depth; a picture without transparency is opaque throughout. Of several frames the first is read.
    Returns: RGBA, 8 bit.
    Raises: OSError, SyntaxError or ValueError for a damaged file, depending on its damage.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"it claims {file.width} x {file.height} pixels, {MOST_PIXELS} at most are read")
            file.filename = ""  # Pillow would map a raw TIFF into memory, with its sides swapped where it lies on its side
            raw = _raw_mode(file)
            file.load()
            picture = _to_rgba(file, raw, path)
            picture.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
            return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (struct.error, KeyError, TypeError, IndexError, AttributeError) as error:  # of EXIF data or tags that are damaged
        raise ValueError(f"damaged inside: {type(error).__name__} {error}") from error


def _raw_mode(file: Image.Image) -> str:
    """How a PNG's samples lie in its file, in Pillow's words, as L;4 or RGB;16B; empty for other formats."""
    tiles = getattr(file, "tile", None)
    return str(tiles[0].args) if file.format == "PNG" and tiles else ""


def _to_rgba(file: Image.Image, raw: str, path: str | Path) -> Image.Image:
    """raw: of `_raw_mode`, before the file was loaded."""
    transparent = file.info.get("transparency")
    if file.format == "PNG" and file.mode.startswith("I"):  # Pillow would clip the 16 bits at 255 and show all white
        samples = np.array(file)
        return _with_alpha(samples >> 8, None if transparent is None else samples != transparent)
    if file.mode in ("F", "I") or file.mode.startswith("I;"):
        bits = 32 if file.mode in ("F", "I") else 16
        raise ValueError(
            f"it has one channel of {bits}-bit numbers, and no word of which is white; save it with 8 bits a channel"
        )
    if raw == "RGB;16B" and transparent is not None:
        high, low = (np.array(part, dtype=np.uint16) for part in (file, _low_bytes(path)))
        return _with_alpha(high, ((high << 8 | low) != np.array(transparent)).any(axis=2))
    if isinstance(transparent, int) and raw in ("L;2", "L;4"):  # Pillow spreads samples over 0 to 255, but not this one
        highest = 2 ** int(raw[2:]) - 1
        file.info["transparency"] = (transparent & highest) * (255 // highest)
    return file.convert("RGBA")


def _low_bytes(path: str | Path) -> Image.Image:
    """Of a PNG's 16-bit colours: Pillow gives the high bytes alone, unless it is told that the bytes are in the other order."""
    with Image.open(path, formats=["PNG"]) as file:
        file.tile = [tile._replace(args="RGB;16L") for tile in file.tile]
        file.load()
        return file.copy()


def _with_alpha(samples: np.ndarray, visible: np.ndarray | None) -> Image.Image:
    """samples: [H, W] or [H, W, 3], 0 to 255. visible: [H, W]; None: all."""
    picture = Image.fromarray(samples.astype(np.uint8)).convert("RGBA")
    if visible is not None:
        picture.putalpha(Image.fromarray(visible.astype(np.uint8) * 255))
    return picture
