"""The public functions fast_gru and fast_gru_step: maths, numerics, layouts, gradients, citizenship, every backend."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import rcu_ops
from rcu_ops import _library, reference
from tests.ops import extended_precision
from tests.ops.fast_gru_inputs import NAMES, inputs
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] + (["cpu"] if _library.has_kernel("fast_gru", "CPU") else [])
RESULTS = ("dx", "dux", "duo", "dw", "dvx", "dvo", "do0")

contiguous = functools.partial(torch.clone, memory_format=torch.contiguous_format)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "channels_last": lambda x: contiguous(x.movedim(2, -1)).movedim(-1, 2),
    "channels_last_with_gaps": lambda x: contiguous(
        torch.cat([x, torch.full_like(x[..., :1], torch.nan)], dim=5).movedim(2, -1)
    ).movedim(-1, 2)[..., :-1],
    "clips_first": lambda x: contiguous(x.transpose(0, 1)).transpose(0, 1),
    "width_major": lambda x: contiguous(x.transpose(4, 5)).transpose(4, 5),
    "every_other_column": lambda x: contiguous(torch.stack([x, torch.full_like(x, torch.nan)], dim=6))[..., 0],
    "middle_channels": lambda x: torch.cat([torch.full_like(x, torch.nan), x, x], dim=2)[
        :, :, x.shape[2] : 2 * x.shape[2]
    ],
}

# N, K, C, L, H, W and R
SHAPES = [
    ((2, 3, 4, 1, 2, 3), 2),
    ((1, 4, 16, 2, 7, 7), 4),
    ((3, 2, 33, 1, 5, 3), 7),
    ((2, 1, 5, 1, 3, 3), 3),
    ((3, 5, 1, 1, 1, 1), 1),
    ((1, 3, 70, 1, 1, 1), 17),
    ((2, 3, 512, 1, 1, 3), 3),  # many channels and few positions: matrices in another order than x
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def eager(tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """What a user would write in eager PyTorch: every step in x's dtype."""
    return reference.fast_gru(*tensors, state_dtype=tensors[0].dtype)


