"""Comparisons over runs: the mean over a data set's splits, and accuracy against cost (Fig. 6 of "Learn to Cycle")."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rcu_ops.cli_errors import UserError

__all__ = ["Priced", "SplitMean", "plot_priced", "read_priced", "split_means"]

MEASURES = ("video_top1", "video_top5", "clip_top1", "clip_top5")


class SplitMean(NamedTuple):
    """A measure of one mode of evaluation on every split, a fraction of 1."""

    mode: str
    measure: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the splits, each with the same weight."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the splits; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def split_means(sources: Sequence[Path]) -> list[SplitMean]:
    """Accuracy and mAP of the evaluations of several splits (folders of ``rcu-ops evaluate``, or their summaries).

    Raises:
        UserError: a source that cannot be read, or evaluations of different modes.
    """
    found = [(source, _measures(source)) for source in sources]
    first = found[0][1]
    for source, measures in found[1:]:
        if measures.keys() != first.keys():
            raise UserError(f"{source}: other modes or measures than in {found[0][0]}")
    return [SplitMean(*key, tuple(measures[key] for _, measures in found)) for key in first]


def _measures(source: Path) -> dict[tuple[str, str], float]:
    path = source / "summary.json" if source.is_dir() else source
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measures = {
            (mode, name): float(values[name])
            for mode, values in content.get("accuracy", {}).items()
            for name in MEASURES
        }
        for mode, values in content.get("map", {}).items():
            measures.update({(mode, f"map@{every}"): float(value) for every, value in values.items()})
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this is not a summary of rcu-ops evaluate") from error
    if not measures:
        raise UserError(f"{path}: it holds no accuracy and no mAP")
    return measures


class Priced(NamedTuple):
    """A network: its name, what it costs (GMAC), its accuracy in percent, the series it belongs to."""

    name: str
    gmac: float
    accuracy: float
    group: str


def read_priced(path: Path) -> list[Priced]:
    """Rows of a CSV file ``name,gmac,accuracy`` (percent), and ``group`` if there is such a column.

    Raises:
        UserError: it cannot be read, a column is missing, a number is none.
    """
    points = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in ("name", "gmac", "accuracy") if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: expected the columns name,gmac,accuracy, got no {' and no '.join(missing)}")
            for row in reader:
                gmac, accuracy = (_number(path, reader.line_num, name, row[name]) for name in ("gmac", "accuracy"))
                if gmac <= 0 or not 0 <= accuracy <= 100:
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected a gmac above 0 and an accuracy in percent, "
                        f"got {gmac:g} and {accuracy:g}"
                    )
                points.append(Priced(row["name"] or "", gmac, accuracy, row.get("group") or ""))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error
    if not points:
        raise UserError(f"{path}: it holds no network")
    return points


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {line}: {name}: expected a number, got {text!r}")
    return value


def plot_priced(path: Path, points: Sequence[Priced]) -> None:
    """Accuracy over cost, one line per group through its networks by cost, as a PNG."""
    from rcu_ops.report import INK, legend, new_figure, save_figure, series

    figure, axes = new_figure(7.0, 4.6)
    groups = list(dict.fromkeys(point.group for point in points))
    for index, group in enumerate(groups):
        taken = sorted((point for point in points if point.group == group), key=lambda point: point.gmac)
        label = group or None
        axes.plot([p.gmac for p in taken], [p.accuracy for p in taken], label=label, **series(index))
    for point in points:
        axes.annotate(
            point.name,
            (point.gmac, point.accuracy),
            xytext=(0, 6),
            textcoords="offset points",
            size=8,
            color=INK,
            ha="center",
        )
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("GMAC per clip")
    axes.set_ylabel("top-1 accuracy (%)")
    if any(groups):
        legend(axes, len(groups))
    save_figure(figure, path)
