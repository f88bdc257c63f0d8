"""Every operator's CUDA kernels once, for compute-sanitizer: ``python -m tests.gpu.small [PART OF]``.

PART (from 0) of OF takes every OF-th problem: a sanitizer is slow, and several can run at once. With
``--one-of-each-size`` a problem runs in its first format of each size only: bf16 and not fp16. Inputs are made on the
host and copied whole, so that whatever a kernel reads uninitialised is its own doing. Nothing is compared: numbers are
the tests' business. With ``--kernels`` all problems run, the slow ones too, and it says which kernels of ours each has
launched.

``--under COMMAND`` runs all this in processes under a command. After a fault inside a kernel a process can launch
nothing more: another takes the problems that are left.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
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

TOGETHER = 16
"""Problems and formats in one session of the profiler: what was launched is said after each."""

LOST = 3
"""Exit code of a process that can launch nothing more."""

Task = tuple[int, Problem, torch.dtype]
"""A problem in one format, numbered from 1."""


class LostDeviceError(RuntimeError):
    """A kernel's fault has ended what this process can do on the device."""


def of_each_size(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    """The first format of each size."""
    return list({dtype.itemsize: dtype for dtype in reversed(dtypes)}.values())


def tasks(chosen: Sequence[Problem], dtypes: Callable[[Sequence[torch.dtype]], Sequence[torch.dtype]]) -> list[Task]:
    """All of these, in the formats that are chosen from theirs."""
    pairs = [(problem, dtype) for problem in chosen for dtype in dtypes(problem.dtypes)]
    return [(number, *pair) for number, pair in enumerate(pairs, 1)]


def run(chosen: Sequence[Task]) -> Iterator[bool]:
    """Run each on CUDA kernels: a line for each, and whether it did not fail; none of what the kernels refuse."""
    for number, problem, dtype in chosen:
        print(f"begins {number}", flush=True)  # if this is the last line, a fault or a limit cut the problem short
        torch.manual_seed(number)
        since, words = time.monotonic(), f"{problem} {dtype}"
        try:
            with rcu_ops.use_backend("cuda"), record_function(f"problem|{problem}|{dtype}"):
                problem.call(on(problem.make(dtype), "cuda"))
                torch.cuda.synchronize()
        except Exception as error:  # the others are tried all the same
            if isinstance(error, ValueError) and "cannot run" in str(error):
                print(f"left out: {words}: {error}", flush=True)
                continue
            print(f"failed: {words}: {type(error).__name__}: {error}", flush=True)
            try:
                torch.cuda.synchronize()
            except RuntimeError as fault:
                raise LostDeviceError from fault
            yield False
            continue
        print(f"{number}: {words} ({time.monotonic() - since:.1f} s)", flush=True)  # the seconds say what is slow
        yield True


def launches(chosen: Sequence[Task]) -> Iterator[bool]:
    """The same, and a line per problem and dtype: ``launched PROBLEM DTYPE: KERNEL, ...``."""
    for begin in range(0, len(chosen), TOGETHER):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            yield from run(chosen[begin : begin + TOGETHER])
        events = list(trace.events())
        ours = [(e.time_range.start, found.group(1)) for e in events if (found := KERNEL.search(e.name))]
        for span in events:
            if span.name.startswith("problem|") and str(span.device_type).endswith("CPU"):
                inside = [name for start, name in ours if span.time_range.start <= start <= span.time_range.end]
                _, problem, dtype = span.name.split("|")
                print(f"launched {problem} {dtype}: {', '.join(sorted(set(inside)))}", flush=True)


def supervise(command: Sequence[str], arguments: Sequence[str]) -> int:
    """Run this program under the command, again after every fault that ends a process: 1 where a problem failed, else
    the command's own exit code.
    """
    code, begun, failed, ended = 0, 0, False, False
    while not ended:
        before = begun
        child = [*command, sys.executable, "-m", "tests.gpu.small", "--after", str(begun), *arguments]
        try:
            process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            print(f"failed: {child[0]}: {error.strerror}")
            return 1
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                begun = int(found.group(1)) if (found := re.match(r"begins (\d+)$", line)) else begun
                failed, ended = failed or line.startswith("failed: "), ended or line.startswith("ran ")
        code = max(code, process.returncode)
        if not ended:
            print(f"lost: the process ended with {process.returncode} in problem {begun}", flush=True)
            failed = True
            ended = begun == before
    return 1 if failed else code


def main(arguments: list[str]) -> int:
    """0 when every CUDA kernel that this build has was run, 1 when one failed or there was none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", type=int, default=[0, 1], metavar="PART OF")
    parser.add_argument("--one-of-each-size", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--after", type=int, default=0, metavar="NUMBER", help="begin after this problem")
    parser.add_argument("--under", metavar="COMMAND")
    given = parser.parse_args(arguments)
    if given.under is not None:
        at = arguments.index("--under")
        return supervise(shlex.split(given.under), arguments[:at] + arguments[at + 2 :])
    part, of = given.part
    chosen = [problem for problem in problems() if given.kernels or problem.name not in SKIPPED]
    of_all = tasks(chosen[part::of], of_each_size if given.one_of_each_size else tuple)
    try:
        kept = list((launches if given.kernels else run)([task for task in of_all if task[0] > given.after]))
    except LostDeviceError:
        return LOST
    print(f"ran {len(kept)} problems on CUDA kernels, {kept.count(False)} of which failed", flush=True)
    return int(not kept or not all(kept))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
