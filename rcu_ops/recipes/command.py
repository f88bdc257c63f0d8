"""``rcu-ops train`` and ``rcu-ops evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import load_model_weights, make_model, parse_model_options
from rcu_ops.recipes.config import (
    LATE_FUSION,
    MODEL_OPTIONS,
    RECIPES,
    STARTING_WEIGHTS,
    Recipe,
    assumptions,
    get_recipe,
)
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    import torch

    from rcu_ops.recipes.checkpoint import RunSettings

_LISTS = """\
Lists of videos are CSV files: path,label (one label per video), or path,start,end,label with seconds (dense labels, for
recipes with the loss bce; with --trimmed actions, each a training clip and together the labels of their video). Paths
are relative to the list; labels are class indices, or names with --labels. With --input flow the paths are .npy files
of `rcu-ops flow` in place of videos.
"""

_TRAIN = f"""\
Train a network with a paper's settings. Results in --out: checkpoint.pt (for --resume), weights.safetensors (at the
end, for --weights of all commands), metrics.csv, loss.png (with matplotlib), and with --val validation.csv and
best.safetensors. Runs on one GPU or CPU, or on many under torchrun; --batch is always the whole batch of a step.

{_LISTS}
Exit codes: 0 done; 1 the loss stopped being finite (the last good checkpoint is kept); 2 bad arguments; 3 done, but
some videos could not be used, in whole or in part (listed in broken_videos.csv; 0 under torchrun, which takes 3 for a
crash); 130 or 143 stopped by a signal, after a checkpoint.
"""

_EVALUATE = f"""\
Score videos with a trained network. Results in --out: summary.json, videos.csv, labels.csv (labels.npz for dense
labels) and one scores_MODE.npz per mode, all ready for `rcu-ops analyze`. An interrupted run is gone on with by the
same command.

modes: clips (regularly spaced clips, averaged), sliding (the training length as a window over the whole video),
unrolled (the whole video; frame by frame for causal networks). With --trimmed the greatest score in place of the mean.

