"""cycle_consistency and srtg: see rcu_ops.bench.cycle_consistency and rcu_ops.bench.srtg."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("cycle_consistency", "gate"))
def test_gate(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("cycle_consistency", "loss, forward+backward"))
def test_loss(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("srtg", "squeeze"))
def test_squeeze(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("srtg", "fuse"))
def test_fuse(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("srtg", "fuse backward"))
def test_fuse_backward(measure, case, candidate):
    measure(case, candidate)
