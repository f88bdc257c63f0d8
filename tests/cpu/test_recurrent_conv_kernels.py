"""The CPU kernels of recurrent_conv themselves, through torch.ops: every instruction set, tail, layout and plan.

What the public function promises is tested in tests/ops; here are the properties of the kernels: the order of sums
(and with it bitwise equality between tilings, thread counts and numbers of frames per call), scratch that is never read
before it is written, NaN and infinity next to padding, and the time-parallel form.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rcu_ops  # noqa: F401  (defines the operators and loads the library)
from rcu_ops import _library, reference
from tests.ops import extended_precision as exact
from tests.tolerance import assert_close_to_reference

if not _library.LIBRARY.exists():
    pytest.skip("the kernel library was not built", allow_module_level=True)

kernels = torch.ops.rcu_ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]


def runs(isa: str) -> bool:
    """Whether this machine can run ``isa``, asked of the library itself."""
    before = os.environ.get("RCU_OPS_CPU_ISA")
    os.environ["RCU_OPS_CPU_ISA"] = isa
    try:
        kernels.recurrent_conv(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1), None, False, False)
        return True
    except RuntimeError:
        return False
    finally:
        os.environ.pop("RCU_OPS_CPU_ISA") if before is None else os.environ.update(RCU_OPS_CPU_ISA=before)


AVAILABLE = [isa for isa in ISAS if runs(isa)]


@pytest.fixture(params=AVAILABLE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RCU_OPS_CPU_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request for scratch memory finds NaN in it."""
    monkeypatch.setenv("RCU_OPS_POISON_SCRATCH", "1")


@pytest.fixture(autouse=True)
def one_frame_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCU_OPS_CHUNK", "0")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "frame_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width_major": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1, 1, 1, 1, 2), value=torch.nan)[
        :, 1:-2, 1:-1, 2:-1, 1:-2
    ],
    "padded_channels": lambda x: channels_last(torch.cat([x, torch.full_like(x, torch.nan)], 1))[:, : x.shape[1]],
}

