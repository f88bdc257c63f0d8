"""Timers and interleaved repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Thunk = Callable[[], Any]

MAX_CALLS = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per repeat."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the middle two."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; the only sample twice when there is one."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Latency:
    """Seconds from handing in one call's work to having its result, over ``calls`` calls one after the other."""

    p50: float
    p99: float
    calls: int


def latency(thunk: Thunk, device: torch.device, calls: int = 500, budget_seconds: float = 3.0) -> Latency:
    """What somebody sees who waits for every result, as a live stream does: one call at a time, by the wall clock.

    Args:
        device: waited for after every call when it is a GPU.
        calls: at most so many; fewer, but at least 20, when they take longer than ``budget_seconds``.
    """
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < calls and (len(samples) < 20 or time.perf_counter() - begin < budget_seconds):
        start = time.perf_counter()
        thunk()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    samples.sort()
    return Latency(statistics.median(samples), samples[-(-99 * len(samples) // 100) - 1], len(samples))


class Timer(Protocol):
    """Times a block of calls on one kind of device."""

    def block(self, thunk: Thunk, calls: int) -> float:
        """Seconds per call over ``calls`` calls."""


class CpuTimer:
    """Wall-clock time.  Caches are as the calls leave them (warm)."""

    def block(self, thunk: Thunk, calls: int) -> float:
        """Seconds per call over ``calls`` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            thunk()
        return (time.perf_counter() - start) / calls


class CudaTimer:
    """Time between two CUDA events on the current stream.

    Calls follow each other at once and find in the L2 cache what fits there (warm).  With ``cold`` a read of twice the
    cache goes before every call, and the time of as many reads alone is taken off: the call finds nothing of its own
    there, and its launch is hidden behind the read.
    """

    def __init__(self, cold: bool = False) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._evict = evicting() if cold else None

    def _elapsed(self, call: Thunk, calls: int) -> float:
        torch.cuda.synchronize()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / calls

    def block(self, thunk: Thunk, calls: int) -> float:
        """Seconds per call over ``calls`` calls."""
        evict = self._evict
        if evict is None:
            return self._elapsed(thunk, calls)

        def both() -> None:
            evict()
            thunk()

        return max(1e-9, self._elapsed(both, calls) - self._elapsed(evict, 20))


def evicting() -> Thunk:
    """What leaves nothing of earlier calls in the current GPU's L2 cache: a read of twice as much."""
    device = torch.cuda.current_device()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    other, total = torch.ones(2 * cache // 4, device=device), torch.empty((), device=device)
    return lambda: torch.sum(other, dim=0, out=total)  # reads alone leave nothing to be written back


def make_timers(device: torch.device, temperatures: Sequence[str]) -> dict[str, Timer]:
    """A timer per temperature of the cache ("cold", "warm"); on a CPU there is only "warm"."""
    if device.type == "cuda":
        return {temperature: CudaTimer(temperature == "cold") for temperature in temperatures}
    return {"warm": CpuTimer()}


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        repeats: samples per candidate.
        block_seconds: calls are grouped until a sample takes about this long, so that the clock's grain and a single
            interruption do not decide it.
        budget_seconds: no new repeat starts after this long, once there are ``least_repeats``.
        least_repeats: samples that are taken whatever they cost.
        least_seconds: what a call is taken to last at least when calls are grouped: what goes before it costs, too.
        latency_calls: single calls that are timed where somebody waits for each.
    """

    repeats: int = 15
    block_seconds: float = 0.02
    budget_seconds: float = 8.0
    least_repeats: int = 5
    least_seconds: float = 1e-9
    latency_calls: int = 500


SCHEDULES = {"quick": Schedule(9, 0.01, 2.0), "standard": Schedule(), "full": Schedule(21, 0.02, 20.0, 7)}
"""By tier of the suite."""

BRIEF = Schedule(7, 0.002, 0.5, 3, 5e-5, 100)
"""On a GPU that is at hand for minutes only."""


def interleaved(candidates: Mapping[str, Thunk], timer: Timer, schedule: Schedule) -> dict[str, Timing]:
    """Time candidates in turns, starting each round with another one.

    Interleaving lets a change of clock rate, or another program, fall on all of them alike.

    Args:
        candidates: what to call, by name.
        timer, schedule: how and how long.
    """
    calls: dict[str, int] = {}
    for name, thunk in candidates.items():
        timer.block(thunk, 1)
        once = timer.block(thunk, 1)
        calls[name] = int(min(MAX_CALLS, max(1.0, schedule.block_seconds / max(once, schedule.least_seconds))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    start = time.perf_counter()
    for repeat in range(schedule.repeats):
        if repeat >= schedule.least_repeats and time.perf_counter() - start > schedule.budget_seconds:
            break
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(timer.block(candidates[name], calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
