"""Every operator's CUDA kernels once, for compute-sanitizer: ``python -m tests.gpu.small [PART OF]``.

PART (from 0) of OF takes every OF-th problem: a sanitizer is slow, and several can run at once.

Inputs are made on the host and copied whole, so that whatever a kernel reads uninitialised is its own doing. Nothing is
compared: numbers are the tests' business.
"""

from __future__ import annotations

import sys

import torch

import rcu_ops
from tests.gpu.problems import on, problems

SKIPPED = ("C64 channels_last", "C512 7x7", "many frames")
"""Kernels that other problems run too, in shapes that take a sanitizer long."""


def main(part: int = 0, of: int = 1) -> int:
    """0 when every CUDA kernel that this build has was run, 1 when there was none."""
    torch.manual_seed(0)
    ran = 0
    with rcu_ops.use_backend("cuda"):
        for problem in [p for p in problems() if p.name not in SKIPPED][part::of]:
            for dtype in problem.dtypes:
                try:
                    problem.call(on(problem.make(dtype), "cuda"))
                except ValueError as error:
                    if "cannot run" not in str(error):
                        raise
                    print(f"left out: {problem} {dtype}: {error}")
                    break
                torch.cuda.synchronize()
                ran += 1
                print(f"{ran}: {problem} {dtype}", flush=True)  # the last line tells what a fault or a limit cut short
    print(f"ran all {ran} problems on CUDA kernels")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
