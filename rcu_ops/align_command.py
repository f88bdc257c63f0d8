"""``rcu-ops align``: which frame of one video is which frame of another, in the eyes of a network."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.inspection import SampledClip, calibrate, check_out, report_faults, sample_clip, seen_pictures
from rcu_ops.model_arguments import load_model_weights, make_model, model_error, parse_model_options
from rcu_ops.progress import Progress
from rcu_ops.report import replacing, write_json
from rcu_ops.run_folder import make_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

__all__ = ["add_parser", "run"]

OUTPUT_NAMES = ("alignment.json", "alignment.npz", "alignment.png", "distances.png")

_DESCRIPTION = """\
Align two videos in time by a network's features, or one video with a copy of itself that begins later (--shift) or
plays slower (--slow). Every sampled frame of A is matched softly with the frames of B (Eq. 4 of "Learn to Cycle"), its
nearest frame is taken (Eq. 5), and the same is done from B to A; a cycle error is how far A -> B -> A ends from where
it began.

Features are the last feature map's mean per frame; temporal strides are set to 1 where the network can. Distances are
measured in units of the mean distance between frames of A and B; --temperature is in that unit. With two files the
features' mean over each video is taken out first, since what two scenes look like says nothing about time. Untrained
rcn_ networks align a video with copies of itself (with recurrence in their last four layers only, their default here);
networks that see a clip's ends, as r3d_ and srtg_ ones do, need training: untrained they match end with end.

Exit codes: 0 done; 2 bad arguments or a video that cannot be read; 3 done, but a video broke before its end.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``align``."""
    parser = subparsers.add_parser(
        "align",
        help="align two videos in time by a network's features",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a video")
    parser.add_argument("b", metavar="B", nargs="?", help="another one (default: A itself, shifted or slowed)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {', '.join(OUTPUT_NAMES)}")
    parser.add_argument("--shift", type=int, metavar="K", help="without B: it is A from its K-th sampled frame on")
    parser.add_argument("--slow", type=int, metavar="F", help="without B: it shows every frame of A F times")
    parser.add_argument("--frames", type=int, default=32, metavar="T", help="sampled per video (default: %(default)s)")
    parser.add_argument("--every", type=int, metavar="N", help="sample one frame in N (default: spread over the video)")
    parser.add_argument("--model", default="rcn_resnet18", help="default: %(default)s")
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the network, such as recurrent_layers='[\"last\",4]'; may repeat",
    )
    parser.add_argument("--weights", metavar="FILE", help="file or URL of trained weights (default: untrained)")
    parser.add_argument("--size", type=int, default=112, help="side of the network's input (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.02, metavar="X", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Align; returns 0, or 3 if a video broke before its end. Bad input raises UserError."""
    for name, least in (("frames", 2), ("every", 1), ("shift", 0), ("slow", 2), ("size", 8)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: expected at least {least}, got {value}")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature: expected a positive number, got {args.temperature}")
    if (args.b is None) == (args.shift is None and args.slow is None):
        raise UserError("expected two videos, or one with --shift or --slow")
    check_out(args.out, OUTPUT_NAMES, args.overwrite)
    from rcu_ops.video import VideoError
    from rcu_ops.video.draw import require_matplotlib

    try:
        require_matplotlib()
        clips = _clips(args)
    except VideoError as error:
        raise UserError(str(error)) from error
    return _align(args, *clips)


