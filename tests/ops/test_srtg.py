"""srtg_squeeze and srtg_fuse: maths, numerics, layouts, gates, gradients, citizenship, on every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import rcu_ops
from rcu_ops import _library, reference
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] + (["cpu"] if _library.has_kernel("srtg_fuse", "CPU") else [])
FUSIONS = ["mul", "add"]

contiguous = functools.partial(torch.clone, memory_format=torch.contiguous_format)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "channels_last_3d": lambda x: contiguous(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3),
    "frame_major": lambda x: contiguous(x.transpose(1, 2)).transpose(1, 2),
    "width_major": lambda x: contiguous(x.transpose(3, 4)).transpose(3, 4),
    "every_other_column": lambda x: contiguous(torch.stack([x, torch.full_like(x, torch.nan)], dim=5))[..., 0],
    "middle_channels": lambda x: torch.cat([torch.full_like(x, torch.nan), x, x], dim=1)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
}
SHAPES = [(2, 3, 4, 2, 3), (1, 64, 2, 7, 7), (3, 17, 3, 5, 9), (2, 1, 1, 1, 1), (1, 33, 2, 14, 14), (2, 130, 1, 3, 1)]
SHAPES.append((2, 96, 5, 7, 7))  # several tasks, which begin and end within a channel's frames


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, h in the state's dtype, and a gate with both values where there is more than one sample."""
    n, c, t = shape[:3]
    gate = torch.arange(n) % 2 == 0
    return torch.randn(shape).to(dtype), torch.randn(n, t, c, dtype=state_dtype(dtype)), gate


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(value: Tensor) -> Tensor:
    return value.double()


