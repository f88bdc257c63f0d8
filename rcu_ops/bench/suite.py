"""Which benchmarks there are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rcu_ops.bench.case import Case

OPERATORS = {
    "recurrent_conv": "rcu_ops.bench.recurrent_conv",
    "streaming": "rcu_ops.bench.streaming",
}
"""By name the module whose ``cases(tier, device)`` lists the benchmarks; a new operator is entered here."""

TIERS = ("quick", "standard", "full")
"""quick: minutes, for pytest.  standard: the suite's shapes, N cut to fit a CPU.  full: all shapes, N uncut."""


def collect(tier: str, device: torch.device, operators: list[str] | None = None, text: str = "") -> list[Case]:
    """The cases of a tier, of the given operators (default: all), whose id contains ``text``."""
    found: list[Case] = []
    for name in operators or OPERATORS:
        found += importlib.import_module(OPERATORS[name]).cases(tier, device)
    return [case for case in found if text in case.id]
