"""Stage two of FASTER: an aggregator trained on cached clips, and what it says after every clip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcu_ops.cli_errors import UserError
from rcu_ops.faster.cache import ClipCache
from rcu_ops.nn.aggregators import Aggregator
from rcu_ops.progress import Progress
from rcu_ops.recipes.checkpoint import load_checkpoint, save_checkpoint
from rcu_ops.recipes.dataset import mix_seed
from rcu_ops.report import replacing, write_csv

__all__ = ["CHECKPOINT", "WEIGHTS", "AggregatorTraining", "aggregate_scores", "load_aggregator", "save_aggregator"]

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "aggregator.safetensors"

_SETTINGS_KEY = "rcu_ops_aggregator"


class AggregatorTraining:
    """SGD with a cosine learning rate on the loss of the prediction after the last clip.

    Every step's videos, their order and views follow from (seed, step), so a run that was stopped goes on exactly.

    Args:
        aggregator: to train, on its device.
        cache: of training videos. pattern: x of 1:x, or -1.
        out: folder for the checkpoint, the weights and ``metrics.csv``.
        settings: plain values that name the run; a checkpoint of others is refused.
        steps, batch, lr, momentum, weight_decay, seed: of the training.
        save_every: steps between checkpoints.
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
        self.aggregator = aggregator
        self.cache = cache
        self.pattern = pattern
        self.step = 0
        self._out = out
        self._settings = {**settings, "cache": cache.digest, "pattern": pattern, "steps": steps, "batch": batch,
                          "lr": lr, "momentum": momentum, "weight decay": weight_decay, "seed": seed}  # fmt: skip
        self._steps, self._batch, self._lr, self._seed, self._save_every = steps, batch, lr, seed, save_every
        self._rows: list[list[float]] = []
        self._device = next(aggregator.parameters()).device
        self._optimizer = torch.optim.SGD(aggregator.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def resume(self) -> None:
        """Go on from the checkpoint in ``out``. UserError if it is another run's."""
        content = load_checkpoint(self._out / CHECKPOINT, self._device)
        if content["settings"] != self._settings:
            held = content["settings"]
            differing = sorted(key for key in {*held, *self._settings} if held.get(key) != self._settings.get(key))
            raise UserError(f"--out: {self._out} holds a run with another {' and '.join(differing)}")
        self.aggregator.load_state_dict(content["aggregator"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.step, self._rows = content["step"], content["rows"]

    def learning_rate(self, step: int) -> float:
        """``lr (1 + cos(pi step / steps)) / 2``, steps counted from 0."""
        return self._lr * (1 + math.cos(math.pi * step / self._steps)) / 2

    def examples(self, step: int) -> list[tuple[int, int]]:
        """(place, view) of the examples of a step: shuffled passes over the cache, each with another view."""
        chosen = []
        for position in range(step * self._batch, (step + 1) * self._batch):
            epoch, place = divmod(position, len(self.cache))
            generator = torch.Generator().manual_seed(mix_seed(self._seed, epoch))
            order = torch.randperm(len(self.cache), generator=generator)
            chosen.append((int(order[place]), epoch % self.cache.views))
        return chosen

    def run(self) -> list[list[float]]:
        """Train to the last step; rows (step, learning rate, loss, accuracy) of ``metrics.csv``."""
        self.aggregator.train()
        with Progress(self._steps, label="aggregator", unit="steps") as bar:
            bar.update(self.step)
            while self.step < self._steps:
                loss, accuracy = self._take()
                self._rows.append([self.step, self.learning_rate(self.step - 1), loss, accuracy])
                bar.update(note=f"loss {loss:.3f}")
                if self.step % self._save_every == 0 or self.step == self._steps:
                    self._save()
        save_aggregator(self._out / WEIGHTS, self.aggregator, self._settings)
        write_csv(self._out / "metrics.csv", ("step", "lr", "loss", "accuracy"), self._rows)
        self.aggregator.eval()
        return self._rows

    def _take(self) -> tuple[float, float]:
        examples = [self.cache[key] for key in self.examples(self.step)]
        takes = self.aggregator.takes
        inputs = torch.stack([example.inputs(self.pattern, takes, self.cache.pattern) for example in examples])
        target = torch.tensor([example.label for example in examples], device=self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        scores = self.aggregator(inputs.to(self._device))[0][:, -1]
        loss = F.cross_entropy(scores, target)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is not finite at step {self.step}; a smaller --lr may help")
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.step += 1
        return float(loss.detach()), float((scores.argmax(1) == target).float().mean())

    def _save(self) -> None:
        content = {
            "settings": self._settings,
            "aggregator": self.aggregator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "rows": self._rows,
        }
        save_checkpoint(self._out / CHECKPOINT, content)


def save_aggregator(path: Path, aggregator: Aggregator, settings: dict[str, Any]) -> None:
    """The weights with the settings in their metadata, as safetensors."""
    import json

    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in aggregator.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_SETTINGS_KEY: json.dumps(settings)})


def load_aggregator(path: Path, channels: int, classes: int) -> tuple[Aggregator, dict[str, Any]]:
    """What :func:`save_aggregator` wrote, and its settings. UserError for other files and other sizes."""
    import json

    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from rcu_ops.nn.aggregators import make_aggregator

    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[_SETTINGS_KEY])
        aggregator = make_aggregator(settings["aggregator"], channels, classes, **settings["options"])
        aggregator.load_state_dict(load_file(path))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
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
