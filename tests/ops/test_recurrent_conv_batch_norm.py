"""recurrent_conv_batch_norm: the numbers of recurrent_conv + nn.BatchNorm3d + addition + ReLU, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rcu_ops
from rcu_ops import _library, reference
from rcu_ops.ops.recurrent_conv_batch_norm import PARTS
from rcu_ops.reference.recurrent_conv_batch_norm import channel_moments, combine_moments
from tests.ops.test_recurrent_conv import LAYOUTS, inputs
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference"] + (["cpu"] if all(_library.has_kernel(name, "CPU") for name in PARTS) else [])
NAMES = ("x", "weight", "gamma", "beta", "h0", "residual")
Given = dict[str, Tensor | None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", offset: float = 0.0) -> Given:
    """Arguments by name, in the order of the public function's; ``offset`` is added to x."""
    x, weight, h0 = inputs(shape, dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta = torch.rand(shape[1]).to(state) + 0.5, torch.randn(shape[1]).to(state)
    residual = LAYOUTS[layout](torch.randn(shape).to(dtype))
    return dict(zip(NAMES, (LAYOUTS[layout](x + offset), weight, gamma, beta, h0, residual), strict=True))


def unfused(given: Given, update: str = "sum", activation: str = "relu", dtype: torch.dtype | None = None) -> Tensor:
    """y by separate layers, every step in ``dtype`` (the yardstick in x's, the exact result in fp64)."""
    x, weight, gamma, beta, h0, residual = (None if v is None else v.to(dtype or v.dtype) for v in given.values())
    assert x is not None and weight is not None
    h, _ = reference.recurrent_conv(x, weight, h0, update=update, state_dtype=x.dtype)
    y = F.batch_norm(h, None, None, gamma, beta, training=True, eps=1e-5)
    y = y if residual is None else y + residual
    return F.relu(y) if activation == "relu" else y


def gradients(call: Callable[[Given], Tensor], given: Given, grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: None if v is None else v.detach().requires_grad_() for name, v in given.items()}
    present = {name: v for name, v in leaves.items() if v is not None}
    found = torch.autograd.grad(call(leaves), list(present.values()), grad)
    return dict(zip(present, found, strict=True))


def fused(given: Given, **options) -> Tensor:
    return rcu_ops.recurrent_conv_batch_norm(**given, **options)[0]


def test_the_compiled_backend_is_tested_when_the_library_has_it() -> None:
    present = [name for name in PARTS if _library.has_kernel(name, "CPU")]
    assert present in ([], list(PARTS)), "some of the operator's parts have kernels, others do not"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "frame_major", "every_other_column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", "relu", "residual", "all"])
def test_forward_and_gradients_keep_the_tolerance_rule(backend, form, dtype, layout) -> None:
    given = problem((3, 20, 4, 5, 7), dtype, layout)
    if form in ("plain", "relu"):
        given["residual"] = None
    if form == "plain":
        given["h0"] = given["gamma"] = given["beta"] = None
    options = {
        "update": "mean" if form == "all" else "sum",
        "activation": "relu" if form in ("relu", "all") else "identity",
    }
    y, h_n, moments = rcu_ops.recurrent_conv_batch_norm(**given, **options)
    exact, eager = unfused(given, **options, dtype=torch.float64), unfused(given, **options, dtype=dtype)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(given["x"]).stride() or backend == "reference"
    assert_close_to_reference(y, exact, eager, "y")
    assert h_n.dtype == moments.dtype == torch.float32
    grad = LAYOUTS[layout](torch.randn(exact.shape).to(dtype))
    # Where y is near zero ReLU's mask is a matter of rounding: one mask for all three.
    if options["activation"] == "relu":
        grad = grad * ((exact > 0.05) | (exact == 0) & (unfused(given, options["update"], "identity") < -0.05))
    got = gradients(functools.partial(fused, **options), given, grad)
    want = gradients(functools.partial(unfused, **options), _to(given, torch.float64), grad.double())
    rough = gradients(functools.partial(unfused, **options), _to(given, dtype), grad)
    for name, value in got.items():
        assert value.dtype == given[name].dtype
        assert_close_to_reference(value, want[name], rough[name], f"gradient of {name}")


