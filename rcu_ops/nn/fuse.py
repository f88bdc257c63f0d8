"""Folding of recurrent convolution + batch normalisation (+ residual) (+ ReLU) into single inference modules."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rcu_ops.nn.batch_norm import MovingBatchNorm3d
from rcu_ops.nn.causality import register_per_frame
from rcu_ops.nn.frame_kernel import Panels, run_frame
from rcu_ops.nn.frames import batch_to_frames, check_clip, frames_to_batch
from rcu_ops.nn.layer_kind import computes_as, copied, has_hooks, take_hooks
from rcu_ops.nn.packed_conv import PackedWeights, conv2d_act
from rcu_ops.nn.recurrent_conv import FrameConv3d, RecurrentConv3d, conv2d_arguments, frame_conv2d
from rcu_ops.nn.relational_fold import fold_relations_of
from rcu_ops.nn.stream_state import StreamSlot, active_slot, scan_with_state
from rcu_ops.ops import recurrent_conv_affine_act
from rcu_ops.ops._kept import Kept
from rcu_ops.ops._recurrent_conv_chunked import KeptPowers
from rcu_ops.reference.recurrent_conv import state_dtype_of

# In evaluation mode these normalise alike.
_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm, MovingBatchNorm3d)

BatchNorm = nn.BatchNorm3d | nn.SyncBatchNorm


def fuse_for_inference(model: nn.Module, *, fold_relations: bool = False) -> nn.Module:
    """A new model for inference with fewer passes over memory; ``model`` is left untouched.

    * :class:`RecurrentConv3d` + ``BatchNorm3d`` or ``SyncBatchNorm`` (+ residual addition) (+ ReLU) becomes one
      :class:`FusedRecurrentConv3d`, which runs :func:`rcu_ops.recurrent_conv_affine_act`.
    * Batch normalisation after a 1xdxd or other 3D convolution is folded into its weight and bias.
    * Dropout around them goes.
    * With ``fold_relations`` every :class:`rcu_ops.nn.RelationalLSTM` takes its hidden state for the keys, with half
      of the weights per step (:func:`rcu_ops.nn.fold_relations`); it has then to stay in its dtype.

    What kernels need of the weights in other forms (rearranged, or, for long clips of few positions on a GPU, their
    powers) is kept beside them and made anew when they change by any way that PyTorch counts. A write through ``.data``
    is none, nor is one to weights that were copied or cast under inference mode; ``load_state_dict`` always is.
    Parametrized weights (``torch.nn.utils.parametrize``) are taken as they are now.

    Streams keep their state under the same names, so a stream may move between a model and its fused form. The result
    has no gradients with respect to its parameters. Layers with hooks (also those by which ``prune`` and the old
    ``weight_norm`` make weights), and layers of classes with a forward of their own, stay unfused. So do modules whose
    ``forward`` cannot be traced, and a warning lists these.

    Args:
        model: in evaluation mode.
        fold_relations: fold Relational LSTMs too.

    Raises:
        ValueError: a module of the model is in training mode (batch statistics cannot be folded); ``fold_relations`` of
            a layer whose rounding would break the tolerance rule, or of a model without such a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"model: expected evaluation mode (call model.eval()), but {training[0]}"
            f"{f' and {len(training) - 1} more modules are' if len(training) > 1 else ' is'} in training mode"
        )
    # Under the caller's inference mode the new weights would be tensors whose changes PyTorch does not count.
    with torch.inference_mode(False), torch.no_grad():
        ours = copied(model)
        if fold_relations:
            ours = fold_relations_of(ours)
        return fuse_patterns(ours, _FOR_INFERENCE).eval().requires_grad_(False)


