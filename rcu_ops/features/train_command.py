"""``rcu-ops features-train``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rcu_ops.cli_errors import UserError
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    from rcu_ops.features.training import FeatureVideos, Windows
    from rcu_ops.recipes.lists import VideoList

EXIT_INCOMPLETE = 3

_DESCRIPTION = """\
Train res_lstm, the (residual) recurrent stack, on what `rcu-ops features` stored, by RMSProp:

  rcu-ops features VIDEOS --model c3d --weights FILE --crops 10 --pca 1024 --out DIR
  rcu-ops features-train DIR/pca_1024 --list train.csv --test test.csv --labels names.txt --out RUN

Lists are CSV files (path,label), the paths as below VIDEOS. RUN gets weights.safetensors and metrics.csv and, with
--test, scores.npz (probabilities, ready for `rcu-ops fuse`) and labels.csv. The same command goes on after a stop.

--sweep depth=1,2,3,4,5 or hidden=256,512,1024 trains one network per value, with residual connections and without, on
the same features, and writes sweep.csv and sweep.png. A residual stack needs features of its hidden size: hidden=H
takes DIR/pca_H unless DIR itself has that size. With --no-residual every size reads DIR, and only plain stacks are
trained.

Exit codes: 0 done; 2 bad arguments; 3 done, but some videos have no features; 130 or 143
stopped by a signal, after a checkpoint.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``features-train``."""
    parser = subparsers.add_parser(
        "features-train",
        help="train residual recurrent stacks on stored features, sweep their size and depth",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("features", type=Path, metavar="DIR", help="folder of `rcu-ops features`, or a pca_D in it")
    add("--list", type=Path, required=True, metavar="LIST", help="labelled videos to train on")
    add("--test", type=Path, metavar="LIST", help="labelled videos to score at the end")
    add("--test-features", type=Path, metavar="DIR", help="folder of their features (default: DIR)")
    add("--labels", type=Path, metavar="FILE", help="class names, one per line; sets --classes")
    add("--classes", type=int, default=51, metavar="K", help="default: %(default)s")
    add("--out", type=Path, required=True, metavar="RUN", help="folder for the results")
    add("--hidden", type=int, metavar="H", help="hidden size (default: that of the features; the paper's: 1024)")
    add("--depth", type=int, default=2, metavar="L", help="layers (default: %(default)s)")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="default: %(default)s")
    add("--residual", action=argparse.BooleanOptionalAction, default=True, help="connections (default: with them)")
    add("--time-steps", type=int, default=25, metavar="T", help="clips taken of a video (default: %(default)s)")
    add("--augment", choices=("stride",), help="train on stretches of videos at a fixed stride (Eq. 3)")
    add("--window", type=int, metavar="N", help="clips of a stretch (default: T); a shorter video is one stretch")
    add("--window-stride", type=int, metavar="N", help="clips from one stretch to the next (default: 1)")
    add("--sweep", metavar="NAME=N,N,...", help="hidden or depth, and its values")
    add("--steps", type=int, default=2000, metavar="N", help="of training (default: %(default)s)")
    add("--batch", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--lr", type=float, default=1e-3, metavar="X", help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", help="default: cuda where there is one")
    parser.set_defaults(run=run)


class _Result(NamedTuple):
    """One network of a sweep; accuracies in 0..1."""

    value: int
    network: str
    parameters: int
    loss: float
    top1: float
    top5: float


class _Data(NamedTuple):
    train: FeatureVideos
    test: FeatureVideos | None


def run(args: argparse.Namespace) -> int:
    """Train one network, or those of a sweep. Returns the exit code; bad input raises UserError."""
    from rcu_ops.analysis.scores_io import list_names, read_class_names
    from rcu_ops.recipes.lists import read_list

    windows = _check(args)
    sweep = None if args.sweep is None else _sweep(args)
    names = None if args.labels is None else tuple(read_class_names(args.labels))
    classes = args.classes if names is None else len(names)
    lists = [None if path is None else read_list(path, classes, names) for path in (args.list, args.test)]
    data = _networks(args, sweep, lists)
    make_folder(args.out)
    try:
        results = []
        for name, each, hidden, depth, residual in data:
            out = args.out if sweep is None else args.out / name
            results.append(_train(args, classes, each, hidden, depth, residual, windows, out))
        if sweep is not None:
            _write_sweep(args.out, *sweep, [result for result in results if result is not None])
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    missing = {name for _, each, *_ in data for part in each if part is not None for name in part.missing}
    if missing:
        print(f"rcu-ops: warning: videos without features: {list_names(sorted(missing))}", file=sys.stderr)
    return EXIT_INCOMPLETE if missing else 0


def _check(args: argparse.Namespace) -> Windows | None:
    from rcu_ops.features.training import Windows

    for name in ("classes", "hidden", "depth", "time_steps", "window", "window_stride", "steps", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr: expected a number above 0, got {args.lr}")
    if args.test_features is not None and args.test is None:
        raise UserError("--test-features: it goes with --test LIST")
    if args.augment is None:
        if args.window is not None or args.window_stride is not None:
            raise UserError("--window, --window-stride: they go with --augment stride")
        return None
    return Windows(args.window or args.time_steps, args.window_stride or 1)


def _sweep(args: argparse.Namespace) -> tuple[str, list[int]]:
    name, _, text = args.sweep.partition("=")
    parts = text.split(",")
    if name not in ("hidden", "depth") or not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"--sweep: expected hidden=N,N,... or depth=N,N,..., got {args.sweep!r}")
    values = sorted({int(part) for part in parts})
    if values[0] < 1:
        raise UserError(f"--sweep: expected at least 1, got {values[0]}")
    if args.test is None:
        raise UserError("--sweep: it compares accuracies, so it needs --test LIST")
    if name == "hidden" and args.hidden is not None:
        raise UserError("--sweep hidden: it sets --hidden itself")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--sweep: its picture needs matplotlib (pip install 'rcu-ops[plot]')")
    return name, values


def _networks(
    args: argparse.Namespace, sweep: tuple[str, list[int]] | None, lists: Sequence[VideoList | None]
) -> list[tuple[str, _Data, int, int, bool]]:
    """(name, features, hidden size, depth, residual) of every network, all checked before the first is trained."""
    own = _open(args, lists, None)
    kind, values = sweep or ("", [0])
    networks = []
    for value in values:
        hidden = value if kind == "hidden" else args.hidden or own.train.size
        depth = value if kind == "depth" else args.depth
        data = own
        if kind == "hidden" and args.residual and value != own.train.size:
            data = _open(args, lists, value)
        for residual in (True, False) if sweep and args.residual else (args.residual,):
            # Made without memory for its parameters: sizes that do not fit are said before hours of work.
            _model(args, 1, data.train.size, hidden, depth, residual, "meta")
            networks.append((f"{kind}_{value}_{_name(residual)}", data, hidden, depth, residual))
    return networks


def _open(args: argparse.Namespace, lists: Sequence[VideoList | None], size: int | None) -> _Data:
    """The features in DIR and of the test list, or those in their ``pca_size``."""
    from rcu_ops.features.training import FeatureVideos

    folders = [args.features, args.test_features or args.features]
    if size is not None:
        folders = [folder / f"pca_{size}" for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            hint = "" if size is None else f" (rcu-ops features --pca {size} makes it; --no-residual needs none)"
            raise UserError(f"{folder}: no such folder{hint}")
    assert lists[0] is not None
    data = _Data(FeatureVideos(folders[0], lists[0]), None if lists[1] is None else FeatureVideos(folders[1], lists[1]))
    if data.test is not None and data.test.size != data.train.size:
        raise UserError(f"{folders[1]}: expected features of size {data.train.size}, got {data.test.size}")
    if data.test is not None and (held := data.train.extraction) != (other := data.test.extraction):
        keys = sorted(key for key in {*held, *other} if held.get(key) != other.get(key))
        raise UserError(f"{folders[1]}: its features were made with another {' and '.join(keys)} than {folders[0]}")
    if size is not None and data.train.size != size:
        raise UserError(f"{folders[0]}: expected features of size {size}, got {data.train.size}")
    return data


def _model(
    args: argparse.Namespace, classes: int, size: int, hidden: int, depth: int, residual: bool, device: Any
) -> Any:
    import rcu_ops

    try:
        return rcu_ops.create_model(
            "res_lstm", num_classes=classes, input_size=size, hidden_size=hidden, num_layers=depth, cell=args.cell,
            residual=residual, device=device,
        )  # fmt: skip
    except ValueError as error:
        text = str(error).replace("hidden_size:", "--hidden:").replace("num_layers:", "--depth:")
        raise UserError(text.replace("residual=False", "--no-residual")) from error


def _name(residual: bool) -> str:
    return "residual" if residual else "plain"


def _train(
    args: argparse.Namespace, classes: int, data: _Data, hidden: int, depth: int, residual: bool,
    windows: Windows | None, out: Path,
) -> _Result | None:  # fmt: skip
    """Train one network in ``out`` and score the test list."""
    import torch

    from rcu_ops.features.training import WEIGHTS, FeatureTraining, feature_scores
    from rcu_ops.recipes.distributed import pick_device
    from rcu_ops.recipes.stored import CHECKPOINT

    torch.manual_seed(args.seed)
    model = _model(args, classes, data.train.size, hidden, depth, residual, None).to(pick_device(args.device))
    settings = {"classes": classes, "hidden": hidden, "depth": depth, "cell": args.cell, "residual": residual}
    label = f"{_name(residual)} {args.cell}, {depth} x {hidden}"
    training = FeatureTraining(
        model, data.train, out, settings, steps=args.steps, time_steps=args.time_steps, windows=windows,
        batch=args.batch, lr=args.lr, seed=args.seed, label=label,
    )  # fmt: skip
    make_folder(out)
    if (out / CHECKPOINT).is_file():
        training.resume()
        print(f"{label}: resumed at step {training.step}")
    loss = training.run()[-1][2]
    print(f"{label}: loss {loss:.4f} after {args.steps} steps; wrote {WEIGHTS} to {out}")
    if data.test is None:
        return None
    top1, top5 = _write_scores(out, data.test, feature_scores(model, data.test, args.time_steps, args.batch))
    print(f"{label}: top-1 {100 * top1:.2f} %, top-5 {100 * top5:.2f} % of {len(data.test)} videos")
    value = depth if args.sweep is not None and args.sweep.startswith("depth") else hidden
    return _Result(value, _name(residual), sum(p.numel() for p in model.parameters()), loss, top1, top5)


def _write_scores(out: Path, videos: FeatureVideos, scores: Any) -> tuple[float, float]:
    """Scores and labels in ``out``; the accuracies."""
    from rcu_ops.analysis import accuracy_report
    from rcu_ops.recipes.evaluate import write_arrays
    from rcu_ops.report import write_csv

    columns = [row[:, None] for row in scores]
    write_arrays(out / "scores.npz", zip((video.name for video in videos.videos), columns, strict=True))
    write_csv(out / "labels.csv", ("video", "label"), [(video.name, video.label) for video in videos.videos])
    report = accuracy_report(columns, [video.label for video in videos.videos])
    return report.video_top1, report.video_top5


def _write_sweep(out: Path, kind: str, values: Sequence[int], results: Sequence[_Result]) -> None:
    from rcu_ops.report import legend, new_figure, save_figure, series, write_csv

    write_csv(out / "sweep.csv", (kind, *_Result._fields[1:]), results)
    figure, axes = new_figure()
    networks = list(dict.fromkeys(result.network for result in results))
    for network in networks:
        taken = [result for result in results if result.network == network]
        style = series(0 if network == "residual" else 1)
        axes.plot([r.value for r in taken], [100 * r.top1 for r in taken], label=network, **style)
    if kind == "hidden":
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel("hidden size" if kind == "hidden" else "layers")
    axes.set_ylabel("top-1 accuracy (%)")
    legend(axes, len(networks))
    save_figure(figure, out / "sweep.png")
    print(f"wrote sweep.csv, sweep.png to {out}")
