"""Training checkpoints, and weights that say what they are.

A checkpoint is a ``torch.save`` file of tensors and plain values (read with ``weights_only=True``): the network, the
optimiser, the step and the settings. Weights are a safetensors file with the settings in its metadata, so that
evaluation needs no options beside it. Both are files that :func:`rcu_ops.load_weights` takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rcu_ops.cli_errors import UserError
from rcu_ops.models.weights import fetch_weights
from rcu_ops.recipes.config import Recipe
from rcu_ops.report import replacing

__all__ = [
    "RunSettings",
    "load_checkpoint",
    "read_settings",
    "save_checkpoint",
    "save_state",
    "save_weights",
    "stored_options",
    "stored_settings",
]

_FORMAT = "rcu-ops training checkpoint 1"
_METADATA_KEY = "rcu_ops_settings"


@dataclass(frozen=True)
class RunSettings:
    """What weights were trained with.

    Attributes:
        recipe: the recipe with all overrides; names the network.
        model_options: further arguments of :func:`rcu_ops.create_model`, as JSON has them.
        names: class names, or None.
    """

    recipe: Recipe
    model_options: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for files."""
        return {
            "recipe": self.recipe.as_dict(),
            "model_options": dict(self.model_options),
            "names": None if self.names is None else list(self.names),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """The settings that :meth:`as_dict` was called on."""
        names = values["names"]
        return cls(
            Recipe.from_dict(values["recipe"]), dict(values["model_options"]), None if names is None else tuple(names)
        )


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file of that name is the old one or the whole new one, also after a power failure."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": _FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; UserError if the file is anything else."""
    content = _try_checkpoint(path, device)
    if content is None:
        raise UserError(f"{path}: this is not a training checkpoint of this version")
    return content


def _try_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any] | None:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # the unpickler's errors have no common base; load_weights says what is wrong with other files
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None


def save_weights(path: Path, model: nn.Module, settings: RunSettings) -> None:
    """Write the parameters and buffers of ``model`` with the settings as a safetensors file."""
    save_state(path, model, _METADATA_KEY, settings.as_dict())


def save_state(path: Path, model: nn.Module, key: str, settings: Mapping[str, Any]) -> None:
    """Write the parameters and buffers of ``model`` as safetensors, with ``settings`` under ``key`` in the metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={key: json.dumps(settings)})


def read_settings(path: Path) -> RunSettings | None:
    """The settings within a checkpoint or weights file of this package; None for every other file."""
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        values = json.loads(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else None
    else:
        content = _try_checkpoint(path, "meta")
        values = None if content is None else content["settings"]
    if values is None:
        return None
    try:
        return RunSettings.from_dict(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def stored_settings(weights: str | None, sha256: str | None = None) -> RunSettings | None:
    """The settings within what a command's ``--weights`` names, a file or URL; None where there are none.

    None, too, where the file cannot be had: :func:`rcu_ops.load_weights` says so.
    """
    if weights is None:
        return None
    try:
        path = fetch_weights(weights, sha256)
    except (ValueError, OSError):
        return None
    return read_settings(path)


def stored_options(stored: RunSettings | None, model: str) -> dict[str, Any]:
    """The options with which ``rcu-ops train`` made the network of these settings, if it is ``model``; else none.

    A recurrence's update, and others, do not show in the shapes of the weights.
    """
    return {} if stored is None or stored.recipe.model != model else dict(stored.model_options)
