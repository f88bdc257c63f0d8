"""Lists of labelled videos: CSV files, one row per video or per labelled interval.

- one label per video: ``path,label``;
- labelled intervals: ``path,start,end,label`` with seconds; the end is not included. A row with an empty start, end and
  label says that a video has no class at all. They are dense labels (classes of every frame), or actions: each a
  trimmed training clip of one class, and all of a video's classes together its labels.

The header line may be left out; with it, columns may stand in any order and others are ignored. A path is relative to
the folder of the list. A label is a class index from 0, or a class name when names are given. Every fault raises
:class:`rcu_ops.cli_errors.UserError` with the file and the line.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rcu_ops.cli_errors import UserError

VIDEO_COLUMNS = ("path", "label")
DENSE_COLUMNS = ("path", "start", "end", "label")


@dataclass(frozen=True)
class LabelledVideo:
    """One video of a list.

    Attributes:
        name: the path as the list gives it.
        path: where the file is.
        label: class index, or None for a whole video with labelled intervals.
        intervals: (class index, start, end) in seconds, the end not included; empty for one label per video.
        span: start and end in seconds of the action that this entry is, or None for a whole video.
    """

    name: str
    path: Path
    label: int | None = None
    intervals: tuple[tuple[int, float, float], ...] = ()
    span: tuple[float, float] | None = None

    def present(self, times: np.ndarray, classes: int) -> np.ndarray:
        """Which classes are present at ``times`` [T] (seconds): bool [classes, T]."""
        found = np.zeros((classes, len(times)), dtype=bool)
        for index, start, end in self.intervals:
            found[index] |= (times >= start) & (times < end)
        return found

    def present_anywhere(self, classes: int) -> np.ndarray:
        """Which classes the video has at any time: bool [classes, 1]."""
        found = np.zeros((classes, 1), dtype=bool)
        found[[index for index, *_ in self.intervals]] = True
        return found


@dataclass(frozen=True)
class VideoList:
    """The videos of a list in its order, and a digest of what it says."""

    source: str
    videos: tuple[LabelledVideo, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and labels: two lists with the same digest train and evaluate alike."""
        content = hashlib.sha256()
        for video in self.videos:
            content.update(repr((video.name, video.label, video.intervals)).encode())
        return content.hexdigest()

    def actions(self) -> VideoList:
        """The labelled intervals as entries of their own, in the order of the list.

        Raises:
            UserError: no video has any.
        """
        entries = [
            replace(video, label=index, span=(start, end))
            for video in self.videos
            for index, start, end in video.intervals
        ]
        if not entries:
            raise UserError(f"{self.source}: expected labelled intervals to train on, no video in this list has any")
        return VideoList(self.source, tuple(entries))


def read_list(path: Path, classes: int, names: Sequence[str] | None = None, *, dense: bool = False) -> VideoList:
    """The videos of a CSV file, see the module's description.

    Args:
        path: the file.
        classes: number of classes.
        names: their names, if labels may be names.
        dense: expect ``path,start,end,label`` instead of ``path,label``.

    Raises:
        UserError: the file cannot be read, a row is malformed, a video with one label stands there twice, or there is
            no video at all.
    """
    index_of = {name: index for index, name in enumerate(names or ())}
    first_line: dict[str, int] = {}
    labels: dict[str, int | None] = {}
    intervals: dict[str, list[tuple[int, float, float]]] = {}
    for line, row in _rows(path, DENSE_COLUMNS if dense else VIDEO_COLUMNS):
        where = f"{path}, line {line}"
        name = row["path"]
        if not name:
            raise UserError(f"{where}: the path is empty")
        if not dense:
            if name in first_line:
                raise UserError(f"{where}: {name!r} is listed already, in line {first_line[name]}")
            labels[name] = _class_index(where, row["label"], classes, index_of)
        else:
            labels[name] = None
            found = intervals.setdefault(name, [])
            if row["start"] or row["end"] or row["label"]:
                start, end = _seconds(where, row["start"]), _seconds(where, row["end"])
                if not start < end:
                    raise UserError(f"{where}: expected the start before the end, got {start:g} and {end:g}")
                found.append((_class_index(where, row["label"], classes, index_of), start, end))
        first_line.setdefault(name, line)
    if not labels:
        raise UserError(f"{path}: no video in this list")
    return VideoList(
        str(path),
        tuple(
            LabelledVideo(name, path.parent / name, label, tuple(intervals.get(name, ())))
            for name, label in labels.items()
        ),
    )


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    order: list[int] | None = None
    width = len(columns)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                row = [cell.strip() for cell in cells]
                if not any(row):
                    continue
                if order is None:
                    header = [cell.lower() for cell in row]
                    if "path" in header:
                        order, width = _column_order(path, header, columns), len(header)
                        continue
                    order = list(range(width))
                if len(row) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {width} columns ({','.join(columns)}), "
                        f"got {len(row)}"
                    )
                yield reader.line_num, {name: row[place] for name, place in zip(columns, order, strict=True)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error


def _column_order(path: Path, header: list[str], columns: Sequence[str]) -> list[int]:
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path}: expected the columns {','.join(columns)}, got {','.join(header)}")
    if columns == VIDEO_COLUMNS and {"start", "end"} <= set(header):
        raise UserError(f"{path}: it has dense labels (path,start,end,label); this recipe takes one label per video")
    return [header.index(name) for name in columns]


def _class_index(where: str, text: str, classes: int, index_of: dict[str, int]) -> int:
    if text in index_of:
        return index_of[text]
    if text.isascii() and text.isdecimal() and int(text) < classes:
        return int(text)
    known = f"a class index from 0 to {classes - 1}" + (" or a name of the labels file" if index_of else "")
    raise UserError(f"{where}: expected {known}, got {text!r}")


def _seconds(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise UserError(f"{where}: expected seconds from 0, got {text!r}")
    return value
