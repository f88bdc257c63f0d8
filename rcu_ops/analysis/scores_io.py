"""Scores and labels from files.

Scores of one model are a file or folder:

- ``scores.jsonl`` as ``rcu-ops stream --out DIR`` writes it (one JSON object per frame with ``index``, ``time`` in
  seconds and ``scores``, a list of K numbers): one video, named after its folder (any other file name: after the file);
- a folder: every ``*.jsonl`` below it, one video each;
- ``.npz`` or ``.safetensors``: one array ``[K, T_v]`` per video, stored under the video's name.

Labels are CSV files with a header line; the columns may stand in any order:

- one label per video: ``video,label``;
- dense labels: ``video,class,start,end`` with frame numbers, or ``video,class,start_s,end_s`` with seconds; the end is
  not included.  A row with an empty class says that a video has no action at all.  Or ``.npz`` / ``.safetensors`` with
  one array ``[K, T_v]`` of 0 and 1 per video.

Labels are class indices, or names when a list of class names is given.  Every fault in a file raises
:class:`rcu_ops.cli_errors.UserError` with the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcu_ops.analysis import fusion
from rcu_ops.cli_errors import UserError
from rcu_ops.tensor_files import not_safetensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VideoScores:
    """Scores ``[K, T]`` of one video with the frame number (int64 ``[T]``) and time (seconds) of each output."""

    scores: np.ndarray
    frames: np.ndarray
    times: np.ndarray | None = None


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one model on a set of videos."""

    source: str
    videos: dict[str, VideoScores] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Scores per output, the same in every video."""
        return int(next(iter(self.videos.values())).scores.shape[0])


def read_scores(path: str | Path, *, softmax: bool = False) -> ScoreSet:
    """Scores of one model from a file or folder; ``softmax`` turns every output's scores into probabilities first."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.jsonl") if not file.name.startswith("."))
        if not files:
            raise UserError(f"{path}: no .jsonl file in this folder")
        videos: dict[str, VideoScores] = {}
        for file in files:
            name = _video_name(file)
            if name in videos:
                raise UserError(f"{file}: a second file for the video {name!r}")
            videos[name] = _read_jsonl(file)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    elif path.suffix == ".jsonl":
        videos = {_video_name(path): _read_jsonl(path)}
    else:
        arrays = read_arrays(path)
        videos = {name: VideoScores(a, np.arange(a.shape[-1] if a.ndim else 0)) for name, a in arrays.items()}
    _check_videos(path, videos)
    if softmax:
        videos = {name: VideoScores(fusion.softmax(v.scores), v.frames, v.times) for name, v in videos.items()}
    return ScoreSet(str(path), videos)


def _check_videos(path: Path, videos: Mapping[str, VideoScores]) -> None:
    if not videos:
        raise UserError(f"{path}: no video in this file")
    classes = None
    for name, video in videos.items():
        shape = list(video.scores.shape)
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{path}: video {name!r}: expected scores of shape [K, T] with K, T >= 1, got {shape}")
        if video.scores.dtype.kind not in "fiu":
            raise UserError(f"{path}: video {name!r}: expected real numbers, got {video.scores.dtype}")
        if not np.isfinite(video.scores).all():
            raise UserError(f"{path}: video {name!r}: scores hold NaN or infinity")
        if classes is not None and shape[0] != classes:
            raise UserError(f"{path}: video {name!r}: expected {classes} classes as in the others, got {shape[0]}")
        classes = shape[0]


def _video_name(file: Path) -> str:
    return file.resolve().parent.name if file.name == "scores.jsonl" else file.stem


