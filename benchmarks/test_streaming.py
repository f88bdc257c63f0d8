"""One frame of RCN-18 as a stream; see rcu_ops.bench.streaming."""

from __future__ import annotations

import pytest

from benchmarks.conftest import parameters


@pytest.mark.parametrize(("case", "candidate"), parameters("streaming"))
def test_one_frame(measure, case, candidate):
    measure(case, candidate)
