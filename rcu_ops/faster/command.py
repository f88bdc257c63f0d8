"""``rcu-ops faster``: cache clips of frozen networks, train an aggregator from them, draw what each pattern costs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import load_model_weights, make_model, parse_model_options
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    from rcu_ops.models.faster import Faster

EXIT_INCOMPLETE = 3

_DESCRIPTION = """\
Two-stage training of FASTER. Stage one trains the two clip-level networks by themselves (rcu-ops train). Then:

  rcu-ops faster cache --expensive-weights FILE --cheap-weights FILE --videos train.csv --views 4 --out CACHE
  rcu-ops faster train --cache CACHE --out RUN
  rcu-ops faster cache ... --videos test.csv --model-option pattern=0 --out TEST
  rcu-ops faster curve --cache TEST --aggregator RUN/aggregator.safetensors --out CURVE

cache and train go on where they were stopped, with the same command; an interrupted train writes a checkpoint first.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``faster``."""
    parser = subparsers.add_parser(
        "faster",
        help="two-stage training of FASTER: cache clips, train an aggregator, accuracy against cost",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="steps", dest="step", metavar="STEP", required=True)

    cache = commands.add_parser("cache", help="write what the frozen networks say of every clip")
    _add_model(cache)
    cache.add_argument("--classes", type=int, default=400, metavar="K", help="default: %(default)s")
    cache.add_argument("--expensive-weights", metavar="FILE", help="of the expensive network (default: untrained)")
    cache.add_argument("--cheap-weights", metavar="FILE", help="of the cheap network (default: untrained)")
    cache.add_argument("--videos", type=Path, required=True, metavar="LIST", help="labelled videos")
    cache.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line; sets --classes")
    cache.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the cache")
    cache.add_argument("--overwrite", action="store_true", help="replace the cache in --out")
    cache.add_argument("--clips", type=int, metavar="N", help="per video (default: 256 frames' worth)")
    cache.add_argument("--views", type=int, default=0, metavar="V", help="random samplings for training (default: 0, "
                       "the uniform clips of a test)")  # fmt: skip
    cache.add_argument("--size", type=int, default=224, help="side of the input (default: %(default)s)")
    cache.add_argument("--scales", default="256,320", metavar="N,N", help="range of the short side (default: 256,320)")
    cache.add_argument("--shard", type=int, default=16, metavar="N", help="videos in a file (default: %(default)s)")
    cache.add_argument("--clip-batch", type=int, default=8, metavar="N", help="clips at once (default: %(default)s)")
    cache.add_argument("--seed", type=int, default=0, help="of sampling and of untrained networks (default: 0)")
    cache.add_argument("--device", default="auto", help="default: cuda where there is one")
    cache.set_defaults(run=run_cache)

    train = commands.add_parser("train", help="train an aggregator from a cache")
    train.add_argument("--cache", type=Path, required=True, metavar="DIR", help="of training videos")
    train.add_argument("--val", type=Path, metavar="DIR", help="a cache of test videos, for the accuracy at the end")
    train.add_argument("--aggregator", default="fast_gru", help="average, concat, lstm, gru or fast_gru (default)")
    train.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="such as tie_candidate=true")
    train.add_argument("--pattern", type=int, metavar="X", help="1:X, -1 for all cheap (default: the cache's)")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    train.add_argument("--steps", type=int, default=2000, metavar="N", help="default: %(default)s")
    train.add_argument("--batch", type=int, default=32, metavar="N", help="default: %(default)s")
    train.add_argument("--lr", type=float, default=0.01, metavar="X", help="first rate, cosine (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.add_argument("--device", default="auto", help="default: cuda where there is one")
    train.set_defaults(run=run_train)

    curve = commands.add_parser("curve", help="accuracy against cost for all patterns and numbers of clips")
    _add_model(curve)
    curve.add_argument("--cache", type=Path, required=True, metavar="DIR", help="of test videos, of pattern=0")
    curve.add_argument("--aggregator", type=Path, required=True, metavar="FILE", help="what `train` wrote")
    curve.add_argument("--agreement", action="store_true", help="with the all-expensive run, instead of accuracy")
    curve.add_argument("--out", type=Path, required=True, metavar="DIR", help="for curve.csv and curve.png")
    curve.set_defaults(run=run_curve)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="faster32", help="faster16 or faster32 (default)")
    parser.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE", help="may repeat")


def _model(args: argparse.Namespace, classes: int, device: Any) -> Faster:
    import torch

    from rcu_ops.models import Faster

    options = parse_model_options(args.model_option)
    with torch.device(device):
        model = make_model(args.model, num_classes=classes, **options)
    if not isinstance(model, Faster):
        raise UserError(f"--model: expected faster16 or faster32, got {args.model}")
    return model.eval()


def run_cache(args: argparse.Namespace) -> int:
    """Write a cache. Returns 0, or 3 if some videos could not be used."""
    import torch

    from rcu_ops.analysis.scores_io import list_names, read_class_names
    from rcu_ops.faster.cache import ClipSampling, remove_cache, write_cache
    from rcu_ops.recipes.distributed import pick_device
    from rcu_ops.recipes.lists import read_list

    _at_least(args, classes=1, clips=1, size=8, shard=1, clip_batch=1, views=0)
    names = None if args.labels is None else tuple(read_class_names(args.labels))
    classes = args.classes if names is None else len(names)
    torch.manual_seed(args.seed)
    model = _model(args, classes, "cpu")
    for kind in ("expensive", "cheap"):
        if (source := getattr(args, f"{kind}_weights")) is not None:
            load_model_weights(
                getattr(model, kind), source, flag=f"--{kind}-weights", hint="--labels or --classes sets it"
            )
    try:
        low, high = (int(part) for part in args.scales.split(","))
    except ValueError:
        raise UserError(f"--scales: expected two numbers such as 256,320, got {args.scales!r}") from None
    clips = args.clips or max(1, model.frames // model.clip_length)
    try:
        sampling = ClipSampling(clips, args.views, args.size, (low, high), args.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    videos = read_list(args.videos, classes, names)
    model = model.to(pick_device(args.device))
    if args.overwrite:
        remove_cache(args.out)
    problems = write_cache(model, videos, sampling, args.out, shard=args.shard, clip_batch=args.clip_batch)
    print(f"{len(videos.videos) - len(problems)} videos, {clips} clips of {model.clip_length} frames, "
          f"{max(1, args.views)} views in {args.out}")  # fmt: skip
    if problems:
        print(f"rcu-ops: warning: videos that could not be used: {list_names(sorted(problems))}", file=sys.stderr)
    return EXIT_INCOMPLETE if problems else 0


def run_train(args: argparse.Namespace) -> int:
    """Train an aggregator. Returns 0."""
    import torch

    from rcu_ops.faster.cache import ClipCache
    from rcu_ops.faster.training import CHECKPOINT, WEIGHTS, AggregatorTraining, aggregate_scores
    from rcu_ops.nn.aggregators import make_aggregator
    from rcu_ops.recipes.distributed import pick_device

    _at_least(args, steps=1, batch=1, pattern=-1)
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr: expected a number above 0, got {args.lr}")
    if args.aggregator == "average":
        raise UserError("--aggregator: the average of scores has nothing to train")
    cache = ClipCache(args.cache)
    options = parse_model_options(args.option, flag="--option")
    torch.manual_seed(args.seed)
    try:
        aggregator = make_aggregator(args.aggregator, cache.channels, cache.classes, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--aggregator, --option: {error}") from error
    pattern = cache.pattern if args.pattern is None else args.pattern
    test = None if args.val is None else ClipCache(args.val)
    if test is not None and (
        (test.channels, test.classes) != (cache.channels, cache.classes) or not test.holds(pattern)
    ):
        raise UserError(f"--val: {args.val} is a cache of other networks or another pattern")
    training = AggregatorTraining(
        aggregator.to(pick_device(args.device)),
        cache,
        pattern,
        args.out,
        {"aggregator": args.aggregator, "options": options},
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    make_folder(args.out)
    if (args.out / CHECKPOINT).is_file():
        training.resume()
        print(f"resumed at step {training.step}")
    rows = training.run()
    print(f"{args.aggregator}: loss {rows[-1][2]:.4f} after {args.steps} steps; wrote {WEIGHTS} to {args.out}")
    if test is not None:
        scores, labels = aggregate_scores(training.aggregator, test, pattern)
        right = (scores.argmax(2) == labels[:, None]).float().mean(0)
        each = ", ".join(f"{100 * float(value):.1f}" for value in right)
        print(f"accuracy after every clip, % of {len(labels)} videos: {each}")
    return 0


def run_curve(args: argparse.Namespace) -> int:
    """Draw accuracy against cost. Returns 0."""
    from rcu_ops.cost_patterns import clip_costs
    from rcu_ops.faster.cache import ClipCache
    from rcu_ops.faster.curve import curve_points, plot_curve
    from rcu_ops.faster.training import load_aggregator
    from rcu_ops.report import write_csv, write_json

    cache = ClipCache(args.cache)
    if cache.pattern != 0:
        raise UserError("--cache: expected one of --model-option pattern=0, which has every clip of both networks")
    aggregator, settings = load_aggregator(args.aggregator, cache.channels, cache.classes)
    model = _model(args, cache.classes, "meta")
    if model.aggregator.channels != cache.channels:
        raise UserError(f"--model: {args.model} has {model.aggregator.channels} channels, the cache {cache.channels}")
    model.aggregator = aggregator
    costs = clip_costs(model, int(cache.settings["clip length"]), int(cache.settings["size"]))
    points = curve_points(aggregator, cache, costs, agreement=args.agreement)
    what = "agreement with all expensive clips" if args.agreement else "accuracy"
    for point in points:
        print(f"{point.method:<20} {point.clips:>3} clips {point.gmac:>9.4g} GMAC {100 * point.value:>6.1f} %")
    make_folder(args.out)
    try:
        write_csv(
            args.out / "curve.csv",
            ("method", "clips", "gmac", what.replace(" ", "_")),
            [(p.method, p.clips, p.gmac, p.value) for p in points],
        )
        write_json(args.out / "curve.json", {"aggregator": settings, "cache": cache.settings})
        title = f"{settings['aggregator']}, clips of {cache.settings['clip length']} frames, {len(cache)} videos"
        plot_curve(args.out / "curve.png", points, ylabel=f"{what} (%)", title=title)
    except ImportError as error:
        raise UserError(f"the picture needs matplotlib (pip install 'rcu-ops[plot]'): {error}") from error
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    print(f"wrote curve.csv, curve.json, curve.png to {args.out}")
    return 0


def _at_least(args: argparse.Namespace, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {bound}, got {value}")