def _to(given: Given, dtype: torch.dtype) -> Given:
    return {name: None if v is None else v.to(dtype) for name, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variance_and_gradients_under_a_large_mean(backend, dtype) -> None:
    """Sums of squares would leave nothing of the variance here."""
    given = problem((2, 12, 3, 8, 8), torch.float32, offset=3000.0 if dtype == torch.float32 else 30.0)
    given = {name: v if name in ("gamma", "beta") else v.to(dtype) for name, v in given.items()}
    given["weight"], given["h0"] = torch.zeros_like(given["weight"]), None
    y, _, moments = rcu_ops.recurrent_conv_batch_norm(**given)
    assert_close_to_reference(y, unfused(given, dtype=torch.float64), unfused(given, dtype=dtype), "y")
    want = channel_moments(given["x"].double())
    rough = channel_moments(given["x"].float(), torch.float32)
    assert_close_to_reference(moments[:2], want[:2], rough[:2], "moments")
    assert torch.equal(moments[2], torch.full((12,), 2 * 3 * 8 * 8.0))


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("optional", [False, True])
def test_gradcheck_and_gradgradcheck(backend, activation, optional) -> None:
    given = problem((2, 2, 3, 2, 1), torch.float64, "channels_last_3d")
    names = NAMES if optional else ("x", "weight")
    leaves = [given[name].requires_grad_() for name in names]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, values, strict=True))
        return rcu_ops.recurrent_conv_batch_norm(**named, update="mean", activation=activation)[:2]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_moments_of_parts_combine_exactly() -> None:
    h = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64) + 1e6
    parts = torch.stack([channel_moments(part) for part in (h[:1], h[1:1], h[1:6], h[6:])])
    torch.testing.assert_close(combine_moments(parts), channel_moments(h))


@pytest.mark.parametrize("empty", [(0, 4, 3, 2, 2), (2, 4, 3, 0, 2)], ids=str)
def test_no_values_at_all(backend, empty) -> None:
    x, weight, _ = inputs(empty)
    gamma = torch.ones(4, requires_grad=True)
    y, h_n, moments = rcu_ops.recurrent_conv_batch_norm(x.requires_grad_(), weight.requires_grad_(), gamma)
    assert y.shape == empty and h_n.shape == empty[:2] + empty[3:]
    assert torch.equal(moments, torch.zeros(3, 4))
    (y.sum() + h_n.sum()).backward()
    assert torch.equal(gamma.grad, torch.zeros(4)) and torch.equal(weight.grad, torch.zeros(4, 4))


def test_nan_spreads_over_its_channel_as_in_batch_norm(backend) -> None:
    given = problem((2, 6, 3, 3, 3), torch.float32)
    given["weight"] = torch.zeros(6, 6)  # W is zero, NaN times zero is NaN: from its frame on everything is
    given["h0"] = None
    given["x"][0, 1, 2, 0, 0] = torch.nan
    y, _, _ = rcu_ops.recurrent_conv_batch_norm(**given)
    assert torch.equal(y.isnan(), unfused(given).isnan())
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable_and_independent_of_threads(backend, dtype) -> None:
    given = problem((3, 24, 4, 9, 7), dtype, "channels_last_3d")
    grad = torch.randn(given["x"].shape).to(dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, threads) if backend == "cpu" else (threads, threads):
            torch.set_num_threads(count)
            runs.append([fused(given), *gradients(fused, given, grad).values()])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_what_is_saved_for_backward(backend) -> None:
    """h and, with residual and ReLU, y: nothing else of the size of x."""
    for residual, relu, expected in ((False, True, 1), (True, True, 2), (True, False, 1)):
        given = problem((2, 4, 3, 5, 5), torch.float32)
        given = given if residual else given | {"residual": None}
        saved: list[Tensor] = []
        args = [None if v is None else v.requires_grad_() for v in given.values()]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
            call = torch.ops.rcu_ops.recurrent_conv_batch_norm
            x, weight, gamma, beta, h0, added = args
            call(x, weight, h0, gamma, beta, added, False, 1e-5, relu, "")
        assert sum(t.numel() == x.numel() for t in saved) == expected


