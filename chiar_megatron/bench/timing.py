"""Times of short calls: CUDA events (the clock on a CPU), rotated inputs, all sides in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Run = Callable[[int], object]
"""One call on the input set of this number."""

_CYCLES_PER_SECOND = 1.8e9  # about a GPU's clock; only bounds how long the stream is held
_MAX_HOLD_SECONDS = 0.05


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    samples: int

    @staticmethod
    def of(values: list[float]) -> Spread:
        """At least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Spread(median(values), low, high, len(values))

    def inverse(self, amount: float) -> Spread:
        """Of `amount` a second, where this is seconds."""
        return Spread(amount / self.median, amount / self.high, amount / self.low, self.samples)

    def record(self, unit: str) -> dict[str, Any]:
        """For JSON."""
        return {
            "median": self.median, "quartile_low": self.low, "quartile_high": self.high,
            "samples": self.samples, "unit": unit,
        }  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotation(bytes_of_one_set: float, device: torch.device) -> int:
    """Input sets to rotate among, so that none is still in the cache when its turn comes again."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = max(2, -(-4 * cache // max(1, int(bytes_of_one_set))))
    return int(max(1, min(wanted, 16, free // 4 // max(1, int(bytes_of_one_set)))))


def time_in_turn(
    runs: Mapping[str, Run], device: torch.device, sets: int, rounds: int, calls: int = 4
) -> dict[str, Spread]:
    """Seconds of one call of each of `runs`, all in one go: every round measures each of them once.

    A measurement is `calls` calls on rotating input sets. On CUDA the stream is held back first, so that
    the calls are queued before they start: what is measured is the device's time, not the host's.
    """
    hold = {}
    for name, run in runs.items():
        for index in range(sets + 1):  # compilation, autotuning, handles
            run(index % sets)
        synchronize(device)
        started = time.perf_counter()
        for index in range(calls):
            run(index % sets)
        hold[name] = time.perf_counter() - started
        synchronize(device)
    measure = _by_events if device.type == "cuda" else _by_clock
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            samples[name].append(measure(run, number * calls, calls, sets, hold[name]))
    return {name: Spread.of(values) for name, values in samples.items()}


def _by_clock(run: Run, first: int, calls: int, sets: int, hold: float) -> float:
    started = time.perf_counter()
    for index in range(first, first + calls):
        run(index % sets)
    return (time.perf_counter() - started) / calls


def _by_events(run: Run, first: int, calls: int, sets: int, hold: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(1.5 * hold, _MAX_HOLD_SECONDS) * _CYCLES_PER_SECOND))
    start.record()
    for index in range(first, first + calls):
        run(index % sets)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, those read and those written counted."""
    elements = 1 << (28 if device.type == "cuda" else 22)
    sources = [torch.randn(elements // 2, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    timed = time_in_turn({"copy": lambda index: target.copy_(sources[index])}, device, 2, 10)
    return 2 * target.nbytes / timed["copy"].median


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random numbers: the ceiling that was measured on this device."""
    size = 8192 if device.type == "cuda" else 512
    pairs = [[torch.randn(size, size, device=device).to(dtype) for _ in range(2)] for _ in range(2)]
    timed = time_in_turn({"product": lambda index: pairs[index][0] @ pairs[index][1]}, device, 2, 10)
    return 2.0 * size**3 / timed["product"].median
