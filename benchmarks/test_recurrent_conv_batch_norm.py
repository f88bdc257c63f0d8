"""recurrent_conv_batch_norm: forward + backward; see rcu_ops.bench.recurrent_conv_batch_norm."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("recurrent_conv_batch_norm", "forward+backward"))
def test_forward_backward(measure, case, candidate):
    measure(case, candidate)
