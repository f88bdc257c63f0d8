"""fast_gru: forward, forward + backward, one step; see rcu_ops.bench.fast_gru."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("fast_gru", "forward"))
def test_forward(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("fast_gru", "forward+backward"))
def test_forward_backward(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("fast_gru", "step"))
def test_step(measure, case, candidate):
    measure(case, candidate)