class FusedRecurrentConv3d(nn.Module):
    """``act(scale * h_t + shift (+ residual_t))`` of a recurrent convolution's hidden states, for inference.

    Made by :func:`fuse_for_inference`. Parameters as in RecurrentConv3d (shared names and shapes); buffers ``scale``
    and ``shift`` [O] in the state's dtype.

    Args:
        conv: the recurrent convolution.
        norm: the batch normalisation after it, in evaluation mode, or None.
        relu: end with a ReLU.
    """

    carries_state: ClassVar[bool] = True

    scale: Tensor
    shift: Tensor
    bias: Tensor | None

    def __init__(self, conv: RecurrentConv3d, norm: BatchNorm | None, relu: bool) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self.update = conv.update
        self.activation = "relu" if relu else "identity"
        self.weight_xh = _parameter(conv.weight_xh)
        self.weight_hh = _parameter(conv.weight_hh)
        self.bias = None if conv.bias is None else _parameter(conv.bias)
        state_dtype = state_dtype_of(conv.weight_xh.dtype)
        if norm is None:
            scale = torch.ones(conv.out_channels, dtype=state_dtype, device=conv.weight_hh.device)
            shift = torch.zeros_like(scale)
        else:
            scale, shift = _affine(norm)
        self.register_buffer("scale", scale.to(state_dtype))
        self.register_buffer("shift", shift.to(state_dtype))
        self._arguments = conv2d_arguments(conv)
        self._packed = PackedWeights()
        self._panels = Panels()
        self._powers = KeptPowers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedRecurrentConv3d:
        # model.to(dtype) must not round scale and shift to 16 bits: they belong to the state's dtype.
        before = self.scale, self.shift
        super()._apply(fn, recurse)
        state_dtype = state_dtype_of(self.weight_xh.dtype)
        if not before[0].is_meta:
            self.scale = before[0].to(self.scale.device, state_dtype)
            self.shift = before[1].to(self.shift.device, state_dtype)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        _forget(self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N,C,T,H,W] (and a residual that expands to [N,O,T,H',W']) -> [N,O,T,H',W']."""
        check_clip(self, x, self.in_channels)
        slot = active_slot(self)
        if slot is not None and (y := self._one_frame(x, residual, slot)) is not None:
            return y
        frames = _convolve(self, self._packed, frames_to_batch(x), self.weight_xh, self.bias)
        xh = batch_to_frames(frames, x.shape[0], x.shape[2])
        if residual is not None and residual.shape != xh.shape:
            residual = residual.expand(xh.shape)

        def scan(h0: Tensor | None) -> tuple[Tensor, Tensor]:
            return recurrent_conv_affine_act(
                xh,
                self.weight_hh,
                self.scale,
                self.shift,
                h0,
                residual,
                update=self.update,
                activation=self.activation,
            )

        if not torch.compiler.is_compiling() and x.shape[2] > 1:
            with self._powers.offered(self.weight_hh):
                return scan_with_state(scan, slot, xh, self.update)
        return scan_with_state(scan, slot, xh, self.update)

    def _one_frame(self, x: Tensor, residual: Tensor | None, slot: StreamSlot) -> Tensor | None:
        """One frame of a stream that has a state, by one kernel; None where that is not taken."""
        if torch.compiler.is_compiling() or slot.fresh is not None:
            return None
        weight = self.weight_xh
        plan = self._panels.plan(self, x, weight)
        if plan is None:
            return None
        state = slot.read(x, plan.shape)
        if state is None:
            return None
        found = run_frame(
            plan,
            self._panels,
            x,
            weight,
            self.bias,
            residual,
            self.activation == "relu",
            weight_hh=self.weight_hh,
            state=state,
            scale=self.scale,
            shift=self.shift,
            mean=self.update == "mean",
        )
        if found is None:
            return None
        slot.write(found[1])
        return found[0]

    def extra_repr(self) -> str:
        """Shape, update and activation."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, update={self.update!r}, activation={self.activation!r}"
        )


