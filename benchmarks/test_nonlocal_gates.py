"""nonlocal_attention and relational_lstm_step; see rcu_ops.bench.nonlocal_gates."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("nonlocal_gates", "attention"))
def test_attention(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("nonlocal_gates", "step"))
def test_step(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("nonlocal_gates", "step, forward+backward"))
def test_step_forward_backward(measure, case, candidate):
    measure(case, candidate)
