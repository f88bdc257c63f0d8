"""Training of recurrent networks on stored features of clips, and their scores of a list of videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcu_ops.cli_errors import UserError
from rcu_ops.features.files import FORMATS, features_shape, read_features, select_steps
from rcu_ops.recipes.evaluate import file_digest
from rcu_ops.recipes.lists import LabelledVideo, VideoList
from rcu_ops.recipes.stored import StoredTraining
from rcu_ops.run_folder import SETTINGS
from rcu_ops.video.sample import strided_clips

__all__ = ["WEIGHTS", "FeatureTraining", "FeatureVideos", "Windows", "feature_scores"]

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Windows:
    """Fixed-stride augmentation (Eq. 3): the stretches of ``length`` clips that start every ``stride`` clips."""

    length: int
    stride: int = 1

    def __call__(self, clips: int) -> np.ndarray:
        """Numbers [windows, length] of the clips of every stretch; a video of fewer clips is one stretch."""
        return strided_clips(clips, min(self.length, clips), self.stride).numpy()


class FeatureVideos:
    """The features that ``rcu-ops features`` stored of the videos of a list.

    Crops of a clip are averaged there already (``--crops 10``, Eqs. 4-5): a file has one row per clip.

    Args:
        folder: with ``NAME.safetensors`` or ``NAME.npy`` for the list's name of a video; may be a ``pca_D`` of one.
        videos: labelled per video.

    Attributes:
        videos: those that have features. missing: names of those that have none. size: F.
        extraction: what the features were made with, as far as the folder says.

    Raises:
        UserError: no features at all, files that cannot be read or of different sizes.
    """

    def __init__(self, folder: Path, videos: VideoList) -> None:
        self.folder = folder
        self.videos: list[LabelledVideo] = []
        self.missing: list[str] = []
        self._files: list[Path] = []
        self._shapes: list[tuple[int, int]] = []
        for video in videos.videos:
            found = [path for suffix in FORMATS if (path := folder / f"{video.name}.{suffix}").is_file()]
            if not found:
                self.missing.append(video.name)
                continue
            self.videos.append(video)
            self._files.append(found[0])
            self._shapes.append(_shape(found[0]))
            if self._shapes[-1][1] != self._shapes[0][1]:
                raise UserError(f"{found[0]}: expected features of size {self._shapes[0][1]} as in {self._files[0]}, "
                                f"got {self._shapes[-1][1]}")  # fmt: skip
        if not self.videos:
            raise UserError(f"{folder}: no features of any video of {videos.source}, such as {videos.videos[0].name!r}")
        self.size = self._shapes[0][1]

    def __len__(self) -> int:
        """How many videos have features."""
        return len(self.videos)

    @cached_property
    def extraction(self) -> dict[str, Any]:
        """Settings of the run that made the features, and the digest of the components they were reduced with."""
        reduced = self.folder.name.startswith("pca_")
        settings = (self.folder.parent if reduced else self.folder) / SETTINGS
        components = self.folder.with_name(f"{self.folder.name}.safetensors")
        try:
            found = dict(json.loads(settings.read_text(encoding="utf-8"))) if settings.is_file() else {}
            found.pop("format", None)  # the same numbers, whichever
            return {**found, "pca": file_digest(components)} if reduced and components.is_file() else found
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{settings}: cannot be read: {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, labels and shapes of the features, and of how they were made."""
        each = [(v.name, v.label, *shape) for v, shape in zip(self.videos, self._shapes, strict=True)]
        return hashlib.sha256(json.dumps([self.extraction, each], sort_keys=True).encode()).hexdigest()

    def sequence(self, place: int, steps: int, windows: Windows | None = None, turn: int = 0) -> np.ndarray:
        """``x_t = a_sigma(t)`` of a video, or of its window number ``turn`` (counted round and round), [T,F]."""
        features = read_features(self._files[place])
        if windows is not None:
            choices = windows(len(features))
            features = features[choices[turn % len(choices)]]
        if not np.isfinite(features).all():
            raise UserError(f"{self._files[place]}: features hold NaN or infinity")
        return select_steps(features, steps)


def _shape(path: Path) -> tuple[int, int]:
    try:
        return features_shape(path)
    except Exception:  # damaged in one of many ways: what reads it whole says in which
        clips, size = read_features(path).shape
        return clips, size


class FeatureTraining(StoredTraining):
    """RMSProp on the loss of the prediction after the last time step, as the residual RNN paper trains.

    With windows, a video shows another of its windows in every pass; each has its turn before one comes again.

    Args:
        model: features [N,T,F] -> scores [N,K], on its device.
        videos: to train on. time_steps: T. windows: the augmentation, or None.
        out, settings, steps, batch, lr, seed, save_every: see :class:`rcu_ops.recipes.stored.StoredTraining`.
    """

    def __init__(
        self,
        model: nn.Module,
        videos: FeatureVideos,
        out: Path,
        settings: dict[str, Any],
        *,
        steps: int,
        time_steps: int = 25,
        windows: Windows | None = None,
        batch: int = 32,
        lr: float = 1e-3,
        seed: int = 0,
        save_every: int = 200,
        label: str = "res_lstm",
    ) -> None:
        def batch_of(keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            # Videos start at different windows, so that a batch has all parts of videos in it.
            inputs = np.stack([videos.sequence(place, time_steps, windows, epoch + place) for place, epoch in keys])
            return torch.from_numpy(inputs), torch.tensor([videos.videos[place].label for place, _ in keys])

        augment = None if windows is None else [windows.length, windows.stride]
        super().__init__(
            model,
            len(videos),
            batch_of,
            torch.optim.RMSprop(model.parameters(), lr=lr),
            out,
            {**settings, "features": videos.digest, "time steps": time_steps, "windows": augment},
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            save_every=save_every,
            weights=(WEIGHTS, "rcu_ops_features_training"),
            label=label,
        )


@torch.inference_mode()
def feature_scores(model: nn.Module, videos: FeatureVideos, time_steps: int, batch: int = 32) -> np.ndarray:
    """Probabilities [V,K] of whole videos, in the order of ``videos``: what late fusion adds and multiplies."""
    device = next(model.parameters()).device
    found = []
    for first in range(0, len(videos), batch):
        places = range(first, min(first + batch, len(videos)))
        inputs = torch.from_numpy(np.stack([videos.sequence(place, time_steps) for place in places]))
        found.append(model(inputs.to(device)).softmax(1).cpu().numpy())
    return np.concatenate(found)
