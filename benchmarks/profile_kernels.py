"""What bounds each of our GPU kernels: ``python -m benchmarks.profile_kernels OUT.json``, with Nsight Compute.

One case of the benchmark suite for every kernel, each called once, with cold caches, under ``ncu``; prints a line per
launch: time, how busy device memory and the multiprocessors were, occupancy, and what warps waited for. OUT.json holds
the numbers; OUT.N.ncu-rep, beside it, everything that ncu knows of a part of the cases, for ``ncu --import
OUT.N.ncu-rep --page source --csv``: instruction by instruction. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import of_toolkit
from benchmarks.kernel_times import prepared
from rcu_ops.bench.suite import collect

CASES = (
    ("recurrent_conv forward N16 C64 T16 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv forward N16 C64 T16 56x56 bf16 NCTHW", "cuda triton"),
    ("recurrent_conv forward N16 C64 T16 56x56 fp32 NCTHW", "cuda"),
    ("recurrent_conv forward N16 C64 T16 56x56 fp32 channels_last_3d", "cuda"),
    ("recurrent_conv forward N16 C128 T16 28x28 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv forward N16 C256 T16 14x14 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv forward N16 C256 T16 14x14 fp32 NCTHW", "cuda"),
    ("recurrent_conv forward N16 C512 T16 7x7 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv forward+backward N16 C64 T16 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv forward+backward N16 C64 T16 56x56 fp32 NCTHW", "cuda"),
    ("recurrent_conv forward+backward N16 C256 T16 14x14 bf16 channels_last_3d", "cuda"),
    ("recurrent_conv fused inference N16 C64 T16 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv step N1 C64 T1 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv step N8 C64 T1 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv step N8 C64 T1 56x56 fp32 channels_last_3d", "cuda"),
    ("recurrent_conv_batch_norm forward+backward N16 C64 T16 56x56 bf16 channels_last_3d", "cuda triton"),
    ("recurrent_conv_batch_norm forward+backward N16 C64 T16 56x56 fp32 NCTHW", "cuda"),
    ("fast_gru forward N1 K16 C64 L1 28x28 bf16 contiguous", "cuda"),
    ("fast_gru step N1 K1 C2048 L1 7x7 bf16 contiguous", "cuda"),
    ("cycle_consistency gate N32 T16 C64 fp32 NTC", "cuda triton"),
    ("cycle_consistency gate N32 T16 C2048 fp32 NTC", "cuda"),
    ("cycle_consistency loss, forward+backward N4 T256 C128 fp32 NTC", "cuda"),
    ("nonlocal_gates attention B1 P49 D1024 bf16 contiguous", "cuda triton"),
    ("nonlocal_gates step B24 P49 D1024 bf16 contiguous", "cuda"),
    ("srtg squeeze N16 C256 T8 28x28 fp32 NCTHW", "cuda triton"),
    ("srtg fuse N16 C256 T8 28x28 fp32 NCTHW", "cuda triton"),
    ("srtg fuse backward N16 C256 T8 28x28 fp32 NCTHW", "cuda"),
)
"""A case and the backends that are asked for it."""

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "LaunchStats",
    "Occupancy",
    "SchedulerStats",
    "WarpStateStats",
    "SourceCounters",
)
PART = 13
"""Cases under one start of ncu: what was found is kept part by part."""

BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MARK = "spin_kernel"
"""PyTorch's kernel that waits: launched before each call, it tells where one ends and the next begins."""

OURS = re.compile(r"rcu_ops|^[a-z_]+_kernel\b")
"""Names of kernels that are ours: those of CUDA C++ have their namespace, those of Triton nothing."""


