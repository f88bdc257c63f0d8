"""The Triton kernels of fast_gru: numerics in the interpreter (own process), registration, resources, warm-up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rcu_ops
from rcu_ops.ops import _selftest, _triton, _warmup
from tests.triton import resources

needs_triton = pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")


@needs_triton
def test_numerics_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.triton.interpreted_fast_gru"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join([*(line for line in lines if not line.startswith("ok")), run.stderr[-3000:]])
    kinds = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(kinds) == len(lines) >= 14
    assert {"numerics", "asked", "nan", "empty", "self-test"} <= set(kinds)


def problem(n: int, channels: int, hidden: int, dtype: torch.dtype, length: int = 1) -> list[torch.Tensor]:
    """x of two clips, the weights and o0, on the meta device."""
    shapes = [(n, 2, channels, length, 7, 7), *((2 * hidden, channels),) * 2, (2, channels, hidden)]
    shapes += [(channels, channels)] * 2 + [(n, channels, length, 7, 7)]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def launches(arguments: list[torch.Tensor], arch: int) -> list:
    kernels = _triton.kernels("fast_gru")
    forward = kernels.plan_forward(*arguments, True, arch)
    o, o_n, *saved = forward.results
    backward = kernels.plan_backward(arguments[0], o_n, *arguments, o, *saved, True, True, arch)
    return forward.launches() + backward.launches()


def test_cpu_tensors_are_refused_with_the_reason() -> None:
    arguments = [torch.zeros(t.shape) for t in problem(1, 4, 1, torch.float32)]
    assert _selftest.known("fast_gru/triton")
    with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match="'triton' cannot run fast_gru: x is on cpu"):
        rcu_ops.fast_gru(*arguments)


def test_opcheck() -> None:
    """The registration: schemas, fakes and autograd are those of the main operators."""
    arguments = [torch.randn(t.shape).requires_grad_() for t in problem(1, 4, 1, torch.float32)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rcu_ops.fast_gru_triton.default, (*arguments, True), test_utils=tests)


@needs_triton
@pytest.mark.parametrize(("columns", "step"), [(90, 30), (90, 300), (16, 5), (31, 5), (1200, 5), (0, 0)])
def test_weight_gradients_are_summed_in_pieces(columns, step) -> None:
    """Whatever is left over, in as many calls as it takes; and large results at once."""
    kernels = _triton.kernels("fast_gru")
    for outputs in (5, 250, 300):
        wide, b = torch.randn(columns, 2 * outputs), torch.randn(columns, 250)
        a, out = wide[:, outputs:], torch.full((outputs, 250), torch.nan)
        kernels.OuterProduct(a, b, out, step).run()
        torch.testing.assert_close(out.double(), a.double().T @ b.double(), rtol=0, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    ("n", "dtype", "arch"),
    [(1, torch.bfloat16, 80), (8, torch.bfloat16, 90), (1, torch.float16, 90), (1, torch.float32, 80)],
    ids=str,
)
def test_compiles_without_spills_and_fits(n, dtype, arch, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = {launch.key(): launch for launch in launches(problem(n, 2048, 512, dtype), arch)}
    finally:
        torch.set_float32_matmul_precision(before)
    assert len({launch.kernel.__name__ for launch in found.values()}) == 6
    for launch in found.values():
        usage = resources.compile_launch(launch, arch)
        name = launch.kernel.__name__
        assert usage.local == 0 and usage.shared <= resources.SHARED_LIMIT[86], f"{name}: {usage}"
        assert usage.vector_loads > 0, f"{name} reads one element at a time: {usage}"
        multiplies = name != "output_gradient_kernel" or "du" not in launch.signature()[1]
        assert (usage.matrix_instructions > 0) == multiplies, f"{name}: {usage}"


@needs_triton
def test_exact_fp32_leaves_the_products_to_the_library() -> None:
    kernels = _triton.kernels("fast_gru")
    arguments = problem(1, 64, 16, torch.float32)
    forward = kernels.plan_forward(*arguments, False, 80)
    assert [type(step).__name__ for step in forward.work[:2]] == ["Product", "Product"]  # U_x and V_x, all steps
    per_step = ["Product", "Launch", "Product", "Product", "Launch", "Product", "Launch"]
    assert [type(step).__name__ for step in forward.work[2:]] == per_step * 2
    assert not any(launch.constants["FUSED"] for launch in forward.launches())


@needs_triton
def test_blocks_occupy_the_gpu_where_rows_are_few() -> None:
    kernels = _triton.kernels("fast_gru")
    for rows in (1, 16, 49, 98, 196, 392, 3136):
        for width, halves in ((1024, 1), (2048, 2), (2048, 1), (512, 2)):
            tile = kernels.choose("half", rows, width, halves, 90, True)
            assert tile.rows < 2 * rows or tile.rows == 16
            programs = halves * -(-rows // tile.rows) * -(-width // tile.outputs)
            narrowest = tile.rows * tile.outputs <= 256
            assert programs >= 0.9 * kernels.MULTIPROCESSORS[90] or narrowest
    scattered = kernels.choose("half", 3136, 100, 1, 90, False)
    assert scattered.rows * scattered.outputs <= kernels.SCATTERED


@needs_triton
def test_warmup_plans_what_the_operator_launches() -> None:
    """The number of clips is not compiled in, and every launch is among those that warmup compiles."""
    kernels = _triton.kernels("fast_gru")
    arguments = problem(2, 64, 16, torch.bfloat16)
    planned = {
        launch.key()
        for launch in _warmup.planned_fast_gru(kernels, (2, 8, 64, 1, 7, 7), torch.bfloat16, 90, True, True)
    }
    assert {launch.key() for launch in launches(arguments, 90)} <= planned
    without = [*arguments[:6], None]
    assert {launch.key() for launch in launches(without, 90)} <= planned
    assert {launch.key() for launch in kernels.plan_forward(*arguments, False, 90).launches()} <= planned
