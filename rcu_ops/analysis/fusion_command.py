"""``rcu-ops fuse``: several streams' scores, or features, into one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rcu_ops.cli_errors import UserError

_DESCRIPTION = """\
Fuse the scores of several streams or methods on the same videos (late fusion): the outputs of a video are averaged,
then the streams' vectors are added, multiplied or weighed. Writes one array [classes, 1] per video to --out, ready for
`rcu-ops analyze`, and with --labels prints the accuracy of every stream and of the fusion. Scores from elsewhere (an
IDT pipeline's, say) take part as an .npz file with one array [classes, outputs] per video. Videos are matched by their
names or, where these differ (videos/a.mp4, flow/a.npy), by the file names without folder and suffix. A two-stream
network's RGB and flow, weighed before any softmax:

  rcu-ops fuse rgb/scores_clips.npz flow/scores_clips.npz --how weighted --weights 0.45,0.55 --out fused.npz

With --features the arguments are folders of `rcu-ops features`, and the features of every video are fused (mid fusion)
into the folder --out.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``fuse``."""
    parser = subparsers.add_parser(
        "fuse",
        help="fuse the scores or features of several streams",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("streams", nargs="+", metavar="[NAME=]PATH", help="scores (or, with --features, a folder)")
    parser.add_argument("--how", choices=("sum", "product", "weighted"), default="product", help="default: product")
    parser.add_argument("--weights", metavar="X,Y", help="for --how weighted: one number per stream, such as 1.5,1")
    parser.add_argument(
        "--softmax",
        nargs="*",
        metavar="NAME",
        help="turn a stream's mean scores into probabilities first: all streams, or those named",
    )
    parser.add_argument("--features", action="store_true", help="fuse folders of features")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="CSV file with the header video,label")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz file (with --features: a folder)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fuse. Returns 0; bad input raises UserError."""
    if len(args.streams) < 2:
        raise UserError("fuse: expected two or more streams, got one")
    weights = _weights(args)
    try:
        return _fuse_features(args, weights) if args.features else _fuse_scores(args, weights)
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name}:{rest}" if name == "weights" else str(error)) from error


def _weights(args: argparse.Namespace) -> list[float] | None:
    if args.weights is None:
        return None
    try:
        return [float(part) for part in args.weights.split(",")]
    except ValueError as error:
        raise UserError(f"--weights: expected numbers with commas between them, got {args.weights!r}") from error


def _fuse_scores(args: argparse.Namespace, weights: list[float] | None) -> int:
    import numpy as np

    from rcu_ops.analysis import accuracy, fusion, scores_io
    from rcu_ops.analysis.command import print_table, read_models
    from rcu_ops.report import replacing

    if args.out.suffix != ".npz":
        raise UserError(f"--out: expected a name that ends with .npz, got {args.out.name}")
    models = read_models(args.streams)
    first = next(iter(models.values()))
    chosen = [] if args.softmax is None else args.softmax or list(models)
    for name in chosen:
        if name not in models:
            raise UserError(f"--softmax {name}: no such stream among {', '.join(models)}")
    streams = {
        name: {video: fusion.video_scores(each.scores) for video, each in scores.videos.items()}
        for name, scores in models.items()
    }
    for name in chosen:
        streams[name] = {video: fusion.softmax(scores) for video, scores in streams[name].items()}
    if args.how == "product":
        for name, videos in streams.items():
            if any((scores < 0).any() for scores in videos.values()):
                raise UserError(
                    f"{models[name].source}: a product needs scores from 0 on; --softmax makes probabilities"
                )
    fused = {video: fusion.fuse([s[video] for s in streams.values()], args.how, weights) for video in first.videos}
    with replacing(args.out) as temporary, temporary.open("wb") as file:
        np.savez(file, **{video: scores[:, None] for video, scores in fused.items()})  # type: ignore[arg-type]
    if args.labels is not None:
        classes = scores_io.read_class_names(args.classes, first.num_classes) if args.classes else None
        labels = scores_io.labels_for(first, scores_io.read_video_labels(args.labels, first.num_classes, classes))
        rows = []
        for name, videos in {**streams, f"fused ({args.how})": fused}.items():
            found = accuracy.accuracy_report([videos[video][:, None] for video in first.videos], labels)
            rows.append((name, f"{100 * found.video_top1:.1f}", f"{100 * found.video_top5:.1f}", str(found.num_videos)))
        print_table(("stream", "top-1 %", "top-5 %", "videos"), rows)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _fuse_features(args: argparse.Namespace, weights: list[float] | None) -> int:
    import numpy as np

    from rcu_ops.analysis.fusion import fuse
    from rcu_ops.features.files import feature_files, read_features, write_features

    if args.softmax is not None or args.labels is not None:
        raise UserError("--features: features have neither probabilities nor labels (--softmax, --labels)")
    folders = [Path(text) for text in args.streams]
    listed = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        listed.append({path.relative_to(folder) for path in feature_files(folder)})
        if listed[-1] != listed[0] or not listed[0]:
            odd = sorted(map(str, listed[-1] ^ listed[0]))
            raise UserError(f"{folder}: expected features of the same videos as {folders[0]}, got {odd[:3] or 'none'}")
    for name in sorted(listed[0]):
        try:
            fused = fuse([read_features(folder / name) for folder in folders], args.how, weights)
        except ValueError as error:
            if str(error).startswith("streams["):
                raise UserError(f"{name}: the streams' features differ in clips or size ({error})") from error
            raise
        write_features(args.out / name, fused.astype(np.float32))
    print(f"wrote {len(listed[0])} files to {args.out}", file=sys.stderr)
    return 0
