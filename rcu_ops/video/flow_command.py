"""``rcu-ops flow``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from rcu_ops.cli_errors import UserError

EXIT_INCOMPLETE = 3

_DESCRIPTION = """\
Optical flow between the neighbouring frames of a video, by OpenCV's DIS. FILE.npy holds uint8 [frames - 1, 2, H, W]:
x and y displacements v in pixels as round((v + bound) * 255 / (2 bound)); rcu_ops.video.flow.flow_stacks makes the
20-channel snippets of a temporal stream of it. A run that was stopped, in whatever way, goes on with the same command.

Exit codes: 0 done; 2 bad arguments; 3 done, but the video broke before its end; 130 interrupted.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``flow``."""
    parser = subparsers.add_parser(
        "flow",
        help="optical flow of a video, quantised",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a name that ends with .npy")
    parser.add_argument("--scale", type=int, default=256, metavar="N", help="short side in pixels (default: 256)")
    parser.add_argument(
        "--bound", type=float, default=20.0, metavar="X", help="largest displacement in pixels (default: 20)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute flow. Returns the exit code; bad input raises UserError."""
    from rcu_ops.progress import Progress
    from rcu_ops.report import replacing
    from rcu_ops.run_folder import make_folder
    from rcu_ops.video import BrokenVideoError, VideoError, open_video
    from rcu_ops.video.flow import FlowPart, compute_flow, require_cv2

    if args.out.suffix != ".npy":
        raise UserError(f"--out: expected a name that ends with .npy, got {args.out.name}")
    if args.scale < 16:
        raise UserError(f"--scale: expected at least 16, got {args.scale}")
    if not 0 < args.bound < float("inf"):
        raise UserError(f"--bound: expected a number above 0, got {args.bound:g}")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out: {args.out} is there already; --overwrite replaces it")
    # The settings are in the part's name: another scale or bound does not go on with its fields.
    path = args.out.with_name(f".{args.out.stem}-{args.scale}-{args.bound:g}.part")
    try:
        require_cv2()
        with open_video(args.video) as reader:
            frames = reader.frame_count
        make_folder(args.out.absolute().parent)
        with contextlib.closing(FlowPart(path, args.video)) as part:
            if part.count:
                print(f"{part.count} fields were done already")
            fault = None
            with Progress(None if frames is None else frames - 1, label="flow", unit="fields") as bar:
                bar.update(part.count)
                try:
                    for field in compute_flow(args.video, scale=args.scale, bound=args.bound, skip=part.count):
                        part.append(field)
                        bar.update()
                except BrokenVideoError as error:
                    fault = str(error)
            if not part.count:
                raise UserError(f"{args.video}: {fault or 'one frame has no flow'}")
            with replacing(args.out) as temporary:
                part.finish(temporary)
            part.remove()
    except (VideoError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    print(f"wrote {part.count} fields to {args.out}")
    if fault is not None:
        print(f"rcu-ops: warning: {fault}", file=sys.stderr)
    return 0 if fault is None else EXIT_INCOMPLETE
