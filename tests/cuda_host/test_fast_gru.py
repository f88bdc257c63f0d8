"""The CUDA passes of fast_gru, unchanged, thread by thread on a CPU: numerics, layouts, sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda_host.harness import DTYPES, poisoned_like, state_dtype
from tests.tolerance import assert_close_to_reference

Values = dict[int, Any]


class Extended:
    """The functions of torch that the formulas use, on numpy's extended precision: exact for fp64 results."""

    tanh = staticmethod(np.tanh)
    where = staticmethod(np.where)

    @staticmethod
    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))


def _added(v: Values) -> Any:
    return v[0] + v[1] if 1 in v else v[0]


def _hidden(m: Any, v: Values) -> Values:
    return {0: m.where(_added(v) < 0, 0.0, _added(v))}


def _gates(m: Any, v: Values) -> Values:
    r = m.sigmoid(v[0])
    return {0: r, 1: m.sigmoid(v[1]), 3: r * v[2]}


def _gated(m: Any, v: Values) -> Values:
    return {3: m.sigmoid(v[0]) * v[2]}


def _output(m: Any, v: Values) -> Values:
    c = m.tanh(_added(v))
    o = (1 - v[2]) * v[3] + v[2] * c
    return {0: c, 3: o, 4: o, 5: o}


def _advanced(m: Any, v: Values) -> Values:
    kept = _output(m, {**v, 2: m.sigmoid(v[2])})
    return {i: kept[i] for i in (3, 4, 5)}


def _d_output(m: Any, v: Values) -> Values:
    g, z, c, before = v[0], v[3], v[4], v[5]
    for i in (1, 2):
        g = g + v[i] if i in v else g
    return {0: g * (1 - z), 6: g * z * (1 - c * c), 7: g * (c - before) * z * (1 - z)}


def _d_gates(m: Any, v: Values) -> Values:
    carry, q, r, before = (v[i] for i in range(4))
    return {0: carry + q * r, 4: q * before * r * (1 - r), 5: r * before}


def _d_hidden(m: Any, v: Values) -> Values:
    return {0: m.where(v[1] > 0, v[0], 0.0)}


def _sum(m: Any, v: Values) -> Values:
    return {0: sum(v.values())}


# Per pass: formula, inputs, operands in the arithmetic's type; in the order of fast_gru::Pass.
PASSES: list[tuple[Callable[[Any, Values], Values], Sequence[int], Sequence[int]]] = [
    (_hidden, (0, 1), ()),
    (_gates, (0, 1, 2), (2,)),
    (_output, (0, 1, 2, 3), (3,)),
    (_d_output, (0, 1, 2, 3, 4, 5), (0,)),
    (_d_gates, (0, 1, 2, 3), (0,)),
    (_d_hidden, (0, 1), ()),
    (_sum, (1, 2, 3), (1,)),
]
WITHOUT_KEEPING = {1: _gated, 2: _advanced}
OPTIONAL = {
    _hidden: [(), (1,)],
    _output: [(), (1,)],
    _d_output: [(), (1,), (1, 2)],
    _sum: [(), (2,), (2, 3), (1,)],
}
CASES = [(i, absent, True) for i, (formula, _, _) in enumerate(PASSES) for absent in OPTIONAL.get(formula, [()])]
CASES += [(1, (), False), (2, (), False), (2, (1,), False)]


def plane(shape: tuple[int, int, int], dtype: torch.dtype, layout: int) -> Tensor:
    """Memory for an operand: dense, with gaps between rows and segments, segments outermost, or beginning anywhere."""
    rows, segments, length = shape
    if layout == 0:
        return torch.empty(shape, dtype=dtype)
    if layout == 3:  # aligned to nothing but its numbers
        return torch.empty(rows * segments * length + 1, dtype=dtype)[1:].view(shape)
    if layout == 1:
        return torch.empty(rows + 1, segments + 2, length + 16, dtype=dtype)[1:, 1:-1, 8:-8]
    return torch.empty(segments, rows, length, dtype=dtype).transpose(0, 1)


