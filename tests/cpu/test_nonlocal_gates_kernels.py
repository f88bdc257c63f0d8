"""CPU kernels of nonlocal_gates through torch.ops: every instruction set, both forms of the backward pass, tails."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import rcu_ops  # noqa: F401  (defines the operators and loads the library)
from rcu_ops import _library, reference
from tests.cpu.test_recurrent_conv_kernels import isa, poisoned_scratch  # noqa: F401  (fixtures)
from tests.ops import exact_nonlocal as exact
from tests.ops.test_nonlocal_gates import eager, eager_step, gradients, inputs, random_mask, step_inputs
from tests.tolerance import assert_close_to_reference

if not _library.LIBRARY.exists():
    pytest.skip("the kernel library was not built", allow_module_level=True)

kernels = torch.ops.rcu_ops
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: B, N, M, D, Dv: tails of every block; long enough for blocks of queries and of keys; one partial vector.
SHAPES = [(2, 15, 33, 47, 65), (1, 150, 301, 20, 24), (3, 8, 7, 3, 5)]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, count: bool) -> Tensor:
    return kernels.nonlocal_attention(query, key, value, mask, 0.9, count)


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_on_every_instruction_set(isa, shape, dtype, masked, count) -> None:  # noqa: F811
    arguments, grad = inputs(shape, dtype), torch.randn(shape[0], shape[1], shape[4]).to(dtype)
    mask = random_mask(*shape[:3]) if masked else None
    options = {"mask": mask, "scale": 0.9, "normalize": "count" if count else "softmax"}
    got = attend(*arguments, mask, count)
    assert_close_to_reference(got, exact.attention(*arguments, **options), eager(*arguments, **options))
    call = functools.partial(attend, mask=mask, count=count)
    rough = gradients(functools.partial(eager, **options), arguments, [grad])
    for g, w, e in zip(
        gradients(call, arguments, [grad]), exact.attention_gradients(grad, *arguments, **options), rough, strict=True
    ):
        assert_close_to_reference(g, w, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 19, 33, 50), (1, 150, 16, 24)], ids=str)
def test_step_on_every_instruction_set(isa, shape, dtype) -> None:  # noqa: F811
    arguments = step_inputs(shape, dtype)
    results = kernels.relational_lstm_step(*arguments)
    for got, want, rough in zip(results, exact.step(*arguments), eager_step(*arguments), strict=True):
        assert_close_to_reference(got, want, rough)
    grads = [torch.randn(shape[0], shape[1], shape[3]).to(r.dtype) for r in results]
    for g, w, e in zip(
        gradients(kernels.relational_lstm_step, arguments, grads),
        exact.step_gradients(*grads, *arguments),
        gradients(eager_step, arguments, grads),
        strict=True,
    ):
        assert_close_to_reference(g, w, e)


def test_samples_whole_or_in_blocks_give_the_same_bits(isa) -> None:  # noqa: F811
    """With more threads than samples the backward pass is cut into queries and keys, and recomputes the maps."""
    step = step_inputs((1, 60, 33, 70))
    grads, threads = [torch.randn(1, 60, 70)] * 2, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = gradients(kernels.relational_lstm_step, step, grads)
        torch.set_num_threads(7)
        parts = gradients(kernels.relational_lstm_step, step, grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("keys", [49, 53, 60])
def test_keys_beyond_whole_panels_have_one_score(isa, keys) -> None:  # noqa: F811
    """One key, some, or many beyond panels of 48: as columns of a block of queries, and as rows of one of keys."""
    arguments, grad = inputs((1, 55, keys, 150, 70), torch.float32, 2.0), torch.randn(1, 55, 70)
    call, threads = functools.partial(attend, mask=None, count=False), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = gradients(call, arguments, [grad])
        torch.set_num_threads(7)
        parts = gradients(call, arguments, [grad])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    options = {"mask": None, "scale": 0.9, "normalize": "softmax"}
    wanted = exact.attention_gradients(grad, *arguments, **options)
    rough = gradients(functools.partial(eager, **options), arguments, [grad])
    for got, want, e in zip(whole, wanted, rough, strict=True):
        assert_close_to_reference(got, want, e)


@pytest.mark.parametrize("count", [False, True])
def test_long_samples_add_up_block_by_block(isa, count) -> None:  # noqa: F811
    """Gradients of keys and values over blocks of queries, the second of which holds dead queries alone."""
    arguments, grad = inputs((1, 520, 310, 20, 54), torch.float32), torch.randn(1, 520, 54)
    mask, threads = random_mask(1, 520, 310), torch.get_num_threads()
    mask[:, 256:512] = False
    options = {"mask": mask, "scale": 0.9, "normalize": "count" if count else "softmax"}
    call = functools.partial(attend, mask=mask, count=count)
    try:
        torch.set_num_threads(1)
        whole = gradients(call, arguments, [grad])
        torch.set_num_threads(3)
        parts = gradients(call, arguments, [grad])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    wanted = exact.attention_gradients(grad, *arguments, **options)
    rough = gradients(functools.partial(eager, **options), arguments, [grad])
    for got, want, e in zip(whole, wanted, rough, strict=True):
        assert_close_to_reference(got, want, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 49, 33, 50), (1, 150, 16, 24), (2, 290, 8, 17)], ids=str)
def test_what_a_step_keeps_gives_the_bits_of_what_is_computed_again(isa, shape, dtype) -> None:  # noqa: F811
    """Weights and gates kept for the backward pass, by whole samples, in rounds, and cut into queries and keys."""
    b, p, _, dv = shape
    step, threads = step_inputs(shape, dtype), torch.get_num_threads()
    step[2][0, 1, :, 0] = -torch.inf  # scores that are all -inf: a gate of dead queries
    step[1][0, 1, :, 0] = 1.0
    grads = [torch.randn(b, p, dv) for _ in range(2)]

    def run(*args: Tensor) -> list[Tensor]:
        return [*kernels.relational_lstm_step(*args), *gradients(kernels.relational_lstm_step, args, grads)]

    def run_kept(gates: int, *args: Tensor) -> list[Tensor]:
        call = lambda *a: kernels.relational_lstm_step_kept(*a, gates)[:2]  # noqa: E731
        return [*call(*args), *gradients(call, args, grads)]

    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            wanted = run(*step)
            assert all(w.isfinite().all() for w in wanted)
            for gates in (0, 1, 4):
                assert all(torch.equal(a, b) for a, b in zip(run_kept(gates, *step), wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
    if dtype != torch.float32:
        return
    _, _, weights, before = kernels.relational_lstm_step_kept(*step, 3)
    exact_weights, exact_gates = reference.nonlocal_gates.relational_lstm_gates(*(t.double() for t in step[:4]))
    rough_weights, rough_gates = reference.nonlocal_gates.relational_lstm_gates(*step[:4])
    assert not weights[0, 1, :, :p].any()
    assert_close_to_reference(weights[..., :p], exact_weights, rough_weights)
    assert_close_to_reference(before, exact_gates[:, :3], rough_gates[:, :3])


def test_steps_of_many_positions_go_in_rounds(isa) -> None:  # noqa: F811
    """A step's weights are kept for a block of queries, and give the bits of weights that are recomputed."""
    step, threads = step_inputs((2, 290, 20, 54)), torch.get_num_threads()
    grads = [torch.randn(2, 290, 54) for _ in range(2)]
    results = []
    try:
        for count in (1, 2, 13):
            torch.set_num_threads(count)
            results.append(gradients(kernels.relational_lstm_step, step, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    wanted, rough = exact.step_gradients(*grads, *step), gradients(eager_step, step, grads)
    for got, want, e in zip(results[0], wanted, rough, strict=True):
        assert_close_to_reference(got, want, e)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), None),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), torch.zeros(1, 3, 4), None),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).double(), torch.zeros(1, 3, 4), None),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), None),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 3)),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)),
    ],
)
def test_direct_callers_are_checked_too(arguments) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        kernels.nonlocal_attention(*arguments, 1.0, False)


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (0, torch.zeros(2, 3, 3, 6)),
        (1, torch.zeros(2, 4, 2, 5)),
        (3, torch.zeros(2, 4, 3, 6).half()),
        (4, torch.zeros(2, 3, 5)),
        (4, torch.zeros(2, 3, 6).double()),
    ],
)
def test_direct_callers_of_the_step_are_checked_too(index, wrong) -> None:
    sizes = ((2, 4, 3, 6), (2, 4, 3, 5), (2, 4, 3, 5), (2, 4, 3, 6), (2, 3, 6))
    arguments = [torch.zeros(s) for s in sizes]
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match="expected"):
        kernels.relational_lstm_step(*arguments)
    arguments[index] = torch.zeros(sizes[index])
    with pytest.raises(RuntimeError, match="expected at least one"):
        kernels.relational_lstm_step_backward(None, None, *arguments)
