"""What a network costs: parameters, multiplications, state, and where the time goes. The command ``rcu-ops cost``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import make_model, parse_model_options

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS = ("convolution", "recurrence", "normalisation and activation", "head", "other")
"""The kinds of layer that time and multiplications are shared out to. After fusion a recurrence includes its
normalisation, residual addition and activation."""

DTYPES = ("float32", "bfloat16", "float16", "float64")

_LABEL = "rcu_ops.cost:"


@dataclass(frozen=True)
class Cost:
    """What :func:`measure_cost` found.

    Attributes:
        model: its name. shape: the clip, [N,C,T,H,W], or clip features [N,T,F]. dtype, device: of the measurement.
        parameters: how many.
        gmac: 1e9 multiply-accumulates of convolutions, recurrences and linear layers for the clip.
        gmac_by_kind: shared out to :data:`KINDS`.
        causal: whether the network streams.
        state_bytes: what a stream carries from frame to frame; None when the network does not stream.
        milliseconds_per_frame: median time of one frame of a stream (of the clip's frames together, divided by T, when
            the network does not stream), or of the feature of one clip; None when not measured.
        time_by_kind: fractions of the time; empty when not measured.
    """

    model: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    parameters: int
    gmac: float
    gmac_by_kind: dict[str, float]
    causal: bool
    state_bytes: int | None
    milliseconds_per_frame: float | None
    time_by_kind: dict[str, float]


def count_parameters(model: nn.Module) -> int:
    """The number of parameters; a parameter that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of ``model`` for a clip of ``shape``, by kind of layer (:data:`KINDS`), counted on ``meta``.

    All products of a layer that carries a state are its recurrence's, but for a recurrent convolution's ``w_xh``.
    Counts what ``torch.utils.flop_counter`` counts (matrix products, convolutions, the package's operators), halved:
    additions of biases, normalisation, activations and pooling are not in it.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from rcu_ops.nn.causality import carries_state

    model = _on_meta(model)
    clip = torch.empty(*shape, dtype=_dtype_of(model), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    counts = counter.get_flop_counts()

    def kind(operator: Any) -> str:
        name = str(operator)
        return "recurrence" if "rcu_ops" in name else "convolution" if "conv" in name else "other"

    by_kind = dict.fromkeys(KINDS, 0)
    for operator, flops in counts.get("Global", {}).items():
        by_kind[kind(operator)] += flops // 2

    def move(name: str, to: str, of: Sequence[str], sign: int = 1) -> None:
        # The counter names modules by their path below the root's class.
        path = f"{type(model).__name__}.{name}" if name else "Global"
        for operator, flops in counts.get(path, {}).items():
            if kind(operator) in of:
                by_kind[kind(operator)] -= sign * (flops // 2)
                by_kind[to] += sign * (flops // 2)

    heads = _heads(model)
    for name in heads:
        move(name, "head", KINDS)
    inside = tuple(f"{name}." for name in heads)
    for name, module in model.named_modules():
        if carries_state(module) and name not in heads and not name.startswith(inside):
            below = f"{name}." if name else ""
            move(name, "recurrence", ("other",))
            for head in heads:
                if head.startswith(below):  # which was moved already
                    move(head, "recurrence", ("other",), sign=-1)
            inside = (*inside, below)
    return by_kind


def _heads(model: nn.Module) -> list[str]:
    """Names of the classifiers: modules called "head", and those of aggregators."""
    from rcu_ops.nn import Aggregator

    found: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "head" and not name.startswith(tuple(f"{head}." for head in found)):
            found.append(name)
        elif isinstance(module, Aggregator) and hasattr(module, "fc"):
            found.append(f"{name}.fc" if name else "fc")
    return found


def stream_state_bytes(model: nn.Module, shape: Sequence[int]) -> int | None:
    """Bytes of state that a stream of frames [N,C,T,H,W], or of clip features [N,T,F], of ``shape`` carries.

    None if the model does not stream.
    """
    import torch

    from rcu_ops.nn import streaming_obstacles
    from rcu_ops.streaming import Streamer, state_bytes

    if streaming_obstacles(model):
        return None
    model = _on_meta(model)
    if len(shape) == 3:
        with torch.no_grad():
            _, last = model.step(torch.empty(shape[0], shape[2], dtype=_dtype_of(model), device="meta"))  # type: ignore[operator]
        return sum(part.numel() * part.element_size() for part in (last if isinstance(last, tuple) else (last,)))
    n, c, _, h, w = shape
    with torch.no_grad():
        _, state = Streamer(model)(torch.empty(n, c, 1, h, w, dtype=_dtype_of(model), device="meta"))
    return state_bytes(state)


def measure_time(
    model: nn.Module, shape: Sequence[int], *, seconds: float = 2.0, on_step: Callable[[float], None] | None = None
) -> tuple[float, dict[str, float]]:
    """Time per frame and how it is shared between kinds of layers.

    Causal models run as a stream, one frame per step; the others run the whole clip.

    Args:
        model: in evaluation mode, on the device and in the dtype to measure.
        shape: the clip [N,C,T,H,W], or clip features [N,T,F].
        seconds: how long to measure.
        on_step: called after every step with the fraction of ``seconds`` that has passed.

    Returns:
        ``(milliseconds per frame, {kind: fraction})``; the median, and shares of the profiler's time per operator.
    """
    import torch

    from rcu_ops.nn import streaming_obstacles
    from rcu_ops.streaming import Streamer

    parameter = next(model.parameters())
    clip = torch.rand(*shape, device=parameter.device).to(parameter.dtype)
    frames_per_step = 1
    state: Any = None
    if len(shape) == 3:

        def step() -> None:
            nonlocal state
            _, state = model.step(clip[:, 0], state)  # type: ignore[operator]

    elif streaming_obstacles(model):
        frames_per_step = shape[2]

        def step() -> None:
            model(clip)

    else:
        streamer = Streamer(model)
        frame = clip[:, :, :1].contiguous(memory_format=torch.channels_last_3d)

        def step() -> None:
            nonlocal state
            _, state = streamer(frame, state)

    def synchronize() -> None:
        if parameter.device.type == "cuda":
            torch.cuda.synchronize(parameter.device)

    durations: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            step()
        synchronize()
        start = time.perf_counter()
        while not durations or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            step()
            synchronize()
            durations.append(time.perf_counter() - before)
            if on_step is not None:
                on_step(min(1.0, (time.perf_counter() - start) / seconds))
        shares = _profile(model, step, parameter.device.type)
    return 1e3 * statistics.median(durations) / frames_per_step, shares


def measure_cost(
    model: nn.Module,
    shape: Sequence[int] = (1, 3, 16, 112, 112),
    *,
    name: str = "",
    seconds: float = 0.0,
    on_step: Callable[[float], None] | None = None,
) -> Cost:
    """All of the above for a model in evaluation mode; ``seconds > 0`` measures time as well."""
    parameter = next(model.parameters())
    macs = count_macs(model, shape)
    state = stream_state_bytes(model, shape)
    milliseconds, shares = measure_time(model, shape, seconds=seconds, on_step=on_step) if seconds > 0 else (None, {})
    return Cost(
        model=name or type(model).__name__,
        shape=tuple(shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        parameters=count_parameters(model),
        gmac=sum(macs.values()) / 1e9,
        gmac_by_kind={kind: count / 1e9 for kind, count in macs.items()},
        causal=state is not None,
        state_bytes=state,
        milliseconds_per_frame=milliseconds,
        time_by_kind=shares,
    )


def format_cost(cost: Cost) -> str:
    """The table that the command prints."""
    if len(cost.shape) == 3:
        n, t, size = cost.shape
        unit, given = "clip", ("features", f"N = {n}, {t} clips, {size} numbers each")
    else:
        n, c, t, h, w = cost.shape
        unit, given = "frame", ("clip", f"N = {n}, {c} channels, {t} frames, {h} x {w}")
    rows = [
        ("model", cost.model),
        given,
        ("parameters", f"{cost.parameters:,}"),
        ("multiply-accumulates", f"{cost.gmac:.2f} GMAC ({cost.gmac / (n * t):.2f} per {unit})"),
        (
            "state of a stream",
            "none: the network is not causal" if cost.state_bytes is None else f"{cost.state_bytes / 2**20:.2f} MiB",
        ),
    ]
    if cost.milliseconds_per_frame is not None:
        how = "streamed" if cost.causal else f"in clips of {t}"
        rows.append((f"time per {unit}", f"{cost.milliseconds_per_frame:.2f} ms {how} ({cost.dtype}, {cost.device})"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", f"{'kind of layer':<30}{'GMAC':>10}" + (f"{'time':>10}" if cost.time_by_kind else "")]
    for kind in KINDS:
        share = f"{100 * cost.time_by_kind.get(kind, 0.0):>8.1f} %" if cost.time_by_kind else ""
        lines.append(f"{kind:<30}{cost.gmac_by_kind[kind]:>10.3f}{share}")
    return "\n".join(lines)


def plot_cost(cost: Cost, path: str | Path) -> None:
    """Shares of multiplications (and of time, if measured) per kind of layer, as a PNG."""
    from rcu_ops.report import PALETTE, legend, new_figure, save_figure

    figure, axes = new_figure(7.0, 3.4)
    total = cost.gmac or 1.0
    groups = [("multiply-accumulates", [100 * cost.gmac_by_kind[kind] / total for kind in KINDS])]
    if cost.time_by_kind:
        groups.append(("time", [100 * cost.time_by_kind.get(kind, 0.0) for kind in KINDS]))
    height = 0.8 / len(groups)
    for index, (label, values) in enumerate(groups):
        places = [row + (index - (len(groups) - 1) / 2) * height for row in range(len(KINDS))]
        bars = axes.barh(places, values, height=height * 0.9, color=PALETTE[index], label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("share (%)")
    axes.set_title(f"{cost.model}, {cost.gmac:.1f} GMAC", fontsize=11, loc="left")
    legend(axes, len(groups))
    save_figure(figure, path)


# ---- where the time goes --------------------------------------------------------------------------------------------


def _profile(model: nn.Module, step: Callable[[], None], device_type: str) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device_type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _labelled(model), profile(activities=activities) as profiler:
        for _ in range(5):
            step()
    times = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        if event.name.startswith((_LABEL, "ProfilerStep")):
            continue
        spent = event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total
        times[_kind_of_event(event)] += spent
    total = sum(times.values()) or 1.0
    return {kind: spent / total for kind, spent in times.items()}


def _kind_of_event(event: Any) -> str:
    convolves = False
    while event is not None:
        name = event.name
        if name.startswith("rcu_ops::"):
            return "recurrence"
        convolves = convolves or "conv" in name
        if name.startswith(_LABEL):
            kind = name.removeprefix(_LABEL)
            # A recurrent layer is a convolution and a recurrence, which the reference backend runs as ordinary calls.
            return "convolution" if kind == "recurrence" and convolves else kind
        event = event.cpu_parent
    return "other"


@contextmanager
def _labelled(model: nn.Module) -> Iterator[None]:
    """While open, every leaf module's calls (and the head's) stand under their kind in profiles."""
    from torch.autograd.profiler import record_function

    open_labels: list[record_function] = []

    def enter(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            label = record_function(_LABEL + kind)
            label.__enter__()
            open_labels.append(label)

        return hook

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    heads = _heads(model)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            kind = _kind_of_module(name, module, heads)
            if kind is not None:
                hooks.enter_context(module.register_forward_pre_hook(enter(kind)))
                hooks.enter_context(module.register_forward_hook(leave))
        yield


def _kind_of_module(name: str, module: nn.Module, heads: Sequence[str]) -> str | None:
    """The kind of a leaf module, or None for modules that are made of others."""
    from torch import nn

    from rcu_ops.nn.causality import carries_state
    from rcu_ops.nn.fuse import FusedFrameConv3d

    if name in heads or name.startswith(tuple(f"{head}." for head in heads)):
        return "head" if name in heads else None
    if carries_state(module):
        return "recurrence"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, FusedFrameConv3d)):
        return "convolution"
    if next(module.children(), None) is not None:
        return None
    if isinstance(module, nn.Linear):
        return "other"
    return "normalisation and activation"


def _on_meta(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).to("meta").eval()


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


# ---- the command ----------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cost``."""
    parser = subparsers.add_parser(
        "cost",
        help="parameters, multiplications, state and time of a network",
        description="Parameters, multiply-accumulates, size of the streaming state and, with --time, the time per "
        "frame of a network, and how they are shared between its kinds of layers.",
    )
    parser.add_argument("model", metavar="MODEL", help="a model's name, or package.module:function that makes one")
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the network, such as stem_pool=false; may repeat",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="clips at once (default: %(default)s)")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="T",
        help="frames of the clip (default: 16; FASTER: 256), or clips of res_lstm's video (default: 25)",
    )
    parser.add_argument("--size", type=int, help="side of the frames (default: 112; FASTER: 224)")
    parser.add_argument("--channels", type=int, default=3, help="channels of the frames (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=400, help="number of classes (default: %(default)s)")
    parser.add_argument("--time", action="store_true", help="measure the time per frame")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure (default: %(default)s)")
    parser.add_argument("--fused", action="store_true", help="measure the time of the fused model")
    parser.add_argument(
        "--fold-relations",
        action="store_true",
        help="of Relational LSTMs folded for inference (half the weights per step)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the measurement (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the measurement (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of the shares here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the cost of one network."""
    import torch

    from rcu_ops.cost_patterns import format_table, table
    from rcu_ops.models import Faster, ResLSTM
    from rcu_ops.nn import fuse_for_inference
    from rcu_ops.nn.relational_fold import fold_relations_of
    from rcu_ops.progress import Progress
    from rcu_ops.report import write_json
    from rcu_ops.run_folder import make_folder

    for option in ("batch", "frames", "size", "channels", "classes"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option}: expected at least 1, got {value}")
    if args.time and not args.seconds > 0:
        raise UserError(f"--seconds: expected a positive number, got {args.seconds}")
    if args.fused and not args.time:
        raise UserError("--fused: fusing changes the time only, so it goes with --time")
    try:
        device = torch.device(args.device)
        # Without --time nothing is ever computed, so the weights need not exist.
        model = _make_model(args, torch.device("cpu" if args.time else "meta"))
        model = model.eval().to(device=device if args.time else None, dtype=getattr(torch, args.dtype))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.fold_relations:
        try:
            model = fold_relations_of(model)
        except ValueError as error:
            raise UserError(f"--fold-relations: {str(error).removeprefix('fold_relations: ')}") from error
    name = f"{args.model} (relations folded)" if args.fold_relations else args.model
    frames = args.frames or (model.frames if isinstance(model, Faster) else 16)
    size = args.size or (model.size if isinstance(model, Faster) else 112)
    shape: tuple[int, ...] = (args.batch, args.channels, frames, size, size)
    if isinstance(model, ResLSTM):
        if args.size is not None:
            raise UserError(f"--size: {args.model} takes features, whose size is --model-option input_size=F")
        shape = (args.batch, args.frames or model.time_steps, model.rnn.input_size)
    for option in ("json", "plot"):
        if path := getattr(args, option):
            make_folder(Path(path).absolute().parent, f"--{option}")
    try:
        cost = measure_cost(model, shape, name=name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{args.model} cannot take a clip {list(shape)}: {str(error).splitlines()[0]}") from error
    if args.time:
        timed = fuse_for_inference(model) if args.fused else model
        with Progress(100, args.model, "%") as bar:
            milliseconds, shares = measure_time(
                timed, shape, seconds=args.seconds, on_step=lambda part: bar.update(int(100 * part) - bar.count)
            )
        name = f"{name} (fused)" if args.fused else name
        cost = Cost(**{**asdict(cost), "model": name, "milliseconds_per_frame": milliseconds, "time_by_kind": shares})
    print(format_cost(cost))
    content = asdict(cost)
    if isinstance(model, Faster):
        rows = table(model, size)
        content["gmac_by_pattern"] = rows
        print(f"\nGMAC of {model.frames} frames by pattern and clip length (* this model)")
        print(format_table(model, rows))
    if args.json:
        write_json(args.json, content)
    if args.plot:
        try:
            plot_cost(cost, args.plot)
        except ImportError as error:
            raise UserError(f"--plot needs matplotlib (pip install 'rcu-ops[plot]'): {error}") from error
    return 0


def _make_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    import importlib

    from torch import nn

    with device:
        module_name, _, function = args.model.partition(":")
        if not function:
            options = parse_model_options(args.model_option)
            if args.channels != 3:
                options["in_channels"] = args.channels
            return make_model(args.model, flag="MODEL", num_classes=args.classes, **options)
        if args.model_option:
            raise UserError(f"--model-option: {args.model} is called without arguments")
        sys.path.insert(0, "")  # the user's own modules lie where the command is run
        try:
            model = getattr(importlib.import_module(module_name), function)()
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"MODEL: {args.model} cannot be made: {error}") from error
        finally:
            sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise UserError(f"MODEL: {args.model} made a {type(model).__name__}, not an nn.Module")
    if next(model.parameters(), None) is None:
        raise UserError(f"MODEL: {args.model} made a {type(model).__name__} without parameters")
    return model
