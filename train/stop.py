"""Ctrl-C and SIGTERM: finish the step, then stop."""

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """Inside the block the first SIGINT or SIGTERM is noted, the second one ends the program at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that was received."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint and the export; once more to stop "
            f"at once",
            file=sys.stderr,
        )

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process received one: all then stop after the same step."""
        if accelerator.num_processes == 1:
            return self.number is not None
        noted = torch.tensor([float(self.number is not None)], device=accelerator.device)
        return bool(accelerator.reduce(noted, reduction="sum").item() > 0)
