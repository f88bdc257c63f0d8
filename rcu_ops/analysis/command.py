"""``rcu-ops analyze``: the evaluations of this package from files of scores and weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError

if TYPE_CHECKING:
    from rcu_ops.analysis.scores_io import ScoreSet

_FILES = """\
scores: a scores.jsonl of `rcu-ops stream`, a folder of them, or an .npz / .safetensors file with one array
[classes, outputs] per video.  NAME=PATH names the model in the picture, the file's name is used otherwise.
labels: a CSV file with the header video,label."""


def add_parser(subparsers: Any) -> None:
    """Register ``analyze`` and its five evaluations."""
    parser = subparsers.add_parser(
        "analyze",
        help="evaluate scores and weights: accuracy, early prediction, segments, mAP, spectrum",
        description="Evaluate per-frame scores and recurrent weights; writes numbers (CSV) and a picture (PNG).",
    )
    kinds = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)

    accuracy = _add(kinds, "accuracy", _run_accuracy, "clip and video accuracy, top-1 and top-5")
    _add_scores(accuracy)
    early = _add(kinds, "early", _run_early, "accuracy of accumulated scores against the observed part of the video")
    _add_scores(early)
    early.add_argument("--steps", type=int, default=10, help="number of observed fractions (default: 10, every 10 %%)")
    segments = _add(kinds, "segments", _run_segments, "accuracy of ten segments relative to the first")
    _add_scores(segments)
    segments.add_argument("--segments", type=int, default=10, help="number of segments (default: 10)")
    segments.add_argument(
        "--sliding",
        action="append",
        default=[],
        metavar="NAME",
        help="this model's scores are of a sliding window: drawn dashed; may repeat, or write NAME:sliding=PATH",
    )
    detection = _add(kinds, "map", _run_map, "frame-wise mean average precision of dense labels, mAP@1 and mAP@8")
    _add_scores(
        detection, labels="dense labels: CSV video,class,start,end (frames) or start_s,end_s, or .npz/.safetensors"
    )
    detection.add_argument(
        "--every", type=int, nargs="+", default=[1, 8], metavar="N", help="look at every N-th frame (default: 1 8)"
    )
    detection.add_argument(
        "--fps", type=float, help="frames per second, for labels in seconds and scores without times"
    )
    spectrum = _add(kinds, "spectrum", _run_spectrum, "entries, diagonal and eigenvalues of every w_hh", files=False)
    spectrum.add_argument("weights", type=Path, help="state dict of a recurrent network: .pth, .pt or .safetensors")


def _add(
    kinds: Any, name: str, work: Callable[[argparse.Namespace], Sequence[Path]], text: str, files: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_FILES if files else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder for the results (default: here)"
    )
    parser.set_defaults(run=run, work=work)
    return parser


def _add_scores(parser: argparse.ArgumentParser, labels: str = "CSV file with the header video,label") -> None:
    parser.add_argument("scores", nargs="+", metavar="[NAME=]PATH", help="scores of one model each")
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE", help=labels)
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    parser.add_argument("--softmax", action="store_true", help="turn scores into probabilities before anything else")


def run(args: argparse.Namespace) -> int:
    """Run one evaluation; prints a table and the files written, returns 0.  Bad input raises UserError."""
    try:
        written = args.work(args)
    except BrokenPipeError:  # not a fault of ours: whoever read the table has gone
        raise
    except OSError as error:
        raise UserError(f"{args.out}: cannot write the results: {error.strerror or error}") from error
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _picture(draw: Callable[[], None], table: Path) -> None:
    """Draw, or say what is missing; the numbers are written by then."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the numbers are in {table}; the picture needs matplotlib: pip install 'rcu-ops[plot]'"
        ) from error
    draw()


def _positive(args: argparse.Namespace, name: str) -> int:
    value = getattr(args, name)
    if value < 1:
        raise UserError(f"--{name}: expected at least 1, got {value}")
    return int(value)


def _load(args: argparse.Namespace) -> tuple[dict[str, ScoreSet], list[str] | None]:
    """Scores of every model by name, all on the same videos, and the class names."""
    from rcu_ops.analysis import scores_io

    models: dict[str, ScoreSet] = {}
    for text in args.scores:
        name, path = _split_name(text)
        if name in models:
            raise UserError(f"two models are named {name!r}: name them apart with NAME=PATH")
        models[name] = scores_io.read_scores(path, softmax=args.softmax)
    first = next(iter(models.values()))
    for other in models.values():
        scores_io.check_same_videos(first, other)
    classes = scores_io.read_class_names(args.classes, first.num_classes) if args.classes else None
    return models, classes


