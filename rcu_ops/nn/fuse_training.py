"""Recurrent convolution + batch normalisation (+ residual) (+ ReLU) as one operator in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rcu_ops.nn.fuse import Fusion, added_to, called, calls, fuse_module, fuse_patterns, is_relu, only_user
from rcu_ops.nn.layer_kind import copied, has_hooks
from rcu_ops.nn.recurrent_conv import RecurrentConv3d
from rcu_ops.nn.stream_state import active_slot, scan_with_state
from rcu_ops.ops import recurrent_conv, recurrent_conv_batch_norm

_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)


def fuse_for_training(model: nn.Module) -> nn.Module:
    """A new model that trains with fewer passes over memory; ``model`` keeps its structure.

    Every :class:`RecurrentConv3d` + ``nn.BatchNorm3d`` or ``nn.SyncBatchNorm`` (+ residual addition) (+ ReLU) runs
    :func:`rcu_ops.recurrent_conv_batch_norm` in training mode. Both models share their parameters, running statistics
    and ``state_dict`` keys, so either may be trained, saved, loaded or evaluated at any time, and ``model`` given to
    :func:`fuse_for_inference`. In evaluation mode, also of a normalisation alone, the running statistics are used. A
    ``SyncBatchNorm`` shares statistics with the processes of its group, on the CPU too.

    Layers with hooks stay unfused: what is fused no longer calls them. So do modules whose ``forward`` cannot be traced
    or takes other branches in training than in evaluation; a warning lists them.

    Args:
        model: in either mode.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return fuse_patterns(copied(model, shared), _FOR_TRAINING)


def _fuse_node(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Let one function call take the place of the pattern that starts with the recurrent convolution ``node``."""
    conv = called(traced, node)
    after = only_user(node)
    norm = None if after is None else called(traced, after)
    if type(conv) is not RecurrentConv3d or type(norm) not in _NORMS:
        return False
    assert after is not None and norm is not None
    if any(calls(traced, n) != 1 or len(n.args) != 1 or n.kwargs for n in (node, after)):
        return False
    if has_hooks(conv) or has_hooks(norm):
        return False
    last = after
    residual: fx.Node | None = None
    after = only_user(last)
    if after is not None and (other := added_to(after, last)) is not None:
        residual, last = other, after
    after = only_user(last)
    relu = after is not None and is_relu(traced, after)
    if relu:
        assert after is not None
        last = after
    with traced.graph.inserting_after(last):
        of_conv = traced.graph.get_attr(str(node.target))
    norm_node = only_user(node)
    assert norm_node is not None
    with traced.graph.inserting_after(of_conv):
        of_norm = traced.graph.get_attr(str(norm_node.target))
    with traced.graph.inserting_after(of_norm):
        call = traced.graph.call_function(conv_batch_norm_act, (of_conv, of_norm, node.args[0], residual, relu))
    last.replace_all_uses_with(call)
    traced.graph.eliminate_dead_code()
    return True


def _with_fused_forward(module: nn.Module, traced: fx.GraphModule) -> nn.Module:
    """``module`` itself, with the traced forward in place of its own: all its parameters, names and methods stay."""
    base = type(module)
    members = {
        "forward": type(traced).forward,
        "fused_from": base,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
    }
    module.__class__ = type(base.__name__, (base,), members)
    return module


_FOR_TRAINING = Fusion("fuse_for_training", _fuse_node, _with_fused_forward, both_modes=True)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For pickle and copy, which know no generated classes: the class before, fused again where it is restored."""
    return _blank, (type(self).__bases__[0],), self.__dict__.copy()


def _blank(base: type[nn.Module]) -> nn.Module:
    def restore(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = base
        self.__setstate__(state)
        fuse_module(self, _FOR_TRAINING)

    restored: type[nn.Module] = type(base.__name__, (base,), {"__setstate__": restore})
    return restored.__new__(restored)


def conv_batch_norm_act(
    conv: RecurrentConv3d,
    norm: nn.BatchNorm3d | nn.SyncBatchNorm,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``act(norm(conv(x)) (+ residual))``: one operator where the batch's statistics are used, else separate ones.

    Args:
        conv, norm: the layers, whose mode, statistics and momentum count as if they were called.
        x: [N,C,T,H,W].
        residual: what expands to the output [N,O,T,H',W'], or None.
        relu: end with a ReLU.
    """
    xh = conv.project(x)
    slot = active_slot(conv)
    if not norm.training and norm.running_mean is not None:
        h = scan_with_state(
            lambda h0: recurrent_conv(xh, conv.weight_hh, h0, update=conv.update), slot, xh, conv.update
        )
        y = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    if residual is not None and residual.shape != xh.shape:
        residual = residual.expand(xh.shape)
    group = _group_of(norm)

    def scan(h0: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h_n, moments = recurrent_conv_batch_norm(
            xh,
            conv.weight_hh,
            norm.weight,
            norm.bias,
            h0,
            residual,
            update=conv.update,
            eps=norm.eps,
            activation="relu" if relu else "identity",
            group=group,
        )
        if norm.training and norm.track_running_stats and xh.numel():
            _track(norm, moments.detach())
        return y, h_n

    return scan_with_state(scan, slot, xh, conv.update)


def _group_of(norm: nn.BatchNorm3d | nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes whose statistics are shared; None when this is the only one."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


@torch.no_grad()
def _track(norm: nn.BatchNorm3d | nn.SyncBatchNorm, moments: Tensor) -> None:
    """Move the running statistics by the batch's, as ``nn.BatchNorm3d`` does (with the unbiased variance)."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = norm.num_batches_tracked.to(moments.dtype).reciprocal()
    variance = moments[1] / (moments[2] - 1).clamp(min=1)
    for running, value in ((norm.running_mean, moments[0]), (norm.running_var, variance)):
        running.mul_(1 - momentum).add_(value * momentum)
