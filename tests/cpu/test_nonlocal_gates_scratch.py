"""What nonlocal_gates' CPU kernels take beyond tensors: their scratch, exactly, of single samples of any size.

A thread's scratch is asked of the library, in a new thread, which has none but what the call leaves to it. That eager
PyTorch takes as much as is claimed here is counted in tests/ops/test_nonlocal_gates_memory.py.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import nonlocal_gates as op
from tests.cpu.test_recurrent_conv_kernels import AVAILABLE

pytestmark = pytest.mark.skipif(not _library.LIBRARY.exists(), reason="the kernel library was not built")

LEAST = 64 << 10  # of a thread, where half of eager's is less
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COUNTS = [(1, 1), (1, 400), (400, 1), (14, 400), (50, 300), (49, 49), (196, 196)]  # N, M
WIDTHS = [(16, 16), (1000, 17)]  # D, Dv


@pytest.fixture(params=[(DTYPES[0], isa) for isa in AVAILABLE] + [(dtype, None) for dtype in DTYPES[1:]], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Blocks depend on the instruction set and on the dtype: fp32 on each, the others on the best one."""
    dtype, isa = request.param
    if isa:
        monkeypatch.setenv("RCU_OPS_CPU_ISA", isa)
    return dtype


def scratch_after(call: Callable[[], Any]) -> int:
    """Bytes of scratch that a thread has which made this call, alone."""
    bytes_of = ctypes.CDLL(str(_library.LIBRARY)).rcu_ops_scratch_bytes
    bytes_of.restype = ctypes.c_int64

    def measured() -> int:
        torch.set_num_threads(1)
        assert bytes_of() == 0
        call()
        return int(bytes_of())

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(measured).result()
    finally:
        torch.set_num_threads(threads)


def of_call(function: Callable[..., Any], tensors: list[Tensor], training: bool) -> int:
    leaves = [t.requires_grad_(training) for t in tensors]

    def call() -> None:
        results = function(*leaves)
        results = [results] if isinstance(results, Tensor) else list(results)
        if training:
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])

    return scratch_after(call)


@pytest.mark.parametrize("training", [False, True])
def test_a_single_samples_attention_takes_half_of_eagers_memory(dtype, training) -> None:
    for (n, m), (d, e) in itertools.product(COUNTS, WIDTHS):
        tensors = [torch.zeros(1, rows, width, dtype=dtype) for rows, width in ((n, d), (m, d), (m, e))]
        maps = 3 if training else 2  # scores and weights; weights and both their gradients
        taken = of_call(rcu_ops.nonlocal_attention, tensors, training)
        assert 0 < taken <= max(maps * n * m * dtype.itemsize // 2, LEAST), (n, m, d, e)


@pytest.mark.parametrize("training", [False, True])
def test_a_single_samples_step_takes_half_of_eagers_memory(dtype, training) -> None:
    for p, (d, e) in (
        (1, (16, 16)),
        (49, (16, 16)),
        (49, (1000, 17)),
        (196, (16, 16)),
        (196, (512, 512)),
        (400, (16, 17)),
    ):
        x_gates, query, key, value = (torch.zeros(1, 4, p, width, dtype=dtype) for width in (e, d, d, e))
        step = [x_gates, query, key, value, torch.zeros(1, p, e, dtype=dtype)]
        kept = 0
        if training:
            x_gates.requires_grad_()
            kept = op._what_a_step_keeps(x_gates)[1]
        maps, numbers = (3 if training else 2) * 4 * p * p, 10 * p * e + (4 * p * p if training else 0)
        half = max(maps, numbers) * dtype.itemsize // 2
        taken = of_call(rcu_ops.relational_lstm_step, step, training)
        assert not kept or taken <= op._scratch_of_a_step(p, max(4, dtype.itemsize), dtype.itemsize == 2)
        assert taken > 0 and taken + kept <= max(half, LEAST), (p, d, e)
