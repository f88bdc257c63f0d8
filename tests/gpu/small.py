"""Every operator's CUDA kernels once, for compute-sanitizer: ``python -m tests.gpu.small [PART OF]``.

PART (from 0) of OF takes every OF-th problem: a sanitizer is slow, and several can run at once. With
``--one-of-each-size`` before them, a problem runs in its first format of each size only: bf16 and not fp16. Inputs are
made on the host and copied whole, so that whatever a kernel reads uninitialised is its own doing. Nothing is compared:
numbers are the tests' business. ``python -m tests.gpu.small kernels`` runs all of them, the slow ones too, and says
which kernels of ours each has launched.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import rcu_ops
from tests.gpu.problems import Problem, on, problems

SKIPPED = ("C64 channels_last", "C512 7x7", "many frames", "many pairs", "C96 many columns", "C200 many columns")
"""Kernels that other problems run too, in shapes that take a sanitizer long."""

KERNEL = re.compile(r"rcu_ops::cuda::(?:\(anonymous namespace\)::|<unnamed>::)?(\w+)")

Choice = Callable[[Sequence[torch.dtype]], Sequence[torch.dtype]]
"""From a problem's dtypes to those that it is run in."""


def of_each_size(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    """The first format of each size."""
    return list({dtype.itemsize: dtype for dtype in reversed(dtypes)}.values())


def run(chosen: list[Problem], dtypes: Choice = tuple) -> Iterator[tuple[Problem, torch.dtype]]:
    """Run each on CUDA kernels in the chosen dtypes that it takes, and hand it out; say what is left out, and why."""
    torch.manual_seed(0)
    with rcu_ops.use_backend("cuda"):
        for problem in chosen:
            for dtype in dtypes(problem.dtypes):
                try:
                    with record_function(f"problem|{problem}|{dtype}"):
                        problem.call(on(problem.make(dtype), "cuda"))
                        torch.cuda.synchronize()
                except ValueError as error:
                    if "cannot run" not in str(error):
                        raise
                    print(f"left out: {problem} {dtype}: {error}")
                    break
                yield problem, dtype


def kernels() -> None:
    """A line per problem and dtype: ``launched PROBLEM DTYPE: KERNEL, ...``."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in run(problems()):
            pass
    events = list(trace.events())
    ours = [(e.time_range.start, found.group(1)) for e in events if (found := KERNEL.search(e.name))]
    for span in events:
        if span.name.startswith("problem|") and str(span.device_type).endswith("CPU"):
            inside = [name for start, name in ours if span.time_range.start <= start <= span.time_range.end]
            _, problem, dtype = span.name.split("|")
            print(f"launched {problem} {dtype}: {', '.join(sorted(set(inside)))}")


def main(arguments: list[str]) -> int:
    """0 when every CUDA kernel that this build has was run, 1 when there was none."""
    if arguments == ["kernels"]:
        kernels()
        return 0
    dtypes: Choice = of_each_size if "--one-of-each-size" in arguments else tuple
    part, of = map(int, arguments[-2:]) if arguments else (0, 1)
    ran, since = 0, time.monotonic()
    for problem, dtype in run([p for p in problems() if p.name not in SKIPPED][part::of], dtypes):
        ran += 1
        now = time.monotonic()  # the last line tells what a fault or a limit cut short, and the seconds what is slow
        print(f"{ran}: {problem} {dtype} ({now - since:.1f} s)", flush=True)
        since = now
    print(f"ran all {ran} problems on CUDA kernels")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