def _split_name(text: str) -> tuple[str, Path]:
    """``NAME=PATH``, or a path alone, named after the file or, for scores.jsonl, after its folder."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, Path(path)
    file = Path(text)
    return (file.resolve().parent.name if file.name == "scores.jsonl" else file.stem or text), file


def _labelled(args: argparse.Namespace) -> tuple[dict[str, tuple[list[Any], Any]], int]:
    """Per model the scores of every video and the matching labels, and the number of videos."""
    from rcu_ops.analysis import scores_io

    models, classes = _load(args)
    first = next(iter(models.values()))
    labels = scores_io.read_video_labels(args.labels, first.num_classes, classes)
    data = {
        name: ([video.scores for video in scores.videos.values()], scores_io.labels_for(scores, labels))
        for name, scores in models.items()
    }
    _note_unscored(first, labels)
    return data, len(first.videos)


def _note_unscored(scores: ScoreSet, labelled: Any) -> None:
    from rcu_ops.analysis.scores_io import list_names

    unscored = sorted(set(labelled) - set(scores.videos))
    if unscored:
        print(f"note: labelled, but without scores and left out: {list_names(unscored)}", file=sys.stderr)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (str(cell) for cell in row)
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _run_accuracy(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import accuracy

    data, _ = _labelled(args)
    reports = [(name, accuracy.accuracy_report(scores, labels)) for name, (scores, labels) in data.items()]
    table, picture = args.out / "accuracy.csv", args.out / "accuracy.png"
    accuracy.write_csv(table, reports)
    _picture(lambda: accuracy.plot(picture, reports), table)
    _print_table(
        ("model", "clip top-1 %", "clip top-5 %", "video top-1 %", "video top-5 %", "clips", "videos"),
        [
            (
                name,
                *map(_percent, (r.clip_top1, r.clip_top5, r.video_top1, r.video_top5)),
                str(r.num_clips),
                str(r.num_videos),
            )
            for name, r in reports
        ],
    )
    return [table, picture]


def _run_early(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import early

    steps = _positive(args, "steps")
    data, num_videos = _labelled(args)
    curves = {name: early.early_accuracy(scores, labels, steps=steps) for name, (scores, labels) in data.items()}
    table, picture = args.out / "early.csv", args.out / "early.png"
    early.write_csv(table, curves, num_videos)
    _picture(lambda: early.plot(picture, curves), table)
    _print_table(
        ("observed %", *curves),
        [
            (f"{100 * (step + 1) / steps:g}", *(_percent(curve[step]) for curve in curves.values()))
            for step in range(steps)
        ],
    )
    return [table, picture]


def _run_segments(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import segments

    count = _positive(args, "segments")
    data, _ = _labelled(args)
    unknown = [name for name in args.sliding if name not in data]
    if unknown:
        raise UserError(f"--sliding {unknown[0]}: no such model among {', '.join(data)}")
    curves = []
    for name, (scores, labels) in data.items():
        model, _, suffix = name.rpartition(":")
        named = suffix in segments.MODES and bool(model)
        mode = "sliding" if name in args.sliding else suffix if named else "unrolled"
        curves.append(segments.segment_curve(model if named else name, scores, labels, mode=mode, segments=count))
    table, picture = args.out / "segments.csv", args.out / "segments.png"
    segments.write_csv(table, curves)
    _picture(lambda: segments.plot(picture, curves), table)
    _print_table(
        ("segment", *(f"{c.model}, {c.mode}" for c in curves)),
        [(str(s + 1), *(f"{100 * c.relative[s]:+.1f}" for c in curves)) for s in range(count)],
    )
    if curves[0].short_videos:
        print(
            f"note: {curves[0].short_videos} videos have fewer than {count} outputs; some segments share one output",
            file=sys.stderr,
        )
    return [table, picture]


def _run_map(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import detection, scores_io

    if any(every < 1 for every in args.every):
        raise UserError(f"--every: expected at least 1, got {min(args.every)}")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        raise UserError(f"--fps: expected a number above 0, got {args.fps:g}")
    models, classes = _load(args)
    first = next(iter(models.values()))
    dense = scores_io.DenseLabels(args.labels, first.num_classes, classes, fps=args.fps)
    results: dict[str, list[detection.DetectionResult]] = {}
    for name, scores in models.items():
        scores_io.check_labelled(scores, dense.videos)
        videos = list(scores.videos.values())
        labels = [dense.for_video(video_name, video) for video_name, video in scores.videos.items()]
        try:
            results[name] = [
                detection.frame_map([v.scores for v in videos], labels, every=every, frames=[v.frames for v in videos])
                for every in dict.fromkeys(args.every)
            ]
        except ValueError as error:
            raise UserError(f"{scores.source}: {error}") from error
    _note_unscored(first, dense.videos)
    table, picture = args.out / "map.csv", args.out / "map.png"
    detection.write_csv(table, results, classes)
    _picture(lambda: detection.plot(picture, results, classes), table)
    _print_table(
        ("model", "every", "mAP %", "classes", "frames", "videos"),
        [
            (
                name,
                str(r.every),
                f"{100 * r.mean:.2f}",
                str(len(r.positives) - len(r.excluded)),
                str(r.num_frames),
                str(r.num_videos),
            )
            for name, samplings in results.items()
            for r in samplings
        ],
    )
    for result in next(iter(results.values())):
        if result.excluded:
            shown = [classes[k] if classes else str(k) for k in result.excluded]
            print(
                f"note: mAP@{result.every} leaves out classes without positive frames: {', '.join(shown)}",
                file=sys.stderr,
            )
    return [table, picture]


def _run_spectrum(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import scores_io, spectrum

    try:
        spectra = spectrum.recurrent_spectra(scores_io.read_state_dict(args.weights))
    except (ValueError, TypeError) as error:
        raise UserError(f"{args.weights}: {error}") from error
    table, values, picture = (args.out / name for name in ("spectrum.csv", "eigenvalues.csv", "spectrum.png"))
    spectrum.write_csv(table, spectra)
    spectrum.write_eigenvalues_csv(values, spectra)
    _picture(lambda: spectrum.plot(picture, spectra), table)
    _print_table(
        ("layer", "C", "entries", "diagonal", "|eigenvalue|", "Re eigenvalue", "radius"),
        [
            (
                s.name,
                str(s.channels),
                _spread(s.entries_mean, s.entries_std),
                _spread(s.diagonal_mean, s.diagonal_std),
                _spread(s.modulus.mean(), s.modulus.std()),
                _spread(s.eigenvalues.real.mean(), s.eigenvalues.real.std()),
                f"{s.spectral_radius:.3f}",
            )
            for s in spectra
        ],
    )
    return [table, values, picture]


def _spread(mean: float, std: float) -> str:
    return f"{mean:.3f} ± {std:.3f}"
