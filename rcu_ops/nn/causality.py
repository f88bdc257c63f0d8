"""Which layers treat every frame alone, which carry a state, and why the others cannot be streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rcu_ops.nn.batch_norm import MovingBatchNorm3d
from rcu_ops.nn.gating import FeatureGate
from rcu_ops.nn.nonlocal_block import NonLocalBlock
from rcu_ops.nn.recurrent_conv import FrameConv3d
from rcu_ops.nn.srtg import SRTG

Check = Callable[[Any], "str | None"]


def _per_frame(module: Any) -> str | None:
    return None


def _because(reason: str) -> Check:
    return lambda module: reason


def _triple(value: Any) -> tuple[Any, Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value, value)


def _temporal_window(module: Any) -> str | None:
    kernel, stride = _triple(module.kernel_size)[0], _triple(module.stride or module.kernel_size)[0]
    if kernel != 1:
        return f"sees {kernel} frames at once (temporal kernel {kernel})"
    if stride != 1:
        return f"drops frames (temporal stride {stride})"
    padding = _triple(getattr(module, "padding", 0))[0] if not isinstance(getattr(module, "padding", 0), str) else 0
    if padding != 0:
        return f"adds frames (temporal padding {padding})"
    return None


def _adaptive_pool(module: Any) -> str | None:
    frames = _triple(module.output_size)[0]
    return None if frames is None else f"pools over time (to {frames} frames)"


def _batch_norm(module: Any) -> str | None:
    return None if module.running_mean is not None else "normalises by the statistics of the chunk"


def _flatten(module: Any) -> str | None:
    return None if module.start_dim >= 3 else "flattens time together with other dimensions"


def _gate(module: FeatureGate) -> str | None:
    return None if module.causal else "pools over time (causal=False)"


def _srtg(module: SRTG) -> str | None:
    if module.gate and module.window is None:
        return "its gate looks at the whole clip (SRTG(window=...) looks back, Streamer(window=...) runs such a model)"
    return None


def _non_local(module: NonLocalBlock) -> str | None:
    return None if module.causal else "attends to the whole clip (NonLocalBlock(memory=...) looks back)"


_STATE_NOT_CARRIED = "its state is not carried from chunk to chunk"
_BIDIRECTIONAL = "reads the future (bidirectional)"


def _rnn(module: Any) -> str | None:
    return _BIDIRECTIONAL if module.bidirectional else _STATE_NOT_CARRIED


_POINTWISE = (
    nn.AlphaDropout, nn.CELU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ELU, nn.FeatureAlphaDropout,
    nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Linear,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax2d,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_FRAME_BATCH = (  # layers that take [N*T,C,H,W]: time can only be in their batch dimension
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Conv2d, nn.ConvTranspose2d, nn.LPPool2d, nn.MaxPool2d,
    nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip

_CHECKS: dict[type[nn.Module], Check] = {
    **dict.fromkeys(_POINTWISE + _FRAME_BATCH, _per_frame),
    nn.Conv3d: _temporal_window,
    FrameConv3d: _temporal_window,
    nn.ConvTranspose3d: _temporal_window,
    nn.MaxPool3d: _temporal_window,
    nn.AvgPool3d: _temporal_window,
    nn.LPPool3d: _temporal_window,
    nn.AdaptiveAvgPool3d: _adaptive_pool,
    nn.AdaptiveMaxPool3d: _adaptive_pool,
    nn.FractionalMaxPool3d: _because("pools over time"),
    nn.Conv1d: _because("convolves along the one dimension it has, which may be time"),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    MovingBatchNorm3d: _per_frame,
    nn.SyncBatchNorm: _batch_norm,
    nn.InstanceNorm3d: _because("normalises over time"),
    nn.GroupNorm: _because("normalises over time"),
    nn.Flatten: _flatten,
    nn.RNN: _rnn,
    nn.LSTM: _rnn,
    nn.GRU: _rnn,
    nn.MultiheadAttention: _because("attends to all frames at once"),
    nn.Transformer: _because("attends to all frames at once"),
    nn.TransformerEncoder: _because("attends to all frames at once"),
    nn.TransformerEncoderLayer: _because("attends to all frames at once"),
    FeatureGate: _gate,
    SRTG: _srtg,
    NonLocalBlock: _non_local,
}


def register_per_frame(module_type: type[nn.Module]) -> type[nn.Module]:
    """Declare that modules of ``module_type`` treat every frame of [N,C,T,H,W] alone, so that models with them stream.

    Usable as a class decorator. The whole module is covered: its children are not looked at.

    Raises:
        TypeError: not a subclass of ``nn.Module``.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type: expected a subclass of nn.Module, got {module_type!r}")
    _CHECKS[module_type] = _per_frame
    return module_type


def streaming_obstacle(module: nn.Module) -> str | None:
    """Why ``module`` by itself cannot run frame by frame, or None if it can (its children are another matter)."""
    check = _known_check(module)
    if check is not None:
        return check(module)
    if carries_state(module) or next(module.children(), None) is not None:
        return None
    return f"{type(module).__name__} is not known to treat every frame alone (register_per_frame says that it does)"


def streaming_obstacles(model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of every module of ``model`` that keeps it from running frame by frame.

    What a module's own ``forward`` does between its children cannot be seen from here; modules with children are taken
    to treat frames alone themselves.
    """
    found: list[tuple[str, str]] = []
    done: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in done:
            return
        done.add(id(module))
        reason = streaming_obstacle(module)
        if reason is not None:
            found.append((name or type(module).__name__, reason))
        elif _known_check(module) is None and not carries_state(module):  # such a layer answers for its children
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


def carries_state(module: nn.Module) -> bool:
    """Whether ``module`` keeps a hidden state over time in the way a Streamer carries (its class says so)."""
    return bool(getattr(type(module), "carries_state", False))


def _known_check(module: nn.Module) -> Check | None:
    for kind in type(module).__mro__:
        check = _CHECKS.get(kind)
        if check is not None:
            # A subclass with its own forward is its author's, not torch's.
            same_forward = type(module).forward is kind.forward  # type: ignore[attr-defined]
            return check if same_forward else None
    return None
