"""Which layers of a network are recurrent (section 5.6 of the RCN paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)
LayerChoice = str | tuple[str, int] | Callable[[str, nn.Module], bool]


def choose_layers(layers: Sequence[tuple[str, nn.Module]], choice: LayerChoice, argument: str = "layers") -> list[bool]:
    """For each (name, module), in network order, whether ``choice`` takes it.

    Args:
        layers: the candidates.
        choice: ``"all"``; ``"none"``; ``("last", n)``; ``("every", k)``: each k-th, so that the k-th is the first
            taken; ``("spaced", n)``: n regularly spaced ones, ending with the last; or ``predicate(name, module) ->
            bool``.
        argument: the name of the caller's argument, for errors.

    Raises:
        ValueError: none of these, or more layers asked for than there are.
    """
    count = len(layers)
    if callable(choice):
        return [bool(choice(name, module)) for name, module in layers]
    if choice == "all":
        return [True] * count
    if choice == "none":
        return [False] * count
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        rule, number = choice
        if rule in ("last", "every", "spaced") and isinstance(number, int) and not isinstance(number, bool):
            if not 1 <= number <= count:
                raise ValueError(
                    f"{argument}: expected a number from 1 to {count} (the layers there are), got {choice!r}"
                )
            if rule == "last":
                taken = set(range(count - number, count))
            elif rule == "every":
                taken = set(range(number - 1, count, number))
            else:
                taken = {(i + 1) * count // number - 1 for i in range(number)}
            return [index in taken for index in range(count)]
    raise ValueError(
        f"{argument}: expected 'all', 'none', ('last', n), ('every', k), ('spaced', n) or a predicate (name, module) "
        f"-> bool, got {choice!r}"
    )
