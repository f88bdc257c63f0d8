"""Networks by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Decorator that makes ``create_model(name, **options)`` call the decorated function or class.

    Raises:
        ValueError: the name is taken.
    """

    def add(builder: Builder) -> Builder:
        if name in _BUILDERS:
            raise ValueError(f"name: there is a model named {name!r} already")
        _BUILDERS[name] = builder
        return builder

    return add


def create_model(name: str, **options: Any) -> nn.Module:
    """A new, untrained network.

    Args:
        name: one of :func:`list_models`.
        options: the network's own arguments, such as ``num_classes=400``.

    Raises:
        ValueError: no such name (similar ones are listed), or an option with an impossible value.
        TypeError: an option that the network does not have.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        similar = difflib.get_close_matches(str(name), _BUILDERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(list_models())}"
        raise ValueError(f"name: there is no model named {name!r}; {hint}")
    return builder(**options)


def list_models(pattern: str | None = None) -> list[str]:
    """The names of all networks, sorted; with a shell pattern (``"rcn_*"``), those that match."""
    return sorted(name for name in _BUILDERS if pattern is None or fnmatch.fnmatchcase(name, pattern))
