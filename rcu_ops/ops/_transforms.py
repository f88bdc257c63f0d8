"""What the operators' rules for torch.vmap and torch.func share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def call(operator: Callable[..., Any], *args: Any, function: type[torch.autograd.Function] | None = None) -> Any:
    """``operator(*args)``, also under functorch transforms, which gradients registered with torch.library do not serve.

    Without such a transform it goes past the gradient registered with torch.library, a Python kernel in front of the
    compiled one, a fixed cost that a small step of a stream notices: to the operator alone where, by that kernel's own
    condition, no gradient is asked for, else to the same gradient in fewer steps.

    Args:
        function: the operator as a ``torch.autograd.Function`` for transforms, or None if it has no gradient.

    Raises:
        NotImplementedError: an argument has a tangent. Where no gradient is asked for besides, torch would drop it
            without a word, and derivatives would miss this operator's part.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(operator, args)
    if torch._C._are_functorch_transforms_active():
        return operator(*args) if function is None else function.apply(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return operator(*args) if function is None else _recorded(operator, function).apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _refuse_tangents(operator: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(
            f"{operator.__name__.partition('.')[0]} has no jvp (forward-mode derivative): take "
            "rcu_ops.use_backend('reference'), or reverse mode (backward, torch.func.vjp, torch.func.jacrev)"
        )


def forward_mode() -> bool:
    """Whether tensors may have tangents: within ``forward_ad.dual_level``, ``torch.func.jvp`` and their kin."""
    return forward_ad._current_level >= 0


@functools.cache
def _recorded(operator: Callable[..., Any], function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """``function`` as it is recorded without transforms.

    Neither the operator's schema nor forward's signature is read for defaults: that took 30 us of a call.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        function.setup_context(ctx, args, output)
        return output

    # The operator's name is what a graph of gradients and an anomaly's report show.
    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(operator.__name__.partition(".")[0], (torch.autograd.Function,), members)


def pick(value: Any, dim: int | None, index: int) -> Any:
    """One sample of a mapped argument."""
    return value.select(dim, index) if dim is not None else value


def stacked(results: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The results of one call per sample, as a vmap rule returns them."""
    together = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return together, (0,) * len(together)


def one_call_per_sample(call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The vmap rule that serves every operator: it runs once per index."""
    return stacked([call(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)])
