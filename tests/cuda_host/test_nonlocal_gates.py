"""The CUDA kernels of nonlocal_gates, unchanged, thread by thread on a CPU: numerics, layouts, masks, sanitizers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.cuda_host.harness import DTYPES, LaunchError, Machine, one_number_further, state_dtype
from tests.ops import exact_nonlocal as exact
from tests.ops.test_nonlocal_gates import LAYOUTS, eager, eager_step, gradients, inputs, random_mask, step_inputs
from tests.tolerance import assert_close_to_reference

#: B, N, M, D, Dv
SHAPES = [(2, 5, 7, 9, 12), (1, 49, 49, 33, 70), (1, 3, 131, 40, 5), (2, 36, 1, 1, 130)]


def _rows(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """[B,rows,columns] as [B,1,rows,columns]."""
    return {
        name: value.unsqueeze(1) if value is not None and value.dim() == 3 and name != "mask" else value
        for name, value in tensors.items()
    }


def _sizes(machine: Machine, query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    b, g = query.shape[:2] if query.dim() == 4 else (query.shape[0], 1)
    sizes = {"B": b, "G": g, "N": query.shape[-2], "M": key.shape[-2], "D": query.shape[-1], "E": value.shape[-1]}
    return {**sizes, "dtype": DTYPES.index(query.dtype), "plain": int(machine.plain), "products": machine.products}


def attention(machine: Machine, query, key, value, *, mask=None, scale=1.0, normalize="softmax") -> Tensor:
    out = torch.full((*query.shape[:-1], value.shape[-1]), torch.nan, dtype=query.dtype)
    tensors = {"query": query, "key": key, "value": value, "mask": mask, "out": out}
    count = int(normalize == "count")
    machine.call("attend", _rows(tensors), **_sizes(machine, query, key, value), scale=scale, count=count)
    return out


def attention_gradients(
    machine: Machine, grad, query, key, value, *, mask=None, scale=1.0, normalize="softmax"
) -> tuple[Tensor, ...]:
    outputs = {f"d{name}": torch.full(t.shape, torch.nan, dtype=t.dtype) for name, t in
               (("query", query), ("key", key), ("value", value))}  # fmt: skip
    tensors = {"query": query, "key": key, "value": value, "mask": mask, "grad": grad, **outputs}
    count = int(normalize == "count")
    machine.call("attend_grad", _rows(tensors), **_sizes(machine, query, key, value), scale=scale, count=count)
    return tuple(outputs.values())


def step(machine: Machine, x_gates, query, key, value, cell) -> tuple[Tensor, Tensor]:
    outputs = {"h": torch.full(cell.shape, torch.nan, dtype=x_gates.dtype)}
    outputs["c"] = torch.full(cell.shape, torch.nan, dtype=state_dtype(x_gates.dtype))
    tensors = {"x_gates": x_gates, "query": query, "key": key, "value": value, "cell": cell, **outputs}
    machine.call("step", _rows(tensors), **_sizes(machine, query, key, value), scale=1.0, count=0)
    return outputs["h"], outputs["c"]


def step_gradients(machine: Machine, grad_h, grad_c, x_gates, query, key, value, cell) -> tuple[Tensor, ...]:
    given = {"x_gates": x_gates, "query": query, "key": key, "value": value, "cell": cell}
    names = {"x_gates": "dx_gates", "query": "dquery", "key": "dkey", "value": "dvalue", "cell": "dcell"}
    outputs = {names[name]: torch.full(t.shape, torch.nan, dtype=t.dtype) for name, t in given.items()}
    tensors = {**given, "grad_h": grad_h, "grad_c": grad_c, **outputs}
    machine.call("step_grad", _rows(tensors), **_sizes(machine, query, key, value), scale=1.0, count=0)
    return tuple(outputs.values())


def check_attention(
    machine: Machine,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout="contiguous",
    *,
    masked=False,
    scale=1.0,
    normalize="softmax",
) -> None:
    """Of results of a few numbers alone the error is luck: several draws are judged together then."""
    results: dict[str, list[tuple[Tensor, ...]]] = {}
    b, n, m, d, e = shape
    for _ in range(16 if m * min(d, e) < 8 else 1):
        arguments, grad = inputs(shape, dtype), torch.randn(b, n, e).to(dtype)
        options = {"mask": random_mask(b, n, m) if masked else None, "scale": scale, "normalize": normalize}
        laid_out = [LAYOUTS[layout](a) for a in (*arguments, grad)]
        got = attention(machine, *laid_out[:3], **options)
        if masked:
            assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))
        found = (got, *attention_gradients(machine, laid_out[3], *laid_out[:3], **options))
        precise = (exact.attention(*arguments, **options), *exact.attention_gradients(grad, *arguments, **options))
        rough = (eager(*arguments, **options), *gradients(partial(eager, **options), arguments, [grad]))
        for name, *values in zip(("out", "dquery", "dkey", "dvalue"), found, precise, rough, strict=True):
            results.setdefault(name, []).append(tuple(values))
    for name, draws in results.items():
        assert_close_to_reference(*(torch.cat(values) for values in zip(*draws, strict=True)), name)


def check_step(machine: Machine, shape: tuple[int, ...], dtype: torch.dtype, given=(True, True), wide=True) -> None:
    """B, P, D, Dv; which of grad_h and grad_c there are."""
    arguments = step_inputs(shape, dtype, wide_cell=wide)
    for values in zip(step(machine, *arguments), exact.step(*arguments), eager_step(*arguments), "hc", strict=True):
        assert_close_to_reference(*values)
    grads = [torch.randn(arguments[4].shape).to(t) if has else None
             for has, t in zip(given, (dtype, state_dtype(dtype)), strict=True)]  # fmt: skip
    results, precise = step_gradients(machine, *grads, *arguments), exact.step_gradients(*grads, *arguments)
    rough = gradients(eager_step, arguments, grads)
    names = ("dx_gates", "dquery", "dkey", "dvalue", "dcell")
    for values in zip(results, precise, rough, names, strict=True):
        assert_close_to_reference(*values)


@pytest.mark.parametrize("normalize", ["softmax", "count"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(machine, dtype, masked, normalize, seed) -> None:
    machine.seed, machine.plain = seed, True
    for shape in SHAPES:
        check_attention(machine, shape, dtype, masked=masked, scale=1.3, normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(machine, dtype, seed) -> None:
    machine.seed, machine.plain = seed, True
    check_step(machine, (2, 9, 24, 70), dtype)
    check_step(machine, (1, 49, 40, 36), dtype, (True, False), False)
    check_step(machine, (1, 1, 8, 8), dtype, (False, True))


# Of each matrix-unit kernel: the device, and how it says it ran.
TILES = {
    "alone": ({"multiprocessors": 1}, "tiles: "),
    "shares": ({"multiprocessors": 16}, "channels shared by"),
    "cluster": ({"architecture": 90, "multiprocessors": 16, "shared_bytes": 227 * 1024, "resident": 8}, "clusters of"),
}


@pytest.mark.parametrize(
    ("dtype", "kernel"), [*((torch.bfloat16, k) for k in TILES), (torch.float16, "shares")], ids=str
)
def test_on_the_matrix_unit(machine, dtype, kernel, seed) -> None:
    machine.seed = seed
    machine.device, words = TILES[kernel]
    # groups of four that are not full; two blocks of rows; several tiles of keys and slices of channels
    for shape, masked, normalize in (
        ((6, 5, 7, 16, 16), False, "softmax"),
        ((6, 5, 7, 16, 16), True, "count"),
        ((1, 49, 49, 72, 136), True, "softmax"),
        ((1, 20, 130, 40, 72), False, "softmax"),
        ((1, 20, 196, 32, 8), True, "count"),
    ):
        arguments, options = inputs(shape, dtype), {"normalize": normalize, "scale": 1.3}
        options["mask"] = random_mask(*shape[:3]) if masked else None
        got = attention(machine, *arguments, **options)
        assert not machine.plan.startswith("plain")
        assert_close_to_reference(got, exact.attention(*arguments, **options), eager(*arguments, **options))
    check_step(machine, (1, 35, 72, 136), dtype)
    assert words in machine.plan and "gradients" in machine.plan
    check_step(machine, (2, 9, 24, 72), dtype, (True, False), False)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.bfloat16, "alone"), (torch.bfloat16, "shares"), (torch.float16, "shares")], ids=str
)
def test_gradients_on_the_matrix_unit(machine, dtype, kernel, seed) -> None:
    machine.seed = seed
    machine.device, _ = TILES[kernel]
    # several samples; blocks that are not full; several tiles of the other side, slices of channels, stages of depth
    for shape, masked, normalize in (
        ((3, 5, 7, 16, 16), False, "softmax"),
        ((1, 49, 49, 72, 136), True, "softmax"),
        ((1, 20, 196, 32, 8), True, "count"),
        ((1, 130, 35, 200, 24), False, "count"),
        ((1, 40, 130, 8, 264), False, "softmax"),
    ):
        check_attention(machine, shape, dtype, masked=masked, scale=1.3, normalize=normalize)
        assert "keys, on the matrix unit" in machine.plan
    check_step(machine, (1, 35, 72, 136), dtype, wide=False)


def test_shares_of_gradients_change_no_bit(machine) -> None:
    arguments, grad = inputs((1, 40, 70, 200, 264), torch.bfloat16), torch.randn(1, 40, 264).bfloat16()
    found = []
    for multiprocessors, machine.seed in ((1, 0), (64, 1), (64, 2)):
        machine.device = {"multiprocessors": multiprocessors}
        found.append(attention_gradients(machine, grad, *arguments))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_dead_queries_reach_no_gradient_on_the_matrix_unit(machine) -> None:
    query, key, value = (t.bfloat16() for t in inputs((1, 6, 40, 8, 16)))
    mask = torch.ones(1, 6, 40, dtype=torch.bool)
    mask[0, 2], mask[0, :, 7] = False, False
    grad = torch.randn(1, 6, 16).bfloat16()
    query[0, 2], grad[0, 2] = torch.inf, torch.nan  # of a query that sees nothing
    value[0, 7] = torch.inf  # of a key that nobody sees
    results = attention_gradients(machine, grad, query, key, value, mask=mask)
    assert torch.equal(results[0][0, 2], torch.zeros(8).bfloat16())
    assert not results[1][0, 7].any() and not results[2][0, 7].any()
    rows, keys = [0, 1, 3, 4, 5], [j for j in range(40) if j != 7]
    alive = query[:, rows], key[:, keys], value[:, keys]
    want = exact.attention_gradients(grad[:, rows], *alive)
    rough = gradients(eager, alive, [grad[:, rows]])
    for g, w, e in zip((results[0][:, rows], *(r[:, keys] for r in results[1:])), want, rough, strict=True):
        assert_close_to_reference(g, w, e)


def test_one_bit_pattern_whatever_the_schedule(machine) -> None:
    arguments = step_inputs((1, 20, 40, 72), torch.bfloat16)
    machine.device, _ = TILES["cluster"]
    found = []
    for machine.seed in range(4):
        found.append(step(machine, *arguments))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernel", ["alone", "cluster"])
def test_dead_and_infinite_on_the_matrix_unit(machine, kernel) -> None:
    machine.device, _ = TILES[kernel]
    query, key, value = (t.bfloat16() for t in inputs((1, 6, 40, 8, 16)))
    query[0, 1] *= 1e4
    query[0, 2], key = -torch.inf, key.abs() + 0.1
    value[0, 5, 3] = torch.inf
    query[0, 4, 0] = torch.nan
    got, want = attention(machine, query, key, value), eager(query.float(), key.float(), value.float())
    assert torch.equal(got[0, 2], torch.zeros(16).bfloat16())
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("layout", ["channel_slice", "every_other_row"])  # of unit stride: others are copied before
def test_layouts(machine, layout) -> None:
    check_attention(machine, (2, 11, 18, 35, 37), torch.bfloat16, layout)


@pytest.mark.parametrize("moved", range(4))
def test_rows_that_begin_anywhere_are_not_for_the_matrix_unit(machine, moved) -> None:
    """A query, key, value or gradient one number after an aligned address: whichever it is, the plan says so."""
    arguments = [*inputs((1, 20, 30, 16, 24), torch.bfloat16), torch.randn(1, 20, 24).bfloat16()]
    placed = [one_number_further(a) if i == moved else a for i, a in enumerate(arguments)]
    got = attention(machine, *placed[:3])
    assert ("rows are not aligned to 16 bytes" in machine.plan) == (moved < 3)
    assert_close_to_reference(got, exact.attention(*arguments[:3]), eager(*arguments[:3]))
    results = attention_gradients(machine, placed[3], *placed[:3])
    assert "rows are not aligned to 16 bytes" in machine.plan
    precise = exact.attention_gradients(arguments[3], *arguments[:3])
    for values in zip(results, precise, gradients(eager, arguments[:3], [arguments[3]]), strict=True):
        assert_close_to_reference(*values)


def test_weights_that_do_not_fit_are_made_again(machine, seed) -> None:
    machine.seed = seed
    for shared_bytes in (42 * 1024, 163 * 1024):
        machine.device = {"shared_bytes": shared_bytes, "multiprocessors": 1}
        for normalize in ("softmax", "count"):
            check_attention(machine, (1, 34, 150, 20, 140), torch.float32, masked=True, normalize=normalize)
    machine.device = {"shared_bytes": 66 * 1024}
    check_step(machine, (1, 70, 20, 70), torch.float32)


def test_channels_shared_by_blocks_change_no_bit(machine) -> None:
    arguments, grad = inputs((2, 20, 30, 300, 300)), torch.randn(2, 20, 300)
    machine.device = {"multiprocessors": 1}
    one = attention(machine, *arguments), *attention_gradients(machine, grad, *arguments)
    machine.device = {"multiprocessors": 64}
    many = attention(machine, *arguments), *attention_gradients(machine, grad, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_large_scores_and_dead_queries(machine) -> None:
    query, key, value = inputs((1, 6, 40, 8, 9), torch.float32)
    query *= 1e4
    want = exact.attention(query, key, value)
    assert_close_to_reference(attention(machine, query, key, value), want, eager(query, key, value))
    query[0, 2], key = -torch.inf, key.abs() + 0.1  # all its scores are -inf
    value[0, 5] = 1.0
    grad = torch.randn(1, 6, 9)
    grad[0, 2] = torch.nan
    out, results = attention(machine, query, key, value), attention_gradients(machine, grad, query, key, value)
    assert torch.equal(out[0, 2], torch.zeros(9)) and out.isfinite().all()
    assert torch.equal(results[0][0, 2], torch.zeros(8))
    alive = [0, 1, 3, 4, 5]
    want = exact.attention_gradients(grad[:, alive], query[:, alive], key, value)
    rough = gradients(eager, (query[:, alive], key, value), [grad[:, alive]])
    for got, w, e in zip((results[0][:, alive], *results[1:]), want, rough, strict=True):
        assert_close_to_reference(got, w, e)


def test_not_a_number_propagates(machine) -> None:
    query, key, value = inputs((1, 4, 6, 8, 5))
    query[0, 1, 3] = torch.nan
    value[0, 2, 4] = torch.inf
    torch.testing.assert_close(attention(machine, query, key, value), eager(query, key, value), equal_nan=True)


@pytest.mark.parametrize("normalize", ["softmax", "count"])
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)], ids=str
)
def test_empty_sizes(machine, shape, normalize) -> None:
    b, n, m, d, e = shape
    arguments, grad = (torch.randn(b, n, d), torch.randn(b, m, d), torch.randn(b, m, e)), torch.randn(b, n, e)
    got = (
        attention(machine, *arguments, normalize=normalize),
        *attention_gradients(machine, grad, *arguments, normalize=normalize),
    )
    want = (
        exact.attention(*arguments, normalize=normalize),
        *exact.attention_gradients(grad, *arguments, normalize=normalize),
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float())


# ---- by a library's products: the kernels between them, and those that mend after them -------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_products(machine, dtype, seed) -> None:
    machine.seed, machine.products = seed, 1
    for shape, masked, normalize in (
        ((3, 5, 7, 9, 12), False, "softmax"),
        ((2, 37, 45, 20, 136), True, "softmax"),  # the first query of a sample sees nothing: it is mended
        ((2, 10, 33, 8, 7), True, "count"),
        ((1, 9, 6, 5, 8), False, "count"),
    ):
        check_attention(machine, shape, dtype, masked=masked, scale=1.3, normalize=normalize)
    check_attention(machine, (2, 6, 9, 10, 12), dtype, "every_other_row")
    check_step(machine, (2, 9, 24, 132), dtype)
    check_step(machine, (1, 12, 8, 30), dtype, (True, False), False)
    check_step(machine, (2, 5, 8, 516), dtype, (False, True), False)


def test_gates_that_share_keys_by_products(machine) -> None:
    """An expanded key lies in no row with the samples: one product per gate."""
    machine.products = 1
    arguments = step_inputs((2, 6, 8, 16))
    arguments[2] = arguments[2][:, :1].expand(-1, 4, -1, -1)
    for values in zip(step(machine, *arguments), exact.step(*arguments), eager_step(*arguments), "hc", strict=True):
        assert_close_to_reference(*values)


def test_maps_of_many_problems_are_made_in_parts(machine) -> None:
    """Gradients take half of the problems at a time where that is much memory."""
    machine.products = 1
    check_attention(machine, (5, 150, 130, 4, 8), torch.float32)


def test_dead_queries_by_products_reach_nobody(machine) -> None:
    machine.products = 1
    query, key, value = inputs((2, 34, 20, 8, 9))
    query[0, 33], key = -torch.inf, key.abs() + 0.1  # all its scores are -inf
    query[0, 2] *= 1e4
    grad = torch.randn(2, 34, 9)
    grad[0, 33] = torch.nan
    out, results = attention(machine, query, key, value), attention_gradients(machine, grad, query, key, value)
    assert torch.equal(out[0, 33], torch.zeros(9)) and torch.equal(results[0][0, 33], torch.zeros(8))
    for sample, rows in ((0, slice(0, 33)), (1, slice(None))):
        alive = query[sample, rows][None], key[sample][None], value[sample][None]
        g = grad[sample, rows][None]
        found = out[sample, rows], results[0][sample, rows], results[1][sample], results[2][sample]
        want = exact.attention(*alive), *exact.attention_gradients(g, *alive)
        rough = eager(*alive), *gradients(eager, alive, [g])
        for got, w, e in zip(found, want, rough, strict=True):
            assert_close_to_reference(got[None], w, e)


def test_mending_changes_nothing_but_rows_that_begin_with_nan(machine) -> None:
    query, key, value = inputs((2, 40, 9, 8, 150), torch.float32)
    want = attention(machine, query, key, value)
    broken = torch.full_like(want, 3.0)
    broken[1, 35] = torch.nan
    machine.products = 2  # mends what is there
    tensors = {"query": query, "key": key, "value": value, "out": broken}
    machine.call("attend", _rows(tensors), **_sizes(machine, query, key, value), scale=1.0, count=0)
    assert torch.equal(broken[1, 32:], want[1, 32:])  # a block's rows
    assert (broken[0] == 3).all() and (broken[1, :32] == 3).all()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed)
    machine.products = 1
    check_attention(machine, (2, 5, 40, 9, 12), torch.bfloat16, masked=True)
    check_step(machine, (1, 6, 8, 36), torch.float32, wide=False)
    machine.products = 0
    check_attention(machine, (1, 5, 70, 33, 36), torch.bfloat16, "every_other_row", masked=True)
    check_step(machine, (1, 35, 40, 20), torch.float32, wide=False)
    machine.device = {"shared_bytes": 42 * 1024}
    check_attention(machine, (1, 33, 100, 20, 40), torch.float32)
    for kernel in ("shares", "cluster"):
        machine.device, words = TILES[kernel]
        # two tiles of keys and slices of channels, two stages of the scores, none of them full
        check_attention(machine, (1, 18, 70, 40, 136), torch.bfloat16, masked=True)
        check_step(machine, (1, 20, 40, 72), torch.float16)
        assert words in machine.plan


def test_too_many_rows_are_refused(machine) -> None:
    one = torch.zeros(1, 1, 1, 1)
    sizes = {"B": 2**33, "G": 1, "N": 1, "M": 1, "D": 1, "E": 1, "dtype": 1, "plain": 0, "products": 0}
    tensors = dict.fromkeys(("query", "key", "value"), one) | {"out": one.clone()}
    with pytest.raises(LaunchError, match="too many rows"):
        machine.call("attend", tensors, **sizes, scale=1.0, count=0)
