"""The Triton kernels of nonlocal_gates: numerics in the interpreter (own process), registration, resources."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rcu_ops
from rcu_ops.ops import _selftest, _triton
from rcu_ops.ops import nonlocal_gates as operators
from tests.triton import resources

TF32 = "TF32"  # fp32 whose products may be rounded
NAMES = ("nonlocal_attention", "relational_lstm_step")


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_numerics_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.triton.interpreted_nonlocal_gates"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join([*(line for line in lines if not line.startswith("ok")), run.stderr[-3000:]])
    kinds = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(kinds) == len(lines) >= 30
    assert {"attention", "step", "dead", "large", "nan", "empty", "self-tests"} <= set(kinds)


@pytest.mark.parametrize("name", NAMES)
def test_cpu_tensors_are_refused_with_the_reason(name) -> None:
    query = torch.zeros(1, 4, 3, 5)
    arguments = (query, query, query) if name == "nonlocal_attention" else (query, query, query, query, query[:, 0])
    assert _selftest.known(f"{name}/triton")
    with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match=f"'triton' cannot run {name}: x is on cpu"):
        getattr(rcu_ops, name)(*arguments)


def test_opcheck() -> None:
    """The registration: schemas, fakes and autograd are those of the main operators."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    query, value = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5)
    ops = torch.ops.rcu_ops
    torch.library.opcheck(
        ops.nonlocal_attention_triton.default, (query, query, value, None, 1.0, False), test_utils=tests
    )
    gates = torch.randn(2, 4, 3, 5)
    step = (gates.requires_grad_(), gates, gates, gates, gates[:, 0].detach())
    torch.library.opcheck(ops.relational_lstm_step_triton.default, step, test_utils=tests)


def test_the_librarys_attention_is_taken_where_the_planner_says_so(monkeypatch) -> None:
    query, key, value = torch.randn(2, 9, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    monkeypatch.setattr(operators, "_triton_kernel", lambda name: lambda *args: f"the kernel {name}")
    assert operators._triton_attention(query, key, value, None, 0.5, False) == "the kernel attention"
    monkeypatch.setattr(operators, "_why_not_library", lambda *args: None)
    got = operators._triton_attention(query, key, value, None, 0.5, False)
    torch.testing.assert_close(got, torch.softmax(0.5 * query @ key.mT, -1) @ value)
    with torch.autocast("cpu", torch.bfloat16):
        assert operators._triton_attention(query, key, value, None, 0.5, False) == "the kernel attention"


def launches(kind: str, positions: int, width: int, dtype: torch.dtype) -> list:
    kernels = _triton.kernels("nonlocal_gates")
    four = torch.empty(24, 4, positions, width, dtype=dtype, device="meta")
    flat, cell = four.flatten(0, 1), torch.empty(24, positions, width, device="meta")
    if kind == "attention":
        return kernels.plan_attention(flat, flat, flat, None, 1.0, False)[1]
    if kind == "attention_backward":
        return kernels.plan_attention_backward(flat, flat, flat, flat, None, 1.0, False)[1]
    grads = (cell.to(dtype), cell) if kind == "step_backward" else None
    return kernels.plan_step(grads, four, four, four, four, cell)[1]


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
@pytest.mark.parametrize(
    ("kind", "positions", "width", "dtype", "arch"),
    [
        ("step", 49, 1024, torch.bfloat16, 90),
        ("attention", 196, 512, torch.bfloat16, 80),
        ("attention_backward", 49, 1024, torch.bfloat16, 90),
        ("step", 196, 512, torch.bfloat16, 80),
        ("step_backward", 196, 512, torch.bfloat16, 80),
        ("attention_backward", 196, 512, torch.bfloat16, 80),
        # where tiles and warps change
        ("attention", 400, 64, torch.bfloat16, 80),
        ("attention", 16, 256, TF32, 90),
        ("attention", 196, 512, torch.float32, 80),
        ("attention_backward", 49, 1024, torch.float32, 80),
        ("attention_backward", 49, 1024, TF32, 90),
        ("attention_backward", 100, 512, torch.float32, 90),
        ("attention_backward", 196, 512, torch.float32, 80),
        ("attention_backward", 196, 512, TF32, 80),
    ],
    ids=str,
)
def test_compiles_without_spills_and_fits(kind, positions, width, dtype, arch, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if dtype == TF32 else "highest")
        planned = launches(kind, positions, width, torch.float32 if dtype == TF32 else dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    for launch in planned:
        usage = resources.compile_launch(launch, arch)
        assert usage.local == 0 and usage.shared <= resources.SHARED_LIMIT[arch], f"{launch.kernel.__name__}: {usage}"
        multiplies = dtype != torch.float32 and launch.kernel.__name__ != "cell_kernel"
        assert (usage.matrix_instructions > 0) == multiplies
