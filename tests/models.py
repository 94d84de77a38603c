"""Inputs of short runs: a model as small as possible, in FaceLift's format, with random weights; mice to train on."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from softprompt.data.samples import write_source
from softprompt.micro import MICRO_MODEL
from softprompt.micro.models import SIZES, vae_config, write_pipeline
from softprompt.micro.world import MicroWorld

PICTURE = 16
"""Side of its pictures in pixels."""


def write_smallest_model(folder: Path) -> Path:
    """A pipeline folder of six views of 16x16 pixels. A run takes a third of the time of one with the embedded model.

    Returns: the folder.
    """
    SIZES["smallest"] = replace(SIZES["tiny"], vae=vae_config([8, 8], layers=1, groups=8))
    torch.manual_seed(0)
    write_pipeline("smallest", folder, picture=PICTURE)
    for part in ("tokenizer", "text_encoder"):  # texts get their meaning from the embedded model
        shutil.rmtree(folder / part)
        shutil.copytree(MICRO_MODEL / part, folder / part)
    return folder


def perturb(parameters: Iterable[Tensor], scale: float = 0.1) -> None:
    """Add seeded noise to parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def write_facelift(folder: Path) -> Path:
    """A new folder that `train.export --into` takes for FaceLift's repository."""
    (folder / "mvdiffusion").mkdir(parents=True)
    (folder / "inference.py").touch()
    return folder


def write_mice(folder: Path, *, train: int, val: int) -> Path:
    """Embedded mice as PNG samples of 64x64 pixels: so many in `train`, so many others in `val`.

    Returns: the folder.
    """
    write_source(MicroWorld("mice", 0, train, size=64), folder / "train")
    write_source(MicroWorld("mice", 10_000, val, size=64), folder / "val")
    return folder