def check(
    machine, index: int, absent: Sequence[int], shape: tuple[int, int, int], dtype, layout: int, wide=False, keep=True
):
    formula, given, in_state = PASSES[index]
    if not keep:
        formula = WITHOUT_KEEPING[index]
    state = state_dtype(dtype)
    inputs = {i: torch.randn(shape).to(state if i in in_state else dtype) for i in given if i not in absent}
    extended = formula(Extended, {i: v.double().numpy().astype(np.longdouble) for i, v in inputs.items()})
    exact = {i: torch.from_numpy(v.astype(np.float64)) for i, v in extended.items()}
    eager = formula(torch, {i: v.to(dtype) for i, v in inputs.items()})
    tensors: dict[str, Tensor | None] = {}
    for i in sorted({*inputs, *exact}):
        kind = state if i in in_state or (wide and i == 0) else dtype
        memory = plane(shape, kind, (layout + i) % 3 if layout in (1, 2) else layout)
        tensors[f"p{i}"] = memory.copy_(inputs[i]) if i in inputs else memory.fill_(torch.nan)
    rows, segments, length = shape
    machine.call(
        "fast_gru_pass",
        tensors,
        **{"pass": index, "dtype": DTYPES.index(dtype), "wide": int(wide), "keep": int(keep)},
        rows=rows,
        segments=segments,
        length=length,
    )
    for i in inputs.keys() | exact.keys():
        if i in exact:
            assert_close_to_reference(tensors[f"p{i}"], exact[i], eager[i], f"operand {i}")
        else:
            assert torch.equal(tensors[f"p{i}"], inputs[i]), f"operand {i} was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("index", "absent", "keep"), CASES, ids=str)
def test_every_pass(machine, index, absent, keep, dtype, seed) -> None:
    machine.seed = seed
    check(machine, index, absent, (3, 2, 40), dtype, 0, keep=keep)  # one run of whole 16-byte words
    check(machine, index, absent, (3, 2, 16), dtype, 1, keep=keep)  # runs of whole words
    check(machine, index, absent, (5, 3, 7), dtype, 2, keep=keep)  # runs without alignment
    check(machine, index, absent, (1, 1, 300), dtype, 0, keep=keep)  # more than one block of single elements
    if PASSES[index][0] is _sum:
        check(machine, index, absent, (3, 2, 16), dtype, 1, wide=True)


def test_nan_and_inf_propagate(machine) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, 90.0, -90.0]).view(1, 1, 8)
    for index in range(3):
        formula, given, _ = PASSES[index]
        for i in given:
            values = {k: special.clone() if k == i else torch.full((1, 1, 8), 0.5) for k in given}
            want = formula(torch, values)
            tensors = {f"p{k}": poisoned_like(special) for k in want} | {f"p{k}": v.clone() for k, v in values.items()}
            extents = {"rows": 1, "segments": 1, "length": 8}
            machine.call("fast_gru_pass", tensors, **{"pass": index, "dtype": 1, "wide": 0, "keep": 1}, **extents)
            for k, w in want.items():
                torch.testing.assert_close(tensors[f"p{k}"], w, equal_nan=True)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_have_nothing_to_report(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed)
    for index in range(len(PASSES)):
        check(machine, index, (), (2, 2, 16), torch.bfloat16, 0)
        check(machine, index, (), (3, 2, 5), torch.float32, 2)
        check(machine, index, (), (2, 2, 16), torch.bfloat16, 3)


def test_too_many_elements_are_refused(machine) -> None:
    from tests.cuda_host.harness import LaunchError

    one = torch.zeros(1, 1, 1)
    extents = {"rows": 2**31, "segments": 2**9, "length": 1}
    tensors = {"p0": one.expand(1, 1, 1), "p1": one.clone()}
    with pytest.raises(LaunchError, match="too many positions"):
        machine.call("fast_gru_pass", tensors, **{"pass": 5, "dtype": 1, "wide": 0, "keep": 1}, **extents)
