"""Any 3D CNN as a causal recurrent one (sections 4.2 and 5.6 of the RCN paper)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from rcu_ops.nn.causality import register_per_frame
from rcu_ops.nn.frames import batch_to_frames, frames_to_batch
from rcu_ops.nn.layer_choice import LayerChoice, choose_layers
from rcu_ops.nn.layer_kind import computes_as
from rcu_ops.nn.recurrent_conv import FrameConv3d, RecurrentConv3d


def convert_to_recurrent(model: nn.Module, layers: LayerChoice = "all", *, update: str = "sum") -> nn.Module:
    """A causal recurrent network made from the 3D CNN ``model``, which is left untouched.

    * Every 3D convolution (temporal kernel > 1) that ``layers`` takes becomes a :class:`RecurrentConv3d`: its temporal
      taps are summed into ``w_xh``, so that on a still clip the first frame gives what the 3D network gives in the
      middle of the clip; ``w_hh`` is the identity. The 3D convolutions not taken become 1xdxd. A network without any
      temporal kernel (a 2D CNN run per frame) gets its spatial convolutions (d > 1) converted instead. All other
      convolutions, 1x1x1 shortcuts among them, stay as they are.
    * Temporal strides, temporal padding and temporal pooling windows go away: one output frame per input frame.
    * Where the network collapses time (``AdaptiveAvgPool3d`` to one frame, ``AdaptiveMaxPool3d``, ``nn.Flatten`` of all
      dimensions), the rest of it runs on every frame alone, and the result is a :class:`FrameClassifier` around the
      converted network, with ``frame_scores(clip) -> [N,K,T]`` and ``forward(clip) -> [N,K]``, their temporal mean.

    What a module's own ``forward`` does to time with functions instead of modules cannot be seen and is left alone.

    Args:
        model: any module; parameters keep their dtype and device.
        layers: which 3D convolutions become recurrent: "all", ("last", n), ("every", k), ("spaced", n), or a predicate
            (name, module) -> bool.
        update: "sum" (Eq. 1) or "mean", as in RecurrentConv3d.

    Returns:
        A new module of the same class, or a FrameClassifier around one.

    Raises:
        ValueError: the model has layers that no causal recurrent network can have (bidirectional RNNs, attention,
            normalisation over time, transposed convolutions in time, ...), or whose replacement would lose what they
            compute (convolutions and pools over time of a class with its own forward, weights made by hooks or
            parametrizations), all listed by name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    named = dict(model.named_modules())
    obstacles = [
        f"{name or 'the model'} ({type(m).__name__}): {why}" for name, m in named.items() if (why := _obstacle(m))
    ]
    if obstacles:
        raise ValueError("model: cannot be made causal and recurrent:\n  " + "\n  ".join(obstacles))
    # Classes with a forward of their own that treat every frame alone: left as they are.
    named = {name: module for name, module in named.items() if not _has_own_forward(module)}
    convs = [(name, module) for name, module in named.items() if isinstance(module, nn.Conv3d)]
    candidates = [(name, conv) for name, conv in convs if conv.kernel_size[0] > 1]
    if not candidates:
        candidates = [(name, conv) for name, conv in convs if max(conv.kernel_size) > 1]
    chosen = choose_layers(candidates, layers)
    taken = {id(conv) for (_, conv), take in zip(candidates, chosen, strict=True) if take}

    # deepcopy with a memo that already knows the replacements: modules shared between places stay shared.
    memo: dict[int, Any] = {}
    collapses = False
    for module in named.values():
        replacement: nn.Module | None = None
        if isinstance(module, nn.Conv3d):
            if id(module) in taken:
                replacement = _recurrent(module, update)
            elif module.kernel_size[0] != 1 or _moves_time(module):
                replacement = _frame_conv(module)
        elif isinstance(module, (nn.MaxPool3d, nn.AvgPool3d)):
            replacement = _frame_pool(module)
        elif isinstance(module, (nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)):
            replacement = _adaptive_frame_pool(module)
        elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            replacement = FoldFrames(nn.Flatten())
        if replacement is not None:
            replacement.train(module.training)
            collapses = collapses or isinstance(replacement, FoldFrames)
            memo[id(module)] = replacement
    converted = copy.deepcopy(model, memo)
    return FrameClassifier(converted).train(model.training) if collapses else converted


@register_per_frame
class FoldFrames(nn.Module):
    """Where a converted network leaves time: moves it into the batch, then applies ``layer`` to every frame.

    Shape:
        [N,C,T,H,W] -> ``layer`` of [N*T,C,1,H,W]. Inputs of other than five dimensions are passed to ``layer`` as they
        are.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> layer([N*T,C,1,H,W])."""
        return self.layer(frames_to_batch(x).unsqueeze(2) if x.dim() == 5 else x)


