"""The GPU tests' problems are right, tried on the CPU; and every operator has some."""

from __future__ import annotations

import re

import pytest
import torch

import rcu_ops
from rcu_ops import _native
from rcu_ops.ops import OPERATORS, _evidence
from tests.gpu.problems import PROBLEMS, RECURRENCES, RELATIONS, SCANS, gpu_backends, on, problems, random_scan
from tests.tolerance import assert_close_to_reference

ALL = problems()


def test_every_operator_has_problems() -> None:
    assert {problem.operator for problem in ALL} == set(OPERATORS) >= set(PROBLEMS)
    assert len({str(problem) for problem in ALL}) == len(ALL)
    assert gpu_backends("recurrent_conv") == ["cuda", "triton"]


H200 = {"architecture": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}
FORMS = {
    "plain scan": "plain: ",
    "fp32 scan": "fp32: ",
    "tile scan": "tile: ",
    "wide scan": "wide: ",
    "hopper scan": "hopper: ",
    "step": "step: .* at a time",
    "step by words": "step: (?!.*unit).* by words(.|\n)*step: .*unit, by words",  # of FMAs and on the matrix unit
    "chunked": "chunked: ",
    "columns": "forward columns: one",
    "columns backward": "backward columns: one",
    "one launch": "forward together: one launch of [0-9]+ blocks, ",
    "one launch in clusters": "forward together: one launch of [0-9]+ blocks in clusters",
    "one launch backward": "backward together: one",
    "query rows": "query rows: ",
    "product tiles": "product tiles: ",
    "short cycle": "short cycle: .* a block per sample",
    "short cycle in clusters": "short cycle: .* a cluster of",
    "plain rows": "relations: plain: .*gradients plain: ",
    "tile": "relations: tiles: ",
    "cluster": "relations: clusters of ",
    "tile gradients": "gradients [0-9]+ blocks of 32 queries",
    "between products": "batched products, .* then the cell update; gradients by PyTorch's batched products",
}
"""By variant how a plan says that it is taken."""


def plans() -> str:
    """What an H200 would make of the problems in fp32 and bf16, a line for each plan."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for title in SCANS:
            with torch.device("meta"):
                given = random_scan(title, dtype)
            x, h0 = given["x"], given["h0"].unsqueeze(2)
            first = {"first": h0.stride(), "first_dtype": str(h0.dtype).removeprefix("torch.")}
            lines.append(
                _native.recurrent_conv_gpu_plan(x.shape, name, x.stride(), x.stride(), **first, **H200)["text"]
            )
        for (n, _, c, *sizes), r, _, _ in RECURRENCES.values():
            columns = n * sizes[0] * sizes[1] * sizes[2]
            for backward, way in enumerate(("forward", "backward")):
                options = {"backward": bool(backward)}
                alone = _native.fast_gru_gpu_columns_plan(
                    columns, c, r, name, shared_bytes=H200["shared_bytes"], **options
                )
                together = _native.fast_gru_gpu_plan(columns, c, r, name, **options, **H200)
                lines.append(f"{way} columns: {alone['text']}")
                if alone["why_not"]:
                    lines.append(f"{way} together: {together['text']}")
        for b, n, m, d, e in RELATIONS.values():
            for kind, gates in (("attend", 1), ("step", 4)):
                said = _native.nonlocal_gates_gpu_plan(kind, b, gates, n, m, d, e, name, **H200)["said"]
                lines.append(f"relations: {said}")
    for problem in ALL:
        if problem.operator in ("cycle_consistency", "soft_nearest_neighbor"):
            with torch.device("meta"):
                given = problem.make(torch.float32)
            (n, t, c), s = given["a"].shape, given["b"].shape[1]
            kind = "cycle" if problem.operator == "cycle_consistency" else "soft"
            lines.append(_native.cycle_consistency_gpu_plan(kind, n, t, s, c, "float32", **H200)["text"])
    return "\n".join(lines)


def test_an_h200_would_run_every_variant() -> None:
    """A variant that no problem is given to could not have its evidence from a run on one."""
    anywhere = {"matrix weight gradient", "plain weight gradient", "norm passes", "fused passes", "gate pass"}
    assert FORMS.keys() | anywhere == {variant.name for variant in _evidence.VARIANTS}
    said = plans()
    missing = [name for name, form in FORMS.items() if not re.search("^.*" + form, said, re.MULTILINE)]
    assert not missing, said


def test_an_h200_would_add_up_a_weight_gradient_beside_the_scan() -> None:
    """Both layouts, and channels that fill the tile or not; the first state is x's frame in its format."""
    found = []
    for title, (shape, _) in SCANS.items():
        with torch.device("meta"):
            x = random_scan(title, torch.bfloat16)["x"]
        plan = _native.recurrent_conv_gpu_plan(
            shape, "bfloat16", x.stride(), x.stride(), residual=x.stride(), reverse=True, weight_sums=True, **H200
        )
        if plan["weight_parts"]:
            assert plan["weight_parts"] == plan["blocks"] == -(-shape[0] * shape[3] * shape[4] // 128)
            found.append(title)
    assert found == ["C64 56x56", "C60 many columns"]


SMALL = [p for p in ALL if p.name in ("probe", "C20 odd", "many frames", "C33 odd") or "far scene" in p.name]


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_on_the_cpu(problem) -> None:
    for dtype in problem.dtypes:
        given = problem.make(dtype)
        if problem.exact is None:
            assert all(value.isfinite().all() for value in problem.call(on(given, "cpu")))
            continue
        exact = problem.exact(on(given, "cpu", torch.float64))
        eager = problem.eager(on(given, "cpu"))
        for choice in ("auto", "reference"):
            with rcu_ops.use_backend(choice):
                got = problem.call(on(given, "cpu"))
            for index, (g, e, r) in enumerate(zip(got, exact, eager, strict=True)):
                if g.is_floating_point() and dtype != torch.float64:
                    assert_close_to_reference(g, e, r, f"{choice} {dtype} output {index}")
                else:
                    assert torch.equal(g, e)
