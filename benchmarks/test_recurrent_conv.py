"""recurrent_conv: forward, forward + backward, fused inference, one step; see rcu_ops.bench.recurrent_conv."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("recurrent_conv", "forward"))
def test_forward(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("recurrent_conv", "forward+backward"))
def test_forward_backward(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("recurrent_conv", "fused inference"))
def test_fused_inference(measure, case, candidate):
    measure(case, candidate)


@pytest.mark.parametrize(("case", "candidate"), parameters("recurrent_conv", "step"))
def test_step(measure, case, candidate):
    measure(case, candidate)