def test_only_h_n_is_used(backend) -> None:
    given = problem((2, 4, 3, 5, 5), torch.float64)
    leaves = [v.requires_grad_() for v in given.values()]
    _, h_n, _ = rcu_ops.recurrent_conv_batch_norm(*leaves)
    dx = torch.autograd.grad(h_n.square().sum(), leaves[0])[0]
    plain = reference.recurrent_conv(leaves[0], leaves[1], leaves[4])[1]
    torch.testing.assert_close(dx, torch.autograd.grad(plain.square().sum(), leaves[0])[0])


def test_moments_have_gradients(backend) -> None:
    given = problem((2, 4, 3, 5, 5), torch.float64)
    leaves = [v.requires_grad_() for v in given.values()]
    _, _, moments = rcu_ops.recurrent_conv_batch_norm(*leaves)
    h, _ = reference.recurrent_conv(leaves[0], leaves[1], leaves[4])
    found, want = (torch.autograd.grad(m[:2].square().sum(), leaves[:2]) for m in (moments, channel_moments(h)))
    torch.testing.assert_close(found, want)


# ---- PyTorch citizenship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "middle_channels"])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(layout, optional) -> None:
    given = problem((2, 4, 3, 3, 2), torch.float32, layout)
    x, weight, gamma, beta, h0, residual = (v.requires_grad_() for v in given.values())
    if not optional:
        gamma = beta = h0 = residual = None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    ops = torch.ops.rcu_ops
    args = (x, weight, h0, gamma, beta, residual, True, 1e-5, True, "")
    dynamic = (*tests, "test_aot_dispatch_dynamic") if layout == "contiguous" else tests
    check(ops.recurrent_conv_batch_norm.default, args, test_utils=dynamic)
    x, weight, gamma, beta, h0, residual = (
        None if v is None else v.detach() for v in (x, weight, gamma, beta, h0, residual)
    )
    y, h, h_n, moments = ops.recurrent_conv_batch_norm(x, weight, h0, gamma, beta, residual, True, 1e-5, True, "")
    grads, mask = (torch.randn_like(y), torch.randn_like(h_n)), y if optional else None
    back = (*grads, h, mask, weight, h0, moments, gamma, beta, True, 1e-5, True, "", True)
    check(ops.recurrent_conv_batch_norm_backward.default, back)
    check(ops.recurrent_conv_moments.default, (x, weight, h0, False))
    check(ops.recurrent_conv_normalize.default, (h, moments, gamma, beta, residual, 1e-5, True))
    sums_args = (grads[0], h, mask, moments, gamma, beta, 1e-5, True)
    check(ops.recurrent_conv_normalize_sums.default, sums_args)
    sums, _ = ops.recurrent_conv_normalize_sums(*sums_args)
    check(
        ops.recurrent_conv_normalize_backward.default,
        (*grads, h, weight, h0, moments, sums, gamma, beta, 1e-5, True, False, True),
    )


def test_parts_refuse_gradients() -> None:
    x, weight, _ = inputs((1, 4, 2, 2, 2))
    h, _, _ = torch.ops.rcu_ops.recurrent_conv_moments(x.requires_grad_(), weight, None, False)
    with pytest.raises(RuntimeError, match="call recurrent_conv_batch_norm"):
        h.sum().backward()


