"""The public function recurrent_conv: maths, numerics, layouts, gradients, PyTorch citizenship, on every backend."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import rcu_ops
from rcu_ops import _library, reference
from rcu_ops.ops.recurrent_conv import BINARY
from tests.ops import extended_precision
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] + (["cpu"] if _library.has_kernel("recurrent_conv", "CPU") else [])

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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, radius: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight of spectral radius about ``radius``, h0."""
    n, c, _, height, width = shape
    weight = torch.eye(c) * 0.5 + torch.randn(c, c) * (radius - 0.5) / c**0.5
    return torch.randn(shape).to(dtype), weight.to(dtype), torch.randn(n, c, height, width).to(dtype)


def eager(x: Tensor, weight: Tensor, h0: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """What a user would write in eager PyTorch: every step in x's dtype."""
    return reference.recurrent_conv(x, weight, h0, state_dtype=x.dtype, **options)


exact = extended_precision.recurrent_conv


SHAPES = [(2, 3, 4, 2, 3), (1, 16, 5, 7, 7), (2, 33, 3, 5, 3), (1, 64, 1, 3, 3), (3, 1, 6, 1, 1), (1, 130, 2, 3, 5)]


def test_the_compiled_backend_is_tested_when_the_library_is_there() -> None:
    if _library.LIBRARY.exists():
        assert _library.load_error() is None, _library.load_error()
        assert "cpu" in BACKENDS


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("update", ["sum", "mean"])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_keeps_the_tolerance_rule(backend, shape, dtype, with_h0, update, reverse) -> None:
    x, weight, h0 = inputs(shape, dtype)
    h0 = h0 if with_h0 else None
    options = {"update": update, "reverse": reverse}
    h, h_n = rcu_ops.recurrent_conv(x, weight, h0, **options)
    assert h.dtype == dtype
    assert h_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, want, rough, name in zip(
        (h, h_n), exact(x, weight, h0, **options), eager(x, weight, h0, **options), ("h", "h_n"), strict=True
    ):
        assert_close_to_reference(got, want, rough, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 3, 4, 5), (1, 7, 2, 3, 3), (2, 64, 2, 7, 7)], ids=str)
def test_layouts_are_read_in_place_and_kept(backend, shape, layout) -> None:
    x, weight, h0 = inputs(shape)
    laid_out = LAYOUTS[layout](x)
    h, h_n = rcu_ops.recurrent_conv(laid_out, weight, LAYOUTS["channels_last_3d"](h0.unsqueeze(2)).squeeze(2))
    assert_close_to_reference(h, exact(x, weight, h0)[0], eager(x, weight, h0)[0])
    assert_close_to_reference(h_n, exact(x, weight, h0)[1], eager(x, weight, h0)[1])
    if backend == "cpu":
        assert h.stride() == torch.empty_like(laid_out).stride()
    elif layout in ("contiguous", "channels_last_3d", "frame_major"):
        assert h.stride() == laid_out.stride()


def test_expanded_inputs(backend) -> None:
    x, weight, h0 = inputs((1, 8, 3, 1, 5))
    wide, state = x.expand(4, 8, 3, 6, 5), h0.expand(4, 8, 6, 5)
    h, _ = rcu_ops.recurrent_conv(wide, weight.t(), state)
    full = wide.contiguous(), weight.t().contiguous(), state.contiguous()
    assert_close_to_reference(h, exact(*full)[0], eager(*full)[0])


@pytest.mark.parametrize("empty", [(0, 4, 3, 2, 2), (2, 4, 3, 0, 2), (2, 4, 3, 2, 0)], ids=str)
def test_empty_batch_and_frames_without_positions(backend, empty) -> None:
    x, weight, _ = inputs(empty)
    x.requires_grad_()
    weight.requires_grad_()
    h, h_n = rcu_ops.recurrent_conv(x, weight)
    assert h.shape == empty
    assert h_n.shape == empty[:2] + empty[3:]
    (h.sum() + h_n.sum()).backward()
    assert x.grad is not None and x.grad.shape == empty
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


