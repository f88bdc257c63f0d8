"""``rcu-ops bench``: the benchmark suite, with a table, a JSON file and pictures."""

from __future__ import annotations

import argparse
import collections
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.bench.suite import OPERATORS, collect, spread
from rcu_ops.cli_errors import UserError
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    from rcu_ops.bench.runner import CaseResult


def add_parser(subparsers: Any) -> None:
    """Register ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the operators against their floors and against PyTorch",
        description="Measure every operator against its floor (bytes or arithmetic at rates measured in the same run), "
        "eager PyTorch, torch.compile and hand-written library loops. Everything is checked before it is timed; the "
        "candidates are timed in turns. On a CPU only the ratios mean something for other machines. With neither "
        "--quick nor --full: the shapes of the papers' networks, with batches cut to fit a CPU.",
    )
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--quick", dest="tier", action="store_const", const="quick", help="few small cases, minutes")
    tier.add_argument("--full", dest="tier", action="store_const", const="full", help="all shapes and batch sizes")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--op", action="append", choices=sorted(OPERATORS), help="only this one; may repeat")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, the longest part")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="start no case after this long; the cases then take turns among operators, kinds and dtypes, and each "
        "is timed briefly",
    )
    parser.add_argument(
        "--cache",
        choices=("cold", "warm", "both"),
        default="both",
        help="on a GPU: whether calls find their inputs in the L2 cache (default: both)",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: bench-out")
    parser.set_defaults(run=run, tier="standard")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the suite.  Returns 0, or 1 when a result of ours was wrong; what an interrupt left is kept (130).

    An operator's table is printed when the last of its cases is done, and ``bench.json`` is written after every case.
    """
    import torch

    from rcu_ops.bench import machine, output
    from rcu_ops.bench.runner import TEMPERATURES, WRONG, run_case
    from rcu_ops.bench.timing import BRIEF, SCHEDULES, make_timers

    device = _device(args.device)
    cases = collect(args.tier, device, args.op, args.filter)
    if not cases:
        raise UserError(f"--filter: no case of the {args.tier} tier contains {args.filter!r}; see --list")
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0
    if args.no_compile:
        for case in cases:
            case.compile = False
    deadline = None
    if args.budget is not None:
        cases, deadline = spread(cases), time.monotonic() + args.budget
    make_folder(args.out)

    about = machine.describe(device)
    _warn_if_busy()
    timers = make_timers(device, TEMPERATURES if args.cache == "both" else (args.cache,))
    warm = make_timers(device, ("warm",))["warm"]
    dtypes = tuple(dict.fromkeys([torch.float32, *(case.dtype for case in cases)]))
    peaks = machine.measure_peaks(device, warm, dtypes)
    print(f"{about.get('gpu') or about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}")
    print(f"measured peaks: {peaks}", flush=True)

    not_run: list[str] = []

    def keep(results: list[CaseResult]) -> None:
        measured = {result.case.id for result in results}
        not_run[:] = [case.id for case in cases if case.id not in measured]
        output.write_json(args.out / "bench.json", about, peaks, args.tier, results, not_run)

    schedule = SCHEDULES[args.tier]
    if deadline is not None:
        schedule = BRIEF if device.type == "cuda" else SCHEDULES["quick"]

    def measure(case: Any) -> Iterator[CaseResult]:
        return run_case(case, timers, peaks, schedule)

    tables = _Tables(cases)
    results, end = _measure(cases, measure, keep, tables, device, deadline)
    tables.print_others(results)
    if end is None:
        again = machine.measure_peaks(device, warm, dtypes)
        print(f"\nmeasured peaks at the end: {again}; bench.json counts from the higher ones")
        peaks = peaks.best_of(again)
        results = [result.with_floor(peaks) for result in results]
        keep(results)
    if not_run:
        why = end or "no time was left"
        print(
            f"incomplete: {len(not_run)} of {len(cases)} cases were not run, bench.json names them: {why}",
            file=sys.stderr,
        )
    print(f"\nwrote {args.out / 'bench.json'}", file=sys.stderr)
    _draw(args.out, results, about)
    failures = [failure for result in results for failure in result.failures]
    for result in results:
        for candidate in result.candidates:
            if candidate.left_out and not candidate.left_out.startswith(WRONG):
                print(f"left out: {result.case.id}: {candidate.name}: {candidate.left_out}", file=sys.stderr)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 130 if end == INTERRUPTED else int(bool(failures or end))


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device: this machine or this torch has no CUDA device")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"--device: there are {torch.cuda.device_count()} CUDA devices, got {name!r}")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def _warn_if_busy() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        print(
            f"warning: other programs are running (load {load:.1f} on {cores} cores): times will be long and uneven",
            file=sys.stderr,
        )


