"""``soft_nearest_neighbor``, ``cycle_consistency``, ``temporal_cycle_loss``: alignment of two sequences of vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcu_ops import _library, reference
from rcu_ops.ops import _checks, _family, _planner, _selftest, _transforms, _triton
from rcu_ops.ops._family import Definition, Family
from rcu_ops.ops._registry import Operator, Overtaken, register, settled, wants_gradients
from rcu_ops.reference.cycle_consistency import CycleConsistency, loss_of_landing, present, squared_distances
from rcu_ops.reference.recurrent_conv import state_dtype_of

KINDS = ("regression", "classification")
PAIRS = ("each", "all")
REDUCTIONS = ("mean", "none")
_SHORT = 64  # frames of sequences that the CPU takes in one pass (most_frames_within)


def soft_nearest_neighbor(
    a: Tensor, b: Tensor, *, temperature: float = 1.0, mask_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For every frame of a its soft nearest neighbour in b and the frame of b nearest to that.

    Eqs. 4 and 5 of "Learn to Cycle": ``z_t = softmax_i(-|a_t - b_i|^2 / temperature)``, ``soft_t = sum_i z_ti b_i``,
    ``index_t = argmin_i |soft_t - b_i|^2``. Distances are sums of squared differences, never differences of squares, so
    a common offset or far-apart scenes in one sequence cost no accuracy; sums are fp32 for 16-bit inputs and fp64 for
    fp64. Bit-identical frames of b tie, and ties go to the lowest index.

    Args:
        a: [N,T,C], fp16, bf16, fp32 or fp64, any strides. N may be 0; T and C may not.
        b: [N,S,C], a's dtype and device, S > 0.
        temperature: > 0; divides the squared distances.
        mask_b: [N,S] bool, True where b has a frame, or None. What b holds elsewhere is never used, NaN included.

    Returns:
        ``(soft, index)``: soft [N,T,C] in a's dtype, zeros where b has no frame at all; index [N,T] int64, -1 where b
        has no frame or the distances are not numbers. soft is differentiable to any order in a and b, index is not.

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape, device or temperature, or a backend chosen by
        :func:`rcu_ops.use_backend` that cannot run these arguments.

    Under autocast 16-bit a and b are taken as fp32.
    """
    args = _check_soft(a, b, temperature=temperature, mask_b=mask_b)
    soft, index = SOFT.select(*args).run(*args)
    return soft, index


