"""The Triton kernels of cycle_consistency and srtg: numerics in the interpreter, registration, resources."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import _selftest, _triton, _warmup
from rcu_ops.ops.cycle_consistency import CYCLE, LOSS
from tests.triton import resources


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_numerics_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.triton.interpreted_cycle_consistency"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join([*(line for line in lines if not line.startswith("ok")), run.stderr[-3000:]])
    kinds = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(kinds) == len(lines) >= 35
    wanted = "soft landing cycle magnitudes moving faults nothing strides data means self-tests"
    assert set(wanted.split()) <= set(kinds)


def test_cpu_tensors_are_refused_with_the_reason() -> None:
    a, x = torch.zeros(1, 3, 5), torch.zeros(1, 2, 3, 4, 4)
    assert _selftest.known("cycle_consistency/triton") and _selftest.known("srtg/triton")
    calls = {
        "soft_nearest_neighbor": (a, a),
        "cycle_consistency": (a, a),
        "temporal_cycle_loss": (a, a),
        "srtg_squeeze": (x,),
        "srtg_fuse": (x, torch.zeros(1, 3, 2)),
    }
    for name, arguments in calls.items():
        with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match=f"'triton' cannot run {name}: x is on cpu"):
            getattr(rcu_ops, name)(*arguments)


def test_opcheck() -> None:
    """The registration: schemas, fakes and autograd are those of the main operators."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    ops = torch.ops.rcu_ops
    torch.library.opcheck(ops.soft_nearest_neighbor_triton.default, (a, b, None, 1.0, True), test_utils=tests)
    torch.library.opcheck(ops.cycle_back_triton.default, (a, a, None, 1.0), test_utils=tests)
    x, h = torch.randn(2, 3, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3)
    torch.library.opcheck(ops.srtg_fuse_triton.default, (x, h, None, False), test_utils=tests)


