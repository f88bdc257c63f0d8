"""Memory of nonlocal_gates beyond inputs and outputs, ours and eager PyTorch's, on the CPU; in a process of its own.

``python -m tests.ops.memory_of_nonlocal_gates`` prints a line of JSON per case: the most bytes during a call that
are neither an input's nor an output's. Tensors are counted by PyTorch's profiler; our kernels' scratch, which is no
tensor, by the C library, in a thread that never called a kernel and so has none.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rcu_ops
from rcu_ops.reference.nonlocal_gates import lstm_gates

LIBC = ctypes.CDLL(None)
CPU = torch.profiler.ProfilerActivity.CPU
CASES = {"P49": (4, 49, 1024), "P196": (4, 196, 512)}


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As it is written without thought for dead queries: the least memory that eager PyTorch takes."""
    return torch.softmax(query @ key.mT, -1) @ value


def plain_step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a step."""
    return lstm_gates(x_gates + plain_attention(query, key, value), cell)


class MallInfo2(ctypes.Structure):
    """The C library's account of its memory; hblkhd: bytes in blocks of their own, uordblks: in use of its heaps."""

    _fields_ = [
        ("arena_ordblks_smblks_hblks", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks_fsmblks", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("fordblks_keepcost", ctypes.c_size_t * 2),
    ]


def in_use() -> int:
    """Bytes in use, those of any thread."""
    gc.collect()
    account = LIBC.mallinfo2()
    return int(account.hblkhd) + int(account.uordblks)


def most_of_tensors(call: Callable[[], Any]) -> int:
    """The most bytes that were alive at once in tensors that a call made and did not return."""
    with torch.profiler.profile(activities=[CPU], profile_memory=True, record_shapes=True) as profile:
        results = call()
    events = [e for e in flat(profile.profiler.kineto_results.experimental_event_tree()) if e.tag.name == "Allocation"]
    assert events, "the profiler saw no allocation"
    changes: list[int] = []
    alive: dict[int, int] = {}  # address: place in changes
    for event in sorted(events, key=lambda e: e.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            alive[fields.ptr] = len(changes)
        elif alive.pop(fields.ptr, None) is None:
            continue  # older
        changes.append(fields.alloc_size)
    for place in alive.values():
        changes[place] = 0
    del results
    return max(0, *itertools.accumulate(changes))


def flat(events: Any) -> Iterator[Any]:
    """Events and those within them."""
    for event in events:
        yield event
        yield from flat(event.children)


def in_new_thread(call: Callable[[], Any]) -> Any:
    """The result of a call, from a thread without scratch."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def beyond(function: Callable[..., Any], arguments: list[Tensor], training: bool) -> dict[str, int]:
    """Bytes beyond inputs and outputs: of tensors at the peak, and of what the first call left to its thread."""
    with torch.no_grad():
        grads = [torch.ones_like(r) for r in as_list(function(*arguments))]  # that come in: inputs

    def call() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return as_list(function(*arguments))
        leaves = [a.detach().requires_grad_() for a in arguments]
        results = as_list(function(*leaves))
        return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)]

    def measured() -> dict[str, int]:
        torch.set_num_threads(1)
        before = in_use()
        call()
        return {"scratch": in_use() - before, "tensors": most_of_tensors(call)}

    in_new_thread(call)  # what PyTorch keeps of a first call is no scratch
    found: dict[str, int] = in_new_thread(measured)
    return found


def as_list(results: Any) -> list[Tensor]:
    """One tensor or several."""
    return [results] if isinstance(results, Tensor) else list(results)


def main(names: list[str]) -> None:
    """One line per case."""
    LIBC.mallinfo2.restype = MallInfo2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in names or CASES:
        b, p, d = CASES[name] if name in CASES else map(int, name.split(","))
        four = [torch.randn(b, 4, p, d) * d**-0.25 for _ in range(4)]
        step = [*four, torch.randn(b, p, d)]
        for op, function, definition, arguments in (
            ("relational_lstm_step", rcu_ops.relational_lstm_step, plain_step, step),
            ("nonlocal_attention", rcu_ops.nonlocal_attention, plain_attention, four[1:]),
        ):
            for training in (False, True):
                ours, theirs = (beyond(f, arguments, training) for f in (function, definition))
                line = {"case": name, "op": op, "training": training, **ours, "eager": theirs["tensors"]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
