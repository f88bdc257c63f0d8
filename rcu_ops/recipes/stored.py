"""The training loop of networks that read what other networks have put on the disk: small, and resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.cli_errors import StoppedError, UserError
from rcu_ops.progress import Progress
from rcu_ops.recipes.checkpoint import load_checkpoint, save_checkpoint, save_state
from rcu_ops.recipes.dataset import mix_seed
from rcu_ops.recipes.signals import signals_received
from rcu_ops.report import write_csv

__all__ = ["CHECKPOINT", "Batch", "StoredTraining"]

CHECKPOINT = "checkpoint.pt"

Batch = Callable[[Sequence[tuple[int, int]]], tuple[Tensor, Tensor]]


class StoredTraining:
    """Cross entropy of a network's scores over stored examples.

    Every step's examples and their order follow from (seed, step), so a run that was stopped goes on exactly.

    Args:
        model: to train, on its device.
        count: how many examples there are.
        batch_of: (place, pass) of every example of a batch, passes from 0 -> (inputs [N,...], classes [N]).
        optimizer: of the model's parameters.
        out: folder for the checkpoint, the weights and ``metrics.csv``.
        settings: plain values that name the run; a checkpoint of others is refused.
        steps, batch, lr, seed: of the training.
        save_every: steps between checkpoints.
        weights: the weights' file name, and the name of the settings in its metadata.
        label: of the progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        batch_of: Batch,
        optimizer: torch.optim.Optimizer,
        out: Path,
        settings: Mapping[str, Any],
        *,
        steps: int,
        batch: int,
        lr: float,
        seed: int = 0,
        save_every: int = 200,
        weights: tuple[str, str],
        label: str,
    ) -> None:
        self.model = model
        self.step = 0
        self._count, self._batch_of, self._optimizer, self._out = count, batch_of, optimizer, out
        self._settings = {**settings, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
        self._steps, self._batch, self._lr, self._seed, self._save_every = steps, batch, lr, seed, save_every
        self._weights, self._label = weights, label
        self._rows: list[list[float]] = []
        self._device = next(model.parameters()).device

    def resume(self) -> None:
        """Go on from the checkpoint in ``out``. UserError if it is another run's."""
        content = load_checkpoint(self._out / CHECKPOINT, self._device)
        if content["settings"] != self._settings:
            held = content["settings"]
            differing = sorted(key for key in {*held, *self._settings} if held.get(key) != self._settings.get(key))
            raise UserError(f"--out: {self._out} holds a run with another {' and '.join(differing)}")
        self.model.load_state_dict(content["model"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.step, self._rows = content["step"], content["rows"]

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0; here the same at every one."""
        return self._lr

    def examples(self, step: int) -> list[tuple[int, int]]:
        """(place, pass) of the examples of a step: shuffled passes over all of them."""
        chosen = []
        for position in range(step * self._batch, (step + 1) * self._batch):
            epoch, place = divmod(position, self._count)
            generator = torch.Generator().manual_seed(mix_seed(self._seed, epoch))
            order = torch.randperm(self._count, generator=generator)
            chosen.append((int(order[place]), epoch))
        return chosen

    def run(self) -> list[list[float]]:
        """Train to the last step; rows (step, learning rate, loss, accuracy) of ``metrics.csv``.

        Raises:
            StoppedError: an interrupt or termination signal came; the checkpoint is of the step that it came in.
        """
        self.model.train()
        with signals_received() as stopped, Progress(self._steps, label=self._label, unit="steps") as bar:
            bar.update(self.step)
            while self.step < self._steps:
                loss, accuracy = self._take()
                self._rows.append([self.step, self.learning_rate(self.step - 1), loss, accuracy])
                bar.update(note=f"loss {loss:.3f}")
                if self.step % self._save_every == 0 or self.step == self._steps or stopped:
                    self._save()
                if stopped:
                    how = f"stopped at step {self.step} of {self._steps}; the same command goes on from there"
                    raise StoppedError(stopped[0], how)
        name, key = self._weights
        save_state(self._out / name, self.model, key, self._settings)
        write_csv(self._out / "metrics.csv", ("step", "lr", "loss", "accuracy"), self._rows)
        self.model.eval()
        return self._rows

    def scores(self, inputs: Tensor) -> Tensor:
        """Scores [N,classes] of a batch of inputs."""
        return self.model(inputs)

    def _take(self) -> tuple[float, float]:
        inputs, target = (part.to(self._device) for part in self._batch_of(self.examples(self.step)))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        scores = self.scores(inputs)
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
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "rows": self._rows,
        }
        save_checkpoint(self._out / CHECKPOINT, content)
