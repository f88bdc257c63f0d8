"""nonlocal_attention and relational_lstm_step: maths, numerics, layouts, gradients, citizenship, on every backend."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rcu_ops
from rcu_ops import _library, reference
from rcu_ops.ops import nonlocal_gates as op
from tests.ops import exact_nonlocal as exact
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] + (["cpu"] if _library.has_kernel("nonlocal_attention", "CPU") else [])
NORMALIZERS = ["softmax", "count"]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "channel_slice": lambda x: torch.cat([torch.full_like(x, torch.nan), x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every_other_row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -2).flatten(-3, -2)[..., ::2, :],
    "every_other_channel": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
}

#: B, N, M, D, Dv
SHAPES = [
    (6, 5, 7, 9, 12),
    (1, 49, 49, 33, 70),
    (40, 1, 9, 1, 1),
    (1, 13, 1, 17, 5),
    (1, 70, 131, 8, 19),
    (2, 16, 3, 64, 2),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[Tensor, ...]:
    """query, key (scores of about ``spread``), value."""
    b, n, m, d, dv = shape
    size = (spread / d**0.5) ** 0.5
    return (
        (torch.randn(b, n, d) * size).to(dtype),
        (torch.randn(b, m, d) * size).to(dtype),
        torch.randn(b, m, dv).to(dtype),
    )


def step_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, wide_cell: bool = True) -> list[Tensor]:
    """x_gates, query, key, value, cell for B, P, D, Dv."""
    b, p, d, dv = shape
    query, key, value = (t.unflatten(0, (b, 4)) for t in inputs((4 * b, p, p, d, dv), dtype, 2.0))
    cell = torch.randn(b, p, dv)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(b, 4, p, dv).to(dtype), query, key, value, cell.to(state if wide_cell else dtype)]


def random_mask(b: int, n: int, m: int) -> Tensor:
    """A third hidden; the first query of every batch sees nothing."""
    mask = torch.rand(b, n, m) > 0.33
    mask[:, 0] = False
    return mask


def eager(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """What a user would write in eager PyTorch: every step in the inputs' dtype."""
    return reference.nonlocal_attention(query, key, value, state_dtype=query.dtype, **options)


def eager_step(*args: Tensor) -> tuple[Tensor, Tensor]:
    return reference.relational_lstm_step(*args, state_dtype=args[0].dtype)


def gradients(function: Callable, arguments, grads) -> tuple[Tensor, ...]:
    leaves = [a.detach().requires_grad_() for a in arguments]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])


def test_the_compiled_backend_is_tested_when_the_library_is_there() -> None:
    if _library.LIBRARY.exists():
        assert _library.load_error() is None, _library.load_error()
        assert "cpu" in BACKENDS