def test_agrees_with_a_library_rnn_per_pixel(backend) -> None:
    """nn.RNN with W_ih = I, ReLU and no bias is Eq. 1 as long as nothing is negative."""
    n, c, t, height, width = 2, 6, 5, 3, 4
    x, weight = torch.rand(n, c, t, height, width), torch.rand(c, c) / c
    rnn = torch.nn.RNN(c, c, nonlinearity="relu", bias=False, batch_first=True)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(c))
        rnn.weight_hh_l0.copy_(weight)
        per_pixel = x.permute(0, 3, 4, 2, 1).reshape(-1, t, c)
        want = rnn(per_pixel)[0].reshape(n, height, width, t, c).permute(0, 4, 3, 1, 2)
    h, _ = rcu_ops.recurrent_conv(x, weight)
    assert_close_to_reference(h, exact(x, weight, None)[0], want)


def test_first_state_without_h0(backend) -> None:
    x, weight, _ = inputs((2, 5, 3, 2, 2))
    for update in ("sum", "mean"):
        h, _ = rcu_ops.recurrent_conv(x, weight, update=update)
        assert torch.equal(h[:, :, 0], x[:, :, 0])
    h, _ = rcu_ops.recurrent_conv(x, weight, torch.zeros(2, 5, 2, 2), update="mean")
    assert torch.equal(h[:, :, 0], x[:, :, 0] / 2)


def test_reverse_is_forward_on_flipped_time(backend) -> None:
    x, weight, h0 = inputs((2, 9, 6, 3, 3))
    h, h_n = rcu_ops.recurrent_conv(x, weight, h0, reverse=True)
    flipped, flipped_n = rcu_ops.recurrent_conv(x.flip(2), weight, h0)
    assert torch.equal(h, flipped.flip(2))
    assert torch.equal(h_n, flipped_n)


