"""Runs cases: checks every candidate, then times those that passed in turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rcu_ops.bench.case import DTYPE_NAMES, OURS, OWN, Case, Prepared
from rcu_ops.bench.correctness import WrongResultError
from rcu_ops.bench.machine import Peaks
from rcu_ops.bench.timing import Latency, Schedule, Thunk, Timer, Timing, interleaved, latency

LAUNCH_SECONDS = 2e-6
"""About what starting and ending a kernel takes on a GPU, even in a CUDA graph."""

TEMPERATURES = ("cold", "warm")
"""Of a GPU's L2 cache: a call finds none of its inputs there, or all that fit."""

WRONG = "wrong"
INEXACT = "its own error breaks the tolerance rule"
"""How the reason begins for which a candidate of ours, or a baseline, outside the tolerance rule has no time."""


@dataclass(frozen=True)
class CandidateResult:
    """One candidate of one case.

    Attributes:
        name, variant: which.
        timing: None when it was left out.
        error_used: share of the error allowed by the tolerance rule.
        left_out: why it has no time: :data:`WRONG` or :data:`INEXACT` and how when outside the tolerance rule, else
            what it raised.
        latency: of single calls, where the case asks for it.
    """

    name: str
    variant: str | None = None
    timing: Timing | None = None
    error_used: float | None = None
    left_out: str | None = None
    latency: Latency | None = None

    @property
    def inexact(self) -> bool:
        """Whether this is a baseline that was left out because it is outside the tolerance rule."""
        return self.left_out is not None and self.left_out.startswith(INEXACT)


@dataclass(frozen=True)
class CaseResult:
    """One case at one cache temperature ("warm", or "cold" on a GPU)."""

    case: Case
    temperature: str
    backend: str
    plan: str | None
    floor_seconds: float
    candidates: tuple[CandidateResult, ...]

    def with_floor(self, peaks: Peaks) -> CaseResult:
        """The same times over the floor that ``peaks`` give."""
        return replace(self, floor_seconds=peaks.floor(self.case.bytes_moved, self.case.flops, self.case.dtype))

    @property
    def least_seconds(self) -> float:
        """The floor, on a GPU with what one launch costs: what a call could take at best."""
        return self.floor_seconds + (LAUNCH_SECONDS if self.case.device.type == "cuda" else 0.0)

    @property
    def ours(self) -> Timing | None:
        """The time of the operator under test, if it was right."""
        return self.timing(OURS)

    def timing(self, name: str) -> Timing | None:
        """The time of a candidate by name."""
        return next((c.timing for c in self.candidates if c.name == name), None)

    def speedup(self, name: str) -> float | None:
        """Median time of a baseline over ours."""
        ours, other = self.ours, self.timing(name)
        return None if ours is None or other is None else other.median / ours.median

    @property
    def failures(self) -> list[str]:
        """Wrong results of ours, and anything that kept it from running. A baseline's are its own affair."""
        return [
            f"{self.case.id}: {c.name}: {c.left_out}"
            for c in self.candidates
            if c.left_out is not None and (c.name == OURS or c.left_out.startswith(WRONG))
        ]


def run_case(case: Case, timers: Mapping[str, Timer], peaks: Peaks, schedule: Schedule) -> Iterator[CaseResult]:
    """Check one case and time it by every timer, given by temperature of the cache."""
    prepared = Prepared.of(case)
    thunks: dict[str, Thunk] = {}
    left_out: dict[str, str] = {}
    candidates = case.candidates()
    trial = next(iter(timers.values()))
    for candidate in candidates:
        try:
            thunks[candidate.name] = prepared.thunk(candidate, trial)
        except WrongResultError as error:
            left_out[candidate.name] = f"{WRONG if candidate.name in OWN else INEXACT}: {error}"
        except Exception as error:  # a baseline may need a compiler, or memory, that is not there
            left_out[candidate.name] = f"{type(error).__name__}: {_first_line(error)}"
    waited = (
        {name: latency(call, case.device, schedule.latency_calls) for name, call in thunks.items()}
        if case.waits
        else {}
    )
    backend, plan = case.backend(prepared.inputs)
    for temperature, timer in timers.items():
        timings = interleaved(thunks, timer, schedule) if thunks else {}
        yield CaseResult(
            case=case,
            temperature=temperature,
            backend=backend,
            plan=plan,
            floor_seconds=peaks.floor(case.bytes_moved, case.flops, case.dtype),
            candidates=tuple(
                CandidateResult(
                    c.name,
                    prepared.chosen.get(c.name),
                    timings.get(c.name),
                    prepared.error_used.get(c.name),
                    left_out.get(c.name),
                    waited.get(c.name),
                )
                for c in candidates
            ),
        )
    del prepared, thunks
    gc.collect()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def as_data(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Results for the JSON file; times in seconds."""
    return [
        {
            "id": result.case.id,
            "op": result.case.op,
            "kind": result.case.kind,
            "shape": result.case.shape,
            "dtype": DTYPE_NAMES[result.case.dtype],
            "layout": result.case.layout,
            "device": str(result.case.device),
            "cache": result.temperature,
            "backend": result.backend,
            "plan": result.plan,
            "bytes": result.case.bytes_moved,
            "flops": result.case.flops,
            "floor_s": result.floor_seconds,
            "candidates": [_candidate_as_data(result, c) for c in result.candidates],
        }
        for result in results
    ]


def _candidate_as_data(result: CaseResult, c: CandidateResult) -> dict[str, Any]:
    data: dict[str, Any] = {"name": c.name, "variant": c.variant, "error_used": c.error_used, "left_out": c.left_out}
    if c.timing is not None:
        low, high = c.timing.quartiles
        data |= {"median_s": c.timing.median, "q1_s": low, "q3_s": high, "samples_s": list(c.timing.samples)}
        if c.latency is not None:
            data |= {"p50_s": c.latency.p50, "p99_s": c.latency.p99, "latency_calls": c.latency.calls}
        if c.name != OURS:
            data["speedup_of_ours"] = result.speedup(c.name)
    return data
