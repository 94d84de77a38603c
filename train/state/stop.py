"""Ctrl-C and SIGTERM: finish the step, then stop. SIGUSR1: save, and go on."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

ONE_STOP_S = 3.0
"""Seconds within which further signals are taken for the same wish."""


class StopSignal:
    """Inside the block the first SIGINT or SIGTERM is noted; a later Ctrl-C ends the program at once. SIGUSR1, as job
    schedulers send some minutes before the end, asks for a checkpoint.

    One stop often arrives twice: job schedulers signal every process, and launchers pass on what they get. So SIGTERM never
    ends the program at once, and Ctrl-C does only some seconds after the first.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that was received."""
        self.save = False
        """Whether a checkpoint is asked for."""
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGUSR1:
            self.save = True
            return
        if self.number is not None:
            if number == signal.SIGINT and time.monotonic() - self._noted_at > ONE_STOP_S:
                os._exit(128 + number)
            return
        self.number, self._noted_at = number, time.monotonic()
        said = (
            f"\n{signal.Signals(number).name}: finishing what is under way, then saving a checkpoint and the export; Ctrl-C in "
            f"{ONE_STOP_S:g} s or later stops at once\n"
        )
        os.write(2, said.encode())  # print may be at work in what was interrupted

    def agree(self, accelerator: Accelerator) -> tuple[bool, bool]:
        """Exchange the wishes of all processes, once a step, so that all act after the same step.

        Returns: whether any process received a stop, and whether any is asked for a checkpoint: clear `save` when it is made.
        """
        number, save = self.number or 0, int(self.save)
        if accelerator.num_processes > 1:
            wishes = accelerator.gather(torch.tensor([[number, save]], device=accelerator.device))
            number, save = wishes.amax(dim=0).tolist()
        self.number = number or self.number
        return number > 0, save > 0
