"""What calling a layer does: what its class is known to compute, or what an heir's forward and hooks make of that."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` is one of ``kinds``, or of a class that inherits from one and has no forward of its own."""
    own = type(module)
    for base in own.__mro__:
        if base in kinds:
            return all(getattr(own, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def take_hooks(module: nn.Module, before: nn.Module) -> None:
    """Let ``module`` call the hooks of ``before``, whose place it takes."""
    for name in _CALL_HOOKS:
        setattr(module, name, getattr(before, name))


def copied(model: nn.Module, known: dict[int, Any] | None = None) -> Any:
    """A deep copy of ``model``; ``known`` are copies of some of its parts, by ``id``.

    Weights that hooks make at every call (those of ``torch.nn.utils.prune`` and of the old ``weight_norm``) are copied
    as values: torch refuses to copy what has a graph of gradients.
    """
    made = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, {**made, **(known or {})})
