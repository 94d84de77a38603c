"""One picture: decoded, fitted into a square, laid on a background."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from softprompt.data.decode import WANTED, decode
from softprompt.errors import InputError, base_of

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}


def load_picture(path: str | Path, size: int) -> Tensor:
    """Read a picture of any colour mode, bit depth, size and aspect (see `softprompt.data.decode`).

    size: side of the square in pixels. The picture is turned upright where its EXIF data ask for it, scaled to fit, aspect
    kept, and centred on transparency; one without an alpha channel is opaque throughout. A picture of that size already is
    returned as it is in the file.
    Returns: uint8 [4, S, S], straight RGBA.
    Raises: InputError when the file cannot be decoded, or when no pixel of the result is visible.
    """
    try:
        picture = decode(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found{base_of(path)}; expected {WANTED}; likely it was moved or deleted") from error
    except (OSError, SyntaxError, ValueError) as error:  # which one depends on the byte that is wrong
        reason = str(error).replace("\n", " ")
        raise InputError(
            f"{path}: cannot be decoded ({reason}); expected {WANTED}, whole; likely it was copied incompletely, or another "
            "format was given its name"
        ) from error
    pixels = np.array(_fit(picture, size))
    if not pixels[..., 3].any():
        raise InputError(
            f"{path}: no visible pixel at {size}x{size} (alpha is 0 everywhere); expected the object opaque on a "
            "transparent background; likely the segmentation found nothing in this view"
        )
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """RGBA of any size => [size, size], aspect kept, centred on transparency."""
    if picture.size == (size, size):
        return picture
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Pillow premultiplies RGBA before it filters: the colour under transparent pixels does not bleed into the edge.
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(scaled, ((size - width) // 2, (size - height) // 2))
    return square


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Lay pictures on a plain colour.

    rgba: uint8 [..., 4, S, S], straight alpha. background: [3] in [0, 1].
    Returns: float32 [..., 3, S, S] in [0, 1].
    """
    colour, alpha = (rgba.float() / 255).split([3, 1], dim=-3)
    return colour * alpha + background.to(colour)[:, None, None] * (1 - alpha)


# ------------------------------------------------------------------------------------------------------- backgrounds


def backgrounds(choice: str) -> list[Tensor] | None:
    """The fixed colours a choice draws from.

    choice: white, black, gray, three_choices (all of them) or random.
    Returns: colours [3] in [0, 1]; None for random, which has no fixed ones.
    Raises: InputError when the choice is none of these.
    """
    if choice == "random":
        return None
    if choice == "three_choices":
        return [torch.tensor(colour) for colour in BACKGROUNDS.values()]
    if choice in BACKGROUNDS:
        return [torch.tensor(BACKGROUNDS[choice])]
    known = ", ".join([*BACKGROUNDS, "three_choices", "random"])
    raise InputError(f"background: {choice!r} is unknown; expected one of {known}; likely a typing mistake")


def pick_background(choice: str, generator: torch.Generator) -> Tensor:
    """Draw the background of one object, the same for all its views.

    Returns: [3] in [0, 1], on the generator's device. random: each channel uniform.
    Raises: InputError when the choice is unknown.
    """
    colours = backgrounds(choice)
    if colours is None:
        return torch.rand(3, generator=generator, device=generator.device)
    index = torch.randint(len(colours), (), generator=generator, device=generator.device)
    return colours[int(index)].to(generator.device)
