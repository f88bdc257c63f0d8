"""The inference fold of the Relational LSTM: scores against the hidden state itself, half of the weights per step.

``theta(x) . phi(h) = (W_theta x) . (W_phi h) = (W_phi^T W_theta x) . h``: with the product of both matrices in place of
theta, the keys of all four gates are the hidden state, and a step multiplies it by the maps g alone. The maps g are
left as they are: ``(A H) W_g^T`` for ``A (H W_g^T)`` has the same weights and multiplications, but the gates would then
no longer be one call of :func:`rcu_ops.relational_lstm_step`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.nn.relational_lstm import GATES, RelationalLSTM

PROBE_FRAMES, PROBE_SIDE = 4, 5


class FoldedRelationalLSTM(RelationalLSTM):
    """A :class:`RelationalLSTM` for inference whose keys are the hidden state; made by :func:`fold_relations`.

    Streams keep their state under the same names and shapes. ``weight_x`` [4 (2 D + 2 Dv), C]: theta, phi and g of
    ``r(X, X)`` and the product ``W_phi^T W_theta`` of ``r(X, H)``; ``weight_h`` [4 Dv, Dv]: g of ``r(X, H)``.

    Raises:
        ValueError: by ``.to(dtype)``: a fold is checked for one dtype, and made in another one anew.
    """

    def __init__(self, module: RelationalLSTM) -> None:
        nn.Module.__init__(self)
        self.channels, self.hidden_channels = module.channels, module.hidden_channels
        self.key_channels, self.normalize = module.key_channels, module.normalize
        hidden = GATES * module.hidden_channels
        self.sizes_x = [*module.sizes_x[:3], hidden]
        self.sizes_h = [hidden]
        self.bn, self.conv = copy.deepcopy(module.bn), copy.deepcopy(module.conv)
        theta = _gates(module.weight_x, module.sizes_x)[3]
        phi, _ = _gates(module.weight_h, module.sizes_h)
        dtype = module.weight_x.dtype
        folded = (phi.mT @ theta).flatten(0, 1)  # [4 Dv, C], in fp64; rounded once
        kept = sum(module.sizes_x[:3])
        self.weight_x = nn.Parameter(torch.cat([module.weight_x.detach()[:kept], folded.to(dtype)]))
        self.weight_h = nn.Parameter(module.weight_h.detach()[-hidden:].clone())
        self.bias_x = self.bias_h = None
        if module.bias_x is not None and module.bias_h is not None:
            # What phi's bias adds to a query's scores is the same for every key: the softmax does not see it.
            bias = (phi.mT @ _gates(module.bias_x[:, None], module.sizes_x)[3]).flatten()
            self.bias_x = nn.Parameter(torch.cat([module.bias_x.detach()[:kept], bias.to(dtype)]))
            self.bias_h = nn.Parameter(module.bias_h.detach()[-hidden:].clone())
        self.train(module.training)
        self.requires_grad_(False)

    def _maps_of_state(self, h: Tensor) -> list[Tensor]:
        value = F.linear(h, self.weight_h, self.bias_h).unflatten(-1, (GATES, -1)).transpose(1, 2)
        return [h.unsqueeze(1).expand(-1, GATES, -1, -1), value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedRelationalLSTM:
        held = self.weight_x.dtype
        asked = fn(torch.empty(0, dtype=held, device=self.weight_x.device)).dtype
        if asked != held:
            raise ValueError(f"dtype: this fold was made and checked for {held}, got {asked}; convert, then fold")
        super()._apply(fn, recurse)
        return self


def fold_relations(module: RelationalLSTM, probe: Tensor | None = None) -> FoldedRelationalLSTM:
    """A folded copy of ``module``, if its rounding keeps the tolerance rule; ``module`` is left untouched.

    The product is made in fp64 and rounded once to the module's dtype. Then both forms run over a probe in that dtype:
    the folded one's error against fp64, in rms and in maximum, may be at most twice the unfolded one's plus one ulp of
    the largest hidden value.

    Args:
        module: in evaluation mode. Nothing is checked on ``meta``, where nothing will be computed, and in fp64.
        probe: input [N,C,T,H,W] of the module; default: a fixed random clip whose batch normalisation is standard.

    Raises:
        ValueError: training mode; a dot product with biases, where the fold is not exact; a fold that would multiply
            more, or that violates the rule, with the numbers.
    """
    if module.training:
        raise ValueError("module: expected evaluation mode (call module.eval())")
    if isinstance(module, FoldedRelationalLSTM):
        raise ValueError("module: it is folded already")
    if module.normalize == "count" and module.bias_x is not None:
        raise ValueError(
            "module: with normalize='count' the bias of phi does not cancel, so bias=True cannot be folded"
        )
    sizes = module.channels, module.hidden_channels, module.key_channels
    before, after = weights_per_frame(*sizes, folded=False), weights_per_frame(*sizes, folded=True)
    if after >= before:
        raise ValueError(
            f"module: with {module.key_channels} key and {module.hidden_channels} hidden channels the fold would take "
            f"{after:,} multiplications per position and frame instead of {before:,}"
        )
    folded = FoldedRelationalLSTM(module)
    if not module.weight_x.is_meta and module.weight_x.dtype != torch.float64:  # fp64 is what the rule measures by
        reason = _violation(module, folded, _probe(module) if probe is None else probe)
        if reason is not None:
            raise ValueError(f"module: folded in {module.weight_x.dtype}, {reason}")
    return folded


def fold_relations_of(model: nn.Module) -> nn.Module:
    """``model`` with its Relational LSTMs folded (:func:`fold_relations`), in place but for a model that is one itself.

    Raises:
        ValueError: there is none, or one that cannot be folded, by name.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RelationalLSTM)}
    if not layers:
        raise ValueError("fold_relations: the model has no RelationalLSTM")
    for name, module in layers.items():
        try:
            folded = fold_relations(module)
        except ValueError as error:
            raise ValueError(f"fold_relations: {name or type(module).__name__}: {error}") from error
        if not name:
            return folded
        model.set_submodule(name, folded)
    return model


