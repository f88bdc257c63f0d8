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
[classes, outputs] per video.  NAME=PATH names the model in the picture, the file's name is used
otherwise, or its folder's where two files have the same.
labels: a CSV file with the header video,label."""


def add_parser(subparsers: Any) -> None:
    """Register ``analyze`` and its evaluations."""
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
    multilabel = _add(kinds, "video-map", _run_video_map, "mean average precision of videos with several labels each")
    _add_scores(
        multilabel,
        labels="CSV file with the header video,label; a row for each label of a video, an empty one for none",
    )
    multilabel.add_argument(
        "--pool",
        choices=("max", "mean"),
        default="max",
        help="how a video's outputs become one score per class (default: %(default)s, the protocol of Charades)",
    )
    confusion = _add(
        kinds, "confusion", _run_confusion, "confusion matrices by category, their difference, change per class"
    )
    _add_scores(confusion)
    confusion.add_argument(
        "--categories", type=Path, metavar="FILE", help="CSV file class,category: orders the classes, needs --classes"
    )
    confusion.add_argument("--top", type=int, metavar="N", help="draw the change of the N classes of largest gain only")
    best = _add(kinds, "top5", _run_top5, "the five best classes of single videos beside a picture of each")
    _add_scores(best)
    best.add_argument("--videos", type=Path, metavar="DIR", help="folder of the videos, for their pictures")
    best.add_argument("--show", nargs="+", metavar="VIDEO", help="which videos (default: the first six)")
    splits = _add(kinds, "splits", _run_splits, "mean accuracy and mAP over a data set's splits", files=False)
    splits.add_argument("evaluations", nargs="+", type=Path, metavar="DIR", help="a folder of `rcu-ops evaluate` each")
    cost = _add(kinds, "cost", _run_cost, "accuracy against multiply-accumulates", files=False)
    cost.add_argument(
        "table", type=Path, metavar="CSV", help="name,gmac,accuracy (percent) and group (a line of the picture each)"
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

    models = read_models(args.scores, softmax=args.softmax)
    first = next(iter(models.values()))
    classes = scores_io.read_class_names(args.classes, first.num_classes) if args.classes else None
    return models, classes


def read_models(sources: Sequence[str], *, softmax: bool = False) -> dict[str, ScoreSet]:
    """Scores of every ``[NAME=]PATH`` by name, all on the same videos and classes; UserError otherwise.

    Videos have the names of the first one's, see :func:`rcu_ops.analysis.scores_io.named_as`.
    """
    from rcu_ops.analysis import scores_io

    models: dict[str, ScoreSet] = {}
    for name, path in _names(sources):
        if name in models:
            raise UserError(f"two models are named {name!r}: name them apart with NAME=PATH")
        models[name] = scores_io.read_scores(path, softmax=softmax)
    first = next(iter(models.values()))
    for name, other in models.items():
        models[name] = renamed = scores_io.named_as(first, other)
        if renamed is not other:
            print(f"{other.source}: videos matched with {first.source}'s by their file names", file=sys.stderr)
        scores_io.check_same_videos(first, renamed)
    return models


def _names(sources: Sequence[str]) -> list[tuple[str, Path]]:
    """``NAME=PATH``, or paths alone, named after their files, or after their folders where the files' names are one.

    A scores.jsonl says nothing by its name: it always has its folder's.
    """
    found: list[tuple[str | None, Path]] = []
    for text in sources:
        name, equals, path = text.partition("=")
        given = bool(equals and name) and "/" not in name and not Path(text).exists()
        found.append((name, Path(path)) if given else (None, Path(text)))

    def named(path: Path) -> str:
        alike = [other.resolve().parent.name for name, other in found if name is None and other.stem == path.stem]
        told_apart = len(alike) == len(set(alike)) > 1
        if path.name == "scores.jsonl" or told_apart:
            return path.resolve().parent.name
        return path.stem or str(path)

    return [(named(path) if name is None else name, path) for name, path in found]


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


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left and the others to the right."""
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
    print_table(
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
    print_table(
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
    print_table(
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
    print_table(
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


def _run_video_map(args: argparse.Namespace) -> list[Path]:
    import numpy as np

    from rcu_ops.analysis import detection, scores_io
    from rcu_ops.report import write_csv

    models, classes = _load(args)
    first = next(iter(models.values()))
    labels = scores_io.read_label_sets(args.labels, first.num_classes, classes)
    results: dict[str, detection.DetectionResult] = {}
    for name, scores in models.items():
        scores_io.check_labelled(scores, labels)
        present = [np.isin(np.arange(first.num_classes), [*labels[video]])[:, None] for video in scores.videos]
        pooled = [
            (v.scores.max(1) if args.pool == "max" else v.scores.mean(1))[:, None] for v in scores.videos.values()
        ]
        try:
            results[name] = detection.frame_map(pooled, present)
        except ValueError as error:
            raise UserError(f"{scores.source}: {error}") from error
    _note_unscored(first, labels)
    table = args.out / "video_map.csv"
    rows = (
        (name, classes[k] if classes else k, float(result.average_precision[k]), int(result.positives[k]))
        for name, result in results.items()
        for k in range(first.num_classes)
    )
    write_csv(table, ("model", "class", "average_precision", "videos"), rows)
    print_table(
        ("model", "pool", "mAP %", "classes", "videos"),
        [
            (name, args.pool, f"{100 * r.mean:.2f}", str(len(r.positives) - len(r.excluded)), str(r.num_videos))
            for name, r in results.items()
        ],
    )
    return [table]


def _run_confusion(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import confusion, scores_io
    from rcu_ops.report import write_csv

    if args.top is not None:
        _positive(args, "top")
    data, _ = _labelled(args)
    classes = scores_io.read_class_names(args.classes) if args.classes else None
    found = {name: confusion.confusion(scores, labels) for name, (scores, labels) in data.items()}
    count = len(next(iter(found.values())).counts)
    names = classes if classes is not None else [str(index) for index in range(count)]
    categories = None
    if args.categories is not None:
        if classes is None:
            raise UserError("--categories: they are given by class name, so --classes is needed")
        categories = scores_io.read_categories(args.categories, classes)
    order = list(range(count)) if categories is None else confusion.category_order(categories)
    written: list[Path] = []

    def keep(name: str) -> Path:
        written.append(args.out / name)
        return written[-1]

    pictures: list[Callable[[], None]] = []

    def draw(name: str, matrix: Any, title: str, difference: bool = False) -> None:
        path = keep(name)
        pictures.append(
            lambda: confusion.plot_confusion(path, matrix, names, categories, difference=difference, title=title)
        )

    for name, each in found.items():
        confusion.write_csv(keep(f"confusion_{name}.csv"), each.counts, names, order)
        draw(f"confusion_{name}.png", each.rates, name)
    if categories is not None:
        accuracies = {name: confusion.category_accuracy(each, categories) for name, each in found.items()}
        rows: list[list[Any]] = [
            [category, next(iter(accuracies.values()))[category][1], *(a[category][0] for a in accuracies.values())]
            for category in dict.fromkeys(categories)
        ]
        write_csv(keep("categories.csv"), ["category", "videos", *found], rows)
        table = [tuple(map(str, row[:2])) + tuple(map(_percent, row[2:])) for row in rows]
        print_table(("category", "videos", *(f"{name} %" for name in found)), table)
    (first, before), *others = found.items()
    for name, after in others:
        change = confusion.per_class_change(before, after)
        rows = [[names[i], before.recall[i].item(), after.recall[i].item(), change[i].item()] for i in order]
        write_csv(keep(f"change_{name}.csv"), ["class", first, name, "change"], rows)
        draw(f"difference_{name}.png", after.rates - before.rates, f"{name} minus {first}", True)
        path = keep(f"change_{name}.png")
        pictures.append(lambda path=path, change=change: confusion.plot_change(path, change, names, top=args.top))  # type: ignore[misc]
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        print(f"{name} against {first}: {better} classes better, {worse} worse, of {count}")

    def draw_all() -> None:
        for picture in pictures:
            picture()

    _picture(draw_all, written[0])
    return written


def _run_top5(args: argparse.Namespace) -> list[Path]:
    from rcu_ops.analysis import scores_io, top5
    from rcu_ops.analysis.fusion import video_scores

    if args.softmax:
        raise UserError("--softmax: the picture shows probabilities anyway")
    models, classes = _load(args)
    first = next(iter(models.values()))
    labels = scores_io.read_video_labels(args.labels, first.num_classes, classes)
    shown = args.show or sorted(first.videos)[:6]
    for video in shown:
        if video not in first.videos:
            raise UserError(f"--show {video}: no such video in {first.source}")
        if video not in labels:
            raise UserError(f"{args.labels}: no label for {video!r}")
    names = classes if classes is not None else [str(index) for index in range(first.num_classes)]
    scores = {
        name: {video: video_scores(each.videos[video].scores) for video in shown} for name, each in models.items()
    }
    picture = args.out / "top5.png"
    pictures = {} if args.videos is None else _middle_pictures(args.videos, shown)
    _picture(lambda: top5.plot(picture, shown, pictures, scores, labels, names), args.labels)
    rows = [
        (video, names[labels[video]], name, ", ".join(f"{names[k]} {100 * p:.1f}" for k, p in top5.best_classes(each)))
        for video in shown
        for name, each in ((name, held[video]) for name, held in scores.items())
    ]
    print_table(("video", "true class", "model", "best classes (%)"), rows)
    return [picture]


def _middle_pictures(folder: Path, videos: Sequence[str]) -> dict[str, Any]:
    """The middle picture of every video that can be found and decoded; what cannot is said."""
    from rcu_ops.video import VideoError, open_video, read_frames

    pictures = {}
    for video in videos:
        found = [folder / video] if (folder / video).is_file() else sorted(folder.glob(f"{video}.*"))
        try:
            if not found:
                raise VideoError(f"{folder / video}: no such file")
            with open_video(found[0]) as reader:
                count = reader.frame_count or 1
            pictures[video] = read_frames(found[0], [count // 2])[0]
        except VideoError as error:
            print(f"note: no picture: {error}", file=sys.stderr)
    return pictures


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
    print_table(
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


def _run_splits(args: argparse.Namespace) -> Sequence[Path]:
    from rcu_ops.analysis.comparison import split_means
    from rcu_ops.report import write_csv

    means = split_means(args.evaluations)
    for row in means:
        values = ", ".join(f"{100 * value:.2f}" for value in row.values)
        print(f"{row.mode:<9} {row.measure:<11} {100 * row.mean:6.2f} % +- {100 * row.deviation:.2f}  ({values})")
    table = args.out / "splits.csv"
    header = ("mode", "measure", "mean", "deviation", *(f"split{index + 1}" for index in range(len(args.evaluations))))
    write_csv(table, header, ((row.mode, row.measure, row.mean, row.deviation, *row.values) for row in means))
    return [table]


def _run_cost(args: argparse.Namespace) -> Sequence[Path]:
    from rcu_ops.analysis.comparison import plot_priced, read_priced

    points = read_priced(args.table)
    for point in sorted(points, key=lambda point: point.gmac):
        print(f"{point.name:<28} {point.gmac:10.2f} GMAC {point.accuracy:7.2f} %  {point.group}".rstrip())
    picture = args.out / "accuracy_cost.png"
    _picture(lambda: plot_priced(picture, points), args.table)
    return [picture]
