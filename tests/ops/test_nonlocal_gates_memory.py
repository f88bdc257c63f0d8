"""Memory of nonlocal_gates beyond its inputs and outputs: at most half of eager PyTorch's, on every backend."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from rcu_ops import _library
from rcu_ops.ops import _triton, nonlocal_gates
from tests.ops.memory_of_nonlocal_gates import CASES

SHAPES = [(24, 49, 1024), (24, 196, 512), (1, 49, 1024), (1, 196, 512)]  # B, P, D = Dv: the suite's


def least_of_eager(b: int, p: int, d: int, size: int) -> int:
    """Bytes that eager PyTorch has at once in a step: the relations, and their sum with x_gates."""
    return 2 * b * 4 * p * d * size


@pytest.mark.skipif(not _library.LIBRARY.exists(), reason="the kernel library was not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts by glibc")
def test_the_cpus_kernels_take_less_than_half_of_eagers(monkeypatch) -> None:
    monkeypatch.setattr(nonlocal_gates, "_threads", lambda: 1)  # as where it is counted
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.memory_of_nonlocal_gates"], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 4 * len(CASES)
    for line in lines:
        b, p, d = CASES[line["case"]]
        kept = 0
        if line["op"] == "relational_lstm_step" and line["training"]:
            _, kept, half = nonlocal_gates._what_a_step_keeps(torch.empty(b, 4, p, d, device="meta"))
            assert kept > 0 and half == line["eager"] // 2, "the planner's arithmetic is not eager's"
        assert line["tensors"] == kept and line["scratch"] > 0, f"no kernel of ours ran, or it made a tensor: {line}"
        assert line["scratch"] + line["tensors"] <= line["eager"] / 2, line
        if line["op"] == "relational_lstm_step":
            assert line["eager"] >= least_of_eager(b, p, d, 4), "the arithmetic below claims more than eager takes"


@pytest.mark.parametrize(("b", "p", "d"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cuda_kernels_need_three_numbers_per_query(b, p, d, dtype) -> None:
    native = _library.native()
    if native is None:
        pytest.skip("the planner was not built")
    half = least_of_eager(b, p, d, getattr(torch, dtype).itemsize) / 2
    sizes = (b, 4, p, p, d, d, dtype)
    for kind in ("attend", "step"):
        assert native.nonlocal_gates_gpu_plan(kind, *sizes)["scratch_bytes"] == 0
    for kind in ("query_gradient", "key_gradient"):
        scratch = native.nonlocal_gates_gpu_plan(kind, *sizes)["scratch_bytes"]
        assert scratch == 3 * 4 * b * 4 * p and scratch <= half
        # Of an attention eager keeps the weights, and the gradients of weights and scores.
        assert scratch <= 3 * b * 4 * p * p * getattr(torch, dtype).itemsize / 2


@pytest.mark.parametrize(("b", "p", "d"), [*SHAPES, (4, 784, 512)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_librarys_products_on_a_gpu_are_taken_in_parts(b, p, d, dtype) -> None:
    """The CUDA backend's way for wide heads: of a step its relations, and a part of the samples' maps at a time."""
    native = _library.native()
    if native is None:
        pytest.skip("the planner was not built")
    size = getattr(torch, dtype).itemsize
    sizes = (b, 4, p, p, d, d, dtype)
    one_map_each = b * 4 * p * p * size
    plan = {kind: native.nonlocal_gates_gpu_plan(kind, *sizes) for kind in ("attend", "step", "query_gradient")}
    assert plan["attend"]["map_bytes"] <= 2 * one_map_each / 2 + 16  # eager's scores and weights
    # A step's relations and a part of the maps; eager has ten numbers per position and channel, and a map. In 16 bits
    # PyTorch's attention takes their place.
    if dtype == "float32":
        assert "batched products" in plan["step"]["said"].partition(";")[0]
        assert 4 * b * p * d * size + plan["step"]["map_bytes"] <= (10 * b * p * d * size + one_map_each) / 2
    gradients = 2 * plan["query_gradient"]["map_bytes"] + plan["query_gradient"]["scratch_bytes"]
    small = 256 << 10  # all at once: launches are what it takes
    assert gradients <= 3 * one_map_each / 2 or one_map_each <= small


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
@pytest.mark.parametrize(("b", "p", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_triton_kernels_make_half_of_eagers_tensors(b, p, d, dtype) -> None:
    kernels = _triton.kernels("nonlocal_gates")
    four = torch.empty(b, 4, p, d, dtype=dtype, device="meta")
    flat, cell = four.flatten(0, 1), torch.empty(b, p, d, device="meta")
    grad_h = torch.empty(b, p, d, dtype=dtype, device="meta")
    half = least_of_eager(b, p, d, dtype.itemsize) / 2
    forward = beyond(*kernels.plan_step(None, four, four, four, four, cell), four, cell)
    backward = beyond(*kernels.plan_step((grad_h, cell), four, four, four, four, cell), four, cell, grad_h)
    assert forward == backward == (half if p > kernels.FUSED else 0)
    three = beyond(*kernels.plan_attention_backward(flat, flat, flat, flat, None, 1.0, False), flat)
    assert three == 3 * 4 * b * 4 * p <= half
    assert beyond(*kernels.plan_attention(flat, flat, flat, None, 1.0, False), flat) == 0


def beyond(results, launches, *inputs: torch.Tensor) -> int:
    """Bytes of the launches' tensors that are neither inputs nor results."""
    known = {storage(t) for t in itertools.chain(inputs, results if isinstance(results, tuple) else (results,))}
    made = {}
    for launch in launches:
        for argument in launch.arguments:
            if isinstance(argument, torch.Tensor) and storage(argument) not in known:
                made[storage(argument)] = argument.untyped_storage().nbytes()
    return sum(made.values())


def storage(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from another's, on meta too."""
    return tensor.untyped_storage()._cdata
