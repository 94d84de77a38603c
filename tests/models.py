"""A model for tests that are not about numbers: as small as one gets, in FaceLift's format, with random weights."""

import shutil
from pathlib import Path

import torch

from softprompt.micro import MICRO_MODEL
from train.benchmark.models import SIZES, Size, write_pipeline

PICTURE = 16
"""Side of its pictures in pixels."""
_TINY = SIZES["tiny"]
_SMALLEST = Size(
    unet=_TINY.unet,
    vae=_TINY.vae
    | {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    vision=_TINY.vision,
    text=_TINY.text,
    picture=_TINY.picture,
)


def write_smallest_model(folder: Path) -> Path:
    """A pipeline folder of six views of 16x16 pixels. A run takes a third of the time of one with the embedded model.

    Returns: the folder.
    """
    SIZES.setdefault("smallest", _SMALLEST)
    torch.manual_seed(0)
    write_pipeline("smallest", folder, picture=PICTURE)
    for part in ("tokenizer", "text_encoder"):  # whose texts mean something
        shutil.rmtree(folder / part)
        shutil.copytree(MICRO_MODEL / part, folder / part)
    return folder