def test_the_compiled_backend_is_tested_when_the_library_is_there() -> None:
    if _library.LIBRARY.exists():
        assert _library.load_error() is None, _library.load_error()
        assert "cpu" in BACKENDS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squeeze_keeps_the_tolerance_rule(backend, shape, dtype, layout) -> None:
    x = inputs(shape, dtype)[0]
    got = rcu_ops.srtg_squeeze(LAYOUTS[layout](x))
    assert got.dtype == torch.float32 and got.is_contiguous()
    eager = x.mean((3, 4)).transpose(1, 2)
    assert_close_to_reference(got, exact(x).mean((3, 4)).transpose(1, 2), eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_large_planes_keep_the_tolerance_rule(backend, dtype) -> None:
    """Clips beyond what caches may hold, and more positions than may be added up one after the other."""
    x, grad = (torch.randn(2, 23, 3, 180, 180).to(dtype) for _ in range(2))
    means = x.float().mean((3, 4)).transpose(1, 2)
    assert_close_to_reference(rcu_ops.srtg_squeeze(x), exact(x).mean((3, 4)).transpose(1, 2), means)
    h = torch.randn(2, 3, 23, requires_grad=True)
    (dh,) = torch.autograd.grad(rcu_ops.srtg_fuse(x, h), h, grad)
    products = (x.float() * grad.float()).sum((3, 4)).transpose(1, 2)
    assert_close_to_reference(dh, (exact(x) * exact(grad)).sum((3, 4)).transpose(1, 2), products)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_of_integers_is_exact(backend, layout) -> None:
    """Sums of small integers over 4 x 8 positions round nowhere, in any order, fp64 included."""
    x = torch.randint(-9, 9, (2, 21, 3, 4, 8)).double()
    want = x.mean((3, 4)).transpose(1, 2)
    for dtype in DTYPES:
        got = rcu_ops.srtg_squeeze(LAYOUTS[layout](x.to(dtype)))
        assert got.dtype == state_dtype(dtype) and torch.equal(got.double(), want)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fuse_is_rounded_once(backend, shape, dtype, layout, fusion, gated) -> None:
    """One operation in the state's dtype, one rounding: bit for bit."""
    x, h, gate = inputs(shape, dtype)
    wide, spread = x.to(h.dtype), h.transpose(1, 2)[..., None, None]
    want = (wide * spread if fusion == "mul" else wide + spread).to(dtype)
    if gated:
        want = torch.where(gate[:, None, None, None, None], want, x)
    laid_out = LAYOUTS[layout](x)
    got = rcu_ops.srtg_fuse(laid_out, h, gate if gated else None, fusion=fusion)
    assert got.dtype == dtype and torch.equal(got, want)
    if backend == "cpu":
        assert got.stride() == torch.empty_like(laid_out).stride()
    half = rcu_ops.srtg_fuse(laid_out, h.bfloat16(), gate if gated else None, fusion=fusion)
    assert half.dtype == dtype


def test_a_closed_gate_passes_what_is_there(backend) -> None:
    """Bit for bit, and whatever h holds; the same for the gradient."""
    x, h, _ = inputs((2, 5, 3, 4, 4))
    h[1] = torch.nan
    gate = torch.tensor([True, False])
    for fusion in FUSIONS:
        leaves = x.clone().requires_grad_(), h.clone().requires_grad_()
        y = rcu_ops.srtg_fuse(*leaves, gate, fusion=fusion)
        assert torch.equal(y[1], x[1]) and not torch.equal(y[0], x[0])
        grad = torch.randn(x.shape)
        dx, dh = torch.autograd.grad(y, leaves, grad)
        assert torch.equal(dx[1], grad[1]) and (dh[1] == 0).all() and dh[0].isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_keeps_the_tolerance_rule(backend, dtype, layout, fusion, gated) -> None:
    x, h, gate = inputs((3, 19, 2, 5, 7), dtype)
    grad = torch.randn(x.shape).to(dtype)
    gate = gate if gated else None

    def run(to: torch.dtype, state: torch.dtype, laid_out, function) -> tuple[Tensor, ...]:
        leaves = [laid_out(x).to(to).requires_grad_(), h.to(state).requires_grad_()]
        return torch.autograd.grad(function(*leaves, gate, fusion=fusion), leaves, laid_out(grad).to(to))

    got = run(dtype, torch.float32, LAYOUTS[layout], rcu_ops.srtg_fuse)
    want = run(torch.float64, torch.float64, contiguous, reference.srtg_fuse)
    eager = run(dtype, dtype, contiguous, functools.partial(reference.srtg_fuse, state_dtype=dtype))
    for name, *values in zip(("dx", "dh"), got, want, eager, strict=True):
        assert_close_to_reference(*values, name)


def test_gradients_of_another_layout(backend) -> None:
    x, h, gate = inputs((2, 6, 3, 4, 5))
    grad = torch.randn(x.shape)
    for first in LAYOUTS.values():
        results = []
        for second in (contiguous, LAYOUTS["channels_last_3d"], lambda g: g.sum().expand(g.shape)):
            leaves = first(x).requires_grad_(), h.clone().requires_grad_()
            results.append(torch.autograd.grad(rcu_ops.srtg_fuse(*leaves, gate), leaves, second(grad)))
        for a, b in zip(results[0], results[1], strict=True):
            torch.testing.assert_close(a, b)
        want = torch.where(gate[:, None, None], x.sum((3, 4)).transpose(1, 2) * grad.sum(), 0)
        torch.testing.assert_close(results[2][1], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_gradcheck_and_gradgradcheck(backend, fusion, layout) -> None:
    x, h, gate = inputs((2, 3, 2, 2, 2), torch.float64)
    leaves = LAYOUTS[layout](x).requires_grad_(), h.requires_grad_()
    fuse = functools.partial(rcu_ops.srtg_fuse, gate=gate, fusion=fusion)
    assert torch.autograd.gradcheck(fuse, leaves)
    assert torch.autograd.gradgradcheck(fuse, leaves)
    assert torch.autograd.gradcheck(rcu_ops.srtg_squeeze, leaves[:1])
    assert torch.autograd.gradgradcheck(rcu_ops.srtg_squeeze, leaves[:1])


@pytest.mark.parametrize("empty", [(0, 4, 3, 2, 2), (2, 4, 0, 2, 2)], ids=str)
def test_nothing_to_do(backend, empty) -> None:
    x, h, gate = inputs(empty)
    x.requires_grad_()
    assert rcu_ops.srtg_squeeze(x).shape == h.shape
    for fusion in FUSIONS:
        y = rcu_ops.srtg_fuse(x, h.requires_grad_(), gate, fusion=fusion)
        assert y.shape == empty
        y.sum().backward()
    no_positions = torch.zeros(2, 3, 4, 0, 5, requires_grad=True)
    h = torch.ones(2, 4, 3, requires_grad=True)
    for fusion in FUSIONS:
        (dh,) = torch.autograd.grad(rcu_ops.srtg_fuse(no_positions, h, fusion=fusion).sum(), h)
        assert torch.equal(dh, torch.zeros(2, 4, 3))


def test_expanded_inputs(backend) -> None:
    x, h = torch.randn(1, 6, 3, 1, 5), torch.randn(1, 1, 6)
    wide, spread = x.expand(4, 6, 3, 7, 5), h.expand(4, 3, 6)
    torch.testing.assert_close(rcu_ops.srtg_squeeze(wide), wide.mean((3, 4)).transpose(1, 2))
    want = wide * spread.transpose(1, 2)[..., None, None]
    assert torch.equal(rcu_ops.srtg_fuse(wide, spread), want)


def test_nan_and_inf_propagate(backend) -> None:
    x, h, _ = inputs((2, 4, 3, 5, 5))
    x[0, 1, 2, 3, 4], x[1, 0, 0, 0, 0], h[0, 0, 0] = torch.nan, torch.inf, torch.nan
    squeezed, want = rcu_ops.srtg_squeeze(x), reference.srtg_squeeze(x)
    assert torch.equal(squeezed.isnan(), want.isnan()) and torch.equal(squeezed.isinf(), want.isinf())
    torch.testing.assert_close(rcu_ops.srtg_fuse(x, h), reference.srtg_fuse(x, h), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_repeatable_and_independent_of_threads(backend, layout) -> None:
    x, h, gate = inputs((3, 40, 3, 9, 7))
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(x.shape))

    def run() -> list[Tensor]:
        leaves = x.detach().requires_grad_(), h.clone().requires_grad_()
        y = rcu_ops.srtg_fuse(*leaves, gate)
        return [rcu_ops.srtg_squeeze(x), y, *torch.autograd.grad(y, leaves, grad)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if backend == "cpu":
                assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- PyTorch citizenship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "every_other_column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, layout) -> None:
    x, h, gate = inputs((2, 4, 3, 3, 2), dtype)
    x = LAYOUTS[layout](x).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if layout == "contiguous":
        tests += ("test_aot_dispatch_dynamic",)
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    check(torch.ops.rcu_ops.srtg_squeeze.default, (x,))
    for add in (False, True):
        for given in (gate, None):
            check(torch.ops.rcu_ops.srtg_fuse.default, (x, h.requires_grad_(), given, add))
    check(torch.ops.rcu_ops.srtg_fuse_backward.default, (torch.randn_like(x), x.detach(), h.detach(), gate))


def test_vmap_and_functorch_gradients(backend) -> None:
    x, h, gate = torch.randn(3, 2, 4, 3, 2, 2), torch.randn(3, 2, 3, 4), torch.tensor([True, False])
    got = torch.vmap(rcu_ops.srtg_fuse, in_dims=(0, 0, None))(x, h, gate)
    squeezed = torch.vmap(rcu_ops.srtg_squeeze)(x)

    def loss(x: Tensor, h: Tensor) -> Tensor:
        return (rcu_ops.srtg_fuse(x, h, gate) * rcu_ops.srtg_squeeze(x).mean()).sum()

    dx, dh = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, h)
    for i in range(3):
        assert torch.equal(got[i], rcu_ops.srtg_fuse(x[i], h[i], gate))
        assert torch.equal(squeezed[i], rcu_ops.srtg_squeeze(x[i]))
        leaves = x[i].clone().requires_grad_(), h[i].clone().requires_grad_()
        want = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(dx[i], want[0])
        torch.testing.assert_close(dh[i], want[1])


def test_compile_fullgraph(backend) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        added = rcu_ops.srtg_fuse(x, h, fusion="add")
        return rcu_ops.srtg_squeeze(rcu_ops.srtg_fuse(added, h, gate)).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 3, 4, 4), (3, 8, 5, 4, 5)):
        x, h, gate = inputs(shape)
        leaves, twins = ([v.clone().requires_grad_() for v in (x, h)] for _ in range(2))
        compiled(*leaves, gate).backward()
        step(*twins, gate).backward()
        for a, b in zip(leaves, twins, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_export_with_dynamic_batch_and_time() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rcu_ops.srtg_fuse(x, rcu_ops.srtg_squeeze(x))

    dims = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("t", min=1, max=1024)}
    program = torch.export.export(Layer(), (torch.randn(2, 6, 4, 3, 3),), dynamic_shapes=(dims,))
    targets = {node.target for node in program.graph.nodes}
    assert {torch.ops.rcu_ops.srtg_squeeze.default, torch.ops.rcu_ops.srtg_fuse.default} <= targets
    for n, t in ((1, 1), (5, 17)):
        x = torch.randn(n, 6, t, 3, 3)
        torch.testing.assert_close(program.module()(x), Layer()(x))