def _read_jsonl(path: Path) -> VideoScores:
    rows: list[list[float]] = []
    frames: list[int] = []
    times: list[float] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
        scores, index, time = record.get("scores"), record.get("index"), record.get("time")
        if not isinstance(scores, list) or not scores or not all(_is_number(value) for value in scores):
            raise UserError(f"{where}: expected a list of numbers under 'scores'")
        if rows and len(scores) != len(rows[0]):
            raise UserError(f"{where}: expected {len(rows[0])} scores as in the lines before, got {len(scores)}")
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UserError(f"{where}: expected a frame number under 'index', got {index!r}")
        if frames and index <= frames[-1]:
            raise UserError(f"{where}: expected a frame number above {frames[-1]}, got {index}")
        if time is not None and not _is_number(time):
            raise UserError(f"{where}: expected seconds under 'time', got {time!r}")
        rows.append([float(value) for value in scores])
        frames.append(index)
        times.append(float("nan") if time is None else float(time))
    if not rows:
        raise UserError(f"{path}: no frame in this file")
    known = np.asarray(times)
    return VideoScores(
        np.ascontiguousarray(np.asarray(rows).T),
        np.asarray(frames, dtype=np.int64),
        None if np.isnan(known).any() else known,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a ``.npz`` or ``.safetensors`` file by name; objects (pickles) are refused."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix == ".safetensors":
            return {name: _host_array(tensor) for name, tensor in _load_safetensors(path).items()}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from error
    raise UserError(f"{path}: expected .jsonl, .npz, .safetensors or a folder")


def _host_array(tensor: Any) -> np.ndarray:
    from rcu_ops.analysis._checks import to_numpy

    return to_numpy(tensor)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} {not_safetensors(path, error)}") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """:func:`rcu_ops.tensor_files.read_state_dict`, with the layers in the order of the network.

    Safetensors files do not keep that order; it is recovered from the names.
    """
    from rcu_ops import tensor_files
    from rcu_ops.analysis.spectrum import natural_order

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        tensors = tensor_files.read_state_dict(path)
    except (OSError, ValueError) as error:
        raise UserError(_one_line(error)) from error
    return {name: tensors[name] for name in natural_order(list(tensors))} if path.suffix == ".safetensors" else tensors


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__


def read_class_names(path: str | Path, num_classes: int | None = None) -> list[str]:
    """One class name per line; with ``num_classes`` the count must fit."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {_one_line(error)}") from error
    if not names:
        raise UserError(f"{path}: no class name in this file")
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: the class name {repeated!r} stands there more than once")
    if num_classes is not None and len(names) != num_classes:
        raise UserError(f"{path}: expected {num_classes} class names, one per score, got {len(names)}")
    return names


def _read_table(path: Path, choices: Sequence[Sequence[str]]) -> tuple[Sequence[str], list[tuple[int, dict[str, str]]]]:
    """Rows of a CSV file as (line number, columns) for the first of ``choices`` whose columns are all there."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            columns = next((choice for choice in choices if set(choice) <= set(header)), None)
            if columns is None:
                wanted = " or ".join(",".join(choice) for choice in choices)
                raise UserError(f"{path}: expected a header line with {wanted}, got {','.join(header) or 'nothing'}")
            rows = []
            for row in reader:
                if any(row[name] is None for name in columns):
                    raise UserError(f"{path}, line {reader.line_num}: expected {len(header)} columns")
                rows.append((reader.line_num, {name: row[name].strip() for name in columns}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {_one_line(error)}") from error
    return columns, rows


def read_video_labels(path: str | Path, num_classes: int, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Class index per video from a ``video,label`` table."""
    path = Path(path)
    _, rows = _read_table(path, [("video", "label")])
    labels: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if row["video"] in labels:
            raise UserError(f"{where}: a second label for the video {row['video']!r}")
        labels[row["video"]] = _class_index(where, row["label"], num_classes, classes)
    return labels


def read_label_sets(path: str | Path, num_classes: int, classes: Sequence[str] | None = None) -> dict[str, set[int]]:
    """Class indices per video from a ``video,label`` table with a row for each label, an empty one for none at all."""
    path = Path(path)
    labels: dict[str, set[int]] = {}
    for line, row in _read_table(path, [("video", "label")])[1]:
        found = labels.setdefault(row["video"], set())
        if row["label"]:
            found.add(_class_index(f"{path}, line {line}", row["label"], num_classes, classes))
    return labels


def read_categories(path: str | Path, classes: Sequence[str]) -> list[str]:
    """The coarse category of every class, in class order, from a ``class,category`` table."""
    path = Path(path)
    _, rows = _read_table(path, [("class", "category")])
    found: dict[str, str] = {}
    for line, row in rows:
        if row["class"] in found:
            raise UserError(f"{path}, line {line}: a second category for the class {row['class']!r}")
        found[row["class"]] = row["category"]
    missing = [name for name in classes if name not in found]
    if missing:
        raise UserError(f"{path}: no category for {list_names(missing)}")
    return [found[name] for name in classes]


def _class_index(where: str, text: str, num_classes: int, classes: Sequence[str] | None) -> int:
    if classes is not None and text in classes:
        return classes.index(text)
    if text.isdecimal():
        if int(text) < num_classes:
            return int(text)
        raise UserError(f"{where}: expected a class index from 0 to {num_classes - 1}, got {text}")
    known = "a class index or one of the given class names" if classes is not None else "a class index"
    raise UserError(f"{where}: expected {known}, got {text!r}")


def labels_for(scores: ScoreSet, labels: Mapping[str, int]) -> np.ndarray:
    """The label of every scored video, in the order of ``scores``, int64 ``[V]``; a video without one is an error."""
    check_labelled(scores, labels)
    return np.asarray([labels[name] for name in scores.videos], dtype=np.int64)


def check_labelled(scores: ScoreSet, labelled: Iterable[str]) -> None:
    """UserError unless every scored video is among ``labelled``."""
    missing = sorted(set(scores.videos) - set(labelled))
    if missing:
        raise UserError(f"{scores.source}: no label for {list_names(missing)}")


