"""Which kernels a call launches on a GPU and how long each takes: ``python -m benchmarks.kernel_times OUT.json``.

For every case of the benchmark suite and each of our GPU backends: two calls under PyTorch's profiler with the L2 cache
emptied before each, of which the shorter counts. Prints a line per case; the file holds, per case and backend, the
kernels in order of launch with their microseconds, or why there are none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rcu_ops.bench.case import Case
from rcu_ops.bench.suite import OPERATORS, collect, spread
from rcu_ops.bench.timing import evicting

WAYS = ("cuda", "triton", "unfused")
TURNS = 2

Kernels = dict[str, dict[str, Any]]
"""By case and backend a list of [kernel, microseconds], or the reason why it did not run."""


def prepared(case: Case, ways: Sequence[str] = WAYS) -> dict[str, Callable[[], Any] | str]:
    """Per backend a call that has run once, or why there is none."""
    case.compile = False
    inputs = case.inputs()
    found: dict[str, Callable[[], Any] | str] = {}
    for candidate in case.candidates():
        if candidate.name in ways:
            try:
                with torch.set_grad_enabled(case.training):
                    call = next(iter(candidate.variants.values())).bind(inputs)
                    call()
                torch.cuda.synchronize()
                found[candidate.name] = call
            except Exception as error:  # Triton raises kinds of its own
                found[candidate.name] = str(error).splitlines()[0]
    return found


def measured(cases: list[Case], ways: Sequence[str] = WAYS) -> Kernels:
    """All in one session of the profiler: starting it takes longer than a call."""
    result: Kernels = {case.id: {} for case in cases}
    evict = evicting()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for case in cases:
            for way, call in prepared(case, ways).items():
                if isinstance(call, str):
                    result[case.id][way] = call
                    continue
                for _ in range(TURNS):
                    evict()
                    torch.cuda.synchronize()
                    with torch.set_grad_enabled(case.training), record_function(f"case|{case.id}|{way}"):
                        call()
                        torch.cuda.synchronize()
    events = list(trace.events())
    on_gpu = [e for e in events if str(e.device_type).endswith("CUDA") and not e.name.startswith("case|")]
    on_gpu.sort(key=lambda e: e.time_range.start)
    turns: dict[str, list[list[list[Any]]]] = defaultdict(list)
    for span in (e for e in events if e.name.startswith("case|") and str(e.device_type).endswith("CPU")):
        inside = [e for e in on_gpu if span.time_range.start <= e.time_range.start <= span.time_range.end]
        turns[span.name].append([[e.name[:160], round(e.time_range.elapsed_us(), 2)] for e in inside])
    for name, lists in turns.items():
        _, case_id, way = name.split("|")
        result[case_id][way] = min(lists, key=lambda kernels: sum(k[1] for k in kernels))
    return result


def main() -> int:
    """0 when every case was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--op", action="append", choices=sorted(OPERATORS))
    parser.add_argument("--filter", default="")
    parser.add_argument("--tier", choices=("quick", "standard", "full"), default="standard")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this backend; may repeat")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no part after this long")
    args = parser.parse_args()
    cases = spread(collect(args.tier, torch.device("cuda"), args.op, args.filter))
    begin = time.monotonic()
    record: Kernels = {}
    while len(record) < len(cases) and time.monotonic() - begin < args.seconds:
        found = measured(cases[len(record) : len(record) + 25], args.way or WAYS)
        record |= found
        for name, ways in found.items():
            words = [f"{w} {sum(k[1] for k in ks):.1f}/{len(ks)}" for w, ks in ways.items() if isinstance(ks, list)]
            print(f"{name}: {', '.join(words)}", flush=True)
        args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return int(len(record) < len(cases))


if __name__ == "__main__":
    sys.exit(main())
