"""Kernels only read their inputs: a tensor that is copied on write is not copied for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rcu_ops import _library
from rcu_ops.ops import _schema
from tests.gpu.problems import on, problems
from tests.ops.test_recurrent_conv_frame import SHAPES, arguments

pytestmark = pytest.mark.skipif(_library.load_error() is not None, reason="the kernel library was not built")


class _LazyClones(TorchDispatchMode):
    """Hands the operators of rcu_ops clones of their inputs that share memory until somebody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.copied: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "rcu_ops":
            return func(*args, **(kwargs or {}))
        clones: list[Tensor] = []

        def clone(tensor: Tensor) -> Tensor:
            clones.append(torch._lazy_clone(tensor))
            return clones[-1]

        out = func(*tree_map_only(Tensor, clone, args), **tree_map_only(Tensor, clone, kwargs or {}))
        name = func._schema.name.removeprefix("rcu_ops::")
        self.called.add(name)
        if not all(torch._C._is_cow_tensor(tensor) for tensor in clones):
            self.copied.append(f"{name}: {[(tuple(t.shape), t.dtype, torch._C._is_cow_tensor(t)) for t in clones]}")
        return out


def call_the_public_functions() -> None:
    for problem in problems():
        if problem.name in ("probe", "C20 odd", "many frames", "C33 odd", "odd", "few channels"):
            for dtype in problem.dtypes:
                problem.call(on(problem.make(dtype), "cpu"))


def call_what_only_others_call() -> None:
    """Kernels that operators call below the dispatcher's Python, or not under a mode."""
    ops, randn = torch.ops.rcu_ops, torch.randn
    ops.recurrent_conv_frame(**arguments(SHAPES[2], torch.bfloat16, recurrent=True))
    ops.srtg_fuse_backward(randn(2, 4, 3, 5, 5), randn(2, 4, 3, 5, 5), randn(2, 3, 4), torch.tensor([True, False]))
    soft, a, mask = randn(2, 5, 8), randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    ops.cycle_back(soft, a, mask, 1.0)
    ops.cycle_back_backward(randn(2, 5), randn(2, 5), randn(2, 5), soft, a, mask, 1.0)
    numbers = (mask, mask, 1.0, True, 0.001, 1e-6)
    mean, *gradients = ops.temporal_cycle_loss_mean(soft, a, *numbers)
    ops.temporal_cycle_loss_mean_backward(mean, soft, a, *gradients, *numbers)
    _, near, distances = ops.temporal_cycle_loss_kept(soft, a, *numbers)
    ops.temporal_cycle_loss_kept_backward(randn(2, 5), soft, a, near, distances, *numbers)
    x, weight, h0, gamma, beta = randn(2, 8, 3, 4, 4), torch.eye(8), randn(2, 8, 4, 4), randn(8), randn(8)
    h, _, moments = ops.recurrent_conv_moments(x, weight, h0, True)
    y = ops.recurrent_conv_normalize(h, moments, gamma, beta, x, 1e-5, True)
    sums, dz = ops.recurrent_conv_normalize_sums(randn(y.shape), h, y, moments, gamma, beta, 1e-5, True)
    rest = (moments, sums, gamma, beta, 1e-5, True, True, True)
    ops.recurrent_conv_normalize_backward(dz, randn(h0.shape), h, weight, h0, *rest)
    gates, value, cell = randn(2, 4, 9, 16), randn(2, 4, 9, 16), randn(2, 9, 16)
    given = (gates, randn(2, 4, 9, 8), randn(2, 4, 9, 8), value, cell)
    _, _, weights, kept = ops.relational_lstm_step_kept(*given, 4)
    ops.relational_lstm_step_kept_backward(randn(2, 9, 16), randn(2, 9, 16), *given, weights, kept)


def test_no_cpu_kernel_copies_an_input() -> None:
    with _LazyClones() as mode:
        call_the_public_functions()
        call_what_only_others_call()
    assert {name for name in _schema.names() if _library.has_kernel(name, "CPU")} - mode.called == set()
    assert mode.copied == []