def leaves_of(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor | None], grads: list[Tensor | None]) -> list[Tensor]:
    """Zeros for weights that a single clip does not use."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad([o for o, _ in pairs], given, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, given, strict=True)]


class Errors:
    """Results of several draws of a problem, judged together: of a few numbers alone, the largest error is luck.

    Args:
        ignored: names of results that are not judged.
    """

    def __init__(self, ignored: tuple[str, ...] = ()) -> None:
        self.ignored = ignored
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, name: str, got: Tensor, exact: Tensor, eager: Tensor) -> None:
        assert got.shape == exact.shape == eager.shape, name
        if name.partition(",")[0] not in self.ignored:
            self.parts.setdefault(name, []).append((got.detach(), exact, eager.detach()))

    def check(self) -> None:
        for name, parts in self.parts.items():
            got, exact, eager = (torch.cat([v.flatten() for v in values]) for values in zip(*parts, strict=True))
            assert_close_to_reference(got, exact, eager, name)


def compare(
    tensors: list[Tensor | None], laid_out: list[Tensor | None], grads: list[Tensor | None], errors: Errors
) -> tuple[Tensor, Tensor]:
    """Forward and backward; ``laid_out`` holds the values of ``tensors``."""
    exact, exact_gradients = extended_precision.fast_gru(
        tensors, *(None if g is None else g.contiguous() for g in grads)
    )
    rough_leaves = leaves_of(tensors)
    rough = eager(rough_leaves)
    roughly = gradients(rough, rough_leaves, grads)
    leaves = [None if v is None else v.detach().requires_grad_() for v in laid_out]
    got = rcu_ops.fast_gru(*leaves)
    for name, g, e, r in zip(("o", "o_n"), got, exact, rough, strict=True):
        errors.add(name, g, e, r)
    wanted = [g for g in exact_gradients if g is not None]
    for name, g, e, r in zip(RESULTS, gradients(got, leaves, grads), wanted, roughly, strict=False):
        errors.add(name, g, e, r)
    return got


@pytest.mark.parametrize("with_o0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_forward_and_backward_keep_the_tolerance_rule(backend, shape, hidden, dtype, with_o0) -> None:
    errors = Errors()
    # The fewer numbers in a draw, the more its largest error is luck; the ulp of 16-bit results hides that.
    draws = 4 if shape[2] < 512 else 2
    if dtype in (torch.float32, torch.float64) and shape[2] < 512:
        draws = 48 if math.prod(shape) < 256 else 24
    for _ in range(draws):
        tensors = inputs(shape, hidden, dtype, with_o0)
        o, o_n = compare(tensors, tensors, [torch.randn(shape).to(dtype), torch.randn(shape[:1] + shape[2:])], errors)
        assert o.dtype == dtype
        assert o_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    errors.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", ["o", "o_n", "both"])
def test_layouts_are_read_in_place(backend, layout, dtype, outputs) -> None:
    shape, hidden = (2, 3, 20, 2, 3, 5), 5
    errors = Errors()
    for _ in range(3):
        tensors = inputs(shape, hidden, dtype)
        laid_out = [
            LAYOUTS[layout](tensors[0]),
            *(w.transpose(-1, -2).contiguous().transpose(-1, -2) for w in tensors[1:6]),
            LAYOUTS["every_other_column"](tensors[6].unsqueeze(1)).squeeze(1),
        ]
        grad_o = LAYOUTS[layout](torch.randn(shape).to(dtype)) if outputs != "o_n" else None
        grad_o_n = torch.randn(shape[:1] + shape[2:]) if outputs != "o" else None
        o, _ = compare(tensors, laid_out, [grad_o, grad_o_n], errors)
        if backend == "cpu":
            assert (o.stride(2) == 1) == layout.startswith("channels_last")
    errors.check()


@pytest.mark.parametrize("channels", [8, 520])
@pytest.mark.parametrize("width", [1, 5])
def test_expanded_inputs(backend, width, channels) -> None:
    """Of samples and positions, of all positions too, and the gradient of a sum: one number for all places."""
    tensors = inputs((1, 3, channels, 1, 1, width), 3)
    wide = [tensors[0].expand(4, 3, channels, 2, 6, 5), *tensors[1:6], tensors[6].expand(4, channels, 2, 6, 5)]
    (exact, _), _ = extended_precision.fast_gru(tensors)  # every place has its own number: once for all that share it
    assert_close_to_reference(rcu_ops.fast_gru(*wide)[0], exact.expand(wide[0].shape), eager(wide)[0])
    if backend == "cpu":  # in the same order of memory the same numbers
        dense = [LAYOUTS["channels_last" if wide[0].stride(2) == 1 else "contiguous"](wide[0]), *wide[1:]]
        grad = torch.randn(()).expand(wide[0].shape)
        for outputs in zip(*(gradients_of(leaves, grad) for leaves in (wide, dense)), strict=True):
            assert torch.equal(*outputs)


def gradients_of(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """o and the gradients of everything."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    o, _ = rcu_ops.fast_gru(*leaves)
    return [o, *torch.autograd.grad(o, leaves, grad)]


