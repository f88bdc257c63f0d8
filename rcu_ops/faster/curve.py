"""Accuracy, or agreement with the all-expensive run, against cost: all patterns and numbers of clips (Figs. 3, 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rcu_ops.cost_patterns import ClipCosts
from rcu_ops.faster.cache import ClipCache
from rcu_ops.faster.training import aggregate_scores
from rcu_ops.models.faster import PATTERNS
from rcu_ops.nn.aggregators import Aggregator, AverageScores

__all__ = ["Point", "curve_points", "plot_curve"]

CLIP_COUNTS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        method: "1:x", or "average, expensive" and "average, cheap".
        clips: per video. gmac: cost of a video. value: accuracy or agreement, 0 to 1.
    """

    method: str
    clips: int
    gmac: float
    value: float


def curve_points(aggregator: Aggregator, cache: ClipCache, costs: ClipCosts, *, agreement: bool = False) -> list[Point]:
    """Every setting that the cache has clips for.

    Args:
        aggregator: in evaluation mode. cache: of test videos. costs: of a clip.
        agreement: compare with what the average over all expensive clips says instead of the labels.
    """
    average = AverageScores(cache.channels, cache.classes)
    counts = sorted({count for count in (*CLIP_COUNTS, cache.clips) if count <= cache.clips})
    points: list[Point] = []
    target = None
    if agreement:
        scores, _ = aggregate_scores(average, cache, 0)
        target = scores[:, -1].argmax(1)

    def add(method: str, made: Aggregator, pattern: int, count: int, gmac: float) -> None:
        # As many clips as wanted, spread over those of the cache, which cover the video.
        clips = [k * cache.clips // count for k in range(count)]
        scores, labels = aggregate_scores(made, cache, pattern, clips)
        right = scores[:, -1].argmax(1) == (labels if target is None else target)
        points.append(Point(method, count, gmac, float(right.float().mean())))

    for count in counts:
        if cache.pattern == 0:
            add("average, expensive", average, 0, count, costs.average(True, count))
        add("average, cheap", average, -1, count, costs.average(False, count))
        for pattern in PATTERNS:
            # With fewer clips than a turn the setting is that of a shorter turn; other patterns' clips may be missing.
            if cache.pattern == 0 and 1 + pattern <= count:
                add(f"1:{pattern}", aggregator, pattern, count, costs.total(pattern, count))
    return points


def plot_curve(path: Path, points: list[Point], *, ylabel: str, title: str = "") -> None:
    """One line per method over the cost (logarithmic), numbers of clips at the averages' marks, as a PNG."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from rcu_ops.report import GREY, INK, new_figure, save_figure, series

    figure, axes = new_figure(7.2, 4.8)
    methods = list(dict.fromkeys(point.method for point in points))
    learned = 0
    for method in sorted(methods, key=lambda name: (name.startswith("average"), name.partition(":")[2].zfill(3))):
        taken = [point for point in points if point.method == method]
        if method.startswith("average"):
            style = {"color": GREY, "linestyle": "--" if "cheap" in method else "-", "marker": ".", "linewidth": 1.4}
        else:
            style, learned = series(learned), learned + 1
        axes.plot([p.gmac for p in taken], [100 * p.value for p in taken], label=method, **style)
        # The other lines' marks double the number of clips as these do, and would cover each other's numbers.
        for point in taken if method.startswith("average") else ():
            axes.annotate(
                f"{point.clips}", (point.gmac, 100 * point.value), xytext=(3, -9), textcoords="offset points",
                size=7, color=INK,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("GMAC per video (the papers' GFLOPs); small numbers: clips of the averages")
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