INTERRUPTED = "interrupted"


class _Tables:
    """The operators' tables, each printed once: when its cases are done, or at the end of a run that stopped before."""

    def __init__(self, cases: list[Any]) -> None:
        self._cases = collections.Counter(case.op for case in cases)
        self._printed: set[str] = set()

    def print_finished(self, op: str, results: list[CaseResult], write: Callable[[str], None]) -> None:
        """Print the operator's table, if all of its cases were run."""
        if self._count(op, results) == self._cases[op]:
            self._printed.add(op)
            write("\n" + self._table(op, results))

    def print_others(self, results: list[CaseResult]) -> None:
        """Print what there is of every operator whose table was not printed, and say how much is missing."""
        for op in dict.fromkeys(result.case.op for result in results):
            if op not in self._printed:
                print(f"\n{op}: incomplete, {self._count(op, results)} of {self._cases[op]} cases were run")
                print(self._table(op, results))

    def _count(self, op: str, results: list[CaseResult]) -> int:
        return len({result.case.id for result in results if result.case.op == op})

    def _table(self, op: str, results: list[CaseResult]) -> str:
        from rcu_ops.bench import output

        return output.table([result for result in results if result.case.op == op])


def _measure(
    cases: list[Any],
    measure: Callable[[Any], Iterable[CaseResult]],
    keep: Callable[[list[CaseResult]], None],
    tables: _Tables,
    device: Any,
    deadline: float | None = None,
) -> tuple[list[CaseResult], str | None]:
    """Results, and what ended the run before its time, if anything did.

    ``keep`` is called with what there is before the first case and after every one: a crash later loses none. A case
    that was interrupted half-way has no result.
    """
    from rcu_ops.progress import Progress

    results: list[CaseResult] = []
    keep(results)
    with Progress(len(cases), "bench", "cases") as bar:
        try:
            for case in cases:
                if deadline is not None and time.monotonic() > deadline:
                    break
                bar.update(0, note=case.id)
                results += list(measure(case))
                keep(results)
                bar.update()
                tables.print_finished(case.op, results, bar.write)
                if (fault := _fault(device)) is not None:
                    return results, f"{case.id}: {fault}"
        except KeyboardInterrupt:
            keep(results)
            return results, INTERRUPTED
    return results, None


def _fault(device: Any) -> str | None:
    """What a kernel did to this process: after an illegal access nothing more can be run on the device."""
    import torch

    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
    return None


def _draw(out: Path, results: list[CaseResult], about: dict[str, Any]) -> None:
    from rcu_ops.bench import output

    subtitle = f"{about.get('gpu') or about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no pictures: they need matplotlib (pip install 'rcu-ops[plot]')", file=sys.stderr)
        return
    for op in dict.fromkeys(result.case.op for result in results):
        path = out / f"bench_{op}.png"
        output.plot(path, op, [result for result in results if result.case.op == op], subtitle)
        print(f"wrote {path}", file=sys.stderr)
    output.roofline(out / "bench_roofline.png", results, subtitle)
    print(f"wrote {out / 'bench_roofline.png'}", file=sys.stderr)