# ---- nonlocal_attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_keeps_the_tolerance_rule(backend, shape, dtype, masked, normalize) -> None:
    query, key, value = inputs(shape, dtype)
    options = {"mask": random_mask(*shape[:3]) if masked else None, "scale": 1.3, "normalize": normalize}
    got = rcu_ops.nonlocal_attention(query, key, value, **options)
    assert got.dtype == dtype and got.is_contiguous()
    assert_close_to_reference(got, exact.attention(query, key, value, **options), eager(query, key, value, **options))
    if masked:
        assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_gradients_keep_the_tolerance_rule(backend, shape, dtype, masked, normalize) -> None:
    arguments = inputs(shape, dtype)
    options = {"mask": random_mask(*shape[:3]) if masked else None, "scale": 1.3, "normalize": normalize}
    grad = torch.randn(shape[0], shape[1], shape[4]).to(dtype)
    got = gradients(functools.partial(rcu_ops.nonlocal_attention, **options), arguments, [grad])
    rough = gradients(functools.partial(eager, **options), arguments, [grad])
    for g, w, e, name in zip(
        got, exact.attention_gradients(grad, *arguments, **options), rough, ("dq", "dk", "dv"), strict=True
    ):
        assert g.dtype == dtype
        assert_close_to_reference(g, w, e, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_any_layout(backend, dtype, layout) -> None:
    shape = (2, 11, 18, 35, 37)
    arguments, grad = inputs(shape, dtype), torch.randn(2, 11, 37).to(dtype)
    want = rcu_ops.nonlocal_attention(*arguments)
    want_gradients = gradients(rcu_ops.nonlocal_attention, arguments, [grad])
    laid_out = [LAYOUTS[layout](a) for a in arguments]
    rough, precise = eager(*arguments), exact.attention(*arguments)
    assert_close_to_reference(rcu_ops.nonlocal_attention(*laid_out), precise, rough)
    got = gradients(rcu_ops.nonlocal_attention, laid_out, [LAYOUTS[layout](grad)])
    rough_gradients = gradients(eager, arguments, [grad])
    for g, w, e in zip(got, exact.attention_gradients(grad, *arguments), rough_gradients, strict=True):
        assert_close_to_reference(g, w, e)
    if backend == "cpu" and layout in ("contiguous", "channel_slice", "every_other_row"):  # same kernel, same order
        assert torch.equal(rcu_ops.nonlocal_attention(*laid_out), want)
        assert all(torch.equal(a, b) for a, b in zip(got, want_gradients, strict=True))


def test_leading_dimensions_and_broadcast_masks(backend) -> None:
    query, key, value = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 7)
    for shape in [(4, 5), (5,), (3, 1, 5), (2, 1, 4, 1), (2, 3, 4, 5)]:
        mask = torch.rand(shape) > 0.4
        got = rcu_ops.nonlocal_attention(query, key, value, mask=mask)
        assert got.shape == (2, 3, 4, 7)
        flat = [t.flatten(0, 1) for t in (query, key, value)]
        whole = mask.expand(2, 3, 4, 5).flatten(0, 1)
        torch.testing.assert_close(got.flatten(0, 1), exact.attention(*flat, mask=whole).float())
    one = rcu_ops.nonlocal_attention(query[0, 0], key[0, 0], value[0, 0])
    torch.testing.assert_close(one, rcu_ops.nonlocal_attention(query, key, value)[0, 0])
    shared = rcu_ops.nonlocal_attention(query, key[:1, :1].expand_as(key), value[:1, :1].expand_as(value))
    assert torch.equal(shared[0, 0], rcu_ops.nonlocal_attention(query[0, 0], key[0, 0], value[0, 0]))


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)], ids=str
)
def test_empty_sizes(backend, shape, normalize) -> None:
    arguments = inputs((*shape[:3], max(shape[3], 1), shape[4]))
    arguments = (arguments[0][..., : shape[3]], arguments[1][..., : shape[3]], arguments[2])
    leaves = [a.detach().requires_grad_() for a in arguments]
    got = rcu_ops.nonlocal_attention(*leaves, normalize=normalize)
    torch.testing.assert_close(got, exact.attention(*arguments, normalize=normalize).float())
    for g, w in zip(
        torch.autograd.grad(got.sum(), leaves),
        exact.attention_gradients(torch.ones_like(got), *arguments, normalize=normalize),
        strict=True,
    ):
        torch.testing.assert_close(g, w.float())


def test_the_librarys_attention_where_it_is_faster(backend) -> None:
    """Taken for the forward pass; dead queries, poison and derivatives of any order are as everywhere."""
    query, key, value = inputs((2, 130, 770, 16, 16))
    said = str(rcu_ops.explain("nonlocal_attention", query, key, value))
    if backend == "cpu" and _library.native() is not None:
        assert "forward: PyTorch's scaled_dot_product_attention" in said
        assert "not PyTorch's attention: " in str(rcu_ops.explain("nonlocal_attention", query[:, :4], key, value))
    grad = torch.randn(2, 130, 16)
    got = gradients(rcu_ops.nonlocal_attention, (query, key, value), [grad])
    rough = gradients(eager, (query, key, value), [grad])
    for g, w, e in zip(got, exact.attention_gradients(grad, query, key, value), rough, strict=True):
        assert_close_to_reference(g, w, e)
    key[..., 0] = key[..., 0].abs() + 0.5
    query[0, 2, 0] = -torch.inf  # all its scores are -inf
    out = rcu_ops.nonlocal_attention(query, key, value, scale=0.7)
    assert torch.equal(out[0, 2], torch.zeros(16)) and out.isfinite().all() and out.is_contiguous()
    alive = [n for n in range(130) if n != 2]
    want, rough = (f(query[:, alive], key, value, scale=0.7) for f in (exact.attention, eager))
    assert_close_to_reference(out[:, alive], want, rough)
    leaves = [t[:1].detach().nan_to_num(neginf=0.0).requires_grad_() for t in (query, key, value)]
    (dq,) = torch.autograd.grad(rcu_ops.nonlocal_attention(*leaves).square().sum(), leaves[:1], create_graph=True)
    second = torch.autograd.grad(dq.square().sum(), leaves)
    assert all(s.isfinite().all() and s.any() for s in second)
    with torch.autocast("cpu", torch.bfloat16):  # of a direct caller: the kernels' dtype is the inputs'
        direct = torch.ops.rcu_ops.nonlocal_attention(*(t.detach() for t in leaves), None, 1.0, False)
    assert direct.dtype == torch.float32


@pytest.mark.skipif(not _library.LIBRARY.exists(), reason="the kernel library was not built")
def test_no_other_kernel_of_the_library_stands_in_for_the_one_that_is_faster() -> None:
    query, key, value = inputs((2, 130, 770, 16, 16))

    def called() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            rcu_ops.nonlocal_attention(query, key, value)
        return {event.name for event in profile.events() if "scaled_dot_product" in event.name}

    with rcu_ops.use_backend("cpu"):
        assert any("flash" in name for name in called())
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
            assert called() == set()
            said = str(rcu_ops.explain("nonlocal_attention", query, key, value))
    assert _library.native() is None or "not PyTorch's attention: its flash attention is switched off" in said


