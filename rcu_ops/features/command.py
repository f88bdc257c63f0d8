"""``rcu-ops features``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import load_model_weights, make_model, parse_model_options

if TYPE_CHECKING:
    from rcu_ops.features.extract import FeatureExtractor

EXIT_INCOMPLETE = 3

_FAULTS = "faults.jsonl"

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv", ".y4m")

_DESCRIPTION = """\
Features of the clips of a video, or of every video below a folder: the output of one layer of a network, one row per
clip. Every video becomes DIR/NAME.safetensors (one array "features" [clips, size]) or DIR/NAME.npy; index.csv lists
them. A run that was stopped, in whatever way, goes on with the same command where it was, within a video too. A video
that cannot be used does not stop the run; such videos are listed at the end.

With --pca the features are reduced as well: the components are fitted on all features of the run (or taken from the
file of another run, for a test set) and saved as DIR/pca_D.safetensors, the reduced features in DIR/pca_D/.

Exit codes: 0 done; 2 bad arguments; 3 done, but some videos could not be used; 130 interrupted.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``features``."""
    parser = subparsers.add_parser(
        "features",
        help="features of clips from any layer of a network, with PCA",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="VIDEO_OR_FOLDER")
    parser.add_argument("--model", required=True, help="network, one of rcu_ops.list_models()")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the features")
    parser.add_argument("--weights", metavar="FILE", help="weights of the network: a file or URL (default: untrained)")
    parser.add_argument("--weights-sha256", metavar="HEX", help="digest that the file of --weights must have")
    parser.add_argument("--classes", type=int, metavar="K", help="number of classes that the weights have")
    parser.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE", help="may repeat")
    parser.add_argument("--layer", metavar="NAME", help="layer whose output is kept (default: the last before scores)")
    numbers = (
        ("clip-length", 16, "frames of a clip"),
        ("step", 8, "frames from the start of one clip to the next"),
        ("stride", 1, "frames from one frame of a clip to the next"),
        ("size", 112, "side of the network's input in pixels"),
        ("batch", 8, "clips run at once"),
    )
    for name, default, text in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--scale", type=int, metavar="N", help="short side before the crop (default: 8/7 of the size)")
    parser.add_argument("--crops", type=int, default=1, metavar="N", help="1, 5 or 10 crops, averaged (default: 1)")
    parser.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: safetensors")
    parser.add_argument("--pca", metavar="D|FILE", help="reduce to D components, or with the components of FILE")
    parser.add_argument("--seed", type=int, default=0, help="of an untrained network's weights (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the features in --out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extract features. Returns the exit code; bad input raises UserError."""
    from rcu_ops.features.files import feature_files
    from rcu_ops.features.pca import load_pca
    from rcu_ops.run_folder import SETTINGS, claim_folder

    videos = _videos(args.source)
    # A file given for the components is read before hours of work depend on it.
    given = None if args.pca is None or args.pca.isdecimal() else load_pca(Path(args.pca))
    if args.pca is not None and given is None and int(args.pca) < 1:
        raise UserError(f"--pca: expected at least 1, got {args.pca}")
    extractor, identity = _extractor(args)
    if args.overwrite and (args.out / SETTINGS).is_file():
        _remove(args.out)
    claim_folder(args.out, identity, "features")
    for leftover in args.out.rglob(".*-*"):  # temporary files of a run that was killed
        if leftover.suffix in (".safetensors", ".npy", ".csv", ".json"):
            leftover.unlink(missing_ok=True)
    if args.weights is None:
        print("note: the network is untrained (--weights)", file=sys.stderr)
    problems = _extract_all(extractor, videos, args)
    if not any(_target(args, name).is_file() for name in videos):
        raise UserError(f"{args.source}: not one of its videos can be used: {next(iter(problems.values()))}")
    if args.pca is not None:
        _reduce(args, given, feature_files(args.out))
    if problems:
        print(f"rcu-ops: warning: videos that could not be used, in whole or in part: {len(problems)}", file=sys.stderr)
        for name, reason in problems.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return EXIT_INCOMPLETE if problems else 0


def _videos(source: Path) -> dict[str, Path]:
    """Every video by its name below the source."""
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise UserError(f"{source}: no video in this folder (known suffixes: {' '.join(SUFFIXES)})")
        return {path.relative_to(source).as_posix(): path for path in found}
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    return {source.name: source}


def _target(args: argparse.Namespace, name: str) -> Path:
    return args.out / f"{name}.{args.format}"


