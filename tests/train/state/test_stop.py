"""One wish to stop, however often it arrives."""

import signal
import time

import pytest
from accelerate import Accelerator

from train.state import stop
from train.state.stop import StopSignal


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_arrive_together_are_one_wish(capfd: pytest.CaptureFixture[str], first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stopping:
        for number in (first, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stopping.number == first
    assert capfd.readouterr().err.count("finishing what is under way") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_later_ctrl_c_ends_at_once_and_a_later_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
        began = time.monotonic()
        monkeypatch.setattr(stop.time, "monotonic", lambda: began + stop.ONE_STOP_S + 1)
        signal.raise_signal(signal.SIGTERM)
        assert codes == []
        signal.raise_signal(signal.SIGINT)
        assert codes == [128 + signal.SIGINT]


def test_sigusr1_asks_for_a_checkpoint_and_not_for_a_stop() -> None:
    accelerator = Accelerator(cpu=True)
    with StopSignal() as stopping:
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.agree(accelerator) == (False, True)
        stopping.save = False
        assert stopping.agree(accelerator) == (False, False)
        assert stopping.number is None