def test_autocast(backend) -> None:
    given = problem((2, 8, 3, 4, 4), torch.float32)
    given["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _, moments = rcu_ops.recurrent_conv_batch_norm(**given)
    assert y.dtype == torch.bfloat16 and moments.dtype == torch.float32
    given |= {name: given[name].bfloat16() for name in ("x", "residual")}
    assert torch.equal(y, fused(given | {"weight": given["weight"].bfloat16()}))
    y.float().sum().backward()
    assert given["weight"].grad.dtype == torch.float32


def test_vmap_and_per_sample_gradients(backend) -> None:
    given = problem((2, 3, 3, 2, 2), torch.float64)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        y, h_n, _ = rcu_ops.recurrent_conv_batch_norm(x, weight, given["gamma"], given["beta"])
        return y.square().sum() + h_n.sum()

    xs = torch.randn(3, *given["x"].shape, dtype=torch.float64)
    for function in (loss, torch.func.grad(loss)):
        got = torch.vmap(function, in_dims=(None, 0))(given["weight"], xs)
        torch.testing.assert_close(got, torch.stack([function(given["weight"], x) for x in xs]))


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()

    def step(*values: Tensor) -> Tensor:
        y, h_n, _ = rcu_ops.recurrent_conv_batch_norm(*values)
        return y.square().sum() + h_n.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 3, 4, 4), (3, 8, 3, 5, 4)):
        given = problem(shape, torch.float64)
        leaves, twins = ([v.detach().clone().requires_grad_() for v in given.values()] for _ in range(2))
        compiled(*leaves).backward()
        step(*twins).backward()
        for a, b in zip(leaves, twins, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_export_with_dynamic_batch_and_time() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(6) * 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return rcu_ops.recurrent_conv_batch_norm(x, self.weight)[0]

    layer = Layer()
    dims = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("t", min=1, max=1024)}
    program = torch.export.export(layer, (torch.randn(2, 6, 4, 3, 3),), dynamic_shapes=(dims,))
    assert torch.ops.rcu_ops.recurrent_conv_batch_norm.default in {node.target for node in program.graph.nodes}
    for n, t in ((1, 1), (5, 17)):
        x = torch.randn(n, 6, t, 3, 3)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_meta_tensors_and_flop_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, c, t, height, width = shape = (2, 8, 5, 3, 4)
    x, weight = (torch.empty(s, device="meta", requires_grad=True) for s in (shape, (c, c)))
    with FlopCounterMode(display=False) as forward:
        y, h_n, moments = rcu_ops.recurrent_conv_batch_norm(x, weight)
    assert y.shape == shape and h_n.shape == (n, c, height, width) and moments.shape == (3, c)
    step = 2 * c * c * n * height * width * (t - 1)
    assert forward.get_total_flops() == step
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * step


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": torch.ones(3)}, ValueError, r"gamma: expected \[C\] = \[4\], got \[3\]"),
        ({"beta": 1.0}, TypeError, "beta: expected a tensor, got float"),
        ({"gamma": torch.ones(4, device="meta")}, ValueError, "gamma: expected on cpu"),
        ({"residual": torch.zeros(2, 4, 3, 5, 4)}, ValueError, "residual: expected x's shape"),
        ({"residual": torch.zeros(2, 4, 3, 5, 5).half()}, TypeError, "residual: expected torch.float32"),
        ({"activation": "tanh"}, ValueError, "activation: expected 'relu' or 'identity', got 'tanh'"),
        ({"eps": -1.0}, ValueError, "eps: expected a number that is not negative, got -1.0"),
        ({"update": "max"}, ValueError, "update: expected 'sum' or 'mean'"),
        ({"x": torch.zeros(1, 4, 1, 1, 1)}, ValueError, "x: expected more than one value per channel"),
    ],
)
def test_wrong_arguments_are_named(backend, change, error, message) -> None:
    arguments = {"x": torch.zeros(2, 4, 3, 5, 5), "weight": torch.zeros(4, 4)} | change
    with pytest.raises(error, match=message):
        rcu_ops.recurrent_conv_batch_norm(**arguments)


def test_triton_says_why_not() -> None:
    with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match="x is on cpu"):
        rcu_ops.recurrent_conv_batch_norm(torch.zeros(2, 4, 3, 5, 5), torch.zeros(4, 4))