@register_per_frame
class FusedFrameConv3d(nn.Module):
    """A 1xdxd convolution with batch normalisation folded in, and the residual addition and ReLU after it.

    Made by :func:`fuse_for_inference`; ``weight`` [O,C/groups,1,kh,kw] and ``bias`` ([O] or None) include the
    normalisation.

    Args:
        conv: the convolution.
        norm: the batch normalisation after it, in evaluation mode, or None.
        relu: end with a ReLU.
    """

    bias: Tensor | None

    def __init__(self, conv: FrameConv3d, norm: BatchNorm | None, relu: bool) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self.relu = relu
        if norm is None:
            self.weight, self.bias = _parameter(conv.weight), None if conv.bias is None else _parameter(conv.bias)
        else:
            self.weight, self.bias = _fold(conv, norm)
        self._arguments = conv2d_arguments(conv)
        self._packed = PackedWeights()
        self._panels = Panels()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        _forget(self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N,C,T,H,W] (and a residual that expands to the output) -> [N,O,T,H',W']."""
        check_clip(self, x, self.in_channels)
        n, t = x.shape[0], x.shape[2]
        if not torch.compiler.is_compiling():  # asked while tracing, it would bind N and T
            plan = self._panels.plan(self, x, self.weight)
            if plan is not None:
                found = run_frame(plan, self._panels, x, self.weight, self.bias, residual, self.relu)
                if found is not None:
                    return found[0]
        frames = frames_to_batch(x)
        if residual is None or residual.shape == self._output_shape(x):
            added = None if residual is None else frames_to_batch(residual)
            return batch_to_frames(
                _convolve(self, self._packed, frames, self.weight, self.bias, added, self.relu), n, t
            )
        y = batch_to_frames(_convolve(self, self._packed, frames, self.weight, self.bias), n, t) + residual
        return F.relu(y) if self.relu else y

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.padding == "same":
            size = list(x.shape[3:])
        else:
            padding = (0, 0, 0) if isinstance(self.padding, str) else self.padding
            size = [
                (x.shape[2 + i] + 2 * padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
                + 1
                for i in (1, 2)
            ]
        return x.shape[0], self.out_channels, x.shape[2], *size

    def extra_repr(self) -> str:
        """Shape and activation."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, relu={self.relu}"
        )


def _like(conv: nn.Conv3d) -> nn.Conv3d:
    """A convolution as ``conv``, its parameters still to be given; a copy would share a parametrization's class."""
    kind = FrameConv3d if isinstance(conv, FrameConv3d) else nn.Conv3d
    given: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    return kind(conv.in_channels, conv.out_channels, **given, device="meta").eval()


def _parameter(tensor: Tensor) -> nn.Parameter:
    """A layer's own parameter, or what its parametrization computes of it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())


def _forget(module: nn.Module) -> None:
    """What was made of the weights; loading under inference mode changes them in place, and nothing counts that."""
    for kept in vars(module).values():
        if isinstance(kept, Kept):
            kept.clear()


def _convolve(
    conv: FusedRecurrentConv3d | FusedFrameConv3d,
    packed: PackedWeights,
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return conv2d_act(packed, frames, weight, bias, residual=residual, relu=relu, **conv._arguments)
    y = frame_conv2d(frames, weight, bias, **conv._arguments, padding_mode=conv.padding_mode)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The normalisation as ``scale * x + shift``, both [C], in fp64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _fold(conv: nn.Conv3d, norm: BatchNorm) -> tuple[nn.Parameter, nn.Parameter]:
    scale, shift = _affine(norm)
    weight = conv.weight.detach().double() * scale.view(-1, 1, 1, 1, 1)
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    return nn.Parameter(weight.to(conv.weight.dtype)), nn.Parameter(shift.to(conv.weight.dtype))


# ---- finding what to fuse ------------------------------------------------------------------------------------------


class _ShallowTracer(fx.Tracer):
    """Traces one module: Sequential children are looked into, all others are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or has_hooks(m)