def inside(choices: list[tuple[str, str]]) -> None:
    """Under ncu: every call once before it looks, then all of them with a mark before each."""
    cases = {case.id: case for case in collect("standard", torch.device("cuda"))}
    calls = []
    for name, way in choices:
        call = prepared(cases[name], (way,)).get(way, "not a candidate")
        calls.append((cases[name].training, name, way, call))
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for training, name, way, call in calls:
        if isinstance(call, str):
            print(f"left out: {name}, {way}: {call}")
            continue
        torch.cuda._sleep(1)
        print(f"called: {name}|{way}", flush=True)
        with torch.set_grad_enabled(training):
            call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def rows(text: str) -> list[dict[str, str]]:
    """The launches in ncu's raw page as CSV, whose second line holds units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(io.StringIO("\n".join(lines[begin:]))))[1:]


def number(row: dict[str, str], name: str) -> float | None:
    """A metric, whose name may be the end of the column's."""
    value = next((row[key] for key in row if key and (key == name or key.endswith("." + name))), "")
    try:
        return float(value.replace(",", ""))
    except ValueError:
        return None


def stalls(row: dict[str, str]) -> list[tuple[str, float]]:
    """The two greatest reasons for which warps waited, each in waiting warps per instruction issued."""
    found = []
    for key in row:
        if key and (match := re.search(r"issue_stalled_(\w+?)_per_issue_active\.ratio", key)):
            found.append((match.group(1), number(row, key) or 0.0))
    return sorted(found, key=lambda pair: -pair[1])[:2]


def profiled(choices: list[tuple[str, str]], report: Path, ncu: str) -> list[dict[str, Any]]:
    """Case, backend, kernel and metrics of every launch of ours that these calls make."""
    options = [option for section in SECTIONS for option in ("--section", section)]
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(BYTES), *options]
    command += ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{MARK}|rcu_ops|^[a-z_]+_kernel"]
    command += ["--force-overwrite", "--export", str(report)]
    child = [sys.executable, "-m", "benchmarks.profile_kernels", "--inside", json.dumps(choices)]
    run = subprocess.run([*command, *child], stdout=subprocess.PIPE, text=True)
    for line in run.stdout.splitlines():
        if line.startswith(("left out", "==ERROR", "==WARN")):
            print(line, flush=True)
    called = re.findall(r"^called: (.*)\|(.*)$", run.stdout, re.MULTILINE)
    page = subprocess.run([ncu, "--import", str(report), "--csv", "--page", "raw"], stdout=subprocess.PIPE, text=True)
    found: list[dict[str, Any]] = []
    place = -1
    for row in rows(page.stdout):
        name = row.get("Kernel Name", "")
        if MARK in name:
            place += 1
        elif OURS.search(name) and 0 <= place < len(called):
            metrics = {key: value for key in row if key and "__" in key and (value := number(row, key)) is not None}
            found.append({"case": called[place][0], "way": called[place][1], "kernel": name, "metrics": metrics})
            print(line_of(found[-1], row), flush=True)
    return found


def line_of(launch: dict[str, Any], row: dict[str, str]) -> str:
    """What is printed of a launch."""
    shares = {
        "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "SM": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    }
    words = [f"{word} {value:.0f} %" for word, key in shares.items() if (value := number(row, key)) is not None]
    words += [f"{reason} {ratio:.1f}" for reason, ratio in stalls(row)]
    short = re.sub(
        r"<.*|\(.*|.*::", "", launch["kernel"].replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    )
    time = row.get("gpu__time_duration.sum", "?")
    return f"{launch['case']}, {launch['way']}: {short} {time}, {', '.join(words)}"


def main() -> int:
    """0 when every case was profiled; 1 when not; 2 without ncu."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("profile.json"))
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no part after this long")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        inside([tuple(choice) for choice in json.loads(args.inside)])
        return 0
    ncu = of_toolkit("ncu")
    if shutil.which(ncu) is None:
        print("profile_kernels: ncu (Nsight Compute) is not installed", file=sys.stderr)
        return 2
    choices = [(name, way) for name, ways in CASES if args.filter in name for way in ways.split()]
    begin = time.monotonic()
    record: list[dict[str, Any]] = []
    done = 0
    while done < len(choices) and time.monotonic() - begin < args.seconds:
        report = args.out.with_suffix(f".{done // PART}.ncu-rep")
        record += profiled(choices[done : done + PART], report, ncu)
        done += PART
        args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return int(done < len(choices) or not record)


if __name__ == "__main__":
    sys.exit(main())
