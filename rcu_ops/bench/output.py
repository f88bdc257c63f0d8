"""The results of a run as a table, a JSON file and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.bench.case import DTYPE_NAMES, OURS
from rcu_ops.bench.machine import Peaks, peaks_as_data
from rcu_ops.bench.runner import INEXACT, CaseResult, as_data
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
    path: str | Path,
    machine: dict[str, Any],
    peaks: Peaks,
    tier: str,
    results: Sequence[CaseResult],
    not_run: Sequence[str] = (),
) -> None:
    """Everything that was measured, with the machine, versions and commit, and the cases for which no time was left."""
    data = {
        "format": FORMAT,
        "tier": tier,
        "machine": machine,
        "peaks": peaks_as_data(peaks),
        "results": as_data(results),
        "not_run": list(not_run),
    }
    report.write_json(path, data)


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit: ``24.3 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.{max(0, 2 - int(np.log10(value)))}f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def table(results: Sequence[CaseResult]) -> str:
    """One block per operator and kind: our time with quartiles, the floor, and how much slower each baseline is.

    On a GPU a launch's time is written before the floor and counts as part of it. A baseline that is outside the
    tolerance rule is "inexact", which is explained below the table.
    """
    blocks: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        blocks.setdefault((result.case.op, result.case.kind), []).append(result)
    text = "\n\n".join(_block(f"{op}: {kind}", rows) for (op, kind), rows in blocks.items())
    inexact = any(candidate.inexact for result in results for candidate in result.candidates)
    return f"{text}\n\ninexact: a baseline that has no time, because {INEXACT}" if inexact else text


def _block(title: str, results: Sequence[CaseResult]) -> str:
    baselines = baselines_of(results)
    waited = any(candidate.latency for result in results for candidate in result.candidates)
    header = [title, OURS, "quartiles", "floor", "of floor", *(f"vs {name}" for name in baselines)]
    rows = [[*header, *(["p50", "p99"] if waited else []), "backend"]]
    for result in results:
        ours = result.ours
        floor, least = result.floor_seconds, result.least_seconds
        words = (
            format_seconds(floor) if least == floor else f"{format_seconds(least - floor)} + {format_seconds(floor)}"
        )
        if ours is None:
            shown = ["wrong" if result.failures else "-", "", words, ""]
        else:
            shown = [
                format_seconds(ours.median),
                _quartiles(ours),
                words,
                f"{100 * least / ours.median:.0f} %",
            ]
        inexact = {candidate.name for candidate in result.candidates if candidate.inexact}
        speedups = [(name, result.speedup(name)) for name in baselines]
        ratios = [
            f"{value:.2f}x" if value is not None else "inexact" if name in inexact else "-" for name, value in speedups
        ]
        if waited:
            single = next((c.latency for c in result.candidates if c.name == OURS), None)
            ratios += ["-", "-"] if single is None else [format_seconds(single.p50), format_seconds(single.p99)]
        rows.append([label(result), *shown, *ratios, result.backend])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
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
        over_floor = [timing.median / result.least_seconds for _, result, timing in points]
        if name == OURS:
            ends = [[q / result.least_seconds for q in timing.quartiles] for _, result, timing in points]
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


def roofline(path: str | Path, results: Sequence[CaseResult], subtitle: str = "") -> None:
    """Bars as PNG: which share of the rate of its floor each candidate reaches, ours and every baseline beside it.

    One panel per operator and kind. On a GPU cold caches are shown where they were measured. A floor is time that
    moving the bytes or doing the arithmetic takes at the rates measured in the same run; out of a CPU's caches, which
    those rates do not know, a bar can pass it.
    """
    measured = [result for result in results if any(c.timing for c in result.candidates)]
    cold = {result.case.id for result in measured if result.temperature == "cold"}
    shown = [result for result in measured if result.temperature == "cold" or result.case.id not in cold]
    panels: dict[tuple[str, str], list[CaseResult]] = {}
    for result in shown:
        panels.setdefault((result.case.op, result.case.kind), []).append(result)
    if not panels:
        return
    names = [OURS, *baselines_of(shown)]
    columns: list[list[tuple[str, str]]] = [[] for _ in range(min(3, len(panels)))]
    sizes = {key: 1.6 + sum(_bars(result) + 0.8 for result in rows) for key, rows in panels.items()}
    for key in sorted(panels, key=lambda key: -sizes[key]):
        min(columns, key=lambda column: sum(sizes[k] for k in column)).append(key)
    height = max(sum(sizes[key] for key in column) for column in columns)
    figure, placeholder = report.new_figure(width=6.2 * len(columns), height=1.1 + 0.125 * height)
    placeholder.remove()
    figure.suptitle(
        f"share of the floor's rate   {subtitle}".rstrip(), fontsize=10, color=report.INK, x=0.01, ha="left"
    )
    grid = figure.add_gridspec(1, len(columns))
    for index, column in enumerate(columns):
        rest = height - sum(sizes[key] for key in column)
        inner = grid[index].subgridspec(
            len(column) + 1, 1, height_ratios=[*(sizes[key] for key in column), rest + 1e-3]
        )
        for row, key in enumerate(column):
            axes = figure.add_subplot(inner[row])
            report.tidy(axes)
            _bars_of_panel(axes, panels[key], names)
            axes.set_title(f"{key[0]}: {key[1]}", fontsize=9, color=report.INK, loc="left")
    handles = [_patch(index, name) for index, name in enumerate(names)]
    figure.legend(handles=handles, frameon=False, fontsize=9, labelcolor=report.INK, ncols=4, loc="outside lower left")
    report.save_figure(figure, path)


def _bars(result: CaseResult) -> int:
    return sum(c.timing is not None for c in result.candidates)


def _bars_of_panel(axes: Any, results: Sequence[CaseResult], names: Sequence[str]) -> None:
    at, ticks, furthest = 0.0, [], 1.0
    for result in results:
        first = at
        for index, name in enumerate(names):
            timing = result.timing(name)
            if timing is None:
                continue
            share = result.least_seconds / timing.median
            furthest = max(furthest, share)
            axes.barh(at, share, height=0.86, color=report.series(index)["color"])
            if name == OURS:
                axes.text(share + 0.01, at, f"{100 * share:.0f} %", va="center", fontsize=6.5, color=report.INK)
            at += 1
        ticks.append(((first + at - 1) / 2, label(result)))
        at += 0.8
    axes.axvline(1, color=report.INK, linewidth=0.9, zorder=3)
    axes.set_xlim(0, 1.08 * furthest)
    axes.set_ylim(at - 0.3, -1)
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks])
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _patch(index: int, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=report.series(index)["color"], label=name)


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