def cycle_consistency(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> CycleConsistency:
    """Whether every frame of a and of b maps to its own place in the other: the gate of SRTG.

    A frame is consistent when the frame nearest to its soft nearest neighbour (:func:`soft_nearest_neighbor`) has the
    same place in time; the gate is the conjunction over all frames in both directions, per sample. With T != S it is
    False. A frame that one sequence has and the other has not cannot map to its place.

    Args:
        a: [N,T,C]. b: [N,S,C]. temperature: as in :func:`soft_nearest_neighbor`.
        mask_a: [N,T] bool, True where a has a frame, or None. mask_b: [N,S], the same for b.

    Returns:
        A named tuple ``(gate, index_ab, index_ba)``: [N] bool, [N,T] int64, [N,S] int64; -1 for frames that are not
        there or have no nearest frame. Nothing of it is differentiable.

    Raises:
        TypeError, ValueError: as :func:`soft_nearest_neighbor`.
    """
    args = _check_cycle(a, b, temperature=temperature, mask_a=mask_a, mask_b=mask_b)
    return CycleConsistency(*CYCLE.select(*args).run(*args))


def temporal_cycle_loss(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "regression",
    temperature: float = 1.0,
    variance_weight: float = 0.001,
    min_variance: float = 1e-6,
    pairs: str = "each",
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The alignment losses of "Temporal Cycle-Consistency Learning": a -> its soft neighbour in b -> back to a.

    With p_t the softmax over k of ``-|soft_t - a_k|^2 / temperature``: "classification" is the cross entropy
    ``-log p_tt``; "regression" is ``(t - mu)^2 / sigma^2 + variance_weight log(sigma)`` with mu and sigma^2 the
    mean and variance of the frame number under p_t.

    Args:
        a: [N,T,C]. b: [N,S,C] (with pairs="all" [M,S,C]). mask_a, mask_b, temperature: as in :func:`cycle_consistency`.
        kind: "regression" or "classification".
        variance_weight: >= 0; min_variance: > 0, the least sigma^2, so that a certain landing has a finite loss.
        pairs: "each": sample n of a with sample n of b; "all": every sample of a with every sample of b, or, when b is
            the same tensor as a, with every other one.
        reduction: "mean" over the frames that are there, or "none".

    On a CPU sequences of up to 64 frames find the gradients of their mean loss along with it, where any will be asked
    for; longer ones keep their distances for them, [N,T,S] and [N,T,T], where they take little memory:
    :func:`rcu_ops.explain` says how much.

    Returns:
        A scalar, or [pairs,T] with zeros for frames that are not there (pairs = N, N M, or N (N - 1), ordered by a's
        sample); fp32 (fp64 for fp64 inputs), computed in that dtype throughout. Differentiable in a and b.

    Raises:
        TypeError, ValueError: as :func:`soft_nearest_neighbor`, and for an unknown kind, pairs or reduction.
    """
    args = _check_loss(
        a, b, kind=kind, temperature=temperature, variance_weight=variance_weight, min_variance=min_variance,
        pairs=pairs, mask_a=mask_a, mask_b=mask_b, reduction=reduction,
    )  # fmt: skip
    return LOSS.select(*args).run(*args)


# ---- checks -------------------------------------------------------------------------------------------------------


def _positive(name: str, value: Any, *, zero: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value >= 0 if zero else value > 0) or value == math.inf:
        raise ValueError(f"{name}: expected a finite number {'>=' if zero else '>'} 0, got {value}")
    return value


def _check_sequences(a: Tensor, b: Tensor, *, same_batch: bool = True) -> tuple[Tensor, Tensor]:
    # What a right call goes through is kept short: before a kernel of a few microseconds it is felt.
    if _checks.tensor("a", a).dim() != 3 or _checks.tensor("b", b).dim() != 3:
        _checks.dims("a", a, "[N,T,C]")
        _checks.dims("b", b, "[N,S,C]")
    (n, frames, c), (samples, others, channels) = a.shape, b.shape
    if frames == 0 or c == 0 or others == 0 or channels == 0:
        name, value = ("a", a) if frames == 0 or c == 0 else ("b", b)
        raise ValueError(f"{name}: expected at least one frame and one channel, got {list(value.shape)}")
    if channels != c or (same_batch and samples != n):
        meaning = "[N,S,C] with a's N and C" if same_batch else "[M,S,C]"
        _checks.shape("b", b, (n if same_batch else samples, others, c), meaning)
    _checks.same_device("b", b, a, "a")
    a, b = _family.autocast_to_fp32(a, b)
    _checks.dtype("b", b, a.dtype)
    return a, b


def _check_mask(name: str, mask: Tensor | None, like: Tensor, like_name: str) -> Tensor | None:
    if mask is None:
        return None
    _checks.shape(name, _checks.boolean(name, mask), tuple(like.shape[:2]), f"{like_name}'s samples and frames")
    _checks.same_device(name, mask, like, like_name)
    return mask


def _check_soft(
    a: Tensor, b: Tensor, *, temperature: float = 1.0, mask_b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, float, bool]:
    a, b = _check_sequences(a, b)
    return a, b, _check_mask("mask_b", mask_b, b, "b"), _positive("temperature", temperature), True


def _check_cycle(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    a, b = _check_sequences(a, b)
    masks = _check_mask("mask_a", mask_a, a, "a"), _check_mask("mask_b", mask_b, b, "b")
    return a.detach(), b.detach(), *masks, _positive("temperature", temperature)


def _check_loss(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "regression",
    temperature: float = 1.0,
    variance_weight: float = 0.001,
    min_variance: float = 1e-6,
    pairs: str = "each",
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    _checks.choice("kind", kind, KINDS)
    _checks.choice("pairs", pairs, PAIRS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    same = b is a
    a, b = _check_sequences(a, b, same_batch=pairs == "each")
    mask_a, mask_b = _check_mask("mask_a", mask_a, a, "a"), _check_mask("mask_b", mask_b, b, "b")
    state = state_dtype_of(a.dtype)
    if a.dtype != state:
        a, b = a.to(state), b.to(state)
    if pairs == "all":
        (a, mask_a), (b, mask_b) = _all_pairs(a, mask_a, b, mask_b, same)
    weights = _positive("variance_weight", variance_weight, zero=True), _positive("min_variance", min_variance)
    return a, b, mask_a, mask_b, _positive("temperature", temperature), kind, *weights, reduction


def _all_pairs(
    a: Tensor, mask_a: Tensor | None, b: Tensor, mask_b: Tensor | None, same: bool
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """The sequences of every pair, ordered by a's sample; a sample is no pair with itself."""
    if same and a.shape[0] == 1:
        raise ValueError("a: expected at least two samples to make pairs of, got 1")
    others = b.shape[0] - int(same)
    pair = torch.arange(a.shape[0] * others, device=a.device)
    first, second = pair // max(others, 1), pair % max(others, 1)
    if same:
        second = second + (second >= first)

    def taken(value: Tensor | None, index: Tensor) -> Tensor | None:
        return None if value is None else value.index_select(0, index)

    return (a.index_select(0, first), taken(mask_a, first)), (b.index_select(0, second), taken(mask_b, second))


# ---- registered operators -----------------------------------------------------------------------------------------


def _fake_soft(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[Tensor, Tensor]:
    n, t, c = a.shape
    return a.new_empty((n, t, c)), a.new_empty((n, t if need_index else 0), dtype=torch.int64)


def _fake_gradients(like_a: Tensor, like_b: Tensor) -> tuple[Tensor, Tensor]:
    return like_a.new_empty(like_a.shape), like_b.new_empty(like_b.shape)


def _fake_soft_backward(
    grad_soft: Tensor, a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(a, b)


def _fake_cycle(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, t, s = a.shape[0], a.shape[1], b.shape[1]
    indices = a.new_empty((n, t), dtype=torch.int64), a.new_empty((n, s), dtype=torch.int64)
    return a.new_empty((n,), dtype=torch.bool), *indices


def _fake_back(soft: Tensor, a: Tensor, mask_a: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (a.new_empty(a.shape[:2], dtype=state_dtype_of(a.dtype)) for _ in range(3))
    return first, second, third


def _fake_back_backward(
    grad_log_probability: Tensor, grad_mean: Tensor, grad_variance: Tensor, soft: Tensor, a: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(soft, a)


def _fake_loss(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape)


def _fake_kept_loss(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, t, s = a.shape[0], a.shape[1], b.shape[1]
    return *_fake_loss(a, b), a.new_empty((n, t, s + t))


def _fake_mean_loss(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(()), *_fake_gradients(a, b)


def _fake_loss_backward(grad_loss: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(a, b)


def _reference_soft(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[Tensor, Tensor]:
    soft, index = reference.soft_nearest_neighbor(a, b, temperature=temperature, mask_b=mask_b)
    return soft.contiguous(), index if need_index else index.new_empty((a.shape[0], 0))


def _reference_soft_backward(
    grad_soft: Tensor, a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    da, db = reference.soft_nearest_neighbor_backward(grad_soft, a, b, temperature=temperature, mask_b=mask_b)
    return da.contiguous(), db.contiguous()


def _reference_cycle(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    gate, index_ab, index_ba = reference.cycle_consistency(a, b, temperature=temperature, mask_a=mask_a, mask_b=mask_b)
    return gate, index_ab, index_ba


def _reference_back(
    soft: Tensor, a: Tensor, mask_a: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_probability, mean, variance = reference.cycle_back(soft, a, temperature=temperature, mask_a=mask_a)
    return log_probability.contiguous(), mean, variance


def _reference_back_backward(
    grad_log_probability: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    soft: Tensor,
    a: Tensor,
    mask_a: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    d_soft, da = reference.cycle_back_backward(
        grad_log_probability, grad_mean, grad_variance, soft, a, temperature=temperature, mask_a=mask_a
    )
    return d_soft.contiguous(), da.contiguous()


def _reference_loss(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    temperature: float,
    regression: bool,
    variance_weight: float,
    min_variance: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64
    queries = present(a, mask_a, wide)
    soft, _ = reference.soft_nearest_neighbor(queries, b.to(wide), temperature=temperature, mask_b=mask_b)
    landing = reference.cycle_back(soft, queries, temperature=temperature, mask_a=mask_a)
    kind = "regression" if regression else "classification"
    loss = loss_of_landing(landing, mask_a, mask_b, kind, variance_weight, min_variance)
    return loss.to(a.dtype), present(soft, mask_a, wide).to(a.dtype).contiguous()


def _reference_loss_backward(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    soft: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    temperature: float,
    regression: bool,
    variance_weight: float,
    min_variance: float,
) -> tuple[Tensor, Tensor]:
    # From a and b alone, so that its own gradients are those of soft, too.
    vjp: Any = torch.func.vjp
    _, pull = vjp(
        lambda x, y: _reference_loss(
            x, y, mask_a, mask_b, temperature, regression, variance_weight, min_variance
        )[0],
        a,
        b,
    )  # fmt: skip
    da, db = pull(grad_loss)
    return da.contiguous(), db.contiguous()


def _reference_mean_loss(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, soft = _reference_loss(a, b, mask_a, mask_b, *numbers)
    one = a.new_ones(())
    gradients = _reference_mean_loss_backward(one, a, b, soft, soft, mask_a, mask_b, *numbers)
    return _reduced(loss, mask_a, mask_b, "mean"), *gradients


def _reference_mean_loss_backward(
    grad_mean: Tensor,
    a: Tensor,
    b: Tensor,
    da: Tensor,
    db: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    # From a and b alone: da and db are functions of them.
    frames = a.shape[0] * a.shape[1] if mask_a is None and mask_b is None else _frames(a, mask_a, mask_b).sum()
    return _reference_loss_backward((grad_mean / frames).expand(a.shape[:2]), a, b, da, mask_a, mask_b, *numbers)


def _reference_kept_loss(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, soft = _reference_loss(a, b, mask_a, mask_b, *numbers)
    wide = torch.float64
    first, second = present(a, mask_a, wide), present(b, mask_b, wide)
    pairs = zip((first, soft.to(wide)), (second, first), (mask_b, mask_a), strict=True)
    distances = torch.cat([_distances_there(x, y, mask_a, mask) for x, y, mask in pairs], -1)
    return loss, soft, distances.to(a.dtype)


def _distances_there(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Tensor:
    distances = squared_distances(x, y)
    for mask, dim in ((mask_x, -1), (mask_y, -2)):
        distances = distances if mask is None else torch.where(mask.unsqueeze(dim), distances, 0)
    return distances


def _reference_kept_loss_backward(
    grad_loss: Tensor, a: Tensor, b: Tensor, soft: Tensor, distances: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _reference_loss_backward(grad_loss, a, b, soft, *rest)


# ---- autograd -----------------------------------------------------------------------------------------------------


def _save_soft(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, mask_b, ctx.temperature, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, mask_b)


def _soft_gradients(family: Family, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    da, db = family["soft_nearest_neighbor_backward"](grad, *ctx.saved_tensors, ctx.temperature)
    return da, db, None, None, None


def _gradients_by(name: str) -> Any:
    """The gradients of a loss by the operator ``name``, from all that was saved."""

    def gradients(family: Family, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        da, db = family[name](grad, *ctx.saved_tensors, *ctx.numbers)
        return da, db, None, None, None, None, None, None

    return gradients


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, mask_a, mask_b, *ctx.numbers = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, *output[1:], mask_a, mask_b)


def _save_loss_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.temperature, ctx.regression, ctx.variance_weight, ctx.min_variance = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.temperature = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


_transpose_soft_backward = _family.transpose_of(_reference_soft_backward, 3)
_transpose_back_backward = _family.transpose_of(_reference_back_backward, 5)


def _second_of(backward: Any) -> Any:
    """Gradients of a loss's gradients; not with respect to soft and distances, which are functions of a and b."""
    transpose = _family.transpose_of(backward, 3)

    def gradients(family: Family, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        numbers = ctx.temperature, ctx.regression, ctx.variance_weight, ctx.min_variance
        return transpose((*ctx.saved_tensors, *numbers), cotangents)

    return gradients


def _soft_second(family: Family, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _transpose_soft_backward((*ctx.saved_tensors, ctx.temperature), cotangents)


def _back_gradients(family: Family, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    soft, a, mask_a = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return (None,) * 4
    zeros = next(torch.zeros_like(grad) for grad in grads if grad is not None)
    given = [zeros if grad is None else grad for grad in grads]
    d_soft, da = family["cycle_back_backward"](*given, soft, a, mask_a, ctx.temperature)
    return d_soft, da, None, None


def _back_second(family: Family, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _transpose_back_backward((*ctx.saved_tensors, ctx.temperature), cotangents)


# ---- FLOPs: a squared difference that is added up counts as a multiply-add, as in a product of matrices -----------


def _product(n: int, t: int, s: int, c: int) -> int:
    return 2 * n * t * s * c


def _soft_flops(a: Any, b: Any, mask_b: Any, temperature: Any, need_index: bool, out_shape: Any = None) -> int:
    return _product(a[0], a[1], b[1], a[2]) * (2 + int(need_index))


def _soft_backward_flops(grad: Any, a: Any, b: Any, mask_b: Any, temperature: Any, out_shape: Any = None) -> int:
    return _product(a[0], a[1], b[1], a[2]) * 5  # distances, grad . b, da, and both parts of db


def _cycle_flops(a: Any, b: Any, mask_a: Any, mask_b: Any, temperature: Any, out_shape: Any = None) -> int:
    (n, t, c), s = a, b[1]
    distances = _product(n, t, s, c) + _product(n, t, t, c) + _product(n, s, s, c)
    return distances + _product(n, t, s, s) + _product(n, s, t, t)


def _back_flops(soft: Any, a: Any, mask_a: Any, temperature: Any, out_shape: Any = None) -> int:
    return _product(a[0], a[1], a[1], a[2])


def _back_backward_flops(
    g: Any, gm: Any, gv: Any, soft: Any, a: Any, mask_a: Any, temperature: Any, out_shape: Any = None
) -> int:
    return _product(a[0], a[1], a[1], a[2]) * 3


def _loss_flops(
    a: Any, b: Any, mask_a: Any, mask_b: Any, temperature: Any, regression: Any, weight: Any, least: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    return _soft_flops(a, b, mask_b, temperature, False) + _back_flops(a, a, mask_a, temperature)


def _loss_backward_flops(
    grad: Any, a: Any, b: Any, soft: Any, mask_a: Any, mask_b: Any, temperature: Any, regression: Any, weight: Any,
    least: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    of_back = _back_backward_flops(grad, grad, grad, soft, a, mask_a, temperature)
    return of_back + _soft_backward_flops(soft, a, b, mask_b, temperature)


def _kept_loss_backward_flops(
    grad: Any, a: Any, b: Any, soft: Any, distances: Any, *rest: Any, out_shape: Any = None
) -> int:
    known = _product(a[0], a[1], a[1] + b[1], a[2])
    return _loss_backward_flops(grad, a, b, soft, *rest) - known


def _mean_loss_flops(a: Any, b: Any, *rest: Any, out_shape: Any = None) -> int:
    return _loss_flops(a, b, *rest) + _kept_loss_backward_flops(a, a, b, a, a, *rest)


# ---- registration -------------------------------------------------------------------------------------------------

_DEFINITIONS = {
    "soft_nearest_neighbor": Definition(
        "(Tensor a, Tensor b, Tensor? mask_b, float temperature, bool need_index) -> (Tensor, Tensor)",
        _fake_soft,
        _reference_soft,
        _soft_flops,
        _soft_gradients,
        _save_soft,
    ),
    "soft_nearest_neighbor_backward": Definition(
        "(Tensor grad_soft, Tensor a, Tensor b, Tensor? mask_b, float temperature) -> (Tensor, Tensor)",
        _fake_soft_backward,
        _reference_soft_backward,
        _soft_backward_flops,
        _soft_second,
        _save_arguments,
    ),
    "cycle_consistency": Definition(
        "(Tensor a, Tensor b, Tensor? mask_a, Tensor? mask_b, float temperature) -> (Tensor, Tensor, Tensor)",
        _fake_cycle,
        _reference_cycle,
        _cycle_flops,
    ),
    "cycle_back": Definition(
        "(Tensor soft, Tensor a, Tensor? mask_a, float temperature) -> (Tensor, Tensor, Tensor)",
        _fake_back,
        _reference_back,
        _back_flops,
        _back_gradients,
        _save_arguments,
    ),
    "cycle_back_backward": Definition(
        "(Tensor grad_log_probability, Tensor grad_mean, Tensor grad_variance, Tensor soft, Tensor a, Tensor? mask_a, "
        "float temperature) -> (Tensor, Tensor)",
        _fake_back_backward,
        _reference_back_backward,
        _back_backward_flops,
        _back_second,
        _save_arguments,
    ),
}


def _one_call_per_sample(operator: Any) -> Any:
    return functools.partial(_transforms.one_call_per_sample, operator)


# The loss as one operator, of the binary alone: Triton's is put together from those above.
_LOSS = Family(
    {
        "temporal_cycle_loss": Definition(
            "(Tensor a, Tensor b, Tensor? mask_a, Tensor? mask_b, float temperature, bool regression, "
            "float variance_weight, float min_variance) -> (Tensor, Tensor)",
            _fake_loss,
            _reference_loss,
            _loss_flops,
            _gradients_by("temporal_cycle_loss_backward"),
            _save_loss,
        ),
        "temporal_cycle_loss_backward": Definition(
            "(Tensor grad_loss, Tensor a, Tensor b, Tensor soft, Tensor? mask_a, Tensor? mask_b, float temperature, "
            "bool regression, float variance_weight, float min_variance) -> (Tensor, Tensor)",
            _fake_loss_backward,
            _reference_loss_backward,
            _loss_backward_flops,
            _second_of(_reference_loss_backward),
            _save_loss_arguments,
        ),
        # Its mean over the frames that are there, [], and that mean's gradients, for short sequences on CPUs: much of
        # their work is the loss's own, and around kernels of so few microseconds every further call is felt.
        "temporal_cycle_loss_mean": Definition(
            "(Tensor a, Tensor b, Tensor? mask_a, Tensor? mask_b, float temperature, bool regression, "
            "float variance_weight, float min_variance) -> (Tensor, Tensor, Tensor)",
            _fake_mean_loss,
            _reference_mean_loss,
            _mean_loss_flops,
            _gradients_by("temporal_cycle_loss_mean_backward"),
            _save_loss,
            _one_call_per_sample,
        ),
        # Those gradients times what the mean's is.
        "temporal_cycle_loss_mean_backward": Definition(
            "(Tensor grad_mean, Tensor a, Tensor b, Tensor da, Tensor db, Tensor? mask_a, Tensor? mask_b, "
            "float temperature, bool regression, float variance_weight, float min_variance) -> (Tensor, Tensor)",
            _fake_loss_backward,
            _reference_mean_loss_backward,
            None,
            _second_of(_reference_mean_loss_backward),
            _save_loss_arguments,
            _one_call_per_sample,
        ),
        # The first with distances kept for the gradients: [N,T,S+T], of a's frames to b's and of soft neighbours to
        # a's, zero where there are no frames.
        "temporal_cycle_loss_kept": Definition(
            "(Tensor a, Tensor b, Tensor? mask_a, Tensor? mask_b, float temperature, bool regression, "
            "float variance_weight, float min_variance) -> (Tensor, Tensor, Tensor)",
            _fake_kept_loss,
            _reference_kept_loss,
            _loss_flops,
            _gradients_by("temporal_cycle_loss_kept_backward"),
            _save_loss,
        ),
        "temporal_cycle_loss_kept_backward": Definition(
            "(Tensor grad_loss, Tensor a, Tensor b, Tensor soft, Tensor distances, Tensor? mask_a, Tensor? mask_b, "
            "float temperature, bool regression, float variance_weight, float min_variance) -> (Tensor, Tensor)",
            _fake_loss_backward,
            _reference_kept_loss_backward,
            _kept_loss_backward_flops,
            _second_of(_reference_kept_loss_backward),
            _save_loss_arguments,
        ),
    }
)
_BINARY = Family(_DEFINITIONS)
_TRITON = Family(
    _DEFINITIONS, "_triton", _family.kernels_of("cycle_consistency", {name: name for name in _DEFINITIONS})
)


def _loss_with_triton(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    temperature: float,
    kind: str,
    variance_weight: float,
    min_variance: float,
    reduction: str,
) -> Tensor:
    a = present(a, mask_a, a.dtype)
    soft, _ = _TRITON["soft_nearest_neighbor"](a, b, mask_b, temperature, False)
    landing = _TRITON["cycle_back"](soft, a, mask_a, temperature)
    loss = loss_of_landing(landing, mask_a, mask_b, kind, variance_weight, min_variance)
    return _reduced(loss, mask_a, mask_b, reduction)


def _loss_at_once(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    temperature: float,
    kind: str,
    variance_weight: float,
    min_variance: float,
    reduction: str,
) -> Tensor:
    numbers = temperature, kind == "regression", variance_weight, min_variance
    name = _loss_operator(a, b, reduction)
    loss = _LOSS[name](a, b, mask_a, mask_b, *numbers)[0]
    return loss if name.endswith("mean") else _reduced(loss, mask_a, mask_b, reduction)


def _loss_operator(a: Tensor, b: Tensor, reduction: str) -> str:
    """Which operator finds a loss: the plain one, one that finds mean and gradients, or one that keeps distances.

    Tracers and transforms see the plain operator and PyTorch's mean, which they fuse and map.
    """
    if not a.is_cpu or not wants_gradients(a, b):
        return "temporal_cycle_loss"
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    short = not traced and a.shape[1] <= _SHORT and b.shape[1] <= _SHORT
    if short and reduction == "mean" and _library.has_kernel("temporal_cycle_loss_mean", "CPU"):
        return "temporal_cycle_loss_mean"
    return "temporal_cycle_loss_kept" if _keeps_distances(a, b) else "temporal_cycle_loss"


def _keeps_distances(a: Tensor, b: Tensor) -> bool:
    """Whether a loss keeps its distances for the gradients, as CPUs can.

    They are two products of eleven. They take up to four times what a, b and the soft neighbours do, which are kept in
    any case: less than half of what eager PyTorch keeps. Short sequences are quicker in one pass.
    """
    frames, others, channels = a.shape[1], b.shape[1], a.shape[2]
    if not settled(frames > _SHORT) and not settled(others > _SHORT):
        return False
    little = settled(frames * (frames + others) <= 4 * (2 * frames + others) * channels)
    on_cpu = a.is_cpu and _library.has_kernel("temporal_cycle_loss_kept", "CPU")
    return little and on_cpu and wants_gradients(a, b)


def _reduced(loss: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if mask_a is None and mask_b is None:
        return loss.mean()
    return loss.sum() / _frames(loss, mask_a, mask_b).sum()


def _frames(like: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
    """Which frames have a loss, [N,T] as ``like`` begins: those that are there, with frames of b to go through."""
    there = like.new_ones(like.shape[:2], dtype=torch.bool) if mask_a is None else mask_a
    return there if mask_b is None else there & mask_b.any(1, keepdim=True)


def _loss_by_reference(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    temperature: float,
    kind: str,
    variance_weight: float,
    min_variance: float,
    reduction: str,
) -> Tensor:
    loss = reference.temporal_cycle_loss(
        a, b, kind=kind, temperature=temperature, variance_weight=variance_weight, min_variance=min_variance,
        mask_a=mask_a, mask_b=mask_b,
    )  # fmt: skip
    return _reduced(loss, mask_a, mask_b, reduction)


def _soft_by_reference(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[Tensor, Tensor]:
    return reference.soft_nearest_neighbor(a, b, temperature=temperature, mask_b=mask_b)


# With gradients the Triton loss is 142 launches and more around kernels of 327 us (fp32, N16 T32 C128) and 869 us (N4
# T256 C128) and takes 4728 and 6325 us of the clock; eager PyTorch 2548 and 2947 (benchmarks/results/nvidia-h200/
# first_run/, not in a graph). The second is as much as was measured. Eager holds every difference of two frames in
# memory, so that more of them may turn it round. A loss without gradients was not measured, and stays Triton's.
_MEASURED_DIFFERENCES = 2**25


def _why_pytorch_loss(a: Tensor, b: Tensor, *_: Any) -> str | None:
    (n, t, c), s = a.shape, b.shape[1]
    few = settled(n * t * s * c <= _MEASURED_DIFFERENCES) and settled(n * t * t * c <= _MEASURED_DIFFERENCES)
    if not few or not wants_gradients(a, b):
        return None
    return "with gradients it is more launches than PyTorch's own operations, which were measured faster"


def _plan(words: Any, kinds: tuple[str, ...], source: Any = _library.native) -> Any:
    """How the kernels of these kinds of alignment find distances between a and b, and why.

    ``words`` takes what ``source`` returns (None: there are no words), a, a kind, the number of keys and the dtype's
    name.
    """

    def plan(a: Tensor, b: Tensor, *_: Any) -> str:
        planner = source()
        if planner is None:
            return _planner.NO_WORDS
        dtype = str(a.dtype).removeprefix("torch.")
        found = {kind: words(planner, a, kind, a.shape[1] if kind == "back" else b.shape[1], dtype) for kind in kinds}
        if len(set(found.values())) == 1:
            return str(found[kinds[0]])
        return "; ".join(f"{kind}: {text}" for kind, text in found.items())

    return plan


def _cpu_words(native: Any, a: Tensor, kind: str, keys: int, dtype: str) -> str:
    return native.cycle_consistency_plan(kind, a.shape[1], keys, a.shape[2], dtype)


def _cuda_words(native: Any, a: Tensor, kind: str, keys: int, dtype: str) -> str:
    if a.shape[0] == 0:
        return "nothing to run"
    n, t, c = a.shape
    return native.cycle_consistency_gpu_plan(
        kind,
        n,
        t,
        keys,
        c,
        dtype,
        **_planner.gpu_limits(a.device),
        sm90a=_planner.holds_sm90a(),
    )["text"]


def _triton_words(kernels: Any, a: Tensor, kind: str, keys: int, dtype: str) -> str:
    return str(kernels.describe(kind, a.shape[1], keys, a.shape[2]))


def _plans(*kinds: str) -> dict[str, Any]:
    return {
        "cpu_plan": _plan(_cpu_words, kinds),
        "cuda_plan": _plan(_cuda_words, kinds),
        "triton_plan": _plan(_triton_words, kinds, lambda: _triton.kernels("cycle_consistency")),
    }


def _loss_cpu_plan(a: Tensor, b: Tensor, *rest: Any) -> str:
    plan = _plans("loss")["cpu_plan"](a, b, *rest)
    if not _keeps_distances(a, b):
        return str(plan)
    kept = a.shape[0] * a.shape[1] * (a.shape[1] + b.shape[1]) * a.element_size()
    return f"{plan}; {kept} bytes of distances are kept for the gradients"


def _probe(device: str) -> tuple[Any, ...]:
    return torch.zeros(1, 3, 8, device=device), torch.zeros(1, 4, 8, device=device)


SOFT = register(
    Operator(
        "soft_nearest_neighbor",
        _family.backends(
            "cycle_consistency",
            ("soft_nearest_neighbor",),
            _BINARY["soft_nearest_neighbor"],
            _soft_by_reference,
            triton=lambda *args: _TRITON["soft_nearest_neighbor"](*args),
            **_plans("soft"),
        ),
        check=_check_soft,
        probe=lambda device: (*_probe(device), None, 1.0, True),
    )
)
CYCLE = register(
    Operator(
        "cycle_consistency",
        _family.backends(
            "cycle_consistency",
            ("cycle_consistency",),
            _BINARY["cycle_consistency"],
            _reference_cycle,
            triton=lambda *args: _TRITON["cycle_consistency"](*args),
            **_plans("cycle"),
        ),
        check=_check_cycle,
        probe=lambda device: (*_probe(device), None, None, 1.0),
    )
)
LOSS = register(
    Operator(
        "temporal_cycle_loss",
        _family.backends(
            "cycle_consistency",
            ("temporal_cycle_loss",),
            _loss_at_once,
            _loss_by_reference,
            triton=_loss_with_triton,
            triton_overtaken=Overtaken(
                f"losses with gradients of up to {_MEASURED_DIFFERENCES} differences: PyTorch is faster",
                _why_pytorch_loss,
            ),
            **(_plans("soft", "back") | {"cpu_plan": _loss_cpu_plan}),
        ),
        check=_check_loss,
        probe=lambda device: (*_probe(device), None, None, 1.0, "regression", 0.001, 1e-6, "mean"),
    )
)


# ---- self-test of the GPU kernels ------------------------------------------------------------------------------


def _selftest_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """Soft neighbours, landings and their gradients; index maps and gates of a short and of a longer pair."""
    generator = torch.Generator("cpu").manual_seed(30)

    def sequence(frames: int, channels: int = 40) -> Tensor:
        return (torch.randn(2, frames, channels, generator=generator, device="cpu") / 80**0.5).to(device, dtype)

    a, b, grad = sequence(13), sequence(19), sequence(13)

    def outputs(kind: str, state: torch.dtype | None, leaves: list[Tensor]) -> Any:
        if state is None:
            operator = getattr(operators, kind)
            return operator(*leaves, None, 1.0, *((False,) if kind == "soft_nearest_neighbor" else ()))
        return getattr(reference, kind)(*leaves, state_dtype=state)

    def run(kind: str, state: torch.dtype | None) -> list[Tensor]:
        pair = (a, b) if kind == "soft_nearest_neighbor" else (a, grad)
        leaves = [(v.detach() if state is None else v.detach().cpu().to(state)).requires_grad_() for v in pair]
        with torch.enable_grad():
            found = [v for v in outputs(kind, state, leaves) if v.is_floating_point()]
        weights = [grad if v.dim() == 3 else grad[..., 0] for v in found]
        gradients = torch.autograd.grad(found, leaves, [w.to(v) for w, v in zip(weights, found, strict=True)])
        return [*found, *gradients]

    for kind in ("soft_nearest_neighbor", "cycle_back"):
        exact, eager = (functools.partial(run, kind, state) for state in (torch.float64, dtype))
        yield _selftest.Case(kind, functools.partial(run, kind, None), exact, eager)
    for frames in (16, 40):
        first = sequence(frames, 20)
        near = (first.float() + 0.01 * sequence(frames, 20).float()).to(dtype)

        def got(first: Tensor = first, near: Tensor = near) -> list[Tensor]:
            return [v.double() for v in operators.cycle_consistency(first, near, None, None, 0.01)]

        def want(first: Tensor = first, near: Tensor = near) -> list[Tensor]:
            found = reference.cycle_consistency(first.cpu(), near.cpu(), temperature=0.01)
            return [v.double() for v in found]

        yield _selftest.Case(f"cycle of {frames} frames", got, want, want)


_selftest.register_backends(
    "cycle_consistency", _selftest_cases, (Path(__file__), *_triton.sources("cycle_consistency"))
)
