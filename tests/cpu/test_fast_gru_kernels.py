"""The CPU passes of fast_gru, through torch.ops: every instruction set, format, tail and thread count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import rcu_ops
from rcu_ops import _library
from tests.cpu.test_recurrent_conv_kernels import AVAILABLE
from tests.ops.test_fast_gru import DTYPES, LAYOUTS, RESULTS, Errors, compare, inputs

if not _library.LIBRARY.exists():
    pytest.skip("the kernel library was not built", allow_module_level=True)


@pytest.fixture(params=[isa for isa in AVAILABLE if isa != "amx"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RCU_OPS_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def on_threads() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which torch has so many threads."""

    @contextlib.contextmanager
    def with_threads(threads: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return with_threads


def one_channel(
    x: Tensor, o0: Tensor | None = None, ux: float = 0, uo: float = 0, wr: float = 0, wz: float = 0, vx: float = 0
) -> tuple[Tensor, ...]:
    """o, o_n, h [2, positions] and r, z, c of one step of one channel, every position with its own x.

    The channel counts as innermost, which fixes the order of what is saved: [positions, features].
    """
    x = x.as_strided((1, 1, 1, 1, 1, len(x)), (len(x), len(x), 1, len(x), len(x), 1))
    w = torch.tensor([wr, wz]).view(2, 1, 1).to(x)
    o0 = torch.zeros_like(x[:, 0]) if o0 is None else o0.view(1, 1, 1, 1, -1)
    ux, uo, vx, vo = (
        torch.full(size, float(v)).to(x) for size, v in (((2, 1), ux), ((2, 1), uo), ((1, 1), vx), ((1, 1), 0))
    )
    o, o_n, hidden, gates = torch.ops.rcu_ops.fast_gru(x, ux, uo, w, vx, vo, o0, True)
    return o, o_n, hidden.view(-1, 2).T, gates.view(3, -1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "middle_channels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 9])
def test_every_instruction_set_keeps_the_tolerance_rule(isa, dtype, layout, threads, on_threads) -> None:
    """On one thread gradients go by columns, on many they are the library's products and passes between them."""
    own = _library.native().fast_gru_gradients_by_columns(80, 10, 3, str(dtype)[6:], threads=threads)
    assert own == (threads == 1 and dtype != torch.float64)
    errors = Errors(ignored=() if own else RESULTS[1:6])  # the library's sums alone
    for positions in range(1, 9):  # runs of all lengths around a vector's
        # Whole vectors of features, which may be read where they lie, in panels across samples; and others.
        channels, hidden = (16, 16) if own and positions % 2 else (10, 3)
        shape = (2, 3, channels, 1, 5, positions)
        tensors = inputs(shape, hidden, dtype)
        laid_out = [LAYOUTS[layout](tensors[0]), *tensors[1:]]
        grads = [LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(shape[:1] + shape[2:])]
        with rcu_ops.use_backend("cpu"), on_threads(threads):
            compare(tensors, laid_out, grads, errors)
    errors.check()


def test_tanh_and_sigmoid_are_accurate_and_take_special_values(isa) -> None:
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.logspace(-30, 2, 4000), torch.tensor([0.0, -0.0])])
    o = one_channel(x, ux=1, wz=1000, vx=1)[0].flatten()
    opened = x > 0.2  # z = sigmoid(1000 relu(x)) is exactly 1 there, and o the candidate
    for got, exact in (
        (o[opened], x[opened].double().tanh()),
        (-one_channel(-x, ux=-1, wz=1000, vx=1)[0].flatten()[opened], x[opened].double().tanh()),
        (one_channel(x, vx=1)[3][2].flatten(), x.double().tanh()),
        (one_channel(x, ux=1, wr=1)[3][0].flatten(), x.relu().double().sigmoid()),
        (one_channel(x, ux=1, wr=-1)[3][0].flatten(), (-x.relu()).double().sigmoid()),
    ):
        ulps = (got.double() - exact).abs() / (exact.abs() * torch.finfo(torch.float32).eps).clamp_min(1e-38)
        assert ulps.max() <= 3, ulps.max()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
    want = torch.tensor([1.0, -1.0, torch.nan, 1.0, -1.0])
    candidate = one_channel(special, ux=1, wr=1, wz=1, vx=1)[3][2].flatten()
    assert torch.equal(candidate.nan_to_num(7), want.nan_to_num(7))
    closed = one_channel(torch.tensor([200.0, 1e30]), ux=1, wr=-1)[3][0].flatten()
    assert torch.equal(closed, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_16_bit_numbers_are_read_and_written(isa, dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    hidden = one_channel(every, ux=1)[2][0]
    assert torch.equal(hidden.isnan(), every.isnan())
    normal = every.abs() >= torch.finfo(dtype).tiny  # a library may take denormal factors for 0
    assert torch.equal(hidden[normal], every[normal].relu())
    # fp32 to 16 bits: every midpoint between two neighbours, and a little to either side of it.
    finite = every[every.isfinite()].float().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    state = torch.cat([middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))])
    state = state[state.to(dtype).isfinite()]
    x = torch.ones(len(state), dtype=dtype)
    o = one_channel(x, state, ux=1, wz=-1000)[0].flatten()  # z = 0: the state stays
    assert torch.equal(o, state.to(dtype))
    largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    assert one_channel(largest, largest, ux=1, uo=1)[2].flatten()[0] == torch.inf