class FrameClassifier(nn.Module):
    """A converted network whose head runs per frame.

    Args:
        network: takes [N,C,T,H,W] and returns [N*T,K], having moved time into the batch (:class:`FoldFrames`).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def frame_scores(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> one score vector per frame, [N,K,T]."""
        n, t = clip.shape[0], clip.shape[2]
        scores = self.network(clip)
        if scores.dim() < 2 or scores.shape[0] != n * t:
            raise ValueError(
                f"network: expected one row of scores per frame, [{n * t},K], got {list(scores.shape)}: the network "
                "changes the number of frames in its own forward"
            )
        return batch_to_frames(scores, n, t)

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K], the mean of the frames' scores."""
        return self.frame_scores(clip).mean(2)


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.RNNBase) and module.bidirectional:
        return "bidirectional: it reads the future"
    if isinstance(module, (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder)):
        return "attends to all frames at once"
    if isinstance(module, (nn.InstanceNorm3d, nn.GroupNorm)):
        return "normalises over time"
    if isinstance(module, nn.ConvTranspose3d) and (module.kernel_size[0] != 1 or module.stride[0] != 1):
        return "transposed convolution over time"
    if isinstance(module, (nn.FractionalMaxPool3d, nn.LPPool3d, nn.MaxUnpool3d)):
        return "pools over time in a way that has no per-frame form"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its sizes are not known yet (run the model once)"
    if isinstance(module, nn.Conv3d) and parametrize.is_parametrized(module):
        return "its weight is parametrized (remove the parametrization first)"
    if isinstance(module, nn.Conv3d) and "weight" not in module._parameters:
        return "its weight is made by a hook (prune.remove and remove_weight_norm make it a parameter)"
    if _has_own_forward(module) and _reaches_over_time(module):
        return (
            f"its class {type(module).__name__} has a forward of its own, which the layer in its place would not have"
        )
    return None


# What gives way to per-frame and recurrent layers.
_POOLS = (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)
_REPLACED = (nn.Conv3d, FrameConv3d, *_POOLS)


def _has_own_forward(module: nn.Module) -> bool:
    return isinstance(module, _REPLACED) and not computes_as(module, *_REPLACED)


def _reaches_over_time(module: Any) -> bool:
    if isinstance(module, (nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)):
        size = module.output_size
        return not (isinstance(size, (tuple, list)) and size[0] is None)
    first = [value[0] if isinstance(value, (tuple, list)) else value for value in (module.kernel_size, module.stride)]
    return first != [1, 1]


def _moves_time(conv: nn.Conv3d) -> bool:
    return conv.stride[0] != 1 or (not isinstance(conv.padding, str) and conv.padding[0] != 0)


def _spatial_arguments(conv: nn.Conv3d) -> dict[str, Any]:
    padding = conv.padding if isinstance(conv.padding, str) else (0, *conv.padding[1:])
    return {
        "kernel_size": (1, *conv.kernel_size[1:]),
        "stride": (1, *conv.stride[1:]),
        "padding": padding,
        "dilation": (1, *conv.dilation[1:]),
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def _recurrent(conv: nn.Conv3d, update: str) -> RecurrentConv3d:
    new = RecurrentConv3d(conv.in_channels, conv.out_channels, **_spatial_arguments(conv), update=update)
    _copy_weights(conv, new.weight_xh, new.bias)
    new.weight_hh.requires_grad_(conv.weight.requires_grad)
    return new


def _frame_conv(conv: nn.Conv3d) -> FrameConv3d:
    new = FrameConv3d(conv.in_channels, conv.out_channels, **_spatial_arguments(conv))
    _copy_weights(conv, new.weight, new.bias)
    return new


@torch.no_grad()
def _copy_weights(conv: nn.Conv3d, weight: Tensor, bias: Tensor | None) -> None:
    taps = conv.weight.double() if conv.weight.dtype != torch.float64 else conv.weight
    weight.copy_(taps.sum(2, keepdim=True))
    weight.requires_grad_(conv.weight.requires_grad)
    if bias is not None:
        assert conv.bias is not None
        bias.copy_(conv.bias)
        bias.requires_grad_(conv.bias.requires_grad)


def _frame_pool(pool: nn.MaxPool3d | nn.AvgPool3d) -> nn.Module:
    def without_time(value: Any, temporal: int) -> tuple[int, int, int]:
        return (temporal, *value[1:]) if isinstance(value, (tuple, list)) else (temporal, value, value)

    kernel = without_time(pool.kernel_size, 1)
    stride = without_time(pool.stride, 1)
    padding = without_time(pool.padding, 0)
    if isinstance(pool, nn.MaxPool3d):
        dilation = without_time(pool.dilation, 1)
        return nn.MaxPool3d(kernel, stride, padding, dilation, pool.return_indices, pool.ceil_mode)
    return nn.AvgPool3d(kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)


def _adaptive_frame_pool(pool: nn.AdaptiveAvgPool3d | nn.AdaptiveMaxPool3d) -> nn.Module:
    size = pool.output_size if isinstance(pool.output_size, (tuple, list)) else (pool.output_size,) * 3
    kind = type(pool)
    arguments = {"return_indices": pool.return_indices} if isinstance(pool, nn.AdaptiveMaxPool3d) else {}
    per_frame = kind((None, size[1], size[2]), **arguments)
    return FoldFrames(per_frame) if size[0] == 1 else per_frame