def launches(kind: str, dtype: torch.dtype) -> list:
    a = torch.empty(8, 16 if kind == "short" else 200, 512, dtype=dtype, device="meta")
    if kind in ("channels_last_3d", "contiguous_format"):
        srtg, x = _triton.kernels("srtg"), torch.empty(8, 256, 8, 28, 28, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=getattr(torch, kind))
        h, gate = torch.empty(8, 8, 256, device="meta"), torch.empty(8, dtype=torch.bool, device="meta")
        return [srtg.plan(*given)[1][0] for given in ((srtg.SQUEEZE, x), (srtg.BACKWARD, x, h, gate, x))]
    kernels = _triton.kernels("cycle_consistency")
    if kind == "short":
        return kernels.plan_short_cycle(a, a, None, None, 1.0)[1]
    mask = torch.empty(8, 200, dtype=torch.bool, device="meta")
    if kind in ("products", "differences"):
        few = a[:, :32], mask[:, :32]
        a, mask = few if kind == "differences" else (a, mask)
        backward = kernels.plan_back(a, a, mask, 1.0)[1]
        return [*kernels.plan_soft(a, a, mask, 1.0, True)[1], *kernels.plan_cycle(a, a, mask, None, 1.0)[1], *backward]
    grads = tuple(torch.empty(8, 200, device="meta") for _ in range(3))
    return [
        *kernels.plan_back_backward(a, a, *grads, mask, 1.0)[1],
        *kernels.plan_soft_backward(a, a, a, mask, 1.0)[1],
    ]


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_warmup_plans_what_the_operators_launch(dtype, monkeypatch) -> None:
    """Every launch of a training step on short and long sequences, and of an SRTG block around them."""
    kernels, srtg = _triton.kernels("cycle_consistency"), _triton.kernels("srtg")
    launched: list = []
    for module in (kernels, srtg):
        monkeypatch.setattr(module, "_run", lambda launches, device: launched.extend(launches))
    planned = set()
    for frames in (16, 200):
        a = torch.empty(4, frames, 64, dtype=dtype, device="meta")
        grads = torch.empty(3, 4, frames, device="meta")
        found = _warmup.planned_cycle_consistency(kernels, tuple(a.shape), dtype, True)
        planned |= {launch.key() for launch in found}
        kernels.cycle_consistency(a, a, None, None, 0.5)
        for x in (a, a.float()):
            kernels.soft_nearest_neighbor(x, x, None, 0.5, True)
            kernels.soft_nearest_neighbor_backward(x, x, x, None, 0.5)
            kernels.cycle_back(x, x, None, 0.5)
            kernels.cycle_back_backward(*grads, x, x, None, 0.5)
    for memory_format in _warmup.MEMORY_FORMATS:
        x = torch.empty(2, 2048, 4, 7, 7, dtype=dtype, device="meta").to(memory_format=memory_format)
        h, gate = torch.empty(2, 4, 2048, device="meta"), torch.empty(2, dtype=torch.bool, device="meta")
        found = _warmup.planned_srtg(srtg, tuple(x.shape), dtype, memory_format, True)
        planned |= {launch.key() for launch in found}
        srtg.squeeze(x)
        for given in (None, gate):
            srtg.fuse(x, h, given, False)
            srtg.fuse(x, h, given, True)
            srtg.fuse_backward(x, x, h, given)
    assert len({launch.key() for launch in launched}) > 10
    assert {launch.key() for launch in launched} <= planned


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
@pytest.mark.parametrize(
    ("kind", "dtype", "arch"),
    [
        ("short", torch.bfloat16, 90),
        ("short", torch.float32, 80),
        ("products", torch.float32, 80),
        ("products", torch.bfloat16, 90),
        ("differences", torch.bfloat16, 80),
        ("gradients", torch.float32, 90),
        ("channels_last_3d", torch.bfloat16, 80),
        ("contiguous_format", torch.bfloat16, 90),
    ],
    ids=str,
)
def test_compiles_without_spills_and_fits(kind, dtype, arch, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    for launch in launches(kind, dtype):
        usage = resources.compile_launch(launch, arch)
        name = launch.kernel.__name__
        assert usage.local == 0 and usage.shared <= resources.SHARED_LIMIT[arch], f"{name}: {usage}"
        if name == "product_kernel":
            assert usage.matrix_instructions > 0 and usage.vector_loads > 0, usage


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_the_form_follows_the_shape_and_explain_says_it() -> None:
    kernels = _triton.kernels("cycle_consistency")
    assert "short cycle: at most 32 frames" in kernels.describe("cycle", 32, 32, 64)
    assert kernels.describe("cycle", 33, 32, 64).endswith("differences: fewer than 33 frames")
    assert kernels.describe("soft", 1, 33, 15).endswith("differences: fewer than 16 channels")
    assert "differences: gradients" in kernels.describe("soft_backward", 99, 99, 64)
    a, b = torch.empty(2, 40, 64), torch.empty(2, 20, 64)
    cycle, loss = (operator.backend("triton").plan for operator in (CYCLE, LOSS))
    assert cycle is not None and loss is not None
    assert "short cycle" in cycle(b, b) and "products of centred frames" in cycle(a, a)
    assert "soft: distances by differences" in loss(a, b) and "back: distances by products" in loss(a, b)
    by_products, by_differences = (
        {launch.kernel.__name__ for launch in launches(kind, torch.float32)} for kind in ("products", "differences")
    )
    assert {"product_kernel", "reach_kernel", "settle_kernel", "compare_kernel"} <= by_products - by_differences


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_bounds_are_those_of_the_compiled_kernels() -> None:
    """The rules stand in csrc/common/cycle_consistency_products.h; these kernels cannot include it."""
    if (native := _library.native()) is None:
        pytest.skip("rcu_ops._native was not built")
    kernels = _triton.kernels("cycle_consistency")
    for c in (16, 100, 2048):
        bounds = kernels._Bounds(c)
        steps = bounds.product_steps, bounds.difference_steps
        want = native.cycle_consistency_bounds(c, *steps, end=1.0, largest=0.0, sharpness=1.0, keys=33, moments=False)
        for name in ("products", "differences", "least"):
            assert getattr(bounds, name) == pytest.approx(want[name], rel=1e-6)
        assert want["allowed"] == 2 * want["differences"] and want["flat"] == kernels.FLAT.value
        assert want["reach"] == 1
