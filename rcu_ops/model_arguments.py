"""A network asked for on the command line: ``--model``, ``--model-option`` and ``--weights``."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcu_ops.cli_errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from rcu_ops.models.weights import LoadReport

__all__ = ["load_model_weights", "make_model", "model_error", "one_line", "parse_model_options"]


def parse_model_options(
    texts: Sequence[str], *, flag: str = "--model-option", classes: str = "is set by --classes"
) -> dict[str, Any]:
    """``NAME=VALUE`` arguments as keywords; values are JSON, Python's ``True``, ``False``, ``None``, or else strings.

    Args:
        texts: what was given.
        flag: the option that took them.
        classes: what the command says of the number of classes, which is none of them.

    Raises:
        UserError: not of that form; said of ``flag``.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{flag}: expected NAME=VALUE, got {text!r}")
        if name == "num_classes":
            raise UserError(f"{flag}: num_classes {classes}")
        options[name] = _value(value)
    return options


def make_model(name: str, *, flag: str = "--model", **options: Any) -> nn.Module:
    """:func:`rcu_ops.create_model` for a command: what is wrong is said of the command's argument.

    Args:
        name: the network's name, the value of ``flag``.
        options: the network's arguments, those of ``--model-option`` among them.

    Raises:
        UserError: there is no such network, or it cannot be made with these options.
    """
    import rcu_ops

    try:
        return rcu_ops.create_model(name, **options)
    except (ValueError, TypeError) as error:
        raise model_error(name, error, flag=flag) from error


def model_error(name: str, error: Exception, *, flag: str = "--model") -> UserError:
    """What :func:`rcu_ops.create_model` raised, said of a command's argument."""
    import rcu_ops

    message = " ".join(str(error).split())
    if name not in rcu_ops.list_models():
        return UserError(f"{flag}: {message.removeprefix('name: ')}")
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", message):
        message = f"it has no argument {unknown[1]!r}"
    elif isinstance(error, TypeError):  # from within the network, which names no argument then
        message = f"one of its arguments has a value of another kind than it takes: {message}"
    return UserError(f"{flag} {name}: {message}")


def load_model_weights(
    model: nn.Module,
    source: str,
    sha256: str | None = None,
    *,
    flag: str = "--weights",
    hint: str = "",
    **options: Any,
) -> LoadReport:
    """:func:`rcu_ops.load_weights` for a command: what is wrong is said of ``flag`` and ``flag``-sha256.

    Args:
        model, source, sha256, options: of ``load_weights``.
        flag: the argument that gave ``source``.
        hint: what makes the number of classes fit.

    Raises:
        UserError: the file cannot be had or read, has another digest, or does not fit the model.
    """
    import rcu_ops

    try:
        return rcu_ops.load_weights(model, source, sha256, **options)
    except (ValueError, OSError) as error:
        message = one_line(str(error))
        if head := re.search(r"shape: head\.\S+ expected \[(\d+)\b.*, got \[(\d+)\b", str(error)):
            message = f"{source} is of {head[2]} classes, the network of {head[1]}" + (hint and f"; {hint}")
        if message.startswith("sha256: "):
            raise UserError(f"{flag}-{message}") from error
        raise UserError(f"{flag}: {message.removeprefix('source: ')}") from error


def one_line(message: str, keep: int = 3) -> str:
    """The first lines of a long message as one line, with the number of lines left out."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    rest = len(lines) - keep
    text = "; ".join(lines[:keep]).replace(":; ", ": ")
    return textwrap.shorten(text, 400, placeholder=" ...") + (f"; and {rest} more" if rest > 0 else "")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text) if text in ("True", "False", "None") else text