def test_results_do_not_depend_on_the_number_of_threads(isa) -> None:
    """More elements than fit one task; the products have one factor, so they are exact."""
    x, state = torch.randn(2, 100_003)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(one_channel(x, state, ux=1, wr=0.5, wz=-0.5, vx=2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_columns_through_all_steps_do_not_depend_on_panels_or_threads(isa, layout, dtype) -> None:
    """Panels of all widths, across samples and with a rest: per column the same numbers as on its own."""
    shape = (3, 3, 21, 1, 1, 37)
    x, *weights, o0 = inputs(shape, 9, dtype)
    x = LAYOUTS[layout](x)
    before = torch.get_num_threads()
    whole = {}
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            whole[threads] = torch.ops.rcu_ops.fast_gru(x, *weights, o0, True)
    finally:
        torch.set_num_threads(before)
    for other in whole.values():
        assert all(torch.equal(a, b) for a, b in zip(whole[1], other, strict=True))
    for sample, position in ((0, 0), (1, 20), (2, 36)):
        at = (slice(sample, sample + 1), ..., slice(position, position + 1))
        o, o_n, *_ = torch.ops.rcu_ops.fast_gru(x[at], *weights, o0[at], False)
        assert torch.equal(o, whole[1][0][at]) and torch.equal(o_n, whole[1][1][at])


# Columns of 16, 8 and 4 lanes: none, one to four beyond whole vectors, across samples and clips, and more than a panel.
SHARED = [(2, 2, 41, 1, 1, 9), (3, 1, 41, 1, 1, 17), (1, 2, 41, 1, 4, 16), (4, 2, 41, 1, 1, 13), (1, 2, 41, 1, 3, 11)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "middle_channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_weights_keep_the_tolerance_rule(isa, dtype, layout) -> None:
    """Tasks share the weights: panels of all widths and a thin one, blocks with a rest in every direction."""
    native, errors, hidden = _library.native(), Errors(ignored=RESULTS[1:6]), 1061
    assert native is not None and not native.fast_gru_few_weights(41, hidden)
    fewest = [] if dtype == torch.float32 and isa in ("portable", "avx2") else [(1, 2, 41, 1, 1, 3)]
    for shape in SHARED + fewest:
        assert native.fast_gru_by_columns(shape[0] * shape[4] * shape[5], 41, hidden, str(dtype)[6:], threads=2)
        tensors = inputs(shape, hidden, dtype)
        laid_out = [LAYOUTS[layout](tensors[0]), *tensors[1:]]
        grads = [torch.randn(shape).to(dtype), torch.randn(shape[:1] + shape[2:])]
        with rcu_ops.use_backend("cpu"):
            compare(tensors, laid_out, grads, errors)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_many_weights_do_not_depend_on_threads_layout_or_cuts(isa, shape, dtype) -> None:
    """The same bits by 1 to 5 threads, in every order of memory, saved or not, and clip by clip."""
    x, *weights, o0 = inputs(shape, 1061, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads, layout, save in ((1, "contiguous", True), (2, "channels_last", True), (5, "clips_first", False)):
            torch.set_num_threads(threads)
            found.append(torch.ops.rcu_ops.fast_gru(LAYOUTS[layout](x), *weights, o0, save))
    finally:
        torch.set_num_threads(before)
    state, steps = o0, []
    for k in range(x.shape[1]):
        o, state, *_ = torch.ops.rcu_ops.fast_gru(x[:, k : k + 1], *weights, state, False)
        steps.append(o)
    found.append((torch.cat(steps, 1), state))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0][:2], other, strict=False))
    assert not found[0][0].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "clips_first"])