@pytest.mark.parametrize("empty", [(0, 3, 4, 1, 2, 2), (2, 3, 4, 0, 2, 2), (2, 3, 4, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("with_o0", [False, True])
def test_empty_batch_and_clips_without_positions(backend, empty, with_o0) -> None:
    leaves = leaves_of(inputs(empty, 2, with_o0=with_o0))
    o, o_n = rcu_ops.fast_gru(*leaves)
    assert o.shape == empty
    assert o_n.shape == empty[:1] + empty[2:]
    (o.sum() + o_n.sum()).backward()
    assert leaves[0].grad is not None and leaves[0].grad.shape == empty
    for weight in leaves[1:6]:
        assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_compiled_backend_is_tested_when_the_library_is_there() -> None:
    if _library.LIBRARY.exists():
        assert _library.load_error() is None, _library.load_error()
        assert "cpu" in BACKENDS


def test_first_state_is_the_first_clip(backend) -> None:
    tensors = inputs((2, 3, 6, 1, 2, 2), 2, with_o0=False)
    o, _ = rcu_ops.fast_gru(*tensors)
    assert torch.equal(o[:, 0], tensors[0][:, 0])
    later, _ = rcu_ops.fast_gru(tensors[0][:, 1:], *tensors[1:6], tensors[0][:, 0])
    assert_close_to_reference(o[:, 1:], extended_precision.fast_gru(tensors)[0][0][:, 1:], later)


def test_a_closed_gate_keeps_the_state_and_an_open_one_replaces_it(backend) -> None:
    """Worked by hand: z' = 1000 relu(x) drives z to 1 where x > 0; z = 1/2 where it is not."""
    c = 3
    x = torch.tensor([[1.0, -1.0, 2.0]]).reshape(1, 1, c, 1, 1, 1)
    o0 = torch.tensor([[0.25, 0.5, -0.75]]).reshape(1, c, 1, 1, 1)
    ux = torch.cat([torch.zeros(c, c), torch.eye(c)])
    w = torch.stack([torch.zeros(c, c), 1000 * torch.eye(c)])
    zero = torch.zeros(c, c)
    o, _ = rcu_ops.fast_gru(x, ux, torch.zeros(2 * c, c), w, torch.eye(c), zero, o0)
    candidate = x[0, 0].flatten().tanh()
    want = torch.stack([candidate[0], (0.5 + candidate[1]) / 2, candidate[2]])
    torch.testing.assert_close(o.flatten(), want)
    half, _ = rcu_ops.fast_gru(x, torch.zeros(2 * c, c), torch.zeros(2 * c, c), w, zero, torch.eye(c), o0)
    torch.testing.assert_close(half.flatten(), (o0.flatten() + (o0.flatten() / 2).tanh()) / 2)


def test_tied_candidate(backend) -> None:
    """One matrix in both places: V x + V (r o), and its gradient is the sum of both."""
    tensors = inputs((2, 3, 6, 1, 2, 2), 2, torch.float64)
    leaves = leaves_of(tensors)
    leaves[5] = leaves[4]
    o, _ = rcu_ops.fast_gru(*leaves)
    (tied,) = torch.autograd.grad(o.sum(), leaves[4])
    apart = leaves_of([*tensors[:5], tensors[4], tensors[6]])
    parts = torch.autograd.grad(rcu_ops.fast_gru(*apart)[0].sum(), apart[4:6])
    torch.testing.assert_close(tied, parts[0] + parts[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_steps_and_chunks_equal_the_whole(backend, dtype, layout) -> None:
    tensors = inputs((2, 5, 24, 1, 5, 3), 6, dtype, with_o0=False)
    x, weights = LAYOUTS[layout](tensors[0]), tensors[1:6]
    _, whole_n = rcu_ops.fast_gru(x, *weights)
    exact, exact_n = extended_precision.fast_gru(tensors)[0]
    rough, rough_n = eager(tensors)
    for sizes in ([2, 3], [1, 1, 1, 1, 1], [4, 1]):
        state, parts = None, []
        for part in x.split(sizes, dim=1):
            o, state = rcu_ops.fast_gru(part, *weights, state)
            parts.append(o)
        assert_close_to_reference(torch.cat(parts, 1), exact, rough)
        assert_close_to_reference(state, exact_n, rough_n)
    state = x[:, 0].to(whole_n.dtype)
    for k in range(1, 5):
        state = rcu_ops.fast_gru_step(x[:, k], state, *weights)
        assert state.dtype == whole_n.dtype
        assert_close_to_reference(state, exact[:, k], rough[:, k])
    assert_close_to_reference(whole_n, exact_n, rough_n)
    assert rcu_ops.fast_gru_step(x[:, 1], x[:, 0], *weights).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(backend, dtype) -> None:
    tensors = inputs((3, 4, 48, 1, 7, 7), 12, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def run() -> list[Tensor]:
        leaves = leaves_of(tensors)
        o, o_n = rcu_ops.fast_gru(*leaves)
        return [o.detach(), o_n.detach(), *torch.autograd.grad(o, leaves, grad)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")
def test_the_kernels_steps_give_the_bits_of_the_whole_on_any_number_of_threads(dtype) -> None:
    tensors = inputs((3, 4, 48, 1, 7, 7), 12, dtype, with_o0=False)
    x, weights, threads, found = tensors[0], tensors[1:6], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert "library products" not in str(rcu_ops.explain("fast_gru", x, *weights).plan)
            o, state = rcu_ops.fast_gru(x, *weights)
            parts, step = [x[:, :1]], x[:, 0].to(state.dtype)
            for clip in x[:, 1:].unbind(1):
                part, step = rcu_ops.fast_gru(clip.unsqueeze(1), *weights, step)
                parts.append(part)
            assert torch.equal(torch.cat(parts, 1), o) and torch.equal(step, state)
            found.append(o)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nan_and_inf_propagate_like_the_reference(backend) -> None:
    tensors = inputs((2, 4, 6, 1, 2, 3), 2)
    tensors[0][0, 1, 1, 0, 0, 0] = torch.nan
    tensors[0][1, 2, 2, 0, 1, 1] = torch.inf
    for got, want in zip(rcu_ops.fast_gru(*tensors), reference.fast_gru(*tensors), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert got.isnan().any() and got.isfinite().any()


@pytest.mark.parametrize("where", ["x", "weight_ux"])
def test_nan_reaches_every_gradient_that_it_reaches_in_eager_pytorch(backend, where) -> None:
    tensors = inputs((2, 4, 8, 1, 2, 3), 4)
    if where == "x":
        tensors[0][0, 1, 1, 0, 0, 0] = torch.nan
    else:
        tensors[1][2, 3] = torch.nan  # one feature of hidden: the others of its columns are numbers
    grad, found = torch.randn_like(tensors[0]), []
    for run in (lambda leaves: rcu_ops.fast_gru(*leaves), eager):
        leaves = leaves_of(tensors)
        found.append(torch.autograd.grad(run(leaves)[0], leaves, grad))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    assert found[0][1].isnan().any()


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_o0", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_and_gradgradcheck(backend, with_o0, recompute, layout) -> None:
    leaves = [None if v is None else v.double() for v in inputs((2, 3, 2, 1, 1, 2), 1, with_o0=with_o0)]
    leaves[0] = LAYOUTS[layout](leaves[0])
    leaves = [None if v is None else v.requires_grad_() for v in leaves]
    call = functools.partial(rcu_ops.fast_gru, recompute=recompute)
    assert torch.autograd.gradcheck(call, leaves)
    if not recompute:  # the same second order
        assert torch.autograd.gradgradcheck(call, leaves)


def test_step_gradcheck(backend) -> None:
    x, *weights, o0 = (v.double() for v in inputs((2, 1, 3, 1, 2, 2), 2))
    leaves = [v.requires_grad_() for v in (x[:, 0].clone(), o0, *weights)]
    assert torch.autograd.gradcheck(rcu_ops.fast_gru_step, leaves)


def test_only_the_asked_gradients_are_computed(backend) -> None:
    for needed in itertools.product([False, True], repeat=3):
        if not any(needed):
            continue
        which = dict(zip((0, 3, 6), needed, strict=True))
        leaves = [v.requires_grad_(which.get(i, False)) for i, v in enumerate(inputs((1, 2, 4, 1, 2, 2), 2))]
        rcu_ops.fast_gru(*leaves)[0].sum().backward()
        assert [leaves[i].grad is not None for i in which] == list(needed)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i not in which)


def test_no_gradient_is_missing(backend) -> None:
    """Every element that influences the loss has a gradient: nothing is cut off at an edge."""
    leaves = leaves_of(inputs((2, 3, 19, 1, 5, 7), 9))
    o, o_n = rcu_ops.fast_gru(*leaves)
    (o.square().sum() + o_n.sum()).backward()
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad is not None and (leaf.grad != 0).all(), name


def test_activation_checkpointing(backend) -> None:
    tensors = inputs((2, 3, 6, 1, 3, 3), 2)
    weight = tensors[1].requires_grad_()

    def block(x: Tensor) -> Tensor:
        return rcu_ops.fast_gru(x, *tensors[1:])[0].relu()

    plain = torch.autograd.grad(block(tensors[0]).square().sum(), weight)[0]
    checkpoint = torch.utils.checkpoint.checkpoint(block, tensors[0], use_reentrant=False)
    assert torch.equal(plain, torch.autograd.grad(checkpoint.square().sum(), weight)[0])


# ---- PyTorch citizenship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "middle_channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_o0", [False, True])
def test_opcheck(layout, dtype, with_o0) -> None:
    tensors = inputs((2, 3, 4, 1, 3, 2), 2, dtype, with_o0)
    tensors[0] = LAYOUTS[layout](tensors[0])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if layout == "contiguous":  # the dynamic test compiles; once is enough
        tests += ("test_aot_dispatch_dynamic",)
    args = (*(None if v is None else v.requires_grad_() for v in tensors), True)
    torch.library.opcheck(torch.ops.rcu_ops.fast_gru.default, args, test_utils=tests)
    plain = [None if v is None else v.detach() for v in tensors]
    torch.library.opcheck(torch.ops.rcu_ops.fast_gru.default, (*plain, False), test_utils=tests)
    o, o_n, hidden, gates = torch.ops.rcu_ops.fast_gru(*plain, True)
    for need_x, need_weights in ((True, True), (False, True), (True, False)):
        needs = (o, hidden, gates, need_x, need_weights)
        backward = (torch.randn_like(o), torch.randn_like(o_n), *plain, *needs)
        torch.library.opcheck(torch.ops.rcu_ops.fast_gru_backward.default, backward, test_utils=tests)


def test_autocast(backend) -> None:
    tensors = inputs((1, 3, 8, 1, 4, 4), 2)
    weight = tensors[4].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        o, o_n = rcu_ops.fast_gru(*tensors)
        assert rcu_ops.fast_gru(*(v.double() for v in tensors))[0].dtype == torch.float64
    assert (o.dtype, o_n.dtype) == (torch.bfloat16, torch.float32)
    want, _ = rcu_ops.fast_gru(*(v.bfloat16() for v in tensors[:6]), tensors[6])
    assert torch.equal(o, want)
    o.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, *(None,) * 5, 0), (3, *(None,) * 6), (0, 0, 0, 1, 0, 0, None)], ids=str)
def test_vmap(backend, in_dims) -> None:
    size = 3
    values = [v.double() for v in inputs((2, 3, 4, 1, 2, 2), 2)]
    args = [v if d is None else torch.stack([v * (i + 1) for i in range(size)], d) for v, d in zip(values, in_dims)]  # noqa: B905
    o, o_n = torch.vmap(rcu_ops.fast_gru, in_dims=in_dims)(*args)
    for i in range(size):
        one = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        want, want_n = rcu_ops.fast_gru(*one)
        torch.testing.assert_close(o[i], want)
        torch.testing.assert_close(o_n[i], want_n)


def test_per_sample_gradients(backend) -> None:
    x, *weights, _ = inputs((3, 3, 4, 1, 2, 2), 2)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return rcu_ops.fast_gru(sample.unsqueeze(0), weight, *weights[1:])[0].square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights[0], x)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(weights[0], sample) for sample in x]))
    leaf = weights[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, x[0]), leaf)
    torch.testing.assert_close(got[0], want)


