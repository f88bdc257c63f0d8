"""The GPU tests' problems are right, tried on the CPU; and every operator has some."""

from __future__ import annotations

import pytest
import torch

import rcu_ops
from rcu_ops.ops import OPERATORS
from tests.gpu.problems import PROBLEMS, gpu_backends, on, problems
from tests.tolerance import assert_close_to_reference

ALL = problems()


def test_every_operator_has_problems() -> None:
    assert {problem.operator for problem in ALL} == set(OPERATORS) >= set(PROBLEMS)
    assert len({str(problem) for problem in ALL}) == len(ALL)
    assert gpu_backends("recurrent_conv") == ["cuda", "triton"]


SMALL = [p for p in ALL if p.name in ("probe", "C20 odd", "many frames", "C33 odd")]


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_on_the_cpu(problem) -> None:
    for dtype in problem.dtypes:
        given = problem.make(dtype)
        if problem.exact is None:
            assert all(value.isfinite().all() for value in problem.call(on(given, "cpu")))
            continue
        exact = problem.exact(on(given, "cpu", torch.float64))
        eager = problem.eager(on(given, "cpu"))
        for choice in ("auto", "reference"):
            with rcu_ops.use_backend(choice):
                got = problem.call(on(given, "cpu"))
            for index, (g, e, r) in enumerate(zip(got, exact, eager, strict=True)):
                if g.is_floating_point() and dtype != torch.float64:
                    assert_close_to_reference(g, e, r, f"{choice} {dtype} output {index}")
                else:
                    assert torch.equal(g, e)