@pytest.mark.parametrize("saved", [False, True])
def test_bf16_of_many_columns_and_weights_is_computed_in_fp32(monkeypatch, layout, saved) -> None:
    """Of more columns than panels are made of, where bf16 is not faster: the bits of fp32's results, rounded once."""
    monkeypatch.setenv("RCU_OPS_CPU_ISA", "avx512" if "avx512" in AVAILABLE else "portable")
    shape, hidden = (1, 2, 32, 1, 8, 26), 8000
    x, *weights, o0 = inputs(shape, hidden, torch.bfloat16)
    x = LAYOUTS[layout](x)
    with rcu_ops.use_backend("cpu"):
        assert "in fp32" in rcu_ops.explain("fast_gru", x, *weights, o0).plan
        assert "each weight read once" in rcu_ops.explain("fast_gru", x[..., 14:], *weights, o0[..., 14:]).plan
    grads = torch.randn(shape).bfloat16(), torch.randn_like(o0, dtype=torch.float32)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = [value.to(dtype) for value in (x, *weights, o0)]
        o, o_n, *kept = torch.ops.rcu_ops.fast_gru(*given, saved)
        # What is between the passes is rounded in bf16; the backward pass starts from the same numbers.
        between = [value.bfloat16().to(dtype) for value in (o, *kept)]
        if not saved:
            return o, o_n
        back = torch.ops.rcu_ops.fast_gru_backward(grads[0].to(dtype), grads[1], *given, *between, True, True)
        return o, o_n, *kept, *back

    got, wanted = run(torch.bfloat16), run(torch.float32)
    assert got[0].stride() == wanted[0].stride() and got[1].dtype == torch.float32
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "clips_first", "every_other_column"])
@pytest.mark.parametrize("saved", [False, True])
def test_many_channels_are_multiplied_alike_in_every_order(isa, layout, saved) -> None:
    """Sequences are laid out anew for the products, in blocks with a rest in every direction: no number changes."""
    shape, hidden = (2, 3, 579, 1, 5, 7), 145
    x, *weights, o0 = inputs(shape, hidden)
    grads = torch.randn(shape), torch.randn_like(o0)

    def run(order: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        given = order(x), *weights, order(o0[:, None])[:, 0]
        o, o_n, *kept = torch.ops.rcu_ops.fast_gru(*given, saved)
        if not saved:
            return o, o_n
        back = torch.ops.rcu_ops.fast_gru_backward(order(grads[0]), grads[1], *given, o, *kept, True, True)
        return o, o_n, *back

    got, wanted = run(LAYOUTS[layout]), run(LAYOUTS["channels_last"])
    assert got[0].stride(2) != 1 and wanted[0].stride(2) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("positions", [130, 250])
def test_gates_of_many_channels_are_read_as_they_were_saved(positions) -> None:
    """Panels may make bf16's forward pass, and the library, in fp32, its gradients; both agree how matrices lie."""
    shape = (1, 1, 512, 1, 1, positions)
    tensors, errors = inputs(shape, 3, torch.bfloat16), Errors()
    with rcu_ops.use_backend("cpu"):
        compare(tensors, tensors, [torch.randn(shape).bfloat16(), None], errors)
    errors.check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "middle_channels"])