def weights_per_frame(channels: int, hidden: int, keys: int, *, folded: bool) -> int:
    """Weights that a frame's relations with the hidden state take, each once per position: theta, phi and g."""
    return GATES * (channels * hidden + hidden**2 if folded else channels * keys + hidden * (keys + hidden))


def _gates(weight: Tensor, sizes: list[int]) -> list[Tensor]:
    """The parts of a weight by gate, [4,D,C] each, in fp64."""
    return [part.unflatten(0, (GATES, -1)) for part in weight.detach().double().split(sizes)]


def _probe(module: RelationalLSTM) -> Tensor:
    weight = module.weight_x
    shape = (1, module.channels, PROBE_FRAMES, PROBE_SIDE, PROBE_SIDE)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(weight.device)
    if module.bn is not None and module.bn.running_mean is not None and module.bn.running_var is not None:
        mean, var = (each.double().view(-1, 1, 1, 1) for each in (module.bn.running_mean, module.bn.running_var))
        x = x * (var + module.bn.eps).sqrt() + mean
    return x.to(weight.dtype)


@torch.no_grad()
def _violation(module: RelationalLSTM, folded: FoldedRelationalLSTM, probe: Tensor) -> str | None:
    """Why the folded module's hidden states break the rule; None if they keep it."""
    wide = copy.deepcopy(module).double()
    exact, eager, got = (_hidden_states(each, probe) for each in (wide, module, folded))
    largest = float(exact.abs().max())
    ulp = torch.finfo(probe.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
    for kind in ("rms", "maximum"):
        error, allowed = _error(got, exact, kind), 2 * _error(eager, exact, kind) + ulp
        if not error <= allowed:
            return f"the {kind} error of its hidden states is {error:.2e}, more than {allowed:.2e}"
    return None


def _hidden_states(module: RelationalLSTM, probe: Tensor) -> Tensor:
    """H_1 ... H_T in fp64, [T,N,P,Dv]."""
    state, hidden = None, []
    for frame in probe.to(module.weight_x.dtype).unbind(2):
        _, state = module.step(frame, state)
        hidden.append(state[0].double())
    return torch.stack(hidden)


def _error(got: Tensor, exact: Tensor, kind: str) -> float:
    difference = got - exact
    return float(difference.square().mean().sqrt() if kind == "rms" else difference.abs().max())
