"""The CUDA kernels of cycle_consistency and srtg, run on the CPU: numerics, masks, magnitudes, layouts, sanitizers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from rcu_ops import reference
from rcu_ops.reference.cycle_consistency import loss_of_landing, present
from tests.cuda_host.harness import DTYPES, Machine, one_number_further, poisoned_like, state_dtype
from tests.ops import alignment
from tests.ops.test_srtg import LAYOUTS
from tests.tolerance import assert_close_to_reference

KINDS = ("soft", "cycle", "back", "soft_backward", "back_backward", "loss", "loss_backward")
PASSES = ("squeeze", "mul", "add", "backward")
SHAPES = [(2, 5, 7, 3), (1, 9, 9, 64), (1, 4, 11, 270), (1, 2, 34, 10)]
MANY_QUERIES = [(2, 40, 5, 40), (1, 67, 6, 130)]  # whole runs of 32, which gradients of keys take together


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, t, s, c = shape
    return (torch.randn(n, t, c) / (2 * c) ** 0.5).to(dtype), (torch.randn(n, s, c) / (2 * c) ** 0.5).to(dtype)


def masks(n: int, frames: int) -> Tensor:
    mask = torch.rand(n, frames) < 0.7
    mask[:, -1] = True
    return mask


def align(
    machine: Machine,
    kind: str,
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    numbers: dict[str, float] | None = None,
    **tensors: Tensor | None,
):
    """One problem, as the bindings put it; returns the outputs in the operator's order.

    Small as it is, it goes to the kernel for long sequences where that takes it, but for ``numbers``.
    """
    n, t, c = a.shape
    s = b.shape[1]
    indices = {"index_ab": torch.full((n, t), -7), "index_ba": torch.full((n, s), -7)}
    names = ("log_probability", "mean", "variance")
    landing = {name: torch.full((n, t), torch.nan, dtype=state_dtype(a.dtype)) for name in names}
    like_a = a.new_full((n, t, c), torch.nan)
    gradients = {"da": like_a, "db": a.new_full((n, s, c), torch.nan)}
    outputs = {
        "soft": {"soft": like_a, "index_ab": indices["index_ab"]},
        "cycle": {"gate": torch.full((n,), 7, dtype=torch.uint8), **indices},
        "back": landing,
        "soft_backward": gradients,
        "back_backward": gradients,
        "loss": {"loss": a.new_full((n, t), torch.nan), "soft": like_a},
        "loss_backward": gradients,
    }[kind]
    machine.call(
        "align",
        {"a": a, "b": b, **tensors, **outputs},
        kind=KINDS.index(kind), N=n, T=t, S=s, C=c, dtype=DTYPES.index(a.dtype), temperature=temperature,
        **{"most_by_differences": 0, **(numbers or {})},
    )  # fmt: skip
    return tuple(outputs.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_neighbors_and_cycles(machine, shape, dtype, masked, seed) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(n, t), masks(n, s)) if masked else (None, None)
    if masked:
        b[~mask_b] = torch.nan
    machine.seed = seed
    soft, index = align(machine, "soft", a, b, mask_b=mask_b)
    eager, _ = reference.soft_nearest_neighbor(a, b, mask_b=mask_b, state_dtype=dtype)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, mask_b=mask_b), eager, "soft")
    alignment.check_indices(index, a, b, mask_b=mask_b)
    gate, index_ab, index_ba = align(machine, "cycle", a, b, mask_a=mask_a, mask_b=mask_b)
    want = reference.cycle_consistency(a, b, mask_a=mask_a, mask_b=mask_b)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(gate.bool(), want.gate)
        assert torch.equal(index_ab, want.index_ab) and torch.equal(index_ba, want.index_ba)
    assert torch.equal(index_ab < 0, want.index_ab < 0) and torch.equal(index_ba < 0, want.index_ba < 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES + MANY_QUERIES, ids=str)
def test_gradients(machine, shape, dtype, masked, seed) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(n, t), masks(n, s)) if masked else (None, None)
    machine.seed = seed
    grad = torch.randn(a.shape).to(dtype)
    got = align(machine, "soft_backward", a, b, grad=grad, mask_b=mask_b)
    for name, *values in zip(("da", "db"), got, *_soft_gradients(a, b, grad, mask_b, dtype), strict=True):
        assert_close_to_reference(*values, name)
    soft = (a + 0.1 * torch.randn(a.shape)).to(dtype)
    landing = align(machine, "back", soft, a, mask_a=mask_a, mask_b=mask_a)
    exact = reference.cycle_back(soft.double(), a.double(), mask_a=mask_a)
    eager = reference.cycle_back(soft, a, mask_a=mask_a, state_dtype=dtype)
    for values in zip(landing, exact, eager, strict=True):
        assert_close_to_reference(*values)
    grads = [torch.randn(n, t) for _ in range(3)]
    names = ("grad_log_probability", "grad_mean", "grad_variance")
    got = align(machine, "back_backward", soft, a, mask_a=mask_a, mask_b=mask_a, **dict(zip(names, grads, strict=True)))

    def back(to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [v.to(to).requires_grad_() for v in (soft, a)]
        outputs = reference.cycle_back(*leaves, mask_a=mask_a, state_dtype=to)
        return torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])

    for values in zip(got, back(torch.float64), back(dtype), strict=True):
        assert_close_to_reference(*values)


def _soft_gradients(a: Tensor, b: Tensor, grad: Tensor, mask_b: Tensor | None, dtype: torch.dtype):
    for to in (torch.float64, dtype):
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        soft, _ = reference.soft_nearest_neighbor(*leaves, mask_b=mask_b, state_dtype=to)
        yield torch.autograd.grad(soft, leaves, grad.to(to))


@pytest.mark.parametrize(("kind", "masked"), [("regression", True), ("classification", False)])
@pytest.mark.parametrize("shape", [(6, 5, 7, 33), (6, 34, 35, 17)], ids=str)
def test_losses(machine, shape, kind, masked, seed) -> None:
    """Forward, and backward from a gradient with strides, against the reference in fp64; short and by products."""
    n, t, s, _ = shape
    a, b = inputs(shape, torch.float32)
    mask_a = mask_b = None
    if masked:
        mask_a, mask_b = masks(n, t), masks(n, s)
        mask_b[0] = False  # no way there
        a[~mask_a], b[~mask_b] = torch.nan, torch.inf
    machine.seed = seed
    numbers = {"regression": int(kind == "regression"), "variance_weight": 0.1, "min_variance": 0.5}
    run = functools.partial(align, machine, a=a, b=b, mask_a=mask_a, mask_b=mask_b, numbers=numbers, temperature=0.5)
    loss, soft = run("loss")
    grad = torch.randn(t, n).T
    d_soft = a.new_full(a.shape, torch.nan)
    found = loss, *run("loss_backward", grad_loss=grad, soft=soft, d_soft=d_soft)

    def exact(to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [present(v, mask, to).requires_grad_() for v, mask in ((a, mask_a), (b, mask_b))]
        got, _ = reference.soft_nearest_neighbor(*leaves, temperature=0.5, mask_b=mask_b, state_dtype=to)
        landing = reference.cycle_back(got, leaves[0], temperature=0.5, mask_a=mask_a, state_dtype=to)
        rows = loss_of_landing(landing, mask_a, mask_b, kind, 0.1, 0.5)
        return rows.detach(), *torch.autograd.grad(rows, leaves, grad.to(to))

    for name, *values in zip(("loss", "da", "db"), found, exact(torch.float64), exact(torch.float32), strict=True):
        assert_close_to_reference(*values, name)
    if masked:
        assert (loss[0] == 0).all() and (found[1][0] == 0).all() and (found[2][0] == 0).all()
        assert (loss[~mask_a] == 0).all() and (soft[~mask_a] == 0).all() and (found[1][~mask_a] == 0).all()


@pytest.mark.parametrize("frames", [20, 42])
def test_frames_keep_their_digits_beside_a_scene_of_far_larger_ones(machine, frames, seed) -> None:
    """Every other frame is of that scene, and has no gradient: what is judged has to do with small numbers alone."""
    near = torch.arange(frames) % 2 == 1
    a = torch.randn(1, frames, 24) + 1e4 * torch.randn(24) * ~near[:, None]
    b = a + 0.5 * torch.randn(a.shape)
    grads = {"grad": torch.randn(a.shape) * near[:, None]}
    grads |= {f"grad_{name}": torch.randn(1, frames) * near for name in ("log_probability", "mean", "variance")}
    machine.seed = seed
    run = functools.partial(align, machine, temperature=30.0)
    soft, _ = run("soft", a, b)
    of_grad = grads.pop("grad")
    of_soft = run("soft_backward", a, b, grad=of_grad)
    of_back = run("back_backward", soft, a, **grads)

    def plain(to: torch.dtype) -> tuple[Tensor, ...]:
        first, second = (v.to(to).requires_grad_() for v in (a, b))
        found, _ = reference.soft_nearest_neighbor(first, second, temperature=30.0, state_dtype=to)
        given, keys = (v.to(to).requires_grad_() for v in (soft, a))
        landing = reference.cycle_back(given, keys, temperature=30.0, state_dtype=to)
        weights = [g.to(to) for g in grads.values()]
        of_landing = torch.autograd.grad(landing, (given, keys), weights)
        return found.detach(), *torch.autograd.grad(found, (first, second), of_grad.to(to)), *of_landing

    values = zip((soft, *of_soft, *of_back), plain(torch.float64), plain(torch.float32), strict=True)
    for name, triple in zip(("soft", "da", "db", "d soft", "da of back"), values, strict=True):
        assert_close_to_reference(*(value[:, near] for value in triple), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["offset", "cut", "huge", "tiny", "copies"])
def test_indices_whatever_the_magnitude(machine, case, dtype) -> None:
    frames, temperature = 20, 1.0
    a = torch.randn(1, frames, 24)
    b = a + 0.3 * torch.randn(1, frames, 24)
    if case == "offset":
        a, b = a + 1e4, b + 1e4
    if case == "cut":
        far = torch.where(torch.arange(frames) < 10, -1e5, 1e5)[:, None]
        a, b = a + far, b + far
    if case == "huge":
        a, b, temperature = a * 1e31, b * 1e31, 1e38
    if case == "tiny":
        a, b, temperature = a * 1e-31, b * 1e-31, 1e-30
    if case == "copies":
        b[:, 1::2] = b[:, ::2]
    a, b = a.to(dtype), b.to(dtype)
    soft, index = align(machine, "soft", a, b, temperature=temperature)
    assert soft.isfinite().all()
    _, excused = alignment.check_indices(index, a, b, temperature)
    assert excused == 0
    _, index_ab, index_ba = align(machine, "cycle", a, b, temperature=temperature)
    alignment.check_indices(index_ab, a, b, temperature)
    alignment.check_indices(index_ba, b, a, temperature)


CLUSTERS = {"architecture": 90, "multiprocessors": 16, "shared_bytes": 227 * 1024}


@pytest.mark.parametrize("device", [{"multiprocessors": 8}, CLUSTERS], ids=["launches", "clusters"])
@pytest.mark.parametrize("view", ["rows", "odd rows", "channels apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_cycles_in_splits(machine, view, dtype, device, seed) -> None:
    """Channels over several blocks, the last with few or none; rows copied by 16 bytes, by 4 or fewer, or number by
    number: the same numbers."""
    n, t, s, c = 2, 9, 21, 1030
    a, b = (x.to(dtype) for x in inputs((n, t, s, c), torch.float32))
    mask_a, mask_b = masks(n, t), masks(n, s)
    b[~mask_b] = torch.inf
    layouts = {
        "rows": lambda x: torch.cat([x, x[..., :10]], 2)[..., :c],  # 1040 numbers apart
        "odd rows": lambda x: torch.cat([x, x[..., :1]], 2)[..., :c],
        "channels apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    machine.seed, machine.device = seed, device
    got = align(machine, "cycle", layouts[view](a), layouts[view](b), mask_a=mask_a, mask_b=mask_b, temperature=0.3)
    for x, y, index, mask_x, mask_y in ((a, b, got[1], mask_a, mask_b), (b, a, got[2], mask_b, mask_a)):
        assert torch.equal(index >= 0, mask_x)
        for sample in range(n):
            rows = mask_x[sample]
            alignment.check_indices(
                index[sample][rows][None], x[sample][rows][None], y[sample][None], 0.3, mask_y[sample][None]
            )
    machine.device = {"multiprocessors": 1}
    whole = align(machine, "cycle", a, b, mask_a=mask_a, mask_b=mask_b, temperature=0.3)
    assert all(torch.equal(x, y) for x, y in zip(got, whole, strict=True))


@pytest.mark.parametrize("device", [{"multiprocessors": 4}, CLUSTERS], ids=["launches", "clusters"])
def test_short_cycles_in_splits_whatever_the_magnitude(machine, device) -> None:
    machine.device = device
    for magnitude in (1e31, 1e-31):
        a = magnitude * torch.randn(1, 11, 1030)
        b = a + 0.3 * magnitude * torch.randn(a.shape)
        temperature = 100 * magnitude**2
        _, *found = align(machine, "cycle", a, b, temperature=temperature)
        for index, x, y in zip(found, (a, b), (b, a), strict=True):
            assert alignment.check_indices(index, x, y, temperature)[1] == 0


def test_equal_frames_of_short_cycles_tie(machine) -> None:
    b = torch.randn(1, 6, 40)[:, [3, 0, 3, 1, 0, 5, 1, 2, 3, 4]]
    _, index_ab, index_ba = align(machine, "cycle", b, b, temperature=1e-3)
    lowest = (b[0][:, None] == b[0][None]).all(-1).int().argmax(1)
    assert torch.equal(index_ab[0], lowest) and torch.equal(index_ba[0], lowest)
    gate, *_ = align(machine, "cycle", b[:, :4], b[:, :4] + 1e-4, temperature=1e-3)
    assert not gate.any()
    gate, *_ = align(machine, "cycle", b[:, 1:4], b[:, 1:4] + 1e-4, temperature=1e-3)
    assert gate.all()


def test_nothing_to_map_to_and_not_a_number(machine) -> None:
    a, b = inputs((3, 4, 4, 6), torch.float32)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    a[2, 1, 3] = torch.nan
    soft, index = align(machine, "soft", a, b, mask_b=mask)
    want, want_index = reference.soft_nearest_neighbor(a, b, mask_b=mask)
    torch.testing.assert_close(soft, want, equal_nan=True)
    assert torch.equal(index, want_index)
    gate, *indices = align(machine, "cycle", a, b, mask_a=mask, mask_b=mask)
    want = reference.cycle_consistency(a, b, mask_a=mask, mask_b=mask)
    assert torch.equal(gate.bool(), want.gate)
    assert all(torch.equal(x, y) for x, y in zip(indices, want[1:], strict=True))
    for result in align(machine, "soft_backward", a[:2], b[:2], grad=torch.randn(2, 4, 6), mask_b=mask[:2]):
        assert (result[1] == 0).all() and result.isfinite().all()


def test_rows_in_the_scratch_and_strides(machine) -> None:
    """A device with little shared memory keeps rows in the scratch; the result is the same, bit for bit."""
    a, b = inputs((2, 6, 9, 40), torch.float32)
    want = align(machine, "soft", a, b)
    machine.device = {"shared_bytes": 5 * 1024}
    views = a.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([b, b], -1)[..., 0]
    assert all(torch.equal(x, y) for x, y in zip(align(machine, "soft", *views), want, strict=True))


# ---- long sequences: distances by products on the matrix unit --------------------------------------------------------

LONG = [(1, 35, 50, 20), (2, 17, 34, 70), (1, 18, 33, 150)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sequences(machine, shape, dtype, masked, seed) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(n, t), masks(n, s)) if masked else (None, None)
    if masked:
        a[~mask_a], b[~mask_b] = torch.inf, torch.nan
    machine.seed = seed
    queries = a if mask_a is None else torch.where(mask_a[..., None], a, 0)
    soft, index = align(machine, "soft", queries, b, mask_b=mask_b, temperature=0.3)
    options = {"temperature": 0.3, "mask_b": mask_b}
    eager, _ = reference.soft_nearest_neighbor(queries, b, **options, state_dtype=dtype)
    assert_close_to_reference(soft, alignment.soft_neighbors(queries, b, **options), eager, "soft")
    alignment.check_indices(index, queries, b, **options)
    landing = align(machine, "back", b, b, mask_a=mask_b, mask_b=mask_b, temperature=0.3)
    found = [
        reference.cycle_back(b.to(state), b.to(state), mask_a=mask_b, temperature=0.3, state_dtype=state)
        for state in (torch.float64, dtype)
    ]
    for values in zip(landing, *found, strict=True):
        assert_close_to_reference(*values)
    if min(t, s) <= 32:
        return
    gate, *indices = align(machine, "cycle", a, b, mask_a=mask_a, mask_b=mask_b, temperature=0.3)
    assert not gate.any()
    for x, y, got, own, other in ((a, b, indices[0], mask_a, mask_b), (b, a, indices[1], mask_b, mask_a)):
        there = torch.ones_like(got, dtype=torch.bool) if own is None else own
        assert torch.equal(got >= 0, there)
        for sample in range(n):
            rows, mask = there[sample], None if other is None else other[sample][None]
            alignment.check_indices(got[sample][rows][None], x[sample][rows][None], y[sample][None], 0.3, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sequences_of_few_pairs(machine, shape, masked, seed) -> None:
    """By differences, as the planner has it: soft neighbours and where they land, of queries that fill no block."""
    a, b = inputs(shape, torch.float32)
    n, s, _ = b.shape
    mask = masks(n, s) if masked else None
    machine.seed = seed
    run = functools.partial(align, machine, temperature=0.3, numbers={"most_by_differences": 2**18})
    soft, index = run("soft", a, b, mask_b=mask)
    eager, _ = reference.soft_nearest_neighbor(a, b, mask_b=mask, temperature=0.3, state_dtype=torch.float32)
    exact = alignment.soft_neighbors(a, b, temperature=0.3, mask_b=mask)
    assert_close_to_reference(soft, exact, eager, "soft")
    alignment.check_indices(index, a, b, 0.3, mask)
    landing = run("back", b, b, mask_a=mask, mask_b=mask)
    found = [
        reference.cycle_back(b.to(state), b.to(state), mask_a=mask, temperature=0.3, state_dtype=state)
        for state in (torch.float64, torch.float32)
    ]
    for values in zip(landing, *found, strict=True):
        assert_close_to_reference(*values)


def moving(frames: int, channels: int) -> tuple[Tensor, Tensor]:
    """Slowly, so that many frames have a say, and a noisy copy."""
    a = 0.3 * torch.randn(1, frames, channels).cumsum(1)
    return a, a + 0.05 * torch.randn(1, frames, channels)


@pytest.mark.parametrize("case", ["still", "flat", "offset", "cut", "huge", "tiny", "copies"])
def test_long_sequences_whatever_the_magnitude(machine, case) -> None:
    """Distances by products: right where they cannot be trusted, and the test's own bound is rarely needed."""
    frames, channels, temperature = 50, 24, 1.0
    a, b = moving(frames, channels)
    if case == "flat":
        temperature = 1e4
    if case == "offset":
        a, b = a + 1e5, b + 1e5
    if case == "cut":
        far = 1e5 * torch.randn(2, channels)[torch.arange(frames) * 2 // frames]
        a, b = a + far, b + far
    if case == "huge":
        a, b, temperature = a * 1e31, b * 1e31, 1e62
    if case == "tiny":
        a, b, temperature = a * 1e-31, b * 1e-31, 1e-62
    if case == "copies":
        b = b[:, torch.arange(frames) // 3 * 3]
    rows = excused = 0
    soft, index = align(machine, "soft", a, b, temperature=temperature)
    assert soft.isfinite().all()
    if case not in ("huge", "tiny"):  # beyond eager's range
        eager, _ = reference.soft_nearest_neighbor(a, b, temperature=temperature, state_dtype=torch.float32)
        assert_close_to_reference(soft, alignment.soft_neighbors(a, b, temperature), eager, "soft")
    _, index_ab, index_ba = align(machine, "cycle", a, b, temperature=temperature)
    for x, y, got in ((a, b, index), (a, b, index_ab), (b, a, index_ba)):
        more_rows, more = alignment.check_indices(got, x, y, temperature)
        rows, excused = rows + more_rows, excused + more
    assert excused <= 0.02 * rows, f"{excused} of {rows} rows needed the rounding bound"
    if case == "copies":
        assert (index_ab % 3 == 0).all() and (index % 3 == 0).all()


def test_long_rows_in_the_scratch_and_strides(machine) -> None:
    """A device with little shared memory keeps rows in the scratch; the result is the same, bit for bit."""
    a, b = inputs((2, 35, 40, 20), torch.float32)
    mask = masks(2, 40)
    want = [*align(machine, "soft", a, b, mask_b=mask), *align(machine, "cycle", a, b, mask_b=mask)]
    machine.device = {"shared_bytes": 4 * 1024, "multiprocessors": 1}  # two blocks, which take several tasks
    views = a.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([b, b], -1)[..., 0]
    got = [*align(machine, "soft", *views, mask_b=mask), *align(machine, "cycle", *views, mask_b=mask)]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_long_sequences_with_nothing_to_map_to_and_not_a_number(machine) -> None:
    a, b = inputs((3, 34, 34, 16), torch.float32)
    mask = torch.ones(3, 34, dtype=torch.bool)
    mask[1] = False
    a[2, 1, 3] = torch.nan
    soft, index = align(machine, "soft", a, b, mask_b=mask)
    want, want_index = reference.soft_nearest_neighbor(a, b, mask_b=mask)
    torch.testing.assert_close(soft, want, equal_nan=True)
    assert torch.equal(index, want_index)
    gate, *indices = align(machine, "cycle", a, b, mask_a=mask, mask_b=mask)
    want = reference.cycle_consistency(a, b, mask_a=mask, mask_b=mask)
    assert torch.equal(gate.bool(), want.gate)
    assert all(torch.equal(x, y) for x, y in zip(indices, want[1:], strict=True))


def gate_data(
    machine: Machine,
    name: str,
    x: Tensor,
    h: Tensor | None = None,
    gate: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    n, c, t, height, width = x.shape
    y = None if name == "squeeze" else poisoned_like(x)
    sums = torch.full((n, t, c), torch.nan, dtype=state_dtype(x.dtype)) if name in ("squeeze", "backward") else None
    machine.call(
        "gate_data",
        {"x": x, "y": y, "grad": grad, "h": h, "gate": gate, "sums": sums},
        **{"pass": PASSES.index(name)}, N=n, C=c, T=t, H=height, W=width, dtype=DTYPES.index(x.dtype),
    )  # fmt: skip
    return y, sums


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 2, 5, 7), (3, 3, 3, 1, 2), (1, 72, 2, 12, 16), (2, 12, 3, 33, 32)], ids=str)
def test_data_path(machine, shape, dtype, layout, seed) -> None:
    machine.seed = seed
    # small integers: nothing rounds, whatever the order, but for the quotient of the mean
    x, grad = (torch.randint(-4, 5, shape).to(dtype) for _ in range(2))
    n, c, t, height, width = shape
    h = torch.randint(-4, 5, (n, t, c)).to(state_dtype(dtype))
    gate = torch.arange(n) % 2 == 0
    laid_out = LAYOUTS[layout](x)
    _, mean = gate_data(machine, "squeeze", laid_out)
    want = x.to(h.dtype).sum((3, 4)).transpose(1, 2) / (height * width)
    assert torch.equal(mean, want)
    for given in (gate, None):
        for name in ("mul", "add"):
            y, _ = gate_data(machine, name, laid_out, h, given)
            assert torch.equal(y, reference.srtg_fuse(x, h, given, fusion=name))
        dx, dh = gate_data(machine, "backward", laid_out, h, given, LAYOUTS["contiguous"](grad))
        want_dx, want_dh = reference.srtg_fuse_backward(grad, x, h, given)
        assert torch.equal(dx, want_dx) and torch.equal(dh, want_dh)