def test_agrees_with_the_librarys_attention(backend) -> None:
    query, key, value = inputs((6, 20, 30, 16, 24))
    mask = torch.rand(6, 20, 30) > 0.3
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(rcu_ops.nonlocal_attention(query, key, value, mask=mask, scale=0.5), want)


def test_zero_scale_is_mean_pooling(backend) -> None:
    query, key, value = inputs((2, 5, 7, 4, 6))
    mean = value.mean(1, keepdim=True).expand(2, 5, 6)
    torch.testing.assert_close(rcu_ops.nonlocal_attention(query, key, value, scale=0.0), mean)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_permutation_equivariance(backend, normalize) -> None:
    query, key, value = (t.double() for t in inputs((1, 9, 12, 5, 6)))
    rows, keys = torch.randperm(9), torch.randperm(12)
    plain = rcu_ops.nonlocal_attention(query, key, value, normalize=normalize)
    mixed = rcu_ops.nonlocal_attention(query[:, rows], key[:, keys], value[:, keys], normalize=normalize)
    torch.testing.assert_close(mixed, plain[:, rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_ten_thousand_do_not_overflow(backend, dtype) -> None:
    query = torch.full((1, 3, 16), 25.0).to(dtype)
    key = torch.full((1, 4, 16), 25.0).to(dtype)  # scores of exactly 10,000
    key[:, 1:3] = torch.tensor([-25.0, 24.0]).to(dtype).view(1, 2, 1)
    value = torch.randn(1, 4, 8).to(dtype)
    got = rcu_ops.nonlocal_attention(query, key, value)
    want = (value[:, :1].double() + value[:, 3:].double()) / 2
    assert_close_to_reference(got, want.expand(1, 3, 8), want.expand(1, 3, 8).to(dtype))
    grads = gradients(rcu_ops.nonlocal_attention, (query, key, value), [torch.randn(1, 3, 8).to(dtype)])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cause", ["mask", "infinite query"])
def test_a_query_that_sees_nothing_gives_zeros_and_poisons_nobody(backend, dtype, cause) -> None:
    query, key, value = inputs((2, 6, 5, 9, 7), dtype)
    key[..., 0] = key[..., 0].abs() + 0.5
    mask = None
    grad = torch.randn(2, 6, 7).to(dtype)
    clean = [t.clone() for t in (query, key, value)]
    if cause == "mask":
        mask = torch.ones(2, 6, 5, dtype=torch.bool)
        mask[:, 2] = False
        query[:, 2] = torch.inf
        grad[:, 2] = torch.nan
    else:
        query[:, 2, 0] = -torch.inf
    got = rcu_ops.nonlocal_attention(query, key, value, mask=mask)
    assert torch.equal(got[:, 2], torch.zeros_like(got[:, 2]))
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(got[:, keep], rcu_ops.nonlocal_attention(*clean)[:, keep])
    dq, dk, dv = gradients(functools.partial(rcu_ops.nonlocal_attention, mask=mask), (query, key, value), [grad])
    clean[0], quiet = clean[0][:, keep], grad[:, keep]
    assert torch.equal(dq[:, 2], torch.zeros_like(dq[:, 2]))
    for g, w, e in zip(
        (dq[:, keep], dk, dv),
        exact.attention_gradients(quiet, *clean),
        gradients(eager, clean, [quiet]),
        strict=True,
    ):
        assert_close_to_reference(g, w, e)


def test_a_query_without_keys_poisons_nobody_where_scores_are_counted(backend) -> None:
    query, key, value = inputs((2, 6, 5, 9, 7))
    mask, grad = random_mask(2, 6, 5), torch.randn(2, 6, 7)
    attend = functools.partial(rcu_ops.nonlocal_attention, mask=mask, normalize="count")
    wanted, clean = attend(query, key, value), gradients(attend, (query, key, value), [grad])
    query[:, 0] = torch.inf
    assert torch.equal(attend(query, key, value), wanted)
    for got, want in zip(gradients(attend, (query, key, value), [grad]), clean, strict=True):
        assert torch.equal(got, want)


def test_nan_reaches_its_own_row_only(backend) -> None:
    query, key, value = inputs((1, 6, 5, 8, 7))
    query[0, 3, 2] = torch.nan
    for normalize in NORMALIZERS:
        got = rcu_ops.nonlocal_attention(query, key, value, normalize=normalize)
        assert got[0, 3].isnan().all()
        assert got[0, [0, 1, 2, 4, 5]].isfinite().all()
    query = query.nan_to_num()
    value[0, 1, 4] = torch.nan
    got = rcu_ops.nonlocal_attention(query, key, value)
    assert got[..., 4].isnan().all() and got[..., :4].isfinite().all() and got[..., 5:].isfinite().all()
    query[0, 0] = key[0, 0] = torch.inf  # a score of +inf is no weight at all, as in torch.softmax
    assert rcu_ops.nonlocal_attention(query, key, value)[0, 0].isnan().all()


# ---- relational_lstm_step -----------------------------------------------------------------------------------------

STEP_SHAPES = [(8, 5, 9, 20), (1, 49, 40, 70), (60, 1, 1, 1), (4, 33, 16, 11), (2, 14, 65, 129)]


@pytest.mark.parametrize("wide_cell", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
def test_step_keeps_the_tolerance_rule(backend, shape, dtype, wide_cell) -> None:
    arguments = step_inputs(shape, dtype, wide_cell=wide_cell)
    h, c = rcu_ops.relational_lstm_step(*arguments)
    assert h.dtype == dtype and c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, want, rough, name in zip((h, c), exact.step(*arguments), eager_step(*arguments), "hc", strict=True):
        assert_close_to_reference(got, want, rough, name)


@pytest.mark.parametrize("outputs", ["h", "c", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
def test_step_gradients_keep_the_tolerance_rule(backend, shape, dtype, outputs) -> None:
    arguments = step_inputs(shape, dtype)
    b, p, _, dv = shape
    grads = [torch.randn(b, p, dv).to(dtype) if outputs in (name, "both") else None for name in "hc"]
    got = gradients(rcu_ops.relational_lstm_step, arguments, grads)
    rough = gradients(eager_step, arguments, grads)
    names = ("dx_gates", "dquery", "dkey", "dvalue", "dcell")
    for g, w, e, a, name in zip(got, exact.step_gradients(*grads, *arguments), rough, arguments, names, strict=True):
        assert g.dtype == a.dtype
        assert_close_to_reference(g, w, e, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_reads_any_layout(backend, layout) -> None:
    # A sample has few numbers, whose one largest error is luck: six samples' are averaged.
    arguments = step_inputs((6, 10, 19, 21))
    laid_out = [LAYOUTS[layout](a) for a in arguments]
    for got, want, rough in zip(
        rcu_ops.relational_lstm_step(*laid_out), exact.step(*arguments), eager_step(*arguments), strict=True
    ):
        assert_close_to_reference(got, want, rough, by_sample=True)
    grads = [torch.randn(6, 10, 21), torch.randn(6, 10, 21)]
    got = gradients(rcu_ops.relational_lstm_step, laid_out, [LAYOUTS[layout](g) for g in grads])
    for g, w, e in zip(
        got, exact.step_gradients(*grads, *arguments), gradients(eager_step, arguments, grads), strict=True
    ):
        assert_close_to_reference(g, w, e, by_sample=True)


def test_step_at_one_position_is_an_lstm_cell(backend) -> None:
    """With P = 1 the attention weight is 1, so the gates are W_x x + W_h h: nn.LSTMCell with its gates reordered."""
    cell = torch.nn.LSTMCell(6, 8)
    x, h, c = torch.randn(3, 6), torch.randn(3, 8), torch.randn(3, 8)
    order = [0, 1, 3, 2]  # LSTMCell has i, f, g, o
    x_gates = torch.nn.functional.linear(x, cell.weight_ih, cell.bias_ih + cell.bias_hh).view(3, 4, 1, 8)[:, order]
    value = torch.nn.functional.linear(h, cell.weight_hh).view(3, 4, 1, 8)[:, order]
    query = torch.randn(3, 4, 1, 5)
    got = rcu_ops.relational_lstm_step(x_gates, query, query, value, c.unsqueeze(1))
    for a, b in zip(got, cell(x, (h, c)), strict=True):
        torch.testing.assert_close(a.squeeze(1), b)


def test_step_is_made_of_attention(backend) -> None:
    x_gates, query, key, value, cell = step_inputs((2, 12, 20, 24))
    a = x_gates + rcu_ops.nonlocal_attention(query, key, value)
    i, f, o, g = *a[:, :3].sigmoid().unbind(1), a[:, 3].tanh()
    want = f * cell + i * g
    h, c = rcu_ops.relational_lstm_step(x_gates, query, key, value, cell)
    torch.testing.assert_close(c, want)
    torch.testing.assert_close(h, o * want.tanh())


def test_step_saturated_gates_are_finite(backend) -> None:
    x_gates, query, key, value, cell = step_inputs((1, 7, 8, 40))
    x_gates = torch.linspace(-300, 300, x_gates.numel()).view_as(x_gates)
    grads = [torch.randn(1, 7, 40), torch.randn(1, 7, 40)]
    arguments = (x_gates, query, key, value, cell)
    for got, want, rough in zip(
        rcu_ops.relational_lstm_step(*arguments), exact.step(*arguments), eager_step(*arguments), strict=True
    ):
        assert_close_to_reference(got, want, rough)
    assert all(g.isfinite().all() for g in gradients(rcu_ops.relational_lstm_step, arguments, grads))


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0)], ids=str)
def test_step_empty_sizes(backend, shape) -> None:
    arguments = [a.requires_grad_() for a in step_inputs(shape)]
    h, c = rcu_ops.relational_lstm_step(*arguments)
    assert h.shape == c.shape == (shape[0], shape[1], shape[3])
    for a, g in zip(arguments, torch.autograd.grad(h.sum() + c.sum(), arguments), strict=True):
        assert torch.equal(g, torch.zeros_like(a))


# ---- gradients of gradients, determinism, PyTorch -----------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradcheck_and_gradgradcheck(backend, normalize, masked) -> None:
    arguments = [a.double().requires_grad_() for a in inputs((2, 3, 4, 2, 3))]
    call = functools.partial(
        rcu_ops.nonlocal_attention,
        mask=random_mask(2, 3, 4) if masked else None,
        scale=0.8,
        normalize=normalize,
    )
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_step_gradcheck_and_gradgradcheck(backend) -> None:
    arguments = [a.requires_grad_() for a in step_inputs((2, 3, 2, 2), torch.double)]
    assert torch.autograd.gradcheck(rcu_ops.relational_lstm_step, arguments)
    assert torch.autograd.gradgradcheck(rcu_ops.relational_lstm_step, arguments)
    only_c = lambda *a: rcu_ops.relational_lstm_step(*a)[1]  # noqa: E731
    assert torch.autograd.gradgradcheck(only_c, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable_and_independent_of_threads(backend, dtype) -> None:
    attention, step = inputs((3, 37, 29, 40, 50), dtype), step_inputs((3, 21, 33, 47), dtype)
    grad, grad_h = torch.randn(3, 37, 50).to(dtype), torch.randn(3, 21, 47).to(dtype)

    def run() -> list[Tensor]:
        return [
            rcu_ops.nonlocal_attention(*attention),
            *rcu_ops.relational_lstm_step(*step),
            *gradients(rcu_ops.nonlocal_attention, attention, [grad]),
            *gradients(rcu_ops.relational_lstm_step, step, [grad_h, grad_h]),
        ]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            if backend == "cpu":
                assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    query, key, value = inputs((2, 3, 4, 5, 6))
    mask, grad = random_mask(2, 3, 4), torch.randn(2, 3, 6)
    step = step_inputs((2, 3, 4, 5))
    grad_h = torch.randn(2, 3, 5)
    ops = torch.ops.rcu_ops
    leaves = [t.requires_grad_() for t in (query, key, value)]
    for m, count in itertools.product((None, mask), (False, True)):
        torch.library.opcheck(ops.nonlocal_attention.default, (*leaves, m, 0.5, count))
        torch.library.opcheck(ops.nonlocal_attention_backward.default, (grad.requires_grad_(), *leaves, m, 0.5, count))
    torch.library.opcheck(ops.relational_lstm_step.default, tuple(t.requires_grad_() for t in step))
    for grads in ((grad_h, None), (grad_h, grad_h), (None, grad_h)):
        torch.library.opcheck(
            ops.relational_lstm_step_backward.default,
            (*grads, *step),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_opcheck_of_the_step_that_keeps() -> None:
    step, grad = step_inputs((2, 3, 4, 5)), torch.randn(2, 3, 5)
    ops = torch.ops.rcu_ops
    for gates in (0, 3):
        torch.library.opcheck(ops.relational_lstm_step_kept.default, (*(t.requires_grad_() for t in step), gates))
        kept = ops.relational_lstm_step_kept(*step, gates)[2:]
        torch.library.opcheck(
            ops.relational_lstm_step_kept_backward.default,
            (grad, None, *step, *kept),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.fixture(params=[0, 2, 4])
def kept_gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many gates the CPU's kernels keep, whatever there is to gain."""
    if not _library.has_kernel("relational_lstm_step_kept", "CPU"):
        pytest.skip("the kernel library was not built")
    monkeypatch.setattr(op, "_what_a_step_keeps", lambda x_gates: (request.param, 1, 2))
    return request.param


def test_a_step_that_keeps_is_differentiable_to_any_order(kept_gates) -> None:
    arguments = [a.requires_grad_() for a in step_inputs((1, 2, 3, 2), torch.float64)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        rcu_ops.relational_lstm_step(*arguments)
    assert saved[5:] == [(1, 4, 2, 8), (1, kept_gates, 2, 2)]
    assert torch.autograd.gradcheck(rcu_ops.relational_lstm_step, arguments)
    assert torch.autograd.gradgradcheck(rcu_ops.relational_lstm_step, arguments)
    only_c = lambda *a: rcu_ops.relational_lstm_step(*a)[1]  # noqa: E731
    assert torch.autograd.gradgradcheck(only_c, arguments)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_compiled_with_every_size_and_number_dynamic(scale: float) -> None:
    torch._dynamo.reset()

    def attend(query: Tensor, scale: float) -> Tensor:
        return rcu_ops.nonlocal_attention(query, query, query, scale=scale)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 7):
        query = torch.randn(2, size, 8)
        torch.testing.assert_close(compiled(query, scale), attend(query, scale))


def test_a_step_that_keeps_under_transforms_and_in_full_graph(kept_gates) -> None:
    step = step_inputs((3, 4, 5, 6))

    def loss(x_gates: Tensor, *rest: Tensor) -> Tensor:
        return sum(
            r.square().sum()
            for r in rcu_ops.relational_lstm_step(x_gates.unsqueeze(0), *(t.unsqueeze(0) for t in rest))
        )

    want = torch.stack([torch.func.grad(loss)(*(t[i] for t in step)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(*step), want)
    whole = lambda *a: sum(r.square().sum() for r in rcu_ops.relational_lstm_step(*a))  # noqa: E731
    leaves = [t.detach().requires_grad_() for t in step]
    plain = torch.autograd.grad(whole(*leaves), leaves)
    torch.testing.assert_close(plain[0], want)
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True))


@pytest.mark.skipif(not _library.LIBRARY.exists(), reason="the kernel library was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_what_leaves_half_of_eagers_memory(dtype) -> None:
    threads = torch.get_num_threads()
    kept = {}
    try:
        for b, p, d, torch_threads in itertools.product((1, 4, 24), (49, 196, 400), (64, 512, 1024), (1, 2, 64)):
            torch.set_num_threads(torch_threads)
            x_gates = torch.empty(b, 4, p, d, dtype=dtype, device="meta")
            gates, taken, half = op._what_a_step_keeps(x_gates)
            numbers = 0 if gates is None else 4 * p * op._kept_keys(x_gates) + gates * p * d
            assert taken == 4 * b * numbers
            within = taken + torch_threads * op._scratch_of_a_step(p, 4, dtype != torch.float32) <= half
            assert not taken or within or (gates == 0 and taken <= half and b <= torch_threads and p <= 256)
            assert half == x_gates.element_size() * b * (10 * p * d + 4 * p * p) // 2
            kept[b, p, d, torch_threads] = gates
    finally:
        torch.set_num_threads(threads)
    wide = dtype == torch.float32
    assert kept[24, 49, 1024, 2] == 0 and kept[4, 196, 512, 2] == (3 if wide else 0)
    assert kept[1, 196, 512, 2] == (2 if wide else 0) and kept[24, 196, 512, 64] == (2 if wide else 0)
    assert kept[1, 196, 64, 2] is None and kept[1, 400, 512, 2] == (2 if wide else None)
    x_gates = torch.empty(4, 4, 196, 512, requires_grad=True)
    plan = rcu_ops.explain("relational_lstm_step", x_gates, x_gates, x_gates, x_gates, x_gates[:, 0]).plan
    assert plan is not None and "weights" in plan and "half of eager's memory" in plan
    with torch.no_grad():
        plan = rcu_ops.explain("relational_lstm_step", x_gates, x_gates, x_gates, x_gates, x_gates[:, 0]).plan
    assert plan is not None and "kept" not in plan


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 2, None)], ids=str)
def test_vmap(backend, in_dims) -> None:
    sizes = ((2, 3, 5), (2, 4, 5), (2, 4, 6))
    args = [
        torch.randn(s) if d is None else torch.randn(*s[:d], 3, *s[d:]) for s, d in zip(sizes, in_dims, strict=True)
    ]
    mask = random_mask(2, 3, 4)
    call = functools.partial(rcu_ops.nonlocal_attention, mask=mask)
    got = torch.vmap(call, in_dims=in_dims)(*args)
    for i in range(3):
        torch.testing.assert_close(
            got[i], call(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        )


def test_vmap_of_the_step_and_per_sample_gradients(backend) -> None:
    step = step_inputs((3, 4, 5, 6))
    h, c = torch.vmap(lambda *a: rcu_ops.relational_lstm_step(*(t.unsqueeze(0) for t in a)))(*step)
    want_h, want_c = rcu_ops.relational_lstm_step(*step)
    torch.testing.assert_close((h.squeeze(1), c.squeeze(1)), (want_h, want_c))

    def loss(x_gates: Tensor, *rest: Tensor) -> Tensor:
        return sum(
            r.square().sum()
            for r in rcu_ops.relational_lstm_step(x_gates.unsqueeze(0), *(t.unsqueeze(0) for t in rest))
        )

    got = torch.vmap(torch.func.grad(loss))(*step)
    want = torch.stack([torch.func.grad(loss)(*(t[i] for t in step)) for i in range(3)])
    torch.testing.assert_close(got, want)


def test_hessian_by_torch_func_equals_autograds(backend) -> None:
    query, key, value = (t[0].double() for t in inputs((1, 3, 4, 2, 3)))

    def loss(query: Tensor) -> Tensor:
        return rcu_ops.nonlocal_attention(query, key, value).square().sum()

    got = torch.func.jacrev(torch.func.grad(loss))(query)
    torch.testing.assert_close(got, torch.autograd.functional.hessian(loss, query))


def test_forward_mode_is_right_or_refused(backend) -> None:
    query, key, value = (t.double() for t in inputs((1, 3, 4, 2, 3)))

    def call(query: Tensor) -> Tensor:
        return rcu_ops.nonlocal_attention(query, key, value)

    if backend == "reference":
        _, got = torch.func.jvp(call, (query,), (query,))
        torch.testing.assert_close(got, torch.autograd.functional.jvp(call, query, query)[1])
    else:
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(call, (query,), (query,))


def test_compile_fullgraph(backend) -> None:
    torch._dynamo.reset()

    def loss(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        out = rcu_ops.nonlocal_attention(query, key, value, mask=mask, scale=0.7)
        h, c = rcu_ops.relational_lstm_step(
            *(t.unsqueeze(1).expand(-1, 4, -1, -1) for t in (out, query, query, out)), out
        )
        return h.square().sum() + c.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for b, n, m in ((2, 5, 6), (3, 9, 4)):
        arguments = inputs((b, n, m, 7, 8))
        mask = random_mask(b, n, m)
        leaves, twins = ([a.clone().requires_grad_() for a in arguments] for _ in range(2))
        compiled(*leaves, mask).backward()
        loss(*twins, mask).backward()
        for a, b_ in zip(leaves, twins, strict=True):
            torch.testing.assert_close(a.grad, b_.grad)


@pytest.mark.slow
def test_gradients_of_one_clip_compiled() -> None:
    """Of an earlier form of the gates, equal in every number, Inductor made wrong gradients for a batch of one."""
    torch._dynamo.reset()
    arguments = [torch.randn(1, 4, 5, 8) for _ in range(4)] + [torch.randn(1, 5, 8)]
    leaves, twins = ([a.clone().requires_grad_() for a in arguments] for _ in range(2))
    compiled = torch.compile(reference.relational_lstm_step, fullgraph=True, dynamic=False)
    torch.autograd.backward([t.sum() for t in compiled(*leaves)])
    torch.autograd.backward([t.sum() for t in reference.relational_lstm_step(*twins)])
    for a, b in zip(leaves, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_export_with_dynamic_sizes() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
            x = rcu_ops.nonlocal_attention(x, x, x)
            gates = x.unsqueeze(1).expand(-1, 4, -1, -1)
            return rcu_ops.relational_lstm_step(gates, gates, gates, gates, cell)

    dims = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("p", min=2, max=1024)}
    program = torch.export.export(Layer(), (torch.randn(2, 5, 6), torch.randn(2, 5, 6)), dynamic_shapes=(dims, dims))
    for b, p in ((1, 3), (4, 21)):
        x, cell = torch.randn(b, p, 6), torch.randn(b, p, 6)
        torch.testing.assert_close(program.module()(x, cell), Layer()(x, cell))


def test_meta_tensors_and_flop_count() -> None:
    b, n, m, d, dv = 2, 5, 7, 16, 24
    leaves = [torch.empty(s, device="meta", requires_grad=True) for s in ((b, n, d), (b, m, d), (b, m, dv))]
    with FlopCounterMode(display=False) as forward:
        out = rcu_ops.nonlocal_attention(*leaves)
    assert out.shape == (b, n, dv)
    assert forward.get_total_flops() == 2 * b * n * m * (d + dv)
    sizes = ((b, 4, n, dv), (b, 4, n, d), (b, 4, n, d), (b, 4, n, dv), (b, n, dv))
    step = [torch.empty(s, device="meta") for s in sizes]
    with FlopCounterMode(display=False) as counted:
        h, c = rcu_ops.relational_lstm_step(*step)
    assert h.shape == c.shape == (b, n, dv)
    assert counted.get_total_flops() == 8 * b * n * n * (d + dv)
    with FlopCounterMode(display=False) as counted:
        torch.ops.rcu_ops.nonlocal_attention_backward(out, *leaves, None, 1.0, False)
        torch.ops.rcu_ops.relational_lstm_step_backward(h, None, *step)
    assert counted.get_total_flops() == 2 * b * n * m * (3 * d + 2 * dv) + 8 * b * n * n * 3 * (d + dv)


def test_autocast(backend) -> None:
    arguments, step = inputs((2, 5, 6, 7, 8)), step_inputs((2, 5, 6, 7))
    with torch.autocast("cpu", torch.bfloat16):
        out = rcu_ops.nonlocal_attention(*arguments)
        h, c = rcu_ops.relational_lstm_step(*step)
    assert (out.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(out, rcu_ops.nonlocal_attention(*(a.bfloat16() for a in arguments)))
    want_h, want_c = rcu_ops.relational_lstm_step(*(a.bfloat16() for a in step[:4]), step[4])
    assert torch.equal(h, want_h) and torch.equal(c, want_c)


@pytest.mark.parametrize("name", ["nonlocal_attention", "relational_lstm_step"])
def test_explain_names_every_backend(name) -> None:
    arguments = inputs((2, 5, 6, 7, 8)) if name == "nonlocal_attention" else step_inputs((2, 5, 6, 7))
    explanation = rcu_ops.explain(name, *arguments)
    assert explanation.backend in ("cpu", "reference")
    assert all(explanation.reasons[b] for b in ("cuda", "triton"))


# ---- errors -------------------------------------------------------------------------------------------------------

ATTENTION = {"query": (2, 3, 4), "key": (2, 5, 4), "value": (2, 5, 6)}
STEP = {"x_gates": (2, 4, 3, 6), "query": (2, 4, 3, 5), "key": (2, 4, 3, 5), "value": (2, 4, 3, 6), "cell": (2, 3, 6)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": 3}, TypeError, "query: expected a tensor, got int"),
        ({"query": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "query: expected float16"),
        ({"query": torch.zeros(4)}, ValueError, r"query: expected \[...,N,D\], got 1 dimensions"),
        ({"key": torch.zeros(2, 5, 3)}, ValueError, r"key: expected \[...,M,D\] = \[2, 5, 4\], got \[2, 5, 3\]"),
        ({"key": torch.zeros(5, 4)}, ValueError, "key: expected 3 dimensions like query"),
        ({"key": torch.zeros(2, 5, 4).half()}, TypeError, "key: expected torch.float32, got torch.float16"),
        ({"value": torch.zeros(2, 4, 6)}, ValueError, r"value: expected \[...,M,Dv\] = \[2, 5, 6\]"),
        ({"value": torch.zeros(2, 5, 6).double()}, TypeError, "value: expected torch.float32, got torch.float64"),
        ({"value": torch.zeros(2, 5, 6, device="meta")}, ValueError, "value: expected on cpu like query, got meta"),
        ({"mask": torch.zeros(2, 3, 5)}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": [True]}, TypeError, "mask: expected a tensor, got list"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"mask: expected broadcastable .*\[2, 3, 5\]"),
        ({"mask": torch.ones(1, 2, 3, 5, dtype=torch.bool)}, ValueError, "mask: expected broadcastable"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale: expected a number, got Tensor"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"normalize": "mean"}, ValueError, "normalize: expected 'softmax' or 'count', got 'mean'"),
    ],
)
def test_wrong_attention_arguments_are_named(backend, change, error, message) -> None:
    arguments = {name: torch.zeros(shape) for name, shape in ATTENTION.items()} | change
    with pytest.raises(error, match=message):
        rcu_ops.nonlocal_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_gates": None}, TypeError, "x_gates: expected a tensor, got NoneType"),
        ({"x_gates": torch.zeros(2, 3, 3, 6)}, ValueError, "x_gates: expected the 4 gates"),
        ({"x_gates": torch.zeros(4, 3, 6)}, ValueError, r"x_gates: expected \[B,4,P,Dv\], got 3 dimensions"),
        ({"query": torch.zeros(2, 4, 2, 5)}, ValueError, r"query: expected \[B,4,P,D\] = \[2, 4, 3, 5\]"),
        ({"key": torch.zeros(2, 4, 3, 4)}, ValueError, r"key: expected \[B,4,P,D\] = \[2, 4, 3, 5\]"),
        ({"value": torch.zeros(2, 4, 3, 5)}, ValueError, r"value: expected \[B,4,P,Dv\] = \[2, 4, 3, 6\]"),
        ({"value": torch.zeros(2, 4, 3, 6).bfloat16()}, TypeError, "value: expected torch.float32, got torch.bfloat16"),
        ({"cell": torch.zeros(2, 3, 5)}, ValueError, r"cell: expected \[B,P,Dv\] = \[2, 3, 6\]"),
        ({"cell": torch.zeros(2, 3, 6).double()}, TypeError, "cell: expected torch.float32, got torch.float64"),
        ({"cell": torch.zeros(2, 3, 6, device="meta")}, ValueError, "cell: expected on cpu like x_gates"),
    ],
)
def test_wrong_step_arguments_are_named(backend, change, error, message) -> None:
    arguments = {name: torch.zeros(shape) for name, shape in STEP.items()} | change
    with pytest.raises(error, match=message):
        rcu_ops.relational_lstm_step(**arguments)