def test_bf16_of_many_weights_keeps_the_tolerance_rule_as_this_processor_takes_it(layout) -> None:
    """In panels, or by the library where it multiplies bf16 faster: 70 columns, forward and backward."""
    shape, errors = (2, 2, 520, 1, 5, 7), Errors()
    tensors = inputs(shape, 130, torch.bfloat16)
    grads = [torch.randn(shape).bfloat16(), torch.randn(shape[:1] + shape[2:])]
    with rcu_ops.use_backend("cpu"):
        compare(tensors, [LAYOUTS[layout](tensors[0]), *tensors[1:]], grads, errors)
    errors.check()


def test_few_columns_of_more_channels_than_are_rounded_at_once() -> None:
    """Three columns are a panel of their own, whose factors go to bf16 1024 at a time where pairs are multiplied."""
    shape, errors = (1, 2, 1101, 1, 1, 3), Errors()
    tensors = inputs(shape, 7, torch.bfloat16)
    with rcu_ops.use_backend("cpu"):
        compare(tensors, tensors, [torch.randn(shape).bfloat16(), None], errors)
    errors.check()


def test_which_problems_go_by_columns() -> None:
    native = _library.native()
    assert native is not None
    by_columns = native.fast_gru_by_columns
    for threads in (1, 2, 8):
        assert by_columns(784, 64, 16, "float32", threads=threads)
    assert by_columns(196, 192, 48, "bfloat16", threads=8)
    assert not by_columns(49, 192, 48, "float32", threads=16)  # four vectors of columns for 16 threads
    amx = _library.native().cpu_isa() == "amx"  # which leaves bf16 to the library
    for dtype, avx512, least, most in (
        ("float32", True, 1, 256),
        ("float32", False, 8, 64),
        ("bfloat16", True, 1, 0 if amx else 256),
        ("bfloat16", False, 1, 0 if amx else 127),
    ):
        taken = [n for n in range(1, 400) if by_columns(n, 2048, 512, dtype, threads=16, avx512=avx512)]
        assert taken == list(range(least, most + 1))
    assert not by_columns(300, 4096, 1024, "float16", threads=2)  # their panels take 27 MB
    assert native.fast_gru_few_weights(192, 48) and not native.fast_gru_few_weights(512, 128)
    assert not by_columns(784, 64, 16, "float64", threads=1)
    width = native.fast_gru_panel_vectors
    assert width(49, lanes=16, threads=2) == 2 and width(784, lanes=16, threads=2) == 3
    for columns in (1, 15, 16, 17, 100, 392, 3136):
        for threads in (1, 2, 3, 16):
            chosen = width(columns, lanes=16, threads=threads)
            panels = -(-columns // (16 * chosen))
            rounds = -(-panels // threads)
            assert 1 <= chosen <= 3 and rounds * chosen <= -(-columns // (16 * threads)) + 3


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 1), (torch.float32, 49), (torch.float64, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_weights_over_many_columns(layout, dtype, threads, on_threads) -> None:
    """The library's sums are made in pieces of 64 columns, 64 at a time: here more than one time, and a rest.

    On few threads the sums in fp32 are those of panels.
    """
    shape, errors = (1, 3, 2, 1, 1, 2100), Errors()
    own = _library.native().fast_gru_gradients_by_columns(2100, 2, 2, str(dtype)[6:], threads=threads)
    assert own == (threads == 1 and dtype == torch.float32)
    for _ in range(18):
        tensors = inputs(shape, 2, dtype, with_o0=False)
        laid_out = [LAYOUTS[layout](tensors[0]), *tensors[1:]]
        with rcu_ops.use_backend("cpu"), on_threads(threads):
            compare(tensors, laid_out, [torch.randn(shape).to(dtype), None], errors)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_o0", [False, True])
def test_gradients_by_columns_do_not_depend_on_threads(isa, layout, dtype, with_o0, on_threads) -> None:
    """Twelve panels, across samples and with a rest."""
    shape = (3, 4, 32, 1, 5, 37)
    x, *weights, o0 = inputs(shape, 9, dtype, with_o0=with_o0)
    given = [LAYOUTS[layout](x), *weights, o0]
    grad_o, grad_o_n = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(shape[:1] + shape[2:])
    o, _, hidden, gates = torch.ops.rcu_ops.fast_gru(*given, True)
    found = []
    for threads in (1, 2, 3, 8):
        assert _library.native().fast_gru_gradients_by_columns(555, 32, 9, str(dtype)[6:], threads=threads)
        with on_threads(threads):
            found.append(torch.ops.rcu_ops.fast_gru_backward(grad_o, grad_o_n, *given, o, hidden, gates, True, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_by_columns_of_more_panels_than_sums(dtype, on_threads) -> None:
    """A task takes one panel after the other, and adds their sums up."""
    shape, errors = (2, 2, 256, 1, 1, 290), Errors()
    units = _library.native().fast_gru_gradient_units(580, 256, 64)
    assert units["panels"] == 2 and units["count"] == 10 and 580 % (2 * units["width"])
    tensors = inputs(shape, 64, dtype, with_o0=False)
    with rcu_ops.use_backend("cpu"), on_threads(1):
        compare(tensors, tensors, [torch.randn(shape).to(dtype), None], errors)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [(20, 5), (19, 7)], ids=str)
def test_gradients_by_columns_do_not_depend_on_the_call_before(isa, features, dtype, on_threads) -> None:
    """It leaves NaN in all memory of the thread, also where this one's channels, features and columns end."""

    def gradients(tensors: list[Tensor], grad_o: Tensor) -> list[Tensor]:
        o, _, hidden, gates = torch.ops.rcu_ops.fast_gru(*tensors, True)
        return torch.ops.rcu_ops.fast_gru_backward(grad_o, None, *tensors, o, hidden, gates, True, True)

    c, r = features
    given, grad_o = inputs((1, 3, c, 1, 1, 37), r, dtype), torch.randn(1, 3, c, 1, 1, 37).to(dtype)
    larger, grad_larger = inputs((1, 3, 32, 1, 1, 37), 16, dtype), torch.randn(1, 3, 32, 1, 1, 37).to(dtype)
    with on_threads(1):
        for sizes in (features, (32, 16)):
            assert _library.native().fast_gru_gradients_by_columns(37, *sizes, str(dtype)[6:], threads=1)
        first = gradients(given, grad_o)
        nothing = gradients([torch.full_like(t, torch.nan) for t in larger], grad_larger)
        assert all(t.isnan().all() for t in nothing)
        again = gradients(given, grad_o)
    for name, a, b in zip(RESULTS, first, again, strict=False):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


def test_units_of_gradients() -> None:
    native = _library.native()
    assert native.fast_gru_gradient_units(784, 64, 16) == {"width": 50, "panels": 1, "count": 16}
    for c, r in ((1, 1), (20, 5), (64, 16), (256, 64)):
        for columns in (1, 2, 31, 48, 97, 196, 784, 3136, 100_000):
            width, panels, count = native.fast_gru_gradient_units(columns, c, r).values()
            assert (count - 1) * panels * width < columns <= count * panels * width
            assert width % 2 == 0 and width <= 96
            numbers = 4 * r * -(-c // 16) * 16 + 2 * c * -(-r // 16) * 16 + 2 * c * -(-c // 16) * 16
            assert count * numbers <= 2**22 or count == 1
            assert native.fast_gru_gradients_by_columns(columns, c, r, "float32", threads=2 * count)
            assert not native.fast_gru_gradients_by_columns(columns, c, r, "float32", threads=2 * count + 1)
    assert not native.fast_gru_gradients_by_columns(784, 64, 16, "float64", threads=1)
    assert not native.fast_gru_gradients_by_columns(784, 512, 128, "float32", threads=1)
    assert not native.fast_gru_gradients_by_columns(0, 64, 16, "float32", threads=1)