def test_compile_fullgraph(backend) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, *weights: Tensor) -> Tensor:
        o, o_n = rcu_ops.fast_gru(x, *weights)
        return o.square().sum() + rcu_ops.fast_gru_step(x[:, 0], o_n, *weights).relu().sum()

    # The reference unrolls its loop over clips, which takes inductor minutes and shows nothing more.
    compiler = "aot_eager" if backend == "reference" else "inductor"
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    weights = inputs((1, 1, 8, 1, 1, 1), 2)[1:6]
    for shape in ((2, 3, 8, 1, 4, 4), (3, 3, 8, 1, 5, 4)):
        tensors = [torch.randn(shape), *weights]
        leaves, twins = leaves_of(tensors), leaves_of(tensors)
        compiled(*leaves).backward()
        step(*twins).backward()
        for a, b in zip(leaves, twins, strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad)


def test_export_with_dynamic_batch_and_clips() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(inputs((1, 1, 6, 1, 1, 1), 2)[1:6])

        def forward(self, x: Tensor) -> Tensor:
            return rcu_ops.fast_gru(x, *self.weights)[0]

    layer = Layer()
    dims = {0: torch.export.Dim("n", min=1, max=64), 1: torch.export.Dim("k", min=2, max=1024)}
    program = torch.export.export(layer, (torch.randn(2, 4, 6, 1, 3, 3),), dynamic_shapes=(dims,))
    assert torch.ops.rcu_ops.fast_gru.default in {node.target for node in program.graph.nodes}
    for n, k in ((1, 2), (5, 17)):
        x = torch.randn(n, k, 6, 1, 3, 3)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_meta_tensors_and_flop_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    c, hidden = 2048, 512
    weights = [meta(2 * hidden, c), meta(2 * hidden, c), meta(2, c, hidden), meta(c, c), meta(c, c)]
    for length, giga in ((1, 0.719), (2, 1.439), (4, 2.877)):  # the paper's steps at 8, 16 and 32 frames per clip
        state = torch.empty(1, c, length, 7, 7, device="meta")
        with FlopCounterMode(display=False) as step:
            rcu_ops.fast_gru_step(state, state, *weights)
        assert round(step.get_total_flops() / 2e9, 3) == giga
    x = meta(2, 4, c, 1, 7, 7)
    with FlopCounterMode(display=False) as forward:
        o, o_n = rcu_ops.fast_gru(x, *weights)
    assert o.shape == x.shape and o_n.shape == (2, c, 1, 7, 7)
    one = 2 * 2 * 49 * (6 * hidden * c + 2 * c * c)
    assert forward.get_total_flops() == 3 * one  # the first state is x itself
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert backward.get_total_flops() == 2 * 3 * one
    of_x = 3 * 2 * 2 * 49 * (2 * hidden * c + c * c)  # what Ux and Vx multiply
    for given, others, count in ((x.detach(), weights, 6 * one - of_x), (x, [w.detach() for w in weights], 3 * one)):
        o, _ = rcu_ops.fast_gru(given, *others)
        with FlopCounterMode(display=False) as backward:
            o.sum().backward()
        assert backward.get_total_flops() == count
    with FlopCounterMode(display=False) as again:
        rcu_ops.fast_gru(x, *weights, recompute=True)[0].sum().backward()
    assert again.get_total_flops() == 4 * 3 * one


