"""The results of a run as a table, a JSON file and pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.bench.case import DTYPE_NAMES, OURS
from rcu_ops.bench.machine import Peaks, peaks_as_data
from rcu_ops.bench.runner import CaseResult, as_data
from rcu_ops.bench.timing import Timing

FORMAT = 1

_SHORT_LAYOUT = {"channels_last_3d": "CL", "NCTHW": "NC"}


def baselines_of(results: Sequence[CaseResult]) -> list[str]:
    """Names of all baselines, in the order they first appear."""
    names = dict.fromkeys(c.name for result in results for c in result.candidates)
    return [name for name in names if name != OURS]


def label(result: CaseResult) -> str:
    """A case in a few words, without its operator and kind."""
    case = result.case
    words = [case.shape, DTYPE_NAMES[case.dtype], _SHORT_LAYOUT.get(case.layout, case.layout)]
    return " ".join([*words, result.temperature] if case.device.type == "cuda" else words)


def write_json(
    path: str | Path, machine: dict[str, Any], peaks: Peaks, tier: str, results: Sequence[CaseResult]
) -> None:
    """Everything that was measured, with the machine, versions and commit."""
    data = {
        "format": FORMAT,
        "tier": tier,
        "machine": machine,
        "peaks": peaks_as_data(peaks),
        "results": as_data(results),
    }
    with report.replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit: ``24.3 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.{max(0, 2 - int(np.log10(value)))}f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def table(results: Sequence[CaseResult]) -> str:
    """One block per operator and kind: our time with quartiles, the floor, and how much slower each baseline is."""
    blocks: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        blocks.setdefault((result.case.op, result.case.kind), []).append(result)
    return "\n\n".join(_block(f"{op}: {kind}", rows) for (op, kind), rows in blocks.items())


def _block(title: str, results: Sequence[CaseResult]) -> str:
    baselines = baselines_of(results)
    header = [title, OURS, "quartiles", "floor", "of floor", *(f"vs {name}" for name in baselines), "backend"]
    rows = [header]
    for result in results:
        ours = result.ours
        floor = result.floor_seconds
        if ours is None:
            shown = ["wrong" if result.failures else "-", "", format_seconds(floor), ""]
        else:
            shown = [
                format_seconds(ours.median),
                _quartiles(ours),
                format_seconds(floor),
                f"{100 * floor / ours.median:.0f} %",
            ]
        speedups = [result.speedup(name) for name in baselines]
        ratios = ["-" if value is None else f"{value:.2f}x" for value in speedups]
        rows.append([label(result), *shown, *ratios, result.backend])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _quartiles(timing: Timing) -> str:
    low, high = timing.quartiles
    return f"{format_seconds(low)} .. {format_seconds(high)}"


def plot(path: str | Path, op: str, results: Sequence[CaseResult], subtitle: str = "") -> None:
    """Two panels as PNG, one row per case: time over the floor, and how much faster ours is than each baseline."""
    shown = [result for result in results if result.ours is not None]
    if not shown:
        return
    baselines = baselines_of(shown)
    figure, (left, right) = report.new_figure(width=11.5, height=1.9 + 0.27 * len(shown), ncols=2, sharey=True)
    figure.suptitle(f"{op}   {subtitle}".rstrip(), fontsize=10, color=report.INK, x=0.01, ha="left")
    rows = np.arange(len(shown))[::-1]
    for index, name in enumerate([OURS, *baselines]):
        style = report.series(index) | {"linestyle": "none"}
        points = [
            (row, result, timing) for row, result in zip(rows, shown, strict=True) if (timing := result.timing(name))
        ]
        over_floor = [timing.median / result.floor_seconds for _, result, timing in points]
        if name == OURS:
            ends = [[q / result.floor_seconds for q in timing.quartiles] for _, result, timing in points]
            left.hlines(
                [row for row, *_ in points], *zip(*ends, strict=True), color=style["color"], linewidth=3, alpha=0.3
            )
        else:
            style["markerfacecolor"] = "white"
            right.plot([result.speedup(name) for _, result, _ in points], [row for row, *_ in points], **style)
        left.plot(over_floor, [row for row, *_ in points], **style, label=name)
    for axes, text in ((left, "time / floor"), (right, f"speed-up of {OURS} over each baseline")):
        axes.set_xscale("log")
        _plain_log_ticks(axes)
        axes.axvline(1, color=report.INK, linewidth=0.9, zorder=0)
        axes.set_xlabel(text)
        axes.set_ylim(-0.7, len(shown) - 0.3)
    figure.legend(frameon=False, fontsize=9, labelcolor=report.INK, ncols=6, loc="outside upper right")
    left.set_yticks(rows, [f"{result.case.kind}   {label(result)}" for result in shown])
    left.tick_params(axis="y", labelsize=8)
    for row, (before, after) in zip(rows, itertools.pairwise(shown), strict=False):
        if before.case.kind != after.case.kind:
            for axes in (left, right):
                axes.axhline(row - 0.5, color=report.GREY, linewidth=0.8)
    report.save_figure(figure, path)


def _plain_log_ticks(axes: Any) -> None:
    """1, 2, 5, 10 as plain numbers instead of powers of ten, within what is shown."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 1.1)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [m * 10.0**e for e in range(-3, 6) for m in steps if low <= m * 10.0**e <= high]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