def _extractor(args: argparse.Namespace) -> tuple[FeatureExtractor, Mapping[str, Any]]:
    """The extractor, and everything that the features depend on."""
    import torch

    from rcu_ops.features.extract import FeatureExtractor
    from rcu_ops.recipes.checkpoint import stored_options, stored_settings
    from rcu_ops.recipes.distributed import pick_device
    from rcu_ops.recipes.evaluate import file_digest

    stored = stored_settings(args.weights, args.weights_sha256)
    options = {**stored_options(stored, args.model), **parse_model_options(args.model_option)}
    if stored is not None:
        options["num_classes"] = stored.recipe.classes
    if args.classes is not None:
        options["num_classes"] = args.classes
    torch.manual_seed(args.seed)
    model = make_model(args.model, **options)
    if args.weights is not None:
        load_model_weights(model, args.weights, args.weights_sha256, hint="--classes sets it")
    settings: dict[str, Any] = {
        name: getattr(args, name) for name in ("clip_length", "step", "stride", "size", "crops")
    }
    settings["scale"] = args.size * 8 // 7 if args.scale is None else args.scale
    model = model.eval().to(pick_device(args.device))
    try:
        extractor = FeatureExtractor(model, args.layer, batch=args.batch, **settings)
        _try_out(extractor)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from error
    weights = Path(args.weights) if args.weights is not None else None
    identity = {
        "model": args.model,
        "model options": options,
        "weights": f"seed {args.seed}"
        if weights is None
        else file_digest(weights)
        if weights.is_file()
        else args.weights,
        "layer": extractor.layer,
        "format": args.format,
        **{name.replace("_", " "): value for name, value in settings.items()},
    }
    return extractor, identity


def _try_out(extractor: FeatureExtractor) -> None:
    """One clip of grey through the network: what cannot work is said before a video is opened."""
    import torch

    picture = torch.full(
        (extractor.clip_length, extractor.crops, extractor.size, extractor.size, 3), 127, dtype=torch.uint8
    )
    try:
        with torch.inference_mode():
            extractor._run([picture])
    except ValueError as error:
        if str(error).startswith("layer:"):
            raise
        raise UserError(f"--model: it cannot take clips of this length and size: {error}") from error
    except (RuntimeError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--model: it cannot take clips of this length and size: {line}") from error


def _extract_all(extractor: FeatureExtractor, videos: Mapping[str, Path], args: argparse.Namespace) -> dict[str, str]:
    """Features of every video that has none; the reasons of those that could not be used, in whole or in part."""
    from rcu_ops.features.files import FeaturePart, features_shape, write_features
    from rcu_ops.progress import Progress
    from rcu_ops.report import write_csv
    from rcu_ops.video import VideoError

    log = args.out / _FAULTS
    faults = _read_faults(log)
    problems: dict[str, str] = {}
    waiting = [name for name in videos if not _target(args, name).is_file()]
    if len(waiting) < len(videos):
        print(f"{len(videos) - len(waiting)} of {len(videos)} videos were done already")
    with Progress(len(waiting), label="features", unit="videos") as bar:
        for name in waiting:
            target = _target(args, name)
            try:
                part = FeaturePart(target.with_name(f"{target.name}.part"))
                for features in extractor(str(videos[name]), skip=part.rows):
                    part.append(features.numpy())
                    bar.update(0, note=f"{name}: {part.rows} clips")
                if extractor.fault is not None:
                    # Before the features: once they are there, nobody opens the video again.
                    faults[name] = extractor.fault
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"video": name, "fault": extractor.fault}) + "\n")
                write_features(target, part.read())
                part.remove()
            except (VideoError, ValueError) as error:
                problems[name] = " ".join(str(error).split())
                bar.write(f"rcu-ops: warning: {problems[name]}", stream=sys.stderr)
            except OSError as error:
                raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
            bar.update()
    rows = []
    for name in videos:
        target = _target(args, name)
        if target.is_file():
            shape = features_shape(target)
            rows.append((name, target.relative_to(args.out).as_posix(), *shape, faults.get(name, "")))
    write_csv(args.out / "index.csv", ("video", "file", "clips", "size", "fault"), rows)
    return {name: reason for name in videos if (reason := problems.get(name) or faults.get(name))}


def _read_faults(log: Path) -> dict[str, str]:
    if not log.is_file():
        return {}
    faults = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a kill cut off; its video has no features yet
            continue
        faults[record["video"]] = record["fault"]
    return faults


def _reduce(args: argparse.Namespace, given: Any, files: Sequence[Path]) -> None:
    from rcu_ops.features.files import read_features, write_features
    from rcu_ops.features.pca import fit_pca, save_pca
    from rcu_ops.progress import track

    pca = given
    if pca is None:
        pca = fit_pca(track(map(read_features, files), len(files), "pca", "files"), int(args.pca))
    name = f"pca_{len(pca.components)}"
    save_pca(args.out / f"{name}.safetensors", pca)
    for file in track(files, label=name, unit="files"):
        try:
            reduced = pca(read_features(file))
        except ValueError as error:
            raise UserError(f"--pca: {error}") from error
        write_features(args.out / name / file.relative_to(args.out), reduced)
    print(f"{name}: {100 * float(pca.explained.sum()):.1f} % of the variance of the clips it was fitted on")


def _remove(out: Path) -> None:
    """Remove what an earlier run wrote to ``out``, and nothing else."""
    from rcu_ops.features.files import feature_files
    from rcu_ops.run_folder import SETTINGS

    for path in (*feature_files(out), *out.rglob("*.part"), *out.glob("pca_*.safetensors")):
        path.unlink()
    for path in out.glob("pca_*"):
        if path.is_dir():
            shutil.rmtree(path)
    for name in ("index.csv", _FAULTS, SETTINGS):
        (out / name).unlink(missing_ok=True)