def named_as(first: ScoreSet, other: ScoreSet) -> ScoreSet:
    """``other`` under the names of ``first``'s videos, where file names without folder and suffix say which is which.

    An RGB stream's videos are ``videos/a.mp4``, its flow stream's ``flow/a.npy``. Unchanged where the names are the
    same, or where that does not match every video of both with one of the other.
    """
    if set(other.videos) == set(first.videos):
        return other
    names, scores = ({Path(name).stem: name for name in one.videos} for one in (first, other))
    if len(names) < len(first.videos) or len(scores) < len(other.videos) or set(names) != set(scores):
        return other
    return replace(other, videos={name: other.videos[scores[stem]] for stem, name in names.items()})


def check_same_videos(first: ScoreSet, other: ScoreSet) -> None:
    """UserError unless two models were run on the same videos and classes: only then do their numbers compare."""
    if first.num_classes != other.num_classes:
        raise UserError(
            f"{other.source}: expected {first.num_classes} classes as in {first.source}, got {other.num_classes}"
        )
    only_first, only_other = (
        sorted(set(first.videos) - set(other.videos)),
        sorted(set(other.videos) - set(first.videos)),
    )
    if only_first:
        raise UserError(f"{other.source}: no scores for {list_names(only_first)}, which {first.source} has")
    if only_other:
        raise UserError(f"{first.source}: no scores for {list_names(only_other)}, which {other.source} has")


def list_names(names: Sequence[str], at_most: int = 5) -> str:
    """``'a', 'b' and 3 more``: video names for a message of one line."""
    shown = ", ".join(repr(name) for name in names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"


class DenseLabels:
    """Dense labels from a file, as a 0 / 1 array for any video's scores, see the module's description."""

    def __init__(
        self, path: str | Path, num_classes: int, classes: Sequence[str] | None = None, *, fps: float | None = None
    ) -> None:
        self.path = Path(path)
        self.num_classes = num_classes
        self.fps = fps
        self._arrays: dict[str, np.ndarray] = {}
        self._intervals: dict[str, list[tuple[int, float, float]]] = {}
        self._seconds = False
        if self.path.suffix in (".npz", ".safetensors"):
            self._arrays = read_arrays(self.path)
        else:
            self._read_intervals(classes)

    @property
    def videos(self) -> list[str]:
        """Names of the labelled videos."""
        return list(self._arrays or self._intervals)

    def _read_intervals(self, classes: Sequence[str] | None) -> None:
        columns, rows = _read_table(
            self.path, [("video", "class", "start", "end"), ("video", "class", "start_s", "end_s")]
        )
        self._seconds = "start_s" in columns
        for line, row in rows:
            where = f"{self.path}, line {line}"
            intervals = self._intervals.setdefault(row["video"], [])
            if not row["class"]:
                continue
            index = _class_index(where, row["class"], self.num_classes, classes)
            start, end = (self._parse_bound(where, row[name]) for name in columns[2:])
            if not start < end:
                raise UserError(f"{where}: expected the start before the end, got {start:g} and {end:g}")
            intervals.append((index, start, end))

    def _parse_bound(self, where: str, text: str) -> float:
        try:
            value = float(text) if self._seconds else int(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value < float("inf"):
            kind = "seconds" if self._seconds else "a frame number"
            raise UserError(f"{where}: expected {kind}, got {text!r}")
        return value

    def for_video(self, name: str, video: VideoScores) -> np.ndarray:
        """Which classes are present in each output of ``video``, bool ``[K, T]``."""
        if self._arrays:
            return self._pick_frames(name, video)
        position = self._clock(name, video)
        present = np.zeros(video.scores.shape, dtype=bool)
        for index, start, end in self._intervals[name]:
            present[index] |= (position >= start) & (position < end)
        return present

    def _pick_frames(self, name: str, video: VideoScores) -> np.ndarray:
        array = self._arrays[name]
        if array.ndim != 2 or array.shape[0] != self.num_classes or array.shape[1] <= video.frames[-1]:
            wanted = f"[{self.num_classes}, {int(video.frames[-1]) + 1} or more]"
            raise UserError(f"{self.path}: video {name!r}: expected shape {wanted}, got {list(array.shape)}")
        if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
            raise UserError(f"{self.path}: video {name!r}: expected only 0 and 1")
        return array[:, video.frames].astype(bool)

    def _clock(self, name: str, video: VideoScores) -> np.ndarray:
        if not self._seconds:
            return video.frames
        if self.fps is not None:
            return video.frames / self.fps
        if video.times is None:
            raise UserError(f"{self.path}: labels in seconds, but the scores of {name!r} have no times: give --fps")
        return video.times