def _clips(args: argparse.Namespace) -> tuple[SampledClip, SampledClip]:
    shift = args.shift or 0
    if args.b is not None:
        return sample_clip(args.a, args.frames, args.every), sample_clip(args.b, args.frames, args.every)
    whole = sample_clip(args.a, args.frames + shift, args.every)
    count = len(whole.numbers) - shift
    if count < 2:
        raise UserError(f"--shift: {args.a} has {len(whole.numbers)} sampled frames, too few to shift by {shift}")
    a = whole.part(list(range(count)))
    repeats = args.slow or 1
    label = f"{Path(args.a).name}" + (f", from sampled frame {shift} on" if shift else "")
    label += f", {repeats} times slower" if repeats > 1 else ""
    # Slowed copies are as long in frames, so they show less of the video.
    return a, whole.part([shift + k // repeats for k in range(count)], label)


def _network(args: argparse.Namespace) -> nn.Module:
    import torch

    import rcu_ops
    from rcu_ops.recipes.checkpoint import stored_options, stored_settings
    from rcu_ops.recipes.distributed import pick_device
    from rcu_ops.stream_command import bound_growth

    given = parse_model_options(args.model_option, classes="has no meaning here: classifiers are left out")
    options = {**stored_options(stored_settings(args.weights), args.model), **given}
    if args.weights is None and args.model.startswith("rcn_"):
        # An untrained recurrence only blurs: through every layer it would be the distance from the start that aligns.
        options.setdefault("recurrent_layers", ("last", 4))
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # an untrained network should at least say the same twice
            try:
                model = rcu_ops.create_model(args.model, **{"dense": True, **options})  # a feature map for every frame
            except TypeError:
                model = make_model(args.model, **options)
    except ValueError as error:
        raise model_error(args.model, error) from error
    if args.weights is not None:
        load_model_weights(model, args.weights, skip_head=True)
    if not hasattr(model, "features"):
        raise UserError(f"--model: {args.model} has no feature maps over a clip")
    if args.weights is None:
        bound_growth(model)
    return model.eval().requires_grad_(False).to(pick_device(args.device))


def _align(args: argparse.Namespace, a: SampledClip, b: SampledClip) -> int:
    import numpy as np
    import torch

    import rcu_ops
    from rcu_ops.analysis.alignment import align_maps, plot_alignment, plot_distances
    from rcu_ops.video.transform import FrameTransform

    model = _network(args)
    device = next(model.parameters()).device
    transform = FrameTransform(args.size, device=device)
    inputs = [transform(clip.images)[None] for clip in (a, b)]
    maps: list[Tensor] = []
    with Progress(3, label="features", unit="passes") as bar, torch.no_grad():
        try:
            if args.weights is None:
                calibrate(model, inputs, model.features)  # type: ignore[arg-type]
            bar.update()
            for clip in inputs:
                maps.append(model.features(clip).float())  # type: ignore[operator]
                bar.update()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--model: {args.model} cannot take these frames: {error}") from error
    # Networks with temporal strides have one feature map for several frames: the first of them stands for it.
    clips = [_per_feature(clip, features.shape[2]) for clip, features in zip((a, b), maps, strict=True)]
    leaves = [features.requires_grad_() for features in maps]
    pooled = [rcu_ops.srtg_squeeze(features) for features in leaves]
    if args.b is not None:
        pooled = [sequence - sequence.mean(1, keepdim=True) for sequence in pooled]
    centre = torch.cat(pooled, 1).mean(1, keepdim=True).detach()
    first, second = (sequence - centre for sequence in pooled)
    distances = torch.cdist(first.detach().double(), second.detach().double()).square()[0]
    unit = float(distances.mean())
    if not math.isfinite(unit) or unit == 0:
        raise UserError(f"the features of {args.model} do not tell the frames of {a.name} and {b.name} apart")
    first, second = (sequence / unit**0.5 for sequence in (first, second))
    soft_a, index_ab = rcu_ops.soft_nearest_neighbor(first, second.detach(), temperature=args.temperature)
    soft_b, index_ba = rcu_ops.soft_nearest_neighbor(second, first.detach(), temperature=args.temperature)
    gate = bool(rcu_ops.cycle_consistency(first, second, temperature=args.temperature).gate)
    # What of each frame speaks for its match: the gradient of their product, times the activations.
    agreement = (first * soft_a.detach()).sum() + (second * soft_b.detach()).sum()
    gradients = torch.autograd.grad(agreement, leaves)
    saliency = [_saliency(leaf, gradient, args.size) for leaf, gradient in zip(leaves, gradients, strict=True)]

    alignment = align_maps(index_ab[0].cpu(), index_ba[0].cpu())
    names = (clips[0].name, clips[1].name)
    untrained = "" if args.weights else " (untrained)"
    words = _words(alignment, len(clips[0].numbers))
    title = f"{args.model}{untrained}\n{words}"
    summary = {
        "model": args.model,
        "weights": args.weights or "untrained",
        "temperature": args.temperature,
        "a": {"name": names[0], "frames": clips[0].numbers, "seconds": [round(float(s), 4) for s in clips[0].times]},
        "b": {"name": names[1], "frames": clips[1].numbers, "seconds": [round(float(s), 4) for s in clips[1].times]},
        "index_ab": alignment.index_ab.tolist(),
        "index_ba": alignment.index_ba.tolist(),
        "cycle_error_a": alignment.cycle_error_a.tolist(),
        "cycle_error_b": alignment.cycle_error_b.tolist(),
        "consistent_a": round(float(alignment.consistent_a.mean()), 4),
        "consistent_b": round(float(alignment.consistent_b.mean()), 4),
        "offset": alignment.offset,
        "speed": alignment.speed,
        "every_frame_at_its_own_place": gate,
    }
    arrays = {
        "embeddings_a": first[0].detach().cpu().numpy(),
        "embeddings_b": second[0].detach().cpu().numpy(),
        "soft_a": soft_a[0].detach().cpu().numpy(),
        "soft_b": soft_b[0].detach().cpu().numpy(),
        "distances": (distances / unit).cpu().numpy(),
        "index_ab": alignment.index_ab,
        "index_ba": alignment.index_ba,
    }
    pictures = [seen_pictures(clip.images, args.size) for clip in clips]
    make_folder(args.out)
    try:
        plot_alignment(
            args.out / "alignment.png",
            pictures[0],
            pictures[1],
            saliency[0],
            saliency[1],
            alignment,
            names=names,
            title=title,
        )
        narrow = title.replace("; ", "\n")
        plot_distances(args.out / "distances.png", arrays["distances"], alignment, names=names, title=narrow)
        with replacing(args.out / "alignment.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        write_json(args.out / "alignment.json", summary)
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written: {error.strerror or error}") from error
    print(f"{args.model}{untrained}: {words}")
    print(f"wrote {', '.join(OUTPUT_NAMES)} to {args.out}")
    return report_faults(a, b)


def _per_feature(clip: SampledClip, count: int) -> SampledClip:
    """The frames that stand for ``count`` feature maps."""
    return clip.part([k * len(clip.numbers) // count for k in range(count)])


def _saliency(features: Tensor, gradient: Tensor, size: int) -> np.ndarray:
    """Gradient x activation, stretched from 0 to 1 in every frame: [T,size,size]."""
    import torch.nn.functional as F

    heat = (features * gradient).sum(1).detach()[0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-30)
    return F.interpolate(heat[:, None], size=(size, size), mode="bilinear")[:, 0].cpu().numpy()


def _words(alignment: Any, frames: int) -> str:
    """The alignment in one line."""
    text = f"{int(alignment.consistent_a.sum())} of {frames} frames cycle-consistent"
    if alignment.offset is not None:
        speed, offset = f"{alignment.speed:.3g}", f"{abs(alignment.offset):.3g}"
        place = "t" if speed == "1" else f"{speed} t"
        if offset != "0":
            place += f" {'+' if alignment.offset > 0 else '-'} {offset}"
        text += f"; frame t of A is frame {place} of B"
    else:
        text += "; too few to tell one video's time by the other's"
    return text
