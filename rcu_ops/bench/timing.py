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


def latency(thunks: Sequence[Thunk], device: torch.device, calls: int = 500, budget_seconds: float = 3.0) -> Latency:
    """What somebody sees who waits for every result, as a live stream does: one call at a time, by the wall clock.

    Args:
        thunks: taken in turn.
        device: waited for after every call when it is a GPU.
        calls: at most so many; fewer, but at least 20, when they take longer than ``budget_seconds``.
    """
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < calls and (len(samples) < 20 or time.perf_counter() - begin < budget_seconds):
        start = time.perf_counter()
        thunks[len(samples) % len(thunks)]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    samples.sort()
    return Latency(statistics.median(samples), samples[-(-99 * len(samples) // 100) - 1], len(samples))


class Timer(Protocol):
    """Times a block of calls on one kind of device."""

    def block(self, thunks: Sequence[Thunk], calls: int) -> float:
        """Seconds per call over ``calls`` calls, taking ``thunks`` in turn."""


class CpuTimer:
    """Wall-clock time.  Caches are as the calls leave them (warm)."""

    def block(self, thunks: Sequence[Thunk], calls: int) -> float:
        """Seconds per call over ``calls`` calls, taking ``thunks`` in turn."""
        start = time.perf_counter()
        for call in range(calls):
            thunks[call % len(thunks)]()
        return (time.perf_counter() - start) / calls


class CudaTimer:
    """Time between two CUDA events on the current stream.

    Every thunk is bound to inputs of its own.  With enough of them that their bytes exceed four times the L2 cache,
    each call finds its inputs cold; with a single one it finds them warm.
    """

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def block(self, thunks: Sequence[Thunk], calls: int) -> float:
        """Seconds per call over ``calls`` calls, taking ``thunks`` in turn."""
        torch.cuda.synchronize()
        self._start.record()
        for call in range(calls):
            thunks[call % len(thunks)]()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / calls


def make_timer(device: torch.device) -> Timer:
    """The timer for ``device``."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def input_sets_for_cold_cache(input_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs to rotate so that a call finds none of its own in the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, 4 * l2_bytes // max(1, input_bytes) + 2)


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        repeats: samples per candidate.
        block_seconds: calls are grouped until a sample takes about this long, so that the clock's grain and a single
            interruption do not decide it.
        budget_seconds: no new repeat starts after this long, once there are ``least_repeats``.
        least_repeats: samples that are taken whatever they cost.
    """

    repeats: int = 15
    block_seconds: float = 0.02
    budget_seconds: float = 8.0
    least_repeats: int = 5


SCHEDULES = {"quick": Schedule(9, 0.01, 2.0), "standard": Schedule(), "full": Schedule(21, 0.02, 20.0, 7)}
"""By tier of the suite."""


def interleaved(candidates: Mapping[str, Sequence[Thunk]], timer: Timer, schedule: Schedule) -> dict[str, Timing]:
    """Time candidates in turns, starting each round with another one.

    Interleaving lets a change of clock rate, or another program, fall on all of them alike.

    Args:
        candidates: per name its thunks, see :class:`CudaTimer` (one on a CPU).
        timer, schedule: how and how long.
    """
    calls: dict[str, int] = {}
    for name, thunks in candidates.items():
        timer.block(thunks, len(thunks))
        once = timer.block(thunks, len(thunks))
        wanted = int(min(MAX_CALLS, max(1.0, schedule.block_seconds / max(once, 1e-9))))
        calls[name] = -(-wanted // len(thunks)) * len(thunks)
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