def test_the_state_does_not_stall_in_bf16(backend) -> None:
    """W = I and inputs of mean 1: a bf16 state stops growing at 256; the fp32 state does not."""
    frames = 2048
    x = torch.ones(1, 4, frames, 1, 1, dtype=torch.bfloat16)
    _, h_n = rcu_ops.recurrent_conv(x, torch.eye(4, dtype=torch.bfloat16))
    assert torch.equal(h_n, torch.full((1, 4, 1, 1), float(frames)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("update", ["sum", "mean"])
def test_any_chunking_equals_the_whole(backend, dtype, layout, update) -> None:
    shape = (2, 24, 7, 5, 3)
    x, weight, _ = inputs(shape, dtype)
    x = LAYOUTS[layout](x)
    whole, whole_n = rcu_ops.recurrent_conv(x, weight, update=update)
    for sizes in ([1] * 7, [2, 5], [3, 1, 3]):
        state, parts = None, []
        for part in x.split(sizes, dim=2):
            h, state = rcu_ops.recurrent_conv(part, weight, state, update=update)
            parts.append(h)
        if backend == "cpu":  # same kernel, same order of additions
            assert torch.equal(torch.cat(parts, 2), whole)
            assert torch.equal(state, whole_n)
        assert_close_to_reference(
            torch.cat(parts, 2), exact(x, weight, None, update=update)[0], eager(x, weight, None, update=update)[0]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable_and_independent_of_threads(backend, dtype) -> None:
    x, weight, h0 = inputs((3, 48, 4, 9, 7), dtype)
    grad_h = torch.randn(x.shape).to(dtype)

    def run() -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (x, weight, h0)]
        h, h_n = rcu_ops.recurrent_conv(*leaves)
        return [h.detach(), h_n.detach(), *torch.autograd.grad(h, leaves, grad_h)]

    first = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if backend == "cpu":
                assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_nan_and_inf_propagate_like_the_reference(backend) -> None:
    x, weight, h0 = inputs((2, 6, 4, 2, 3))
    x[0, 1, 1, 0, 0] = torch.nan
    x[1, 2, 2, 1, 1] = torch.inf
    h, h_n = rcu_ops.recurrent_conv(x, weight, h0)
    want, want_n = reference.recurrent_conv(x, weight, h0)
    for got, expected in ((h, want), (h_n, want_n)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())
    others = torch.ones_like(h, dtype=torch.bool)
    others[0, :, :, 0, 0] = others[1, :, :, 1, 1] = False
    assert h[others].isfinite().all()


@pytest.mark.parametrize("where", ["grad", "x", "h0"])
def test_an_infinite_gradient_of_the_weight_stays_infinite(backend, where) -> None:
    x, weight, h0 = inputs((2, 6, 4, 2, 3))
    grad = torch.randn_like(x)
    {"grad": grad[:, :, 0], "x": x[:, :, 1], "h0": h0}[where][0, 2, 0, 0] = torch.inf
    found = []
    for run in (rcu_ops.recurrent_conv, reference.recurrent_conv):
        leaf = weight.clone().requires_grad_()
        found += torch.autograd.grad(run(x, leaf, h0)[0], leaf, grad)
    got, want = found
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert where == "h0" or want.isinf().any()


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("update", ["sum", "mean"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_gradcheck_and_gradgradcheck(backend, with_h0, update, reverse, layout) -> None:
    x, weight, h0 = (v.double() for v in inputs((2, 3, 3, 2, 2)))
    leaves = (
        LAYOUTS[layout](x).requires_grad_(),
        weight.requires_grad_(),
        h0.requires_grad_() if with_h0 else None,
    )
    call = functools.partial(rcu_ops.recurrent_conv, update=update, reverse=reverse)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("outputs", ["h", "h_n", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_keeps_the_tolerance_rule(backend, layout, dtype, outputs) -> None:
    shape = (2, 20, 4, 5, 3)
    x, weight, h0 = inputs(shape, dtype)
    grad_h = torch.randn(shape).to(dtype)
    grad_h_n = torch.randn(h0.shape)

    chosen = [grad_h if outputs != "h_n" else None, grad_h_n if outputs != "h" else None]

    def gradients(function, *leaves: Tensor) -> tuple[Tensor, ...]:
        pairs = [(o, g) for o, g in zip(function(*leaves), chosen, strict=True) if g is not None]
        laid_out = [LAYOUTS[layout](g) if g.dim() == 5 else g.to(o.dtype) for o, g in pairs]
        return torch.autograd.grad([o for o, _ in pairs], leaves, laid_out)

    leaves = [v.requires_grad_() for v in (LAYOUTS[layout](x), weight, h0)]
    got = gradients(rcu_ops.recurrent_conv, *leaves)
    rough = gradients(eager, *leaves)
    want = extended_precision.gradients(x, weight, h0, *chosen)
    for g, w, e, name in zip(got, want, rough, ("dx", "dweight", "dh0"), strict=True):
        assert g.dtype == dtype
        assert_close_to_reference(g, w, e, name)


def test_no_gradient_is_missing(backend) -> None:
    """Every element that influences the loss has a gradient: nothing is cut off at a tile's edge."""
    x, weight, h0 = inputs((2, 19, 3, 5, 7))
    leaves = [v.requires_grad_() for v in (x, weight, h0)]
    h, h_n = rcu_ops.recurrent_conv(*leaves)
    (h.square().sum() + h_n.sum()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad != 0).all()


def test_only_the_asked_gradients_are_computed(backend) -> None:
    for needed in itertools.product([False, True], repeat=3):
        if not any(needed):
            continue
        leaves = [v.requires_grad_(n) for v, n in zip(inputs((1, 4, 2, 2, 2)), needed, strict=True)]
        rcu_ops.recurrent_conv(*leaves)[0].sum().backward()
        assert [v.grad is not None for v in leaves] == list(needed)


def test_truncated_backpropagation(backend) -> None:
    x, weight, _ = inputs((1, 6, 4, 2, 2))
    weight.requires_grad_()
    _, state = rcu_ops.recurrent_conv(x[:, :, :2], weight)
    whole = torch.autograd.grad(rcu_ops.recurrent_conv(x[:, :, 2:], weight, state)[0].sum(), weight)[0]
    cut = torch.autograd.grad(rcu_ops.recurrent_conv(x[:, :, 2:], weight, state.detach())[0].sum(), weight)[0]
    assert not torch.allclose(whole, cut)


def test_activation_checkpointing(backend) -> None:
    x, weight, _ = inputs((2, 6, 4, 3, 3))
    weight.requires_grad_()

    def block(x: Tensor) -> Tensor:
        return rcu_ops.recurrent_conv(x, weight)[0].relu()

    plain = torch.autograd.grad(block(x).square().sum(), weight)[0]
    saved = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).square().sum(), weight
    )[0]
    assert torch.equal(plain, saved)


# ---- PyTorch citizenship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_h0", [False, True])
def test_opcheck(layout, dtype, with_h0) -> None:
    x, weight, h0 = inputs((2, 4, 3, 3, 2), dtype)
    x = LAYOUTS[layout](x)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if layout == "contiguous":  # the dynamic test compiles; once is enough
        tests += ("test_aot_dispatch_dynamic",)
    h0 = h0.requires_grad_() if with_h0 else None
    args = (x.requires_grad_(), weight.requires_grad_(), h0, True, False)
    torch.library.opcheck(torch.ops.rcu_ops.recurrent_conv.default, args, test_utils=tests)
    with torch.no_grad():
        h, h_n = torch.ops.rcu_ops.recurrent_conv(*args)
    grads = (torch.randn_like(h), torch.randn_like(h_n), h, weight.detach(), None if h0 is None else h0.detach())
    for need_weight_grad in (False, True):
        backward = (*grads, False, True, need_weight_grad)
        torch.library.opcheck(torch.ops.rcu_ops.recurrent_conv_backward.default, backward, test_utils=tests)


def test_autocast(backend) -> None:
    x, weight, h0 = inputs((1, 8, 3, 4, 4))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h, h_n = rcu_ops.recurrent_conv(x, weight, h0)
        assert rcu_ops.recurrent_conv(x.double(), weight.double())[0].dtype == torch.float64
    assert h.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    want, _ = rcu_ops.recurrent_conv(x.bfloat16(), weight.bfloat16(), h0)
    assert torch.equal(h, want)
    h.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    weight.requires_grad_(False)
    scale, shift = torch.rand(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = rcu_ops.recurrent_conv_affine_act(x, weight, scale, shift, h0, x)
    narrow = x.bfloat16()
    assert torch.equal(y, rcu_ops.recurrent_conv_affine_act(narrow, weight.bfloat16(), scale, shift, h0, narrow)[0])


def test_the_reference_takes_every_argument_by_name() -> None:
    x, weight, h0 = inputs((1, 3, 2, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):  # which it switches off, whatever it finds
        h, _ = reference.recurrent_conv(x=x, weight=weight, h0=h0)
    assert torch.equal(h, reference.recurrent_conv(x, weight, h0)[0])


@pytest.mark.parametrize("in_dims", [(0, None, 0), (2, None, None), (0, 0, None), (None, 0, 1)], ids=str)
def test_vmap(backend, in_dims) -> None:
    size = 3
    x, weight, h0 = (torch.randn(*s, dtype=torch.double) for s in ((2, 4, 3, 2, 2), (4, 4), (2, 4, 2, 2)))

    def mapped(value: Tensor, dim: int | None) -> Tensor:
        return value if dim is None else torch.stack([value * (i + 1) for i in range(size)], dim)

    args = [mapped(v, d) for v, d in zip((x, weight, h0), in_dims, strict=True)]
    h, h_n = torch.vmap(rcu_ops.recurrent_conv, in_dims=in_dims)(*args)
    for i in range(size):
        one = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        want, want_n = rcu_ops.recurrent_conv(*one)
        torch.testing.assert_close(h[i], want)
        torch.testing.assert_close(h_n[i], want_n)


def test_per_sample_gradients(backend) -> None:
    x, weight, _ = inputs((3, 4, 3, 2, 2))

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return rcu_ops.recurrent_conv(sample.unsqueeze(0), weight)[0].square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    want = torch.stack([torch.func.grad(loss)(weight, sample) for sample in x])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("update", ["sum", "mean"])
def test_compile_fullgraph(backend, update) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, weight: Tensor) -> Tensor:
        h, h_n = rcu_ops.recurrent_conv(x, weight, update=update)
        return h.relu().sum() + h_n.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 3, 4, 4), (3, 8, 3, 5, 4)):
        x, weight, _ = inputs(shape)
        leaves, twins = ([v.clone().requires_grad_() for v in (x, weight)] for _ in range(2))
        compiled(*leaves).backward()
        step(*twins).backward()
        for a, b in zip(leaves, twins, strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_state_outlives_changes_of_h(backend, frames, with_h0) -> None:
    x, weight, h0 = inputs((2, 16, frames, 3, 4), torch.float32)
    h, h_n = rcu_ops.recurrent_conv(x, weight, h0 if with_h0 else None)
    kept = h[:, :, -1].clone()
    h.zero_(), x.zero_()
    assert torch.equal(h_n, kept)


def test_the_reference_compiled_in_16_bits() -> None:
    """Inductor's AVX-512 kernels with two transposes of bf16 write garbage: channels-last clips are not transposed."""
    torch._dynamo.reset()
    weight = (torch.eye(64) / 2 + torch.randn(64, 64) / 20).bfloat16()
    x, grad = (torch.randn(2, 64, 4, 16, 16).bfloat16().to(memory_format=torch.channels_last_3d) for _ in "xg")

    def results(scan: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in (x.detach(), weight.detach())]
        h, _ = scan(*leaves, state_dtype=dtype)
        return [h, *torch.autograd.grad(h, leaves, grad.to(dtype))]

    compiled = torch.compile(reference.recurrent_conv, fullgraph=True, dynamic=False)
    got, rough = (results(scan, torch.bfloat16) for scan in (compiled, reference.recurrent_conv))
    for name, *of in zip(("h", "dx", "dW"), got, results(reference.recurrent_conv, torch.float64), rough, strict=True):
        assert_close_to_reference(*of, name)


def test_export_with_dynamic_batch_and_time() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(6) * 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return rcu_ops.recurrent_conv(x, self.weight)[0]

    layer = Layer()
    dims = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("t", min=1, max=1024)}
    program = torch.export.export(layer, (torch.randn(2, 6, 4, 3, 3),), dynamic_shapes=(dims,))
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.rcu_ops.recurrent_conv.default in targets
    for n, t in ((1, 1), (5, 17)):
        x = torch.randn(n, 6, t, 3, 3)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_meta_tensors_and_flop_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, c, t, height, width = shape = (2, 8, 5, 3, 4)
    x = torch.empty(shape, device="meta", requires_grad=True)
    weight = torch.empty(c, c, device="meta", requires_grad=True)
    step = 2 * c * c * n * height * width
    with FlopCounterMode(display=False) as forward:
        h, h_n = rcu_ops.recurrent_conv(x, weight)
    assert h.shape == shape and h_n.shape == (n, c, height, width)
    assert forward.get_total_flops() == step * (t - 1)  # the first state is x itself
    with FlopCounterMode(display=False) as backward:
        h.sum().backward()
    assert backward.get_total_flops() == 2 * step * (t - 1)
    h, _ = rcu_ops.recurrent_conv(x, weight.detach())
    with FlopCounterMode(display=False) as backward:
        h.sum().backward()
    assert backward.get_total_flops() == step * (t - 1)
    with FlopCounterMode(display=False) as stepping:
        rcu_ops.recurrent_conv(x[:, :, :1], weight, h_n)
    assert stepping.get_total_flops() == step


# ---- fused inference form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_affine_act_keeps_the_tolerance_rule(backend, dtype, layout, activation, with_residual) -> None:
    shape = (2, 18, 4, 3, 5)
    x, weight, h0 = inputs(shape, dtype)
    scale, shift = torch.rand(18) + 0.5, torch.randn(18)
    residual = torch.randn(shape).to(dtype) if with_residual else None
    y, h_n = rcu_ops.recurrent_conv_affine_act(
        LAYOUTS[layout](x), weight, scale, shift, h0, residual, update="mean", activation=activation
    )
    arguments = (x, weight, scale, shift, h0, residual)
    options = {"update": "mean", "activation": activation}
    want, want_n = reference.recurrent_conv_affine_act(
        *(None if a is None else a.double() for a in arguments), **options
    )
    rough, rough_n = reference.recurrent_conv_affine_act(
        *(None if a is None else a.to(dtype) for a in arguments), **options, state_dtype=dtype
    )
    assert y.dtype == dtype
    assert_close_to_reference(y, want, rough, "y")
    assert_close_to_reference(h_n, want_n, rough_n, "h_n")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_act_has_the_same_state_as_the_plain_form(backend, dtype) -> None:
    x, weight, h0 = inputs((2, 18, 4, 3, 5), dtype)
    ones, zeros = torch.ones(18), torch.zeros(18)
    y, h_n = rcu_ops.recurrent_conv_affine_act(x, weight, ones, zeros, h0, activation="identity")
    h, want_n = rcu_ops.recurrent_conv(x, weight, h0)
    assert torch.equal(h_n, want_n)
    assert torch.equal(y, h)


def test_affine_act_opcheck_compile_and_export() -> None:
    x, weight, h0 = inputs((2, 6, 3, 4, 4))
    scale, shift, residual = torch.rand(6), torch.randn(6), torch.randn(x.shape)
    args = (x, weight, scale, shift, h0, residual, False, True)
    torch.library.opcheck(
        torch.ops.rcu_ops.recurrent_conv_affine_act.default, args, test_utils=("test_schema", "test_faketensor")
    )
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(rcu_ops.recurrent_conv_affine_act, fullgraph=True)
        for a, b in zip(
            compiled(x, weight, scale, shift, h0, residual),
            rcu_ops.recurrent_conv_affine_act(x, weight, scale, shift, h0, residual),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_affine_act_refuses_gradients(backend) -> None:
    x, weight, _ = inputs((1, 4, 2, 2, 2))
    channels = torch.ones(4)
    with pytest.raises(RuntimeError, match="no gradient"):
        rcu_ops.recurrent_conv_affine_act(x.requires_grad_(), weight, channels, channels)
    y, _ = torch.ops.rcu_ops.recurrent_conv_affine_act(x, weight, channels, channels, None, None, False, True)
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()


def test_no_call_takes_the_detour_of_registered_gradients() -> None:
    def detours(call: Callable[[], object]) -> bool:
        files = set()
        sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
        try:
            call()
        finally:
            sys.setprofile(None)
        return any(Path(file).parts[-2:] == ("_library", "autograd.py") for file in files)

    x, weight, h0 = inputs((1, 4, 1, 2, 2))
    channels = torch.ones(4)
    assert not detours(lambda: BINARY.forward(x, weight, h0, False, False))
    assert not detours(lambda: BINARY.affine_act(x, weight, channels, channels, h0, None, False, True))
    weight.requires_grad_()
    assert detours(lambda: torch.ops.rcu_ops.recurrent_conv(x, weight, h0, False, False))
    assert not detours(lambda: BINARY.forward(x, weight, h0, False, False))
    names = {output.grad_fn and output.grad_fn.name() for output in BINARY.forward(x, weight, h0, False, False)}
    assert names == {"recurrent_convBackward"}
    with torch.no_grad():
        assert not detours(lambda: BINARY.forward(x, weight, h0, False, False))


# ---- errors -------------------------------------------------------------------------------------------------------

GOOD = {"x": (2, 4, 3, 5, 5), "weight": (4, 4), "h0": (2, 4, 5, 5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1, 2]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, 3, 5, 5, dtype=torch.int64)}, TypeError, "x: expected float16"),
        ({"x": torch.zeros(4, 3, 5, 5)}, ValueError, r"x: expected \[N,C,T,H,W\], got 4 dimensions"),
        ({"x": torch.zeros(2, 4, 0, 5, 5)}, ValueError, "x: expected at least one frame"),
        ({"x": torch.zeros(2, 0, 3, 5, 5)}, ValueError, "one channel"),
        ({"weight": torch.zeros(4, 5)}, ValueError, r"weight: expected \[C,C\] = \[4, 4\], got \[4, 5\]"),
        ({"weight": torch.zeros(4, 4).bfloat16()}, TypeError, "weight: expected torch.float32, got torch.bfloat16"),
        ({"weight": torch.zeros(4, 4, device="meta")}, ValueError, "weight: expected on cpu like x, got meta"),
        ({"h0": torch.zeros(2, 4, 5, 4)}, ValueError, r"h0: expected \[N,C,H,W\] = \[2, 4, 5, 5\]"),
        ({"h0": torch.zeros(2, 4, 5, 5).double()}, TypeError, "h0: expected torch.float32, got torch.float64"),
        ({"h0": torch.zeros(2, 4, 5, 5, device="meta")}, ValueError, "h0: expected on cpu"),
        ({"update": "max"}, ValueError, "update: expected 'sum' or 'mean', got 'max'"),
        ({"x": torch.zeros(2, 4, 3, 5, 5).to_sparse()}, TypeError, "strided"),
    ],
)
def test_wrong_arguments_are_named(backend, change, error, message) -> None:
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(error, match=message):
        rcu_ops.recurrent_conv(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": torch.ones(3)}, ValueError, r"scale: expected \[C\] = \[4\], got \[3\]"),
        ({"shift": 1.0}, TypeError, "shift: expected a tensor, got float"),
        ({"residual": torch.zeros(2, 4, 3, 5, 4)}, ValueError, "residual: expected x's shape"),
        ({"residual": torch.zeros(2, 4, 3, 5, 5).half()}, TypeError, "residual: expected torch.float32"),
        ({"activation": "tanh"}, ValueError, "activation: expected 'relu' or 'identity', got 'tanh'"),
    ],
)
def test_wrong_affine_arguments_are_named(backend, change, error, message) -> None:
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    arguments |= {"scale": torch.ones(4), "shift": torch.ones(4)} | change
    with pytest.raises(error, match=message):
        rcu_ops.recurrent_conv_affine_act(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 4), None),
        (torch.zeros(2, 4, 3, 5, 5), torch.zeros(4, 5), None),
        (torch.zeros(2, 4, 3, 5, 5), torch.zeros(4, 4).double(), None),
        (torch.zeros(2, 4, 0, 5, 5), torch.zeros(4, 4), None),
        (torch.zeros(2, 4, 3, 5, 5), torch.zeros(4, 4), torch.zeros(2, 4, 5, 4)),
        (torch.zeros(2, 4, 3, 5, 5).int(), torch.zeros(4, 4).int(), None),
    ],
)
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled CPU kernel is not built")
def test_direct_callers_of_the_operator_are_checked_too(arguments) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.rcu_ops.recurrent_conv(*arguments, False, False)
