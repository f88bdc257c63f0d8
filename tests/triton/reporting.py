"""Runs the cases of a script under Triton's interpreter, one line for each, whatever the ones before it did."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable

import torch


def run(cases: Iterable[tuple[str, Callable[[], None]]], before: Callable[[], None] = lambda: None) -> int:
    """The exit code: 1 if a case raised. Every case has fresh random inputs and runs after ``before``."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = False
    for index, (name, case) in enumerate(cases):
        torch.manual_seed(int(os.environ.get("RCU_OPS_TEST_SEED", "0")) * 1000 + index)
        before()
        try:
            case()
            print(f"ok {name}", flush=True)
        except Exception as error:  # every case is reported
            failed = True
            print(f"FAILED {name}: {' '.join(str(error).split())}", flush=True)
            traceback.print_exc()
    return int(failed)
