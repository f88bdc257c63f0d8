"""Which benchmarks there are."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rcu_ops.bench.case import Case

OPERATORS = {
    "cycle_consistency": "rcu_ops.bench.cycle_consistency",
    "fast_gru": "rcu_ops.bench.fast_gru",
    "nonlocal_gates": "rcu_ops.bench.nonlocal_gates",
    "recurrent_conv": "rcu_ops.bench.recurrent_conv",
    "recurrent_conv_batch_norm": "rcu_ops.bench.recurrent_conv_batch_norm",
    "srtg": "rcu_ops.bench.srtg",
    "streaming": "rcu_ops.bench.streaming",
}
"""By name the module whose ``cases(tier, device)`` lists the benchmarks; a new operator is entered here."""

TIERS = ("quick", "standard", "full")
"""quick: minutes, for pytest.  standard: the suite's shapes, N cut to fit a CPU.  full: all shapes, N uncut."""


def spread(cases: list[Case]) -> list[Case]:
    """The same cases in turns: one of each operator, kind and dtype, then the next of each."""
    queues: dict[tuple[str, str, torch.dtype], list[Case]] = {}
    for case in cases:
        queues.setdefault((case.op, case.kind, case.dtype), []).append(case)
    rounds = itertools.zip_longest(*queues.values())
    return [case for turn in rounds for case in turn if case is not None]


def collect(tier: str, device: torch.device, operators: list[str] | None = None, text: str = "") -> list[Case]:
    """The cases of a tier, of the given operators (default: all), whose id contains ``text``."""
    found: list[Case] = []
    for name in operators or OPERATORS:
        found += importlib.import_module(OPERATORS[name]).cases(tier, device)
    return [case for case in found if text in case.id]