# Around every blocking: rows of 4, 6, 8, 14, 32; vectors of 2, 4, 8, 16, 32 lanes and groups of them; k in parts.
SHAPES = [
    (2, 1, 3, 5, 7),
    (2, 5, 3, 3, 5),
    (1, 33, 2, 1, 97),
    (3, 16, 4, 7, 7),
    (2, 65, 2, 5, 10),
    (1, 200, 2, 3, 11),
    (1, 30, 2, 14, 31),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight with spectral radius below 1 and some large diagonal entries, a state in the state's dtype."""
    n, c, _, height, width = shape
    weight = torch.eye(c, dtype=torch.float64) * torch.rand(c).double() + 0.3 * torch.randn(c, c).double() / c**0.5
    state = torch.randn(n, c, height, width, dtype=reference_state(dtype))
    return torch.randn(shape, dtype=torch.float64).to(dtype), weight.to(dtype), state


def reference_state(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def eager(x: Tensor, weight: Tensor, h0: Tensor | None, update: str, reverse: bool) -> tuple[Tensor, Tensor]:
    start = None if h0 is None else h0.to(x.dtype)
    return reference.recurrent_conv(x, weight, start, update=update, reverse=reverse, state_dtype=x.dtype)


def check_forward(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    h, h_n = kernels.recurrent_conv(x, weight, h0, mean, reverse)
    assert h.stride() == torch.empty_like(x).stride()
    assert h_n.stride() == torch.empty_like(x.select(2, 0)).stride()
    update = "mean" if mean else "sum"
    want = exact.recurrent_conv(x, weight, h0, update=update, reverse=reverse)
    rough = eager(x, weight, h0, update, reverse)
    assert_close_to_reference(h, want[0], rough[0], "h")
    assert_close_to_reference(h_n, want[1], rough[1], "h_n")
    return h, h_n


def test_this_processor_was_recognised() -> None:
    assert AVAILABLE[0] == "portable"
    assert ISAS[: len(AVAILABLE)] == AVAILABLE
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    words = set(flags.split())
    assert ("avx2" in AVAILABLE) == ({"avx2", "fma", "f16c"} <= words)
    assert ("avx512" in AVAILABLE) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"} <= words)
    assert ("avx512_bf16" in AVAILABLE) == ("avx512" in AVAILABLE and "avx512_bf16" in words)
    if "amx" in AVAILABLE:
        assert {"amx_tile", "amx_bf16", "avx512_bf16"} <= words


def test_unknown_isa_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCU_OPS_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"RCU_OPS_CPU_ISA: expected one of portable.*got 'mmx'"):
        kernels.recurrent_conv(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1), None, False, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(isa: str, dtype: torch.dtype, layout: str) -> None:
    for i, shape in enumerate(SHAPES):
        x, weight, state = inputs(shape, dtype)
        h0 = (None, state, state.to(dtype))[i % 3]
        if i % 2:
            weight = weight.t()
        check_forward(LAYOUTS[layout](x), weight, h0, mean=i % 4 == 1, reverse=i % 5 == 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_channels(isa: str, dtype: torch.dtype, layout: str) -> None:
    """The sum over k is cut into parts from a few hundred channels on."""
    for shape in [(1, 520, 3, 5, 7), (1, 384, 1, 7, 7)]:
        x, weight, state = inputs(shape, dtype)
        check_forward(LAYOUTS[layout](x), weight, state, mean=False, reverse=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_act(isa: str, dtype: torch.dtype, layout: str) -> None:
    for i, shape in enumerate(SHAPES):
        x, weight, state = inputs(shape, dtype)
        h0, residual, relu, mean = (None, state)[i % 2], (None, torch.randn_like(x))[i % 3 > 0], i % 4 > 0, i % 5 == 2
        x = LAYOUTS[layout](x)
        if residual is not None:
            residual = LAYOUTS["sliced" if i % 2 else layout](residual)
        scale, shift = (torch.randn(shape[1], dtype=reference_state(dtype)) for _ in range(2))
        y, h_n = kernels.recurrent_conv_affine_act(x, weight, scale, shift, h0, residual, mean, relu)
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(h_n, kernels.recurrent_conv(x, weight, h0, mean, False)[1])
        # Exact: in fp64 on the exact states. Eager: one layer after the other, in x's dtype.
        update = "mean" if mean else "sum"
        want = epilogue(exact.recurrent_conv(x, weight, h0, update=update)[0], scale, shift, residual, relu)
        rough = epilogue(eager(x, weight, h0, update, False)[0], scale, shift, residual, relu)
        assert_close_to_reference(y, want, rough, "y")


def epilogue(h: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """act(scale h + shift (+ residual)) in h's dtype."""
    scale, shift = (v.to(h.dtype).view(1, -1, 1, 1, 1) for v in (scale, shift))
    y = scale * h + shift
    y = y if residual is None else y + residual.to(h.dtype)
    return y.relu() if relu else y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(isa: str, dtype: torch.dtype, layout: str) -> None:
    for i, shape in enumerate(SHAPES):
        x, weight, state = inputs(shape, dtype)
        mean, reverse = i % 2 == 1, i % 3 == 1
        grad_h = None if i % 4 == 3 else LAYOUTS[layout](torch.randn_like(x))
        grad_h_n = torch.randn_like(state) if i % 4 else None
        update = "mean" if mean else "sum"
        h = exact.recurrent_conv(x, weight, state, update=update, reverse=reverse)[0].to(dtype)
        h = LAYOUTS["channels_last" if i % 2 else "contiguous"](h)
        dx, dweight, dh0 = kernels.recurrent_conv_backward(grad_h, grad_h_n, h, weight, state, mean, reverse, True)
        assert dx.stride() == torch.empty_like(h).stride()
        # dweight is defined on the h that was saved, rounded to its dtype, so the exact one is computed from that too.
        want = exact_backward(grad_h, grad_h_n, h, weight, state, mean, reverse)
        rough = eager_backward(grad_h, grad_h_n, h, weight, state, mean, reverse)
        for got, a, b, name in zip((dx, dweight, dh0), want, rough, ("dx", "dweight", "dh0"), strict=True):
            if got.numel() > 1:  # a single number of eager's may be exact by luck
                assert_close_to_reference(got, a, b, name)
        if i % 2:
            only_x = kernels.recurrent_conv_backward(grad_h, grad_h_n, h, weight, None, mean, reverse, False)
            assert only_x[1].shape == only_x[2].shape == (0,)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "width_major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_norm_is_scanned_where_it_lies(
    isa: str, dtype: torch.dtype, layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx over the normalisation's gradient: bit by bit what a scan to another tensor gives."""
    for shape in ((2, 33, 7, 3, 5), (2, 64, 7, 5, 8)):
        h, weight, state = inputs(shape, dtype)
        h, dz = (LAYOUTS[layout](value) for value in (h, torch.randn_like(h)))
        moments, sums, gamma, beta = torch.rand(8, shape[1], dtype=state.dtype).add(0.5).split((3, 2, 1, 2))
        tables = (moments, sums, gamma[0], beta[0], 1e-5, True, False, True)
        backward = kernels.recurrent_conv_normalize_backward
        monkeypatch.setenv("RCU_OPS_CHUNK", "0")
        grad_h = backward(dz, None, h, torch.zeros_like(weight), None, *tables)[0]  # dx_t = grad_h_t
        monkeypatch.setenv("RCU_OPS_CHUNK", str(chunk))
        want = kernels.recurrent_conv_backward(grad_h, state, h, weight, state, False, False, True)
        for a, b in zip(backward(dz, state, h, weight, state, *tables), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_of_many_rows(isa: str, dtype: torch.dtype, layout: str) -> None:
    """Enough columns for long chains, several flushes of them, and several ranges of rows."""
    x, weight, state = inputs((1, 20, 4, 40, 41), dtype)
    grad_h, h = (LAYOUTS[layout](torch.randn_like(x)) for _ in range(2))
    want = exact_backward(grad_h, None, h, weight, state, False, False)[1]
    rough = eager_backward(grad_h, None, h, weight, state, False, False)[1]
    got = kernels.recurrent_conv_backward(grad_h, None, h, weight, state, False, False, True)[1]
    assert_close_to_reference(got, want, rough, "dweight")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_of_a_given_state(isa: str, dtype: torch.dtype, layout: str) -> None:
    """However the state before the first frame lies, and in whichever of its dtypes: the same numbers."""
    for shape in SHAPES:
        x, weight, state = inputs(shape, dtype)
        state = state.to(dtype).float()
        grad_h, h = torch.randn_like(x), torch.randn_like(x)

        def dweight(state: Tensor, grad_h: Tensor = grad_h, h: Tensor = h, weight: Tensor = weight) -> Tensor:
            return kernels.recurrent_conv_backward(grad_h, None, h, weight, state, False, False, True)[1]

        laid = LAYOUTS[layout](state.unsqueeze(2)).select(2, 0)
        rounded = LAYOUTS[layout](state.to(dtype).unsqueeze(2)).select(2, 0)
        assert torch.equal(dweight(laid), dweight(state))
        assert torch.equal(dweight(rounded), dweight(state))


def exact_backward(
    grad_h: Tensor | None, grad_h_n: Tensor | None, h: Tensor, weight: Tensor, h0: Tensor, mean: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dh0 from extended precision; dweight = sum dx_t h_{t-1}^T in extended precision over the saved h."""
    update = "mean" if mean else "sum"
    dx, _, dh0 = exact.gradients(h, weight, h0, grad_h, grad_h_n, update=update, reverse=reverse)
    before = previous(h, h0, reverse)
    rows = [v.double().transpose(0, 1).flatten(1).numpy().astype("longdouble") for v in (dx, before)]
    return dx, torch.from_numpy((rows[0] @ rows[1].T).astype("float64")), dh0


def eager_backward(
    grad_h: Tensor | None, grad_h_n: Tensor | None, h: Tensor, weight: Tensor, h0: Tensor, mean: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of the gradient in h's dtype, frame by frame."""
    dtype, a = h.dtype, 0.5 if mean else 1.0
    frames = h.shape[2]
    order = list(range(frames))[::-1] if reverse else list(range(frames))
    g = torch.zeros_like(h[:, :, 0]) if grad_h_n is None else grad_h_n.to(dtype)
    dx: dict[int, Tensor] = {}
    for t in reversed(order):
        if grad_h is not None:
            g = g + grad_h[:, :, t]
        dx[t] = a * g
        g = torch.einsum("oc,nchw->nohw", weight.T, dx[t])
    stacked = torch.stack([dx[t] for t in range(frames)], 2)
    dweight = sum(
        torch.einsum("nohw,nchw->oc", stacked[:, :, t], previous(h, h0, reverse)[:, :, t].to(dtype)) for t in order
    )
    assert isinstance(dweight, Tensor)
    return stacked, dweight, g


def previous(h: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    start = h0.unsqueeze(2).to(torch.promote_types(h.dtype, h0.dtype))
    return torch.cat([h[:, :, 1:], start], 2) if reverse else torch.cat([start, h[:, :, :-1]], 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frame_by_frame_is_bitwise_one_call(isa: str, dtype: torch.dtype, layout: str) -> None:
    for shape in [(1, 5, 4, 3, 3), (2, 64, 4, 7, 7), (1, 130, 3, 2, 5), (3, 33, 3, 1, 40), (1, 512, 2, 7, 7)]:
        for mean, reverse, with_state in itertools.islice(itertools.product([False, True], repeat=3), shape[0], 8, 3):
            x, weight, state = inputs(shape, dtype)
            x = LAYOUTS[layout](x)
            h, h_n = kernels.recurrent_conv(x, weight, state if with_state else None, mean, reverse)
            now, frames = (state if with_state else None), {}
            for t in range(shape[2])[:: -1 if reverse else 1]:
                frames[t], now = kernels.recurrent_conv(x[:, :, t : t + 1], weight, now, mean, reverse)
            assert torch.equal(torch.cat([frames[t] for t in range(shape[2])], 2), h)
            assert torch.equal(now, h_n)


@pytest.mark.parametrize("states", ["as x", "in x's dtype", "uneven rows", "rows a page apart"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_product_by_panels_of_the_weight(isa: str, dtype: torch.dtype, states: str) -> None:
    """One frame of adjacent channels, rows in whole blocks, half ones and less, equals vectors along positions."""
    for n, c, height, width in [(2, 32, 3, 5), (1, 96, 7, 7), (1, 160, 2, 11), (3, 144, 1, 5)]:
        x, weight, state = inputs((n, c, 1, height, width), dtype)
        if states == "in x's dtype":
            state = state.to(dtype)
        scale, shift, residual = torch.rand(c) + 0.5, torch.randn(c), torch.randn_like(x)
        h, h_n = kernels.recurrent_conv(x, weight, state, True, False)
        y, y_n = kernels.recurrent_conv_affine_act(x, weight, scale, shift, state, residual, False, True)
        last, given = channels_last(x), channels_last(state)
        if states == "uneven rows":
            given = torch.nn.functional.pad(state, (0, 1, 1, 0), value=torch.nan)
            given = given.contiguous(memory_format=torch.channels_last)[:, :, 1:, :-1]
        elif states == "rows a page apart":
            page = 1024 if state.dtype == torch.float32 else 2048
            given = channels_last(torch.cat([state, torch.full((n, page - c, height, width), torch.nan)], 1))[:, :c]
        for matrix in (weight, weight.T.contiguous().T):
            got = kernels.recurrent_conv(last, matrix, given, True, False)
            assert torch.equal(got[0], h) and torch.equal(got[1], h_n)
            got = kernels.recurrent_conv_affine_act(
                last, matrix, scale, shift, given, channels_last(residual), False, True
            )
            assert torch.equal(got[0], y) and torch.equal(got[1], y_n)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clips_written_past_the_caches_are_the_same(isa: str, dtype: torch.dtype, layout: str) -> None:
    """From 4 MiB on; single frames of the same clip are below that."""
    x, weight, state = inputs((1, 64, 11, 56, 56), dtype)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn_like(x))
    assert x[:, :, :1].nbytes < 4 * 2**20 <= x.nbytes
    scale, shift = torch.randn(64), torch.randn(64)
    h, _ = kernels.recurrent_conv(x, weight, state, False, False)
    y, y_n = kernels.recurrent_conv_affine_act(x, weight, scale, shift, state, residual, False, True)
    for t in range(x.shape[2]):
        now = x[:, :, t : t + 1]
        out, _ = kernels.recurrent_conv_affine_act(
            now, weight, scale, shift, state, residual[:, :, t : t + 1], False, True
        )
        frame, state = kernels.recurrent_conv(now, weight, state, False, False)
        assert torch.equal(frame, h[:, :, t : t + 1])
        assert torch.equal(out, y[:, :, t : t + 1])
    assert torch.equal(state, y_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_agree_bitwise(isa: str, dtype: torch.dtype) -> None:
    """The sum over k runs in one order whatever the orientation, the tail, and the place of a position in its tile."""
    x, weight, state = inputs((2, 70, 3, 9, 11), dtype)
    want = kernels.recurrent_conv(x, weight, state, False, False)
    for name, layout in LAYOUTS.items():
        got = kernels.recurrent_conv(layout(x), weight, state, False, False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
    alone = kernels.recurrent_conv(x[1:, ..., 4:5, 3:4], weight, state[1:, :, 4:5, 3:4], False, False)[0]
    assert torch.equal(alone, want[0][1:, ..., 4:5, 3:4])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_number_of_threads_does_not_matter(dtype: torch.dtype, layout: str, threads: Callable[[int], None]) -> None:
    for shape in [(1, 96, 3, 7, 7), (2, 32, 3, 30, 31), (1, 256, 1, 4, 4)]:
        x, weight, state = inputs(shape, dtype)
        x = LAYOUTS[layout](x)
        grad = torch.randn_like(x)
        results = []
        for count in (1, 2, 3):
            threads(count)
            h, h_n = kernels.recurrent_conv(x, weight, state, False, False)
            results.append((h, h_n, *kernels.recurrent_conv_backward(grad, None, h, weight, state, False, False, True)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_values_stay_in_their_position(isa: str, dtype: torch.dtype, value: float, layout: str) -> None:
    shape = (2, 19, 4, 3, 7)
    x, weight, state = inputs(shape, dtype)
    weight = weight.abs() + torch.finfo(dtype).eps  # an infinity stays one instead of meeting its negative
    x[1, 4, 1, 2, 3] = value
    h, h_n = kernels.recurrent_conv(LAYOUTS[layout](x), weight, state, False, False)
    want, want_n = reference.recurrent_conv(x.double(), weight.double(), state.double())
    hit = torch.zeros(shape, dtype=torch.bool)
    hit[1, 4, 1, 2, 3] = True
    hit[1, :, 2:, 2, 3] = True
    assert torch.equal(h.isfinite(), ~hit)
    assert torch.equal(h[hit].double(), want[hit]) or (h[hit].isnan() == want[hit].isnan()).all()
    assert torch.equal(h_n.isnan(), want_n.isnan()) and torch.equal(h_n.isinf(), want_n.isinf())


def test_infinite_state_under_the_identity(isa: str) -> None:
    """0 * inf is NaN in every other channel, as in the definition, and the identity keeps the infinity itself."""
    for dtype in DTYPES:
        x, state = torch.zeros(1, 3, 2, 1, 2, dtype=dtype), torch.zeros(1, 3, 1, 2, dtype=reference_state(dtype))
        state[0, 1, 0, 0] = torch.inf
        h, _ = kernels.recurrent_conv(x, torch.eye(3, dtype=dtype), state, False, False)
        assert h[0, :, 0, 0, 0].isnan().tolist() == [True, False, True]
        assert h[0, 1, 0, 0, 0] == torch.inf
        assert (h[..., 1] == 0).all()


def test_rounding_of_16_bit_outputs(isa: str) -> None:
    """Outputs are rounded to nearest even; NaN stays NaN whatever its payload; denormals survive."""
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 14,), dtype=torch.int32)
    special = torch.tensor([0, 1, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x00000001, 0x00018000, 0x3F808000, 0x3F818000])
    values = torch.cat([bits, special.to(torch.int32), special.to(torch.int32) | -(2**31)]).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        # dh0 = W^T g with g = grad_h_n carries any fp32 value to a rounded output: W = 1, one channel, one frame.
        h = torch.zeros(1, 1, 1, 1, values.numel(), dtype=dtype)
        grad = values.view(1, 1, 1, -1)
        dx = kernels.recurrent_conv_backward(None, grad, h, torch.ones(1, 1, dtype=dtype), None, False, False, False)[0]
        want = values.to(dtype)
        assert torch.equal(dx.flatten().isnan(), want.isnan())
        kept = ~want.isnan()
        assert torch.equal(dx.flatten()[kept].view(torch.int16), want[kept].view(torch.int16))


def test_true_fp32_state(isa: str) -> None:
    """W = I over 1024 frames of ones and small numbers: a state rounded to bf16 at every frame would stop growing."""
    frames = 1024
    x = (torch.rand(1, 4, frames, 1, 3) + 0.5).bfloat16()
    _, h_n = kernels.recurrent_conv(x, torch.eye(4, dtype=torch.bfloat16), None, False, False)
    assert (h_n.double() / x.double().sum(2) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [32, 96])
def test_whole_blocks_of_channels(isa: str, dtype: torch.dtype, channels: int, layout: str) -> None:
    """Channels that fill vectors and tiles, where kernels read and write tensors without stages."""
    for frames, mean, reverse, given in ((1, False, False, True), (1, True, True, False), (4, True, True, True)):
        x, weight, state = inputs((2, channels, frames, 5, 9), dtype)
        x, state = LAYOUTS[layout](x), state.contiguous(memory_format=torch.channels_last)
        h, _ = check_forward(x, weight, state if given else None, mean, reverse)
        grad = torch.randn_like(x)
        got = kernels.recurrent_conv_backward(grad, state.float(), h, weight, state, mean, reverse, True)
        want = exact_backward(grad, state.float(), h, weight, state, mean, reverse)
        rough = eager_backward(grad, state.float(), h, weight, state, mean, reverse)
        for a, b, c, name in zip(got, want, rough, ("dx", "dweight", "dh0"), strict=True):
            assert_close_to_reference(a, b, c, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
def test_time_parallel_form(
    isa: str, dtype: torch.dtype, chunk: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCU_OPS_CHUNK", str(chunk))
    for i, frames in enumerate((2, 9, 16)):
        x, weight, state = inputs((2, 12, frames, 5, 8), dtype)
        x, weight = LAYOUTS[layout](x), weight * 0.75
        h0, mean, reverse = (None, state, state)[i], i == 2, i == 1
        h, _ = check_forward(x, weight, h0, mean, reverse)
        grad = torch.randn_like(x)
        got = kernels.recurrent_conv_backward(grad, state, h, weight, state, mean, reverse, True)
        want = exact_backward(grad, state, h, weight, state, mean, reverse)
        rough = eager_backward(grad, state, h, weight, state, mean, reverse)
        for a, b, c, name in zip(got, want, rough, ("dx", "dweight", "dh0"), strict=True):
            assert_close_to_reference(a, b, c, name)


@pytest.mark.parametrize("radius", [0.5, 1.0, 1.05])
def test_time_parallel_form_of_a_growing_state(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCU_OPS_CHUNK", "16")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.linalg.qr(torch.randn(24, 24)).Q * radius
        x = torch.randn(1, 24, 200, 1, 2)
        check_forward(x.to(dtype), weight.to(dtype), None, mean=False, reverse=False)


def test_fp64_is_never_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Powers of W are kept more precise than the state, and nothing is more precise than fp64."""
    x, weight, state = inputs((1, 4, 32, 1, 1), torch.float64)
    want = kernels.recurrent_conv(x, weight, state, False, False)
    monkeypatch.setenv("RCU_OPS_CHUNK", "4")
    got = kernels.recurrent_conv(x, weight, state, False, False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_bad_chunk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCU_OPS_CHUNK", "two")
    with pytest.raises(RuntimeError, match=r"RCU_OPS_CHUNK: expected a number of frames.*got 'two'"):
        kernels.recurrent_conv(torch.zeros(1, 1, 3, 1, 1), torch.zeros(1, 1), None, False, False)


def test_empty_and_expanded(isa: str) -> None:
    for shape in [(0, 4, 2, 3, 3), (2, 4, 2, 0, 3), (2, 4, 2, 3, 0)]:
        x, weight, state = inputs(shape, torch.float32)
        h, h_n = kernels.recurrent_conv(x, weight, state, False, False)
        assert h.shape == shape and h_n.shape == state.shape
        dx, dweight, dh0 = kernels.recurrent_conv_backward(x, state, h, weight, state, False, False, True)
        assert dx.shape == shape and dh0.shape == state.shape and torch.equal(dweight, torch.zeros(4, 4))
    x = torch.randn(1, 6, 3, 1, 1).expand(3, 6, 3, 5, 4)
    check_forward(x, torch.randn(6, 1).expand(6, 6) / 6, torch.randn(1, 6, 1, 1).expand(3, 6, 5, 4), False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: expected \[N,C,T,H,W\], got 3 dimensions"),
        ({"x": torch.zeros(2, 3, 0, 1, 1)}, "x: expected at least one frame and one channel"),
        ({"x": torch.zeros(2, 3, 2, 4, 5, dtype=torch.int32)}, "x: expected dtype Double, Float, BFloat16 or Half"),
        ({"weight": torch.zeros(3, 4)}, r"weight: expected shape \[C,C\] = \[3, 3\], got \[3, 4\]"),
        ({"weight": torch.zeros(3, 3).double()}, "weight: expected dtype Float, got Double"),
        ({"h0": torch.zeros(2, 3, 4, 4)}, r"h0: expected shape \[N,C,H,W\] = \[2, 3, 4, 5\], got \[2, 3, 4, 4\]"),
        ({"h0": torch.zeros(2, 3, 4, 5).half()}, "h0: expected dtype Float or Float, got Half"),
    ],
)
def test_checks_of_direct_callers(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 2, 4, 5), "weight": torch.zeros(3, 3), "h0": torch.zeros(2, 3, 4, 5)} | change
    with pytest.raises(RuntimeError, match=message):
        kernels.recurrent_conv(arguments["x"], arguments["weight"], arguments["h0"], False, False)


def test_repeatable() -> None:
    x, weight, state = inputs((2, 40, 3, 9, 9), torch.bfloat16)
    h, h_n = kernels.recurrent_conv(x, weight, state, False, False)
    again = kernels.recurrent_conv(x, weight, state, False, False)
    assert torch.equal(h, again[0]) and torch.equal(h_n, again[1])
    first = kernels.recurrent_conv_backward(x, None, h, weight, state, False, False, True)
    second = kernels.recurrent_conv_backward(x, None, h, weight, state, False, False, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the planner ---------------------------------------------------------------------------------------------------

native = _library.native()
planned = pytest.mark.skipif(native is None, reason="rcu_ops._native was not built for this Python")


@planned
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_tasks_cover_every_output_once(dtype: str, isa: str) -> None:
    assert native is not None
    for n, c, t, positions in [(1, 64, 16, 3136), (1, 512, 1, 49), (8, 512, 1, 49), (1, 7, 3, 5), (0, 4, 2, 9)]:
        for threads, last, state in itertools.product((1, 2, 7, 64), (False, True), (False, True)):
            plan = native.recurrent_conv_plan_details(n, c, t, positions, dtype, threads, last, state, last, isa)
            written = torch.zeros(c, n * positions, dtype=torch.int32)
            for q0, q1, c0, c1 in plan["tasks"]:
                assert q0 < q1 and c0 < c1
                written[c0:c1, q0:q1] += 1
            assert (written == 1).all()


@planned
def test_one_product_takes_panels_of_the_weight_where_channels_are_adjacent() -> None:
    """Split over output channels where the weight is the larger operand, over positions where they are."""
    assert native is not None
    for positions, c, split in [(3136, 64, "positions"), (196, 256, "channels"), (49, 512, "channels")]:
        arguments = (1, c, 1, positions, "float32", 2, True, True)
        assert "packs its panels of W" in native.recurrent_conv_plan(*arguments, isa="avx512")
        assert "packs its panels" not in native.recurrent_conv_plan(*arguments, dense=False, isa="avx512")
        tasks = native.recurrent_conv_plan_details(*arguments, isa="avx512")["tasks"]
        assert len(tasks) >= 2
        assert len({task[2] for task in tasks}) == (2 if split == "channels" else 1)
    assert "packs its panels" not in native.recurrent_conv_plan(1, 24, 1, 49, "float32", 2, True, True, isa="avx512")


@planned
def test_tasks_of_a_single_step_in_bf16_divide_the_larger_operand() -> None:
    def tasks(channels: int, positions: int, isa: str = "avx512_bf16") -> list[tuple[int, ...]]:
        details = native.recurrent_conv_plan_details(1, channels, 1, positions, "bfloat16", 2, True, True, isa=isa)
        return [tuple(task) for task in details["tasks"]]

    assert tasks(512, 49) == [(0, 49, 0, 256), (0, 49, 256, 512)]  # W; positions would be 32 and 17
    assert {task[2:] for task in tasks(256, 196)} == {(0, 256)}  # the state


@planned
def test_offsets_past_two_to_the_31() -> None:
    assert native is not None
    plan = native.recurrent_conv_plan_details(2**20, 64, 16, 3136, "float32", 16)
    assert plan["tasks"][-1][1] == 2**20 * 3136


@planned
def test_chunks_only_where_the_model_says_so() -> None:
    """Never for one frame, never where every thread has columns enough; for a few columns and many threads, yes."""
    assert native is not None
    details = native.recurrent_conv_plan_details
    assert details(1, 512, 1, 49, "float32", 64)["chunk"] == 0
    assert details(16, 64, 16, 3136, "float32", 2)["chunk"] == 0
    many = details(1, 512, 256, 49, "float32", 64, isa="avx512")
    assert many["chunk"] > 0
    assert many["chunked_cost"] * 1.2 < many["sequential_cost"]
    assert "chunks of" in native.recurrent_conv_plan(1, 512, 256, 49, "float32", 64, isa="avx512")
    assert "too few frames" in native.recurrent_conv_plan(1, 512, 1, 49, "float32", 64)
    near = details(1, 64, 256, 1, "float32", 2, isa="avx512")
    assert near["chunk"] == 0 and near["chunked_cost"] < near["sequential_cost"]
    assert "not a fifth less" in native.recurrent_conv_plan(1, 64, 256, 1, "float32", 2, isa="avx512")
    assert "not a fifth less" not in native.recurrent_conv_plan(16, 64, 16, 3136, "float32", 2)
    with pytest.raises(ValueError, match="dtype: expected float64"):
        native.recurrent_conv_plan(1, 1, 1, 1, "int8")
