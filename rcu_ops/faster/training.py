"""Stage two of FASTER: an aggregator trained on cached clips, and what it says after every clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcu_ops.cli_errors import UserError
from rcu_ops.faster.cache import ClipCache
from rcu_ops.nn.aggregators import Aggregator
from rcu_ops.recipes.stored import CHECKPOINT, StoredTraining
from rcu_ops.tensor_files import not_safetensors

__all__ = ["CHECKPOINT", "WEIGHTS", "AggregatorTraining", "aggregate_scores", "load_aggregator"]

WEIGHTS = "aggregator.safetensors"

_SETTINGS_KEY = "rcu_ops_aggregator"


class AggregatorTraining(StoredTraining):
    """SGD with a cosine learning rate on the loss of the prediction after the last clip; every pass has another view.

    Args:
        aggregator: to train, on its device.
        cache: of training videos. pattern: x of 1:x, or -1.
        out, settings, steps, batch, lr, seed, save_every: see :class:`rcu_ops.recipes.stored.StoredTraining`.
        momentum, weight_decay: of SGD.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        cache: ClipCache,
        pattern: int,
        out: Path,
        settings: dict[str, Any],
        *,
        steps: int,
        batch: int = 32,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        seed: int = 0,
        save_every: int = 200,
    ) -> None:
        if not cache.holds(pattern):
            raise UserError(f"--pattern: the cache has the clips of 1:{cache.pattern}, not those of 1:{pattern}")

        def batch_of(keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            examples = [cache[place, epoch % cache.views] for place, epoch in keys]
            inputs = torch.stack([example.inputs(pattern, aggregator.takes, cache.pattern) for example in examples])
            return inputs, torch.tensor([example.label for example in examples])

        super().__init__(
            aggregator,
            len(cache),
            batch_of,
            torch.optim.SGD(aggregator.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay),
            out,
            {**settings, "cache": cache.digest, "pattern": pattern, "momentum": momentum, "weight decay": weight_decay},
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            save_every=save_every,
            weights=(WEIGHTS, _SETTINGS_KEY),
            label="aggregator",
        )
        self.aggregator = aggregator

    def learning_rate(self, step: int) -> float:
        """``lr (1 + cos(pi step / steps)) / 2``, steps counted from 0."""
        return self._lr * (1 + math.cos(math.pi * step / self._steps)) / 2

    def scores(self, inputs: Tensor) -> Tensor:
        """After the last clip."""
        return self.model(inputs)[0][:, -1]


def load_aggregator(path: Path, channels: int, classes: int) -> tuple[Aggregator, dict[str, Any]]:
    """Weights that the training wrote, and its settings. UserError for other files and other sizes."""
    import json

    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from rcu_ops.nn.aggregators import make_aggregator

    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[_SETTINGS_KEY])
        aggregator = make_aggregator(settings["aggregator"], channels, classes, **settings["options"])
        aggregator.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path} {not_safetensors(path, error)}") from error
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not an aggregator for {channels} channels and {classes} classes: {error}") from error
    return aggregator.eval(), settings


@torch.inference_mode()
def aggregate_scores(
    aggregator: Aggregator, cache: ClipCache, pattern: int, clips: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Scores [videos,K,classes] after every clip of the first view of every video, and labels [videos]."""
    device = next(aggregator.parameters(), torch.empty(0)).device
    scores, labels = [], []
    for place in range(len(cache)):
        example = cache[place, 0]
        inputs = example.inputs(pattern, aggregator.takes, cache.pattern, clips).unsqueeze(0)
        scores.append(aggregator(inputs.to(device))[0][0].cpu())
        labels.append(example.label)
    return torch.stack(scores), torch.tensor(labels)
