"""A way of training, and the settings that all ways in a benchmark share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Settings that all ways of training share."""

    size: str
    """A key of softprompt.micro.models.SIZES."""
    device: torch.device
    dtype: torch.dtype
    """dtype of frozen weights and arithmetic."""
    batch_size: int = 1
    """Objects a step."""
    views: int = 6
    picture: int | None = None
    """Side in pixels; None: the size's own."""
    rank: int = 16
    compiled: bool = False


@dataclass(frozen=True)
class Way:
    """A way of training."""

    name: str
    step: Callable[[int], None]
    """Does optimizer step number i."""
    phases: dict[str, tuple[Any, str]]
    """Phases of a step: name => an object and its method that does it."""