@dataclass(frozen=True)
class Fusion:
    """What to fuse.

    Attributes:
        name: the public function.
        fuse_node: fuses the pattern that starts at a node of a traced module, if there is one; True if the graph has
            changed.
        finish: (the module, its fused GraphModule) -> what takes the module's place.
        both_modes: the result is to run in training and in evaluation mode. A traced module has taken its branches:
            those whose calls depend on the mode stay as they are.
    """

    name: str
    fuse_node: Callable[[fx.GraphModule, fx.Node], bool]
    finish: Callable[[nn.Module, fx.GraphModule], nn.Module]
    both_modes: bool


def fuse_patterns(model: nn.Module, fusion: Fusion) -> nn.Module:
    """``model``, a copy that may be changed, with everything in it fused; warns of what cannot be traced."""
    for module in model.modules():  # what is fused for training has a forward that knows its children by name
        module.__class__ = getattr(type(module), "fused_from", type(module))
    untraced: list[str] = []
    fused = _fuse(model, "", fusion, {}, untraced)
    if untraced:
        warnings.warn(
            f"{fusion.name} left these modules as they are, because their forward cannot be traced or the root has "
            f"methods that a traced module would lose: {', '.join(untraced)}",
            stacklevel=3,
        )
    return fused


def _fuse(
    module: nn.Module,
    name: str,
    fusion: Fusion,
    done: dict[int, tuple[nn.Module, nn.Module]],
    untraced: list[str],
) -> nn.Module:
    """``module`` with everything in it fused; a module met twice gives the same result twice.

    ``done`` keeps the originals too, so that their ids stay theirs.
    """
    if id(module) in done:
        return done[id(module)][1]
    result = module
    if _has_convolution(module):
        # A traced module has a forward and nothing else: a root with other methods of its own keeps its class.
        traced = None if not name and hasattr(module, "frame_scores") else fuse_module(module, fusion)
        if traced is not None:
            result = traced
        elif any(isinstance(child, RecurrentConv3d) for child in module.children()):
            untraced.append(name or type(module).__name__)
    done[id(module)] = (module, result)
    if isinstance(result, fx.GraphModule) and result is not module:
        children = {str(node.target) for node in result.graph.nodes if node.op == "call_module"}
    else:
        children = {child_name for child_name, _ in result.named_children()}
    for child_name in sorted(children):
        child_path = f"{name}.{child_name}" if name else child_name
        result.set_submodule(child_name, _fuse(result.get_submodule(child_name), child_path, fusion, done, untraced))
    return result


def _nearby(module: nn.Module) -> list[nn.Module]:
    """The children of ``module``, looking through Sequentials."""
    found: list[nn.Module] = []
    for child in module.children():
        found.extend(_nearby(child) if type(child) is nn.Sequential else [child])
    return found


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(child, (RecurrentConv3d, nn.Conv3d)) for child in _nearby(module))


def _graph_of(module: nn.Module, both_modes: bool) -> fx.Graph | None:
    """What ``module`` calls; None if it cannot be traced, or (``both_modes``) makes other calls in the other mode."""
    mode = module.training
    try:
        graph = _ShallowTracer().trace(module)
        if both_modes:
            module.training = not mode
            if str(_ShallowTracer().trace(module)) != str(graph):
                return None
    except Exception:  # user code may raise anything when it meets a proxy; the caller reports the module by name
        return None
    finally:
        module.training = mode
    return graph


def fuse_module(module: nn.Module, fusion: Fusion) -> nn.Module | None:
    """What takes the place of ``module``; ``module`` itself if nothing fuses; None if it cannot be traced."""
    graph = _graph_of(module, fusion.both_modes)
    if graph is None:
        return None
    if any(not node.users for node in graph.nodes if node.op not in ("placeholder", "output")):
        return None  # a call whose result is not used acts in place: dead-code elimination would drop it
    for node in graph.nodes:
        node.type = None  # annotations may be strings, which a GraphModule cannot be pickled with
    traced = fx.GraphModule(module, graph, type(module).__name__)
    # Where a recurrent and a plain convolution are added, the recurrent one takes the other as its residual.
    nodes = sorted(graph.nodes, key=lambda node: not isinstance(called(traced, node), RecurrentConv3d))
    changed = False
    for node in nodes:
        changed = fusion.fuse_node(traced, node) or changed
    if not changed:
        return module
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    return fusion.finish(module, traced)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _for_inference(module: nn.Module, traced: fx.GraphModule) -> nn.Module:
    """Without dropout, which does nothing in evaluation mode but takes a call, and without what is not used."""
    for node in list(traced.graph.nodes):
        if type(called(traced, node)) in _DROPOUTS and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    traced.delete_all_unused_submodules()
    take_hooks(traced, module)
    return traced