def test_means_keep_the_tolerance_rule(machine) -> None:
    for layout in ("contiguous", "channels_last_3d"):
        x = LAYOUTS[layout](torch.randn(1, 40, 2, 9, 11))
        exact = x.double().mean((3, 4)).transpose(1, 2)
        assert_close_to_reference(gate_data(machine, "squeeze", x)[1], exact, x.mean((3, 4)).transpose(1, 2))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed)
    a, b = inputs((2, 5, 9, 70), torch.bfloat16)
    mask_a, mask_b = masks(2, 5), masks(2, 9)
    run = functools.partial(align, machine)
    for tensors in ({}, {"mask_a": mask_a, "mask_b": mask_b}):
        run("cycle", a, b, **tensors)
    wide = [torch.randn(1, frames, 1032) for frames in (30, 7)]
    for machine.device in ({"multiprocessors": 4}, CLUSTERS):
        run("cycle", a[..., :1].expand(2, 5, 1026), b[..., :1].expand(2, 9, 1026))
        run("cycle", *wide)
    machine.device = {"multiprocessors": 4}
    long = [torch.randn(1, frames, 16) for frames in (34, 36)]
    run("cycle", *long, mask_b=masks(1, 36))
    for further in (a[..., :64].contiguous(), long[0]):  # no copies of 16 bytes
        run("cycle", further, one_number_further(further))
        run("soft", one_number_further(further), further)
    run("soft", *long, temperature=1e4)
    run("soft", a, b, mask_b=mask_b)
    run("soft_backward", a, b, grad=torch.randn_like(a))
    run("back", a, a, mask_a=mask_a, mask_b=mask_a)
    names = ("grad_log_probability", "grad_mean", "grad_variance")
    run("back_backward", a, a, **{name: torch.randn(2, 5) for name in names})
    numbers = {"regression": 1, "variance_weight": 0.1, "min_variance": 0.5}
    ways = {"mask_a": mask_a, "mask_b": mask_b, "numbers": numbers}
    _, soft = run("loss", a.float(), b.float(), **ways)
    run("loss_backward", a.float(), b.float(), soft=soft, grad_loss=torch.randn(2, 5), d_soft=soft.clone(), **ways)
    for layout, shape in (("contiguous", (33, 5)), ("channels_last_3d", (33, 5)), ("channels_last_3d", (36, 4))):
        channels, width = shape
        x, h = torch.randn(1, channels, 2, 3, width), torch.randn(1, 2, channels)
        laid_out = LAYOUTS[layout](x)
        gate_data(machine, "squeeze", laid_out)
        gate_data(machine, "mul", laid_out, h, torch.ones(1).bool())
        gate_data(machine, "backward", laid_out, h, None, laid_out)
        gate_data(machine, "backward", laid_out, h, None, one_number_further(laid_out))