def test_meta_tensors_and_autocast(backend) -> None:
    x = torch.empty(2, 4, 3, 5, 5, device="meta", dtype=torch.bfloat16)
    if backend == "cpu":
        assert rcu_ops.srtg_squeeze(x).shape == (2, 3, 4) and rcu_ops.srtg_squeeze(x).dtype == torch.float32
        assert rcu_ops.srtg_fuse(x, torch.empty(2, 3, 4, device="meta")).dtype == torch.bfloat16
    x, h, _ = inputs((2, 4, 3, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert rcu_ops.srtg_squeeze(x).dtype == torch.float32
        assert torch.equal(rcu_ops.srtg_fuse(x, h), rcu_ops.reference.srtg_fuse(x, h))


def test_activation_checkpointing(backend) -> None:
    x, h, gate = inputs((2, 3, 4, 2, 3))
    x.requires_grad_()
    h.requires_grad_()

    def block(x: Tensor, h: Tensor) -> Tensor:
        return rcu_ops.srtg_squeeze(rcu_ops.srtg_fuse(x, h, gate)).square().sum()

    plain = torch.autograd.grad(block(x, h), (x, h))
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, h, use_reentrant=False), (x, h))
    assert all(torch.equal(a, b) and b.any() for a, b in zip(plain, again, strict=True))


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1}, TypeError, "x: expected a tensor, got int"),
        ({"x": torch.zeros(2, 4, 3, 5, 5).int()}, TypeError, "x: expected float16"),
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, r"x: expected \[N,C,T,H,W\], got 4 dimensions"),
        ({"h": torch.zeros(2, 4, 3)}, ValueError, r"h: expected \[N,T,C\] = \[2, 3, 4\], got \[2, 4, 3\]"),
        ({"h": None}, TypeError, "h: expected a tensor, got NoneType"),
        ({"h": torch.zeros(2, 3, 4, device="meta")}, ValueError, "h: expected on cpu like x, got meta"),
        ({"gate": torch.ones(2)}, TypeError, "gate: expected torch.bool, got torch.float32"),
        ({"gate": True}, TypeError, "gate: expected a tensor, got bool"),
        ({"gate": torch.ones(3).bool()}, ValueError, r"gate: expected \[N\] = \[2\], got \[3\]"),
        ({"fusion": "cat"}, ValueError, "fusion: expected 'mul' or 'add', got 'cat'"),
    ],
)
def test_wrong_arguments_are_named(backend, change, error, message) -> None:
    with pytest.raises(error, match=message):
        rcu_ops.srtg_fuse(**{"x": torch.zeros(2, 4, 3, 5, 5), "h": torch.zeros(2, 3, 4)} | change)


def test_a_mean_of_nothing_is_an_error(backend) -> None:
    for shape in ((2, 0, 3, 4, 4), (2, 4, 3, 0, 4), (2, 4, 3, 4, 0)):
        with pytest.raises(ValueError, match="x: expected at least one channel and one position"):
            rcu_ops.srtg_squeeze(torch.zeros(shape))
