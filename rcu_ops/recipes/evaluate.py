"""Scores and accuracy of a trained network on a list of videos.

Every video's scores are a file of their own until all videos are done, so an interrupted evaluation goes on where it
stopped. The results are files that ``rcu-ops analyze`` reads:

- ``scores_clips.npz``, ``scores_sliding.npz``, ``scores_unrolled.npz``: one array [K, outputs] per video, by the name
  that the list gives it (see :mod:`rcu_ops.recipes.scoring` for what they are);
- ``labels.csv`` (``video,label``; with several labels a row for each, and an empty one for none), or ``labels.npz``
  with one array [K, T] of 0 and 1 per video for dense labels;
- ``videos.csv``: the first choice of every mode for every video (one label per video only);
- ``summary.json``: the numbers, the settings, and the videos that could not be used.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops.analysis.scores_io import list_names
from rcu_ops.cli_errors import UserError
from rcu_ops.progress import Progress
from rcu_ops.recipes.config import Recipe
from rcu_ops.recipes.lists import LabelledVideo, VideoList
from rcu_ops.recipes.metrics import accuracy_over, mean_average_precision, video_mean_average_precision
from rcu_ops.recipes.scoring import VideoResult
from rcu_ops.report import replacing, write_csv, write_json
from rcu_ops.run_folder import SETTINGS, claim_folder
from rcu_ops.video import VideoError

__all__ = ["EVERY", "EXIT_INCOMPLETE", "evaluate"]

EVERY = (1, 8)
"""mAP at every frame and every 8th one."""

EXIT_INCOMPLETE = 3

_SUMMARY = "summary.json"
_PARTS = "parts"


def evaluate(
    score: Callable[[str], VideoResult],
    videos: VideoList,
    recipe: Recipe,
    modes: Sequence[str],
    out: Path,
    identity: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> int:
    """Score every video that has not been scored yet, then write all results.

    Args:
        score: scores of one file, such as a :class:`rcu_ops.recipes.scoring.VideoScorer`.
        videos: what to score.
        recipe: decides what labels are (``loss``, ``trimmed``) and the number of classes.
        modes: the scores that ``score`` gives, by name.
        out: the folder of the results; made if need be.
        identity: what the scores depend on, as JSON has it; the folder is refused if it holds another's.
        names: class names, for ``videos.csv``.

    Returns:
        0 if all videos were scored, 3 if some could not be used; the results are then those of the others.

    Raises:
        UserError: the folder holds another evaluation, or not one video can be used.
    """
    identity = json.loads(json.dumps({**identity, "list": videos.digest, "modes": list(modes)}))
    if claim_folder(out, identity, "an evaluation") and (out / _SUMMARY).is_file():
        summary = json.loads((out / _SUMMARY).read_text(encoding="utf-8"))
        print(f"{out} holds this evaluation already; --overwrite does it again")
        _print_summary(summary)
        return EXIT_INCOMPLETE if summary["unusable"] else 0
    parts = out / _PARTS
    began = time.monotonic()
    problems = _score_all(score, videos, recipe, parts, out)
    done = [(index, video) for index, video in enumerate(videos.videos) if _part(parts, index).is_file()]
    if not done:
        first = next(iter(problems.values()))
        raise UserError(f"{videos.source}: not one of its {len(videos.videos)} videos can be used: {first}")
    summary = _write_results(done, parts, recipe, modes, out, names)
    faults = {video.name: fault for index, video in done if (fault := str(_read(parts, index, "fault")))}
    summary = {
        **summary,
        "videos": len(done),
        "unusable": [{"video": name, "reason": reason} for name, reason in problems.items()],
        "broken": [{"video": name, "reason": reason} for name, reason in faults.items()],
        "seconds": round(time.monotonic() - began, 3),
        "settings": identity,
    }
    write_json(out / _SUMMARY, summary, indent=2)
    shutil.rmtree(parts)
    _print_summary(summary)
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir() if path.name != SETTINGS))} to {out}")
    if problems:
        count = f"{len(problems)} of {len(videos.videos)}"
        print(
            f"rcu-ops: warning: videos that could not be used: {count}: {list_names(sorted(problems))}", file=sys.stderr
        )
    return EXIT_INCOMPLETE if problems else 0


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:07d}.npz"


def _read(parts: Path, index: int, key: str) -> np.ndarray:
    with np.load(_part(parts, index), allow_pickle=False) as archive:
        return archive[key]


def _score_all(
    score: Callable[[str], VideoResult], videos: VideoList, recipe: Recipe, parts: Path, out: Path
) -> dict[str, str]:
    """Write the part of every video that has none; the reasons of those that could not be used, by name."""
    parts.mkdir(exist_ok=True)
    waiting = [(i, video) for i, video in enumerate(videos.videos) if not _part(parts, i).is_file()]
    if len(waiting) < len(videos.videos):
        print(f"{len(videos.videos) - len(waiting)} of {len(videos.videos)} videos were done already")
    problems: dict[str, str] = {}
    with Progress(len(waiting), label="evaluate", unit="videos") as bar:
        for count, (index, video) in enumerate(waiting):
            try:
                result = score(str(video.path))
                _check(video.name, result, recipe)
                arrays = {**result.scores, "times": result.times, "fault": np.asarray(result.fault or "")}
                with replacing(_part(parts, index)) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            except VideoError as error:
                problems[video.name] = str(error)
                bar.write(f"rcu-ops: warning: {error}", stream=sys.stderr)
            except KeyboardInterrupt:
                left = len(waiting) - count
                bar.write(f"{left} videos are left; the same command goes on with them", stream=sys.stderr)
                raise
            bar.update()
    return problems


def _check(name: str, result: VideoResult, recipe: Recipe) -> None:
    """Refuse scores that no analysis can use."""
    for mode, scores in result.scores.items():
        if not np.isfinite(scores).all():
            raise VideoError(f"{name}: the network's {mode} scores are not finite")
        if recipe.dense and mode != "clips" and scores.shape[1] != len(result.times):
            raise UserError(
                f"dense labels need one score vector per frame, the network gives {scores.shape[1]} for "
                f"{len(result.times)} frames (I3D and (2+1)D networks: --model-option dense=true)"
            )


def _write_results(
    done: Sequence[tuple[int, LabelledVideo]],
    parts: Path,
    recipe: Recipe,
    modes: Sequence[str],
    out: Path,
    names: Sequence[str] | None,
) -> dict[str, Any]:
    for mode in modes:
        write_arrays(out / f"scores_{mode}.npz", ((v.name, _read(parts, i, mode)) for i, v in done))
    summary: dict[str, Any] = {}
    if recipe.dense:
        present = [video.present(_read(parts, index, "times"), recipe.classes) for index, video in done]
        write_arrays(out / "labels.npz", zip((video.name for _, video in done), present, strict=True))
        for mode in modes:
            if mode != "clips":
                scores = [_read(parts, index, mode) for index, _ in done]
                summary.setdefault("map", {})[mode] = {
                    str(every): mean_average_precision(scores, present, every) for every in EVERY
                }
        return summary
    if recipe.trimmed:
        present = [video.present_anywhere(recipe.classes) for _, video in done]
        labels = (
            (video.name, label)
            for (_, video), classes in zip(done, present, strict=True)
            for label in (np.flatnonzero(classes).tolist() or [""])
        )
        write_csv(out / "labels.csv", ("video", "label"), labels)
        for mode in modes:
            every_score = (_read(parts, index, mode) for index, _ in done)
            summary.setdefault("video_map", {})[mode] = video_mean_average_precision(every_score, present)
        return summary
    write_csv(out / "labels.csv", ("video", "label"), ((video.name, video.label) for _, video in done))
    choices: list[list[Any]] = [[video.name, video.label] for _, video in done]
    for mode in modes:

        def pairs(mode: str = mode) -> Iterator[tuple[np.ndarray, int]]:
            for row, (index, video) in zip(choices, done, strict=True):
                scores = _read(parts, index, mode)
                row.append(int(scores.mean(axis=1, dtype=np.float64).argmax()))
                assert video.label is not None
                yield scores, video.label

        summary.setdefault("accuracy", {})[mode] = asdict(accuracy_over(pairs()))
    if names is not None:
        choices = [[name, *(names[choice] for choice in rest)] for name, *rest in choices]
    write_csv(out / "videos.csv", ("video", "label", *modes), choices)
    return summary


def write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """An ``.npz`` file written array by array: ``np.savez`` would hold them all in memory."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _print_summary(summary: Mapping[str, Any]) -> None:
    for mode, values in summary.get("accuracy", {}).items():
        single = "clip" if mode == "clips" else "single"
        print(
            f"{mode:<9} video top-1 {100 * values['video_top1']:.2f} %, top-5 {100 * values['video_top5']:.2f} %; "
            f"{single} top-1 {100 * values['clip_top1']:.2f} %, top-5 {100 * values['clip_top5']:.2f} % "
            f"({values['num_videos']} videos)"
        )
    for mode, values in summary.get("map", {}).items():
        shown = ", ".join(
            f"mAP@{every} {100 * value:.2f} %" if value is not None and math.isfinite(value) else f"mAP@{every} none"
            for every, value in values.items()
        )
        print(f"{mode:<9} {shown} ({summary['videos']} videos)")
    for mode, value in summary.get("video_map", {}).items():
        shown = "none" if value is None else f"{100 * value:.2f} %"
        print(f"{mode:<9} mAP {shown} of the greatest scores ({summary['videos']} videos)")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