@pytest.mark.parametrize("with_o0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_recomputed_gates_are_the_saved_ones(backend, layout, dtype, with_o0) -> None:
    """In 16 bits, too, where the states of the steps are more exact than the results that are kept."""
    for shape, hidden in (((2, 4, 21, 1, 3, 5), 9), ((1, 3, 140, 1, 2, 2), 33)):
        x, *others = leaves_of(inputs(shape, hidden, dtype, with_o0))
        leaves = [LAYOUTS[layout](x.detach()).requires_grad_(), *others]
        grads = [torch.randn(shape).to(dtype), torch.randn(shape[:1] + shape[2:])]
        saved, recomputed = (
            gradients(rcu_ops.fast_gru(*leaves, recompute=recompute), leaves, grads) for recompute in (False, True)
        )
        assert all(torch.equal(a, b) for a, b in zip(recomputed, saved, strict=True))


def test_recompute_keeps_no_gates(backend) -> None:
    tensors = leaves_of(inputs((2, 4, 8, 1, 3, 3), 2))
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            rcu_ops.fast_gru(*tensors, recompute=recompute)
        kept[recompute] = sum(sizes)
    if backend == "cpu":
        assert kept[False] - kept[True] == 4 * 2 * 9 * (2 * 2 + 3 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("forward", "backward", "size"),
    [("innermost", "contiguous", 8), ("contiguous", "innermost", 8), ("apart", "contiguous", 1)],
)
def test_saved_tensors_may_come_back_in_another_order_of_memory(backend, forward, backward, size, dtype) -> None:
    """As from save_on_cpu(pin_memory=True), which keeps no strides: the gates lie in the order that x had."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
        "innermost": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 6 else x,
        "apart": lambda x: torch.stack([x, x], 3)[:, :, :, 0],
    }
    x, *rest = inputs((1, 3, 200, 1, size, size), 50, dtype)
    tensors = [layouts[forward](x), *rest]
    grad = torch.randn(x.shape).to(dtype)
    want = gradients_of(tensors, grad)
    with torch.autograd.graph.saved_tensors_hooks(layouts[backward], lambda t: t):
        got = gradients_of(tensors, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- errors -------------------------------------------------------------------------------------------------------

GOOD = {
    "x": (2, 3, 4, 1, 5, 5),
    "weight_ux": (6, 4),
    "weight_uo": (6, 4),
    "weight_w": (2, 4, 3),
    "weight_vx": (4, 4),
    "weight_vo": (4, 4),
    "o0": (2, 4, 1, 5, 5),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1, 2]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 3, 4, 1, 5, 5).int()}, TypeError, "x: expected float16"),
        ({"x": torch.zeros(3, 4, 1, 5, 5)}, ValueError, r"x: expected \[N,K,C,L,H,W\], got 5 dimensions"),
        ({"x": torch.zeros(2, 0, 4, 1, 5, 5)}, ValueError, "x: expected at least one clip"),
        ({"x": torch.zeros(2, 3, 0, 1, 5, 5)}, ValueError, "one channel"),
        ({"weight_ux": torch.zeros(5, 4)}, ValueError, r"weight_ux: expected \[2R,C\] with R of at least 1"),
        ({"weight_ux": torch.zeros(0, 4)}, ValueError, r"weight_ux: expected \[2R,C\] with R of at least 1"),
        ({"weight_uo": torch.zeros(4, 4)}, ValueError, r"weight_uo: expected \[2R,C\] = \[6, 4\], got \[4, 4\]"),
        ({"weight_w": torch.zeros(2, 3, 4)}, ValueError, r"weight_w: expected \[2,C,R\] = \[2, 4, 3\]"),
        ({"weight_vx": torch.zeros(4, 5)}, ValueError, r"weight_vx: expected \[C,C\] = \[4, 4\], got \[4, 5\]"),
        ({"weight_vo": torch.zeros(4, 4).half()}, TypeError, "weight_vo: expected torch.float32, got torch.float16"),
        ({"weight_w": torch.zeros(2, 4, 3, device="meta")}, ValueError, "weight_w: expected on cpu like x, got meta"),
        ({"weight_vo": 3}, TypeError, "weight_vo: expected a tensor, got int"),
        ({"o0": torch.zeros(2, 4, 1, 5, 4)}, ValueError, r"o0: expected \[N,C,L,H,W\] = \[2, 4, 1, 5, 5\]"),
        ({"o0": torch.zeros(2, 4, 1, 5, 5).double()}, TypeError, "o0: expected torch.float32, got torch.float64"),
        ({"o0": torch.zeros(2, 4, 1, 5, 5, device="meta")}, ValueError, "o0: expected on cpu"),
    ],
)
def test_wrong_arguments_are_named(backend, change, error, message) -> None:
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(error, match=message):
        rcu_ops.fast_gru(**arguments)


def test_wrong_step_arguments_are_named(backend) -> None:
    weights = [torch.zeros(GOOD[name]) for name in NAMES[1:6]]
    x = torch.zeros(2, 4, 1, 5, 5)
    with pytest.raises(ValueError, match=r"x: expected \[N,C,L,H,W\]"):
        rcu_ops.fast_gru_step(x[0], x, *weights)
    with pytest.raises(ValueError, match=r"o: expected \[N,C,L,H,W\]"):
        rcu_ops.fast_gru_step(x, x[:1], *weights)
    with pytest.raises(TypeError, match="o: expected a tensor, got NoneType"):
        rcu_ops.fast_gru_step(x, None, *weights)


def test_explain() -> None:
    explanation = rcu_ops.explain("fast_gru", *(torch.zeros(GOOD[name]) for name in NAMES))
    assert explanation.backend == BACKENDS[-1]
    assert set(explanation.reasons) == {"cuda", "triton", "cpu", "reference"}
    if "cpu" in BACKENDS and _library.native() is None:
        assert explanation.plan is not None and "rcu_ops._native" in explanation.plan
    elif "cpu" in BACKENDS:
        assert explanation.plan is not None and explanation.plan.startswith("3 steps of 50 columns, each column")
        found = rcu_ops.explain("fast_gru", *(torch.zeros(GOOD[name], dtype=torch.float64) for name in NAMES))
        assert found.plan is not None and found.plan.startswith("3 steps of 50 columns: U_x and V_x")
    x = torch.zeros(2, 4, 1, 5, 5)
    step = rcu_ops.explain("fast_gru_step", x, x, *(torch.zeros(GOOD[name]) for name in NAMES[1:6]))
    assert step.backend == BACKENDS[-1]


@pytest.mark.parametrize("wrong", range(7))
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled CPU kernel is not built")
def test_direct_callers_of_the_operator_are_checked_too(wrong) -> None:
    arguments = [torch.zeros(GOOD[name]) for name in NAMES]
    arguments[wrong] = arguments[wrong][..., :-1].contiguous()
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.rcu_ops.fast_gru(*arguments, False)