{_LISTS}
Exit codes: 0 done; 2 bad arguments; 3 done, but some videos could not be used (listed in summary.json); 130
interrupted.
"""

# Only these may differ from the run that is resumed, and only so that the steps it has taken do not depend on them.
_RESUMABLE = ("iterations", "milestones")
# What scores depend on, beside the weights.
_EVALUATION_SETTINGS = (
    "loss",
    "trimmed",
    "classes",
    "frames",
    "period",
    "crop",
    "eval_scale",
    "eval_clips",
    "eval_windows",
    "eval_crops",
    "sampling",
    "input",
    "flow_length",
)


def add_parser(subparsers: Any) -> None:
    """Register ``train`` and ``evaluate``."""
    train = _add(subparsers, "train", "train a network with a paper's settings", _TRAIN, run_train)
    train.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    train.add_argument("--train", type=Path, metavar="LIST", help="videos to train on")
    train.add_argument("--val", type=Path, metavar="LIST", help="videos to validate on")
    train.add_argument("--out", type=Path, metavar="DIR", help="folder for all results")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    train.add_argument(
        "--show", action="store_true", help="print the recipe and what its paper does not give, and stop"
    )
    train.add_argument("--weights", metavar="FILE", help="weights to start from: a file or URL; not used by --resume")
    train.add_argument("--weights-sha256", metavar="HEX", help="digest that the file of --weights must have")
    train.add_argument("--skip-head", action="store_true", help="leave the classifier of --weights out")
    train.add_argument(
        "--cross-modality",
        action="store_true",
        help="--weights are of a network with other input channels (RGB for flow): average its first layer over them",
    )
    train.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    train.add_argument("--accumulate", type=int, default=1, metavar="N", help="take a batch in N parts (default: 1)")
    train.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes")
    train.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: one per core, at most 8)")
    train.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="default: %(default)s")
    train.add_argument("--save-every", type=int, default=1000, metavar="STEPS", help="default: %(default)s")
    train.add_argument("--val-every", type=int, metavar="STEPS", help="default: as --save-every")
    _add_common(train, _settings())

    evaluation = _add(subparsers, "evaluate", "score a list of videos with a trained network", _EVALUATE, run_evaluate)
    evaluation.add_argument("--weights", required=True, metavar="FILE", help="checkpoint or weights")
    evaluation.add_argument("--videos", type=Path, required=True, metavar="LIST", help="videos to evaluate on")
    evaluation.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    evaluation.add_argument(
        "--recipe", metavar="NAME", help="settings of weights that were not trained with `rcu-ops train`"
    )
    evaluation.add_argument(
        "--modes", metavar="A,B", help="some of clips,sliding,unrolled (default: clips, or sliding for dense labels, "
        "and unrolled for causal networks)",
    )  # fmt: skip
    evaluation.add_argument("--overwrite", action="store_true", help="replace the evaluation in --out")
    evaluation.add_argument("--clip-batch", type=int, default=8, metavar="N", help="clips run at once (default: 8)")
    _add_common(evaluation, [item for item in _settings() if item.name in ("model", *_EVALUATION_SETTINGS)])


def _add(
    subparsers: Any, name: str, text: str, description: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_common(parser: argparse.ArgumentParser, settings: Sequence[dataclasses.Field[Any]]) -> None:
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line; sets --classes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--autocast", choices=("bf16", "fp16"), help="mixed precision (default: none)")
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the network, such as update=mean or dense=true; may repeat",
    )
    group = parser.add_argument_group("recipe", "Override single settings of the recipe.")
    for item in settings:
        flag = f"--{item.name.replace('_', '-')}"
        text = item.metadata["help"]
        if item.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parse, shown = _PARSERS[str(item.type)]
            group.add_argument(flag, type=parse, metavar=shown, help=text)


def _settings() -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(Recipe) if item.name != "name"]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "float": (float, "X"),
    "str": (str, "NAME"),
    "tuple[int, ...]": (_integers, "N,N"),
    "tuple[int, int]": (_integers, "N,N"),
}


def run_train(args: argparse.Namespace) -> int:
    """Train. Returns the exit code; bad input raises UserError."""
    for name, least in (("accumulate", 1), ("log_every", 1), ("save_every", 1), ("val_every", 1), ("workers", 0)):
        _at_least(args, name, least)
    if args.show:
        return _show(_recipe(args))
    for name in ("train", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing")
    from rcu_ops.recipes.distributed import distributed

    with distributed(args.device) as processes:
        return _train(args, processes)


def _train(args: argparse.Namespace, processes: Any) -> int:
    import torch

    from rcu_ops.recipes.checkpoint import load_checkpoint
    from rcu_ops.recipes.dataset import mix_seed
    from rcu_ops.recipes.lists import read_list
    from rcu_ops.recipes.train import CHECKPOINT, Training, TrainOptions, remove_results

    file = args.out / CHECKPOINT
    checkpoint = load_checkpoint(file, processes.device) if args.resume and file.is_file() else None
    if file.exists() and checkpoint is None and not args.overwrite:
        raise UserError(f"--out: {args.out} holds a run; --resume goes on with it, --overwrite replaces it")
    settings = _new_settings(args) if checkpoint is None else _resumed_settings(args, checkpoint)
    recipe = settings.recipe
    videos = read_list(args.train, recipe.classes, settings.names, dense=recipe.intervals)
    if recipe.trimmed:
        videos = videos.actions()
    validation = None
    if args.val is not None:
        validation = read_list(args.val, recipe.classes, settings.names, dense=recipe.intervals)
    torch.manual_seed(mix_seed(args.seed))
    model = _model(settings)
    if checkpoint is None and args.weights is not None:
        load_model_weights(
            model,
            args.weights,
            args.weights_sha256,
            hint="--skip-head leaves the classifier of another number of classes out",
            skip_head=args.skip_head,
            cross_modality=args.cross_modality,
        )
    options = TrainOptions(
        out=args.out,
        seed=args.seed,
        workers=min(8, os.cpu_count() or 1) if args.workers is None else args.workers,
        accumulate=args.accumulate,
        autocast=_autocast(args.autocast),
        sync_batch_norm=args.sync_bn,
        log_every=args.log_every,
        save_every=args.save_every,
        validate_every=args.val_every or args.save_every,
    )
    make_folder(args.out)
    training = Training(model.to(processes.device), settings, videos, options, processes, validation)
    if checkpoint is not None:
        training.resume(checkpoint)
    elif processes.first:
        remove_results(args.out)
    if processes.first:
        print(_opening(settings, args, checkpoint is not None, training.step), flush=True)
    return training.run()


def _opening(settings: RunSettings, args: argparse.Namespace, resumed: bool, step: int) -> str:
    recipe = settings.recipe
    lines = [
        f"{recipe.name}: {recipe.model}, {recipe.classes} classes, {recipe.frames} frames, batch {recipe.batch}, "
        f"{recipe.iterations} steps"
    ]
    if resumed:
        lines.append(f"resumed at step {step}")
    elif args.resume:
        lines.append(f"there is nothing to resume in {args.out}; starting anew")
    if not resumed and args.weights is None and STARTING_WEIGHTS[recipe.name] != "random weights":
        lines.append(f"note: untrained; the paper starts from {STARTING_WEIGHTS[recipe.name]} (--weights)")
    return "\n".join(lines)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate. Returns the exit code; bad input raises UserError."""
    import rcu_ops
    from rcu_ops.nn import streaming_obstacles
    from rcu_ops.recipes.checkpoint import RunSettings, read_settings
    from rcu_ops.recipes.distributed import pick_device
    from rcu_ops.recipes.evaluate import evaluate, file_digest
    from rcu_ops.recipes.lists import read_list
    from rcu_ops.recipes.scoring import VideoScorer

    _at_least(args, "clip_batch", 1)
    weights = Path(args.weights)
    stored = read_settings(weights)
    if stored is None and args.recipe is None:
        if not weights.is_file():
            raise UserError(f"--weights: there is no file {weights}")
        raise UserError(f"--recipe is missing: {args.weights} does not say what it was trained with")
    if stored is None or args.recipe is not None:
        settings = _new_settings(args)
    else:
        names = stored.names if args.labels is None else _names(args)
        options = {**stored.model_options, **parse_model_options(args.model_option)}
        settings = RunSettings(_override(stored.recipe, args, names), options, names)
    recipe = settings.recipe
    videos = read_list(args.videos, recipe.classes, settings.names, dense=recipe.intervals)
    model = _model(settings)
    load_model_weights(model, args.weights)
    device = pick_device(args.device)
    model = model.eval().to(device)
    causal = not streaming_obstacles(model)
    if args.modes is None:
        unrolled = causal and recipe.input == "rgb" and not recipe.trimmed
        modes = ["sliding" if recipe.dense else "clips", *(["unrolled"] if unrolled else [])]
    else:
        modes = list(dict.fromkeys(mode.strip() for mode in args.modes.split(",")))
    # Fused layers compute in the precision of their weights, which autocast would not change.
    autocast = _autocast(args.autocast)
    try:
        scorer = VideoScorer(
            model if autocast is not None else rcu_ops.fuse_for_inference(model),
            recipe,
            modes,
            autocast=autocast,
            batch=args.clip_batch,
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if args.overwrite:
        _remove_evaluation(args.out)
    identity = {
        "model": recipe.model,
        "model options": dict(settings.model_options),
        "weights": file_digest(weights) if weights.is_file() else args.weights,
        "autocast": args.autocast,
        **{name.replace("_", " "): getattr(recipe, name) for name in _EVALUATION_SETTINGS},
    }
    return evaluate(scorer, videos, recipe, modes, args.out, identity, settings.names)


def _remove_evaluation(out: Path) -> None:
    """Remove what an evaluation wrote to ``out``, and nothing else."""
    if not (out / "settings.json").is_file():
        return
    shutil.rmtree(out / "parts", ignore_errors=True)
    for name in ("summary.json", "videos.csv", "labels.csv", "labels.npz", "settings.json"):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("scores_*.npz"):
        path.unlink()


def _show(recipe: Recipe) -> int:
    assumed = assumptions(recipe.name)
    original = RECIPES[recipe.name]
    for item in _settings():
        value = getattr(recipe, item.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if value != getattr(original, item.name):
            note = "overridden"
        else:
            note = f"not in the paper: {assumed[item.name]}" if item.name in assumed else ""
        print(f"{item.name.replace('_', '-'):<13} {text:<16} {note}".rstrip())
    for name, value in MODEL_OPTIONS.get(recipe.name, {}).items():
        print(f"{'model-option':<13} {name}={value}")
    print(f"the paper starts from {STARTING_WEIGHTS[recipe.name]} (--weights)")
    fusion = LATE_FUSION.get(recipe.name.split("_")[0])
    if fusion is not None:
        weights = ",".join(map(str, fusion))
        print(f"streams are fused by `rcu-ops fuse RGB FLOW --how weighted --weights {weights}`")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        raise UserError(f"--recipe is missing; expected one of {', '.join(RECIPES)}")
    try:
        recipe = get_recipe(args.recipe)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return _override(recipe, args, _names(args))


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {item.name: value for item in _settings() if (value := getattr(args, item.name, None)) is not None}


def _override(recipe: Recipe, args: argparse.Namespace, names: Sequence[str] | None) -> Recipe:
    changes = _overrides(args)
    if names is not None:
        if changes.get("classes", len(names)) != len(names):
            raise UserError(f"--classes: {changes['classes']}, but there are {len(names)} class names")
        changes["classes"] = len(names)
    if "crop" in changes and "scales" not in vars(args):  # evaluation has no training scales, and no option for them
        changes["scales"] = (changes["crop"], changes["crop"])
    try:
        return dataclasses.replace(recipe, **changes)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from error


def _names(args: argparse.Namespace) -> tuple[str, ...] | None:
    if args.labels is None:
        return None
    from rcu_ops.analysis.scores_io import read_class_names

    return tuple(read_class_names(args.labels))


def _new_settings(args: argparse.Namespace) -> RunSettings:
    from rcu_ops.recipes.checkpoint import RunSettings

    recipe = _recipe(args)
    flow = {"in_channels": 2 * recipe.flow_length} if recipe.input == "flow" else {}
    options = {**MODEL_OPTIONS.get(recipe.name, {}), **flow, **parse_model_options(args.model_option)}
    return RunSettings(recipe, options, _names(args))


def _resumed_settings(args: argparse.Namespace, checkpoint: dict[str, Any]) -> RunSettings:
    from rcu_ops.recipes.checkpoint import RunSettings

    try:
        stored = RunSettings.from_dict(checkpoint["settings"])
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    recipe = stored.recipe
    if args.recipe not in (None, recipe.name):
        raise UserError(f"--recipe: the run to resume has {recipe.name}, got {args.recipe}")
    for name, value in _overrides(args).items():
        held = getattr(recipe, name)
        if value != held and name not in _RESUMABLE:
            raise UserError(f"--{name.replace('_', '-')}: the run to resume has {held}, got {value}")
    if args.labels is not None and _names(args) != stored.names:
        raise UserError(f"--labels: {args.labels} holds other names than the run to resume has")
    for name, value in parse_model_options(args.model_option).items():
        if stored.model_options.get(name) != value:
            raise UserError(
                f"--model-option: the run to resume has {name}={stored.model_options.get(name)}, got {value}"
            )
    further = _override(recipe, args, stored.names)
    _check_steps_taken(recipe, further, checkpoint["step"])
    return RunSettings(further, stored.model_options, stored.names)


def _check_steps_taken(held: Recipe, further: Recipe, step: int) -> None:
    """Refuse settings by which the first ``step`` steps would have been others."""
    if further.iterations < step:
        raise UserError(f"--iterations: the run to resume has taken {step} steps, got {further.iterations}")
    if step and held.schedule == "cosine" and further.iterations != held.iterations:
        raise UserError(
            f"--iterations: with schedule=cosine the rates of the steps taken follow from the number of all, "
            f"{held.iterations}, got {further.iterations}"
        )
    passed, given = (tuple(m for m in recipe.milestones if m < step) for recipe in (held, further))
    if passed != given:
        raise UserError(f"--milestones: the run to resume has passed {passed}, got {given} before its step {step}")


def _model(settings: RunSettings) -> torch.nn.Module:
    recipe, channels = settings.recipe, settings.model_options.get("in_channels")
    if recipe.input == "flow" and channels != 2 * recipe.flow_length:
        raise UserError(
            f"--flow-length: {recipe.flow_length} fields are {2 * recipe.flow_length} channels, but the network's "
            f"in_channels is {channels}"
        )
    return make_model(settings.recipe.model, num_classes=settings.recipe.classes, **settings.model_options)


def _autocast(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _at_least(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    if value is not None and value < least:
        raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
