"""``rcu-ops relations``: where the gates of a Relational LSTM look, over the frames of a real clip."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.inspection import SampledClip, calibrate, check_out, report_faults, sample_clip, seen_pictures
from rcu_ops.model_arguments import load_model_weights, make_model, parse_model_options
from rcu_ops.progress import Progress
from rcu_ops.report import write_csv, write_json
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

__all__ = ["add_parser", "run"]

OUTPUT_NAMES = ("relations.png", "relations.csv", "relations.json")
UNTRAINED = "untrained"

_DESCRIPTION = """\
For one position of a clip, draw where each gate (input, forget, output, new content) of a Relational LSTM looks: in the
current frame, and in the memory, the hidden state after the frame before. Frames are sampled from the video, scaled and
centre-cropped; the network runs over them in their order.

relations.csv has every weight, relations.json where each gate looks most and over how many positions it is spread.
Without --weights the network is untrained, and every output says so; it then normalises by the statistics of the clip.

--position X,Y: with a decimal point fractions of the width and height of what the network sees (0.5,0.5 is the middle),
as whole numbers column and row of its grid (7 x 7 at a size of 224).

Exit codes: 0 done; 2 bad arguments or a video that cannot be read; 3 done, but the video broke before its end.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``relations``."""
    parser = subparsers.add_parser(
        "relations",
        help="where the gates of a Relational LSTM look, over the frames of a video",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {', '.join(OUTPUT_NAMES)}")
    parser.add_argument("--position", default="0.5,0.5", metavar="X,Y", help="that looks (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=8, metavar="T", help="sampled (default: %(default)s)")
    parser.add_argument("--every", type=int, metavar="N", help="sample one frame in N (default: spread over the video)")
    parser.add_argument(
        "--shown", type=int, default=6, metavar="R", help="frames in the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default="relational_two_branch", help="a network with a Relational LSTM (default: %(default)s)"
    )
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the network, such as backbone=resnet50v2; may repeat",
    )
    parser.add_argument("--weights", metavar="FILE", help="file or URL of trained weights (default: untrained)")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the relations; returns 0, or 3 if the video broke before its end. Bad input raises UserError."""
    for name, least in (("frames", 1), ("every", 1), ("shown", 2), ("size", 32)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: expected at least {least}, got {value}")
    position = _parse_position(args.position)
    check_out(args.out, OUTPUT_NAMES, args.overwrite)
    from rcu_ops.video import VideoError
    from rcu_ops.video.draw import require_matplotlib

    try:
        require_matplotlib()
        clip = sample_clip(args.video, args.frames, args.every, least=1)
    except VideoError as error:
        raise UserError(str(error)) from error
    _write(args, clip, *_relations(args, clip, position))
    return report_faults(clip)


def _parse_position(text: str) -> tuple[float, float] | tuple[int, int]:
    """(x, y) as fractions, or (column, row)."""
    parts = [part.strip() for part in text.split(",")]
    wanted = "expected X,Y: two fractions from 0.0 to 1.0, or a column and a row"
    if len(parts) != 2:
        raise UserError(f"--position: {wanted}, got {text!r}")
    if all(part.isascii() and part.isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    try:
        x, y = (float(part) for part in parts)
    except ValueError as error:
        raise UserError(f"--position: {wanted}, got {text!r}") from error
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise UserError(f"--position: {wanted}, got {text!r}")
    return x, y


def _cell(position: tuple[float, float] | tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Row and column of a grid."""
    x, y = position
    if isinstance(x, int) and isinstance(y, int):
        if not (x < columns and y < rows):
            raise UserError(
                f"--position: expected a column from 0 to {columns - 1} and a row from 0 to {rows - 1}, got {x},{y}"
            )
        return y, x
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def _network(args: argparse.Namespace) -> nn.Module:
    import torch

    from rcu_ops.recipes.checkpoint import stored_options, stored_settings
    from rcu_ops.recipes.distributed import pick_device

    given = parse_model_options(args.model_option, classes="has no meaning here: classifiers are left out")
    options = {**stored_options(stored_settings(args.weights), args.model), **given}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # an untrained network should at least say the same twice
        model = make_model(args.model, **options)
    if args.weights is not None:
        load_model_weights(model, args.weights, skip_head=True)
    return model.eval().requires_grad_(False).to(pick_device(args.device))


def _relations(
    args: argparse.Namespace, clip: SampledClip, position: tuple[float, float] | tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Weights [T,2,4,h,w], and the cell that looks."""
    import torch

    from rcu_ops.nn import RelationalLSTM
    from rcu_ops.video.transform import FrameTransform

    model = _network(args)
    layers = [module for module in model.modules() if isinstance(module, RelationalLSTM)]
    if not layers:
        raise UserError(f"--model: {args.model} has no Relational LSTM")
    inputs: list[Tensor] = []
    layers[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    frames = FrameTransform(args.size, device=next(model.parameters()).device)(clip.images)[None]
    passes = 2 if args.weights is None else 1
    with Progress(passes + 1, label="relations", unit="passes") as bar, torch.no_grad():
        try:
            if args.weights is None:
                calibrate(model, [frames], model)
                bar.update()
            inputs.clear()
            model(frames)
            bar.update()
        except (RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"--model: {args.model} cannot take these frames: {message}") from error
        row, column = _cell(position, *inputs[0].shape[3:])
        weights = layers[0].attention(inputs[0], row * inputs[0].shape[4] + column)[0].float().cpu()
        bar.update()
    if not weights.isfinite().all():
        raise UserError(f"the weights of {args.model} are not finite on {clip.name}")
    return weights.numpy(), (row, column)


def _write(args: argparse.Namespace, clip: SampledClip, weights: np.ndarray, cell: tuple[int, int]) -> None:
    from rcu_ops.analysis.relations import GATES, SOURCES, looked_at, plot_relations

    trained = UNTRAINED if args.weights is None else str(args.weights)
    rows, columns = weights.shape[3:]
    spread = looked_at(weights)
    labels = [f"frame {number}, {time:.2f} s" for number, time in zip(clip.numbers, clip.times, strict=True)]
    looks: list[dict[str, Any]] = []
    for t, number in enumerate(clip.numbers):
        for s, source in enumerate(SOURCES):
            for g, gate in enumerate(GATES):
                place = int(abs(weights[t, s, g]).argmax())
                looks.append(
                    {
                        "frame": number,
                        "source": source,
                        "gate": gate,
                        "row": place // columns,
                        "column": place % columns,
                        "weight": float(weights[t, s, g].flat[place]),
                        "positions": round(float(spread[t, s, g]), 4),
                    }
                )
    summary = {
        "model": args.model,
        "weights": trained,
        "video": clip.name,
        "grid": [rows, columns],
        "position": {"row": cell[0], "column": cell[1]},
        "frames": clip.numbers,
        "seconds": [round(float(second), 4) for second in clip.times],
        "memory_of_the_first_frame": "empty: its weights are those of zeros",
        "looks": looks,
    }
    table = (
        (trained, number, f"{time:.4f}", source, gate, r, c, float(weights[t, s, g, r, c]))
        for t, (number, time) in enumerate(zip(clip.numbers, clip.times, strict=True))
        for s, source in enumerate(SOURCES)
        for g, gate in enumerate(GATES)
        for r in range(rows)
        for c in range(columns)
    )
    words = f"from row {cell[0]}, column {cell[1]} of {rows} x {columns}"
    note = f" ({UNTRAINED}: what it looks at means nothing)" if args.weights is None else ""
    make_folder(args.out)
    try:
        plot_relations(
            args.out / "relations.png",
            seen_pictures(clip.images, args.size),
            weights,
            cell,
            labels=labels,
            title=f"{args.model}{note}: where its gates look on {clip.name}, {words}\n"
            "max: the largest weight, to which each map is stretched; over: how many positions it is spread over",
            shown=args.shown,
        )
        header = ("weights", "frame", "seconds", "source", "gate", "row", "column", "weight")
        write_csv(args.out / "relations.csv", header, table)
        write_json(args.out / "relations.json", summary)
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    print(f"{args.model}{note}: {clip.name}, {len(clip.numbers)} frames, {words}")
    last = spread[-1].mean(1)
    print(f"positions looked at, mean of the gates in the last frame: {last[0]:.1f} current, {last[1]:.1f} memory")
    print(f"wrote {', '.join(OUTPUT_NAMES)} to {args.out}")