def _fuse_node(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Fuse the pattern that starts with the convolution ``node``, if it is one; True if the graph has changed."""
    conv = called(traced, node)
    if (
        not isinstance(conv, (RecurrentConv3d, nn.Conv3d))
        or not computes_as(conv, RecurrentConv3d, FrameConv3d, nn.Conv3d)
        or has_hooks(conv)
        or calls(traced, node) != 1
        or len(node.args) != 1
        or node.kwargs
    ):
        return False
    last = node
    norm: BatchNorm | None = None
    after = only_user(last)
    if (
        after is not None
        and isinstance(candidate := called(traced, after), _NORMS)
        and computes_as(candidate, *_NORMS)
        and not has_hooks(candidate)
    ):
        if candidate.running_mean is None:
            return False
        norm, last = candidate, after
    residual: fx.Node | None = None
    after = only_user(last)
    if after is not None and norm is not None and (other := added_to(after, last)) is not None:
        residual, last = other, after
    after = only_user(last)
    relu = after is not None and is_relu(traced, after)
    if relu:
        assert after is not None
        last = after
    per_frame = conv if isinstance(conv, FrameConv3d) and conv.stride[0] == 1 else None
    # A per-frame one alone gains by keeping its weight as the library wants it, but sums in another order: not in fp32,
    # where the 512 products of a head then round more.
    if last is node and (per_frame is None or conv.weight.dtype not in (torch.bfloat16, torch.float16)):
        return False
    fused: nn.Module
    if isinstance(conv, RecurrentConv3d):
        fused = FusedRecurrentConv3d(conv, norm, relu)
    elif per_frame is not None:
        fused = FusedFrameConv3d(per_frame, norm, relu)
    elif norm is not None:
        # Temporal kernels and strides: only the normalisation folds, the rest of the pattern stays in the graph.
        folded = _like(conv)
        folded.weight, folded.bias = _fold(conv, norm)
        traced.set_submodule(str(node.target), folded)
        norm_node = only_user(node)
        assert norm_node is not None
        norm_node.replace_all_uses_with(node)
        return True
    else:
        return False
    target = str(node.target)
    traced.set_submodule(target, fused.eval())
    with traced.graph.inserting_after(last):
        call = traced.graph.call_module(target, (node.args[0],) if residual is None else (node.args[0], residual))
    last.replace_all_uses_with(call)
    traced.graph.eliminate_dead_code()
    return True


_FOR_INFERENCE = Fusion("fuse_for_inference", _fuse_node, _for_inference, both_modes=False)


def called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def calls(traced: fx.GraphModule, node: fx.Node) -> int:
    """How often the module of ``node`` is called, under any name."""
    module = called(traced, node)
    return sum(called(traced, other) is module for other in traced.graph.nodes)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that takes the value of ``node``, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def added_to(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand if ``node`` is ``value + other`` (either order, in place or not), else None."""
    function = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not (function or method) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    other = b if a is value else a
    return other if isinstance(other, fx.Node) and other is not value else None


def is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a ReLU: a module, a function or a method, in place or not."""
    if node.op == "call_module":
        module = called(traced, node)
        return type(module) is nn.ReLU and not has_hooks(module)
    if node.op == "call_function":
        return node.target in (F.relu, F.relu_, torch.relu, torch.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")
