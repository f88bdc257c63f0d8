"""The quick tier of ``rcu-ops bench`` under pytest-benchmark: one test per candidate, grouped by case."""

from __future__ import annotations

import functools

import pytest
import torch

from rcu_ops.bench.case import OWN, Candidate, Case, Prepared
from rcu_ops.bench.correctness import WrongResultError
from rcu_ops.bench.runner import INEXACT
from rcu_ops.bench.suite import collect
from rcu_ops.bench.timing import SCHEDULES, CpuTimer

CPU = torch.device("cpu")


def parameters(operator: str, kind: str | None = None) -> list[object]:
    """One parameter per case and candidate, the candidates of a case side by side."""
    return [
        pytest.param(case, candidate.name, id=f"{case.id} | {candidate.name}")
        for case in collect("quick", CPU, [operator])
        if kind is None or case.kind == kind
        for candidate in case.candidates()
    ]


@functools.lru_cache(maxsize=1)  # tests of one case stand side by side: one set of inputs at a time is enough
def prepared(case: Case) -> tuple[Prepared, dict[str, Candidate]]:
    return Prepared.of(case), {candidate.name: candidate for candidate in case.candidates()}


@pytest.fixture
def measure(benchmark):
    """Check a candidate, then time it; extra_info says what the numbers are to be held against."""

    def run(case: Case, name: str) -> None:
        ready, candidates = prepared(case)
        try:
            thunk = ready.thunk(candidates[name], CpuTimer())
        except WrongResultError as error:
            if name in OWN:
                raise
            pytest.skip(f"{INEXACT}: {error}")
        benchmark.group = case.id
        benchmark.extra_info |= {
            "candidate": name,
            "variant": ready.chosen[name],
            "error_used": ready.error_used[name],
            "bytes": case.bytes_moved,
            "flops": case.flops,
        }
        benchmark.pedantic(thunk, rounds=SCHEDULES["quick"].repeats, warmup_rounds=2)

    return run
