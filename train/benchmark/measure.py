"""Time, memory and operations of steps, each way in turn so that all see the same machine."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from train.benchmark.way import Way


@dataclass
class Measured:
    """A way of training, measured. Times are seconds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step in each repeat, mean over its steps."""
    flop: float = 0.0
    """Operations of a step, mean over a cycle of steps; recomputation by gradient checkpointing counts."""
    peak_bytes: int | None = None
    """Peak of the GPU's memory in its steps; None on a CPU."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by phase, synchronised after each."""

    @property
    def typical(self) -> float:
        """Seconds a step: the median over repeats."""
        return median(self.seconds)


CYCLE = 4
"""Steps that are measured together: a KL term on every fourth step falls into each cycle once."""


def measure(ways: Sequence[Way], *, device: torch.device, repeats: int, progress: bool) -> list[Measured]:
    """After a cycle of warm-up, `repeats` cycles of each way, interleaved; then one with each phase timed."""
    found = [Measured(way.name) for way in ways]
    for way, one in zip(ways, found, strict=True):
        _cycle(way, device)
        # On a CPU only the plain kernel's operations are known to the counter; there are as many in the others.
        kernels = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with kernels, FlopCounterMode(display=False) as counter:
            _cycle(way, device)
        one.flop = counter.get_total_flops() / CYCLE
        one.peak_bytes = _peak(way, device)
    for _ in tqdm(range(repeats), desc="timing", unit="round", disable=not progress, leave=False):
        for way, one in zip(ways, found, strict=True):
            began = _now(device)
            _cycle(way, device)
            one.seconds.append((_now(device) - began) / CYCLE)
    for way, one in zip(ways, found, strict=True):
        with _timed(way.phases, device) as phases:
            _cycle(way, device)
        one.phases = {name: seconds / CYCLE for name, seconds in phases.items()}
    return found


def dearest_kernels(way: Way, device: torch.device, *, count: int = 10) -> dict[str, float]:
    """The kernels in which a cycle of steps spends most of the device's time, each with its share of all."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        _cycle(way, device)
        _now(device)
    spent = {one.key: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in seen.key_averages()}
    dearest = sorted(spent, key=lambda name: -spent[name])[:count]
    return {name: spent[name] / sum(spent.values()) for name in dearest if spent[name] > 0}


def matmul_flops(device: torch.device, dtype: torch.dtype, *, repeats: int = 10) -> float:
    """FLOP/s of a large matrix product, the best of some: the machine's practical maximum."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats + 1):
        began = _now(device)
        a @ b
        best = max(best, 2 * n**3 / (_now(device) - began))
    return best


def _cycle(way: Way, device: torch.device) -> None:
    for number in range(CYCLE):
        way.step(number)


def _peak(way: Way, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    _cycle(way, device)
    return int(torch.cuda.max_memory_allocated())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _timed(phases: dict[str, tuple[Any, str]], device: torch.device) -> Iterator[dict[str, float]]:
    """Inside the block each phase's method adds up its time."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            began = _now(device)
            result = method(*args, **options)
            spent[name] += _now(device) - began
            return result

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in phases.items():
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spent
