"""Scores of one whole video, in one pass over it and in bounded memory.

- ``clips``: regularly spaced clips of the training length, one score vector each; with segment sampling the positions
  in the segments, or with windows one score vector per window, averaged over the positions;
- ``sliding``: the training length as a window that moves on by its own length, so that every frame is in one window;
  one score vector per frame where the network gives one, else one per window;
- ``unrolled``: the network over the whole video; frame by frame through a :class:`rcu_ops.Streamer` if it is causal,
  else in one piece, for which the whole video must fit in memory.

With a sampling period p above 1, the video is p interleaved videos of every p-th frame, each at the speed the network
was trained at; they run side by side as a batch, and their scores are put back in the order of the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcu_ops.nn import streaming_obstacles
from rcu_ops.recipes.config import Recipe
from rcu_ops.recipes.dataset import evaluation_crops, evaluation_picture, network_input, read_clip
from rcu_ops.streaming import State, Streamer
from rcu_ops.video import BrokenVideoError, open_video
from rcu_ops.video.flow import flow_pictures, open_flow
from rcu_ops.video.sample import regular_clips, segment_positions

__all__ = ["MODES", "VideoResult", "VideoScorer"]

MODES = ("clips", "sliding", "unrolled")


@dataclass(frozen=True)
class VideoResult:
    """What a network says about one video.

    Attributes:
        scores: for every mode float32 [K, outputs], outputs in the order of time.
        times: of all frames, seconds [T].
        fault: why the file broke after these frames, or None.
    """

    scores: dict[str, np.ndarray]
    times: np.ndarray
    fault: str | None


class VideoScorer:
    """Runs a network over whole videos.

    Args:
        model: in evaluation mode.
        recipe: frames, period, crop, eval_scale, eval_clips and eval_windows.
        modes: some of :data:`MODES`.
        dtype: of the network's input, that of its weights.
        autocast: a dtype to run it in under ``torch.autocast``, or None.
        batch: clips run at once.

    Raises:
        ValueError: an unknown mode, or ``unrolled`` for a network without per-frame scores.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        modes: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        batch: int = 8,
    ) -> None:
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {', '.join(modes) or 'none'}")
        if "unrolled" in modes and not hasattr(model, "frame_scores"):
            raise ValueError(f"modes: unrolled needs per-frame scores, which {type(model).__name__} does not give")
        if recipe.input == "flow" and tuple(modes) != ("clips",):
            raise ValueError(f"modes: flow has snippets of segments only (clips), got {', '.join(modes)}")
        self.causal = not streaming_obstacles(model)
        self._model: Any = model
        self._recipe = recipe
        self._modes = tuple(modes)
        self._dtype = dtype
        self._autocast = autocast
        self._batch = batch
        self._device = next(model.parameters()).device
        self._streamer = Streamer(model) if self.causal and "unrolled" in modes else None

    @torch.inference_mode()
    def __call__(self, source: str) -> VideoResult:
        """Scores of the video at ``source``.

        Raises:
            VideoError: it cannot be opened, or not one frame of it decodes.
        """
        if self._recipe.input == "flow":
            return self._score_flow(source)
        collectors: dict[str, Any] = {}
        announced: int | None = None
        times: list[float] = []
        fault: str | None = None
        block: list[Tensor] = []
        size = self._recipe.frames * self._recipe.period
        wanted: set[int] = set()
        kept: dict[int, Tensor] = {}

        if "sliding" in self._modes:
            collectors["sliding"] = _Sliding(self)
        if "unrolled" in self._modes:
            collectors["unrolled"] = _WholeVideo(self) if self._streamer is None else _Unrolled(self, self._streamer)

        with open_video(source) as reader:
            announced = reader.frame_count
            if "clips" in self._modes and announced is not None:
                wanted = set(self._clip_indices(announced).flatten().tolist())
            try:
                for frame in reader:
                    times.append(frame.time_seconds)
                    if not collectors and frame.index not in wanted:
                        continue
                    if frame.index in wanted:
                        kept[frame.index] = evaluation_crops(frame.image, self._recipe)
                    if collectors:
                        block.append(evaluation_picture(frame.image, self._recipe))
                    if len(block) == size:
                        for collector in collectors.values():
                            collector.add(block)
                        block = []
            except BrokenVideoError as error:
                fault = f"broke at frame {error.frame_index}: {error.reason}"
        if block:
            for collector in collectors.values():
                collector.add(block)
        scores = {mode: collector.result() for mode, collector in collectors.items()}
        if "clips" in self._modes:
            indices = self._clip_indices(len(times))
            if len(times) != announced:
                kept = self._read_again(source, indices)
            scores["clips"] = self._score_clips(indices, kept)
        return VideoResult({mode: scores[mode].float().cpu().numpy() for mode in self._modes}, np.asarray(times), fault)

    def _clip_indices(self, frame_count: int) -> Tensor:
        recipe = self._recipe
        if recipe.sampling == "segments":
            windows, length = recipe.eval_windows
            length = min(length, frame_count) or frame_count
            rows = segment_positions(length, recipe.frames, snippet=recipe.snippet, positions=recipe.eval_clips)
            starts = regular_clips(frame_count, length, windows)[:, 0]
            return (starts[:, None, None] + rows).flatten(0, 1)
        return regular_clips(frame_count, recipe.frames, recipe.eval_clips, stride=recipe.period)

    def _score_flow(self, source: str) -> VideoResult:
        fields = open_flow(source)
        indices = self._clip_indices(len(fields))
        wanted = indices.unique()
        pictures = flow_pictures(fields, wanted, self._recipe.flow_length).numpy()
        kept = {
            int(start): evaluation_crops(picture, self._recipe) for start, picture in zip(wanted, pictures, strict=True)
        }
        scores = self._score_clips(indices, kept)
        return VideoResult({"clips": scores.float().cpu().numpy()}, np.arange(len(fields), dtype=np.float64), None)

    def _read_again(self, source: str, indices: Tensor) -> dict[int, Tensor]:
        """The pictures of the clips, when the container was wrong about how many frames there are."""
        wanted = sorted(set(indices.flatten().tolist()))
        images = read_clip(source, lambda announced: wanted).images
        return {index: evaluation_crops(image, self._recipe) for index, image in zip(wanted, images, strict=True)}

    def _score_clips(self, indices: Tensor, pictures: dict[int, Tensor]) -> Tensor:
        """[K, clips], or [K, windows]."""
        parts = []
        for some in indices.split(self._batch):
            clips = torch.stack([torch.stack([pictures[index] for index in clip], 1) for clip in some.tolist()])
            with self._precision():
                scores = self._model(self._prepare(clips.flatten(0, 1)))  # every crop of every clip
            parts.append(scores.unflatten(0, clips.shape[:2]).mean(1))
        windows, length = self._recipe.eval_windows
        scores = torch.cat(parts)
        return (scores.unflatten(0, (windows, -1)).mean(1) if length else scores).T

    def _prepare(self, frames: Tensor) -> Tensor:
        """uint8 [N, T, crop, crop, 3] on the CPU to the network's input on its device."""
        return network_input(frames.to(self._device), self._dtype)

    def _interleave(self, block: Sequence[Tensor]) -> Tensor:
        """Pictures as input [period, 3, t, H, W]: row p has every period-th picture from p on.

        The last picture is repeated until the rows are full.
        """
        period = self._recipe.period
        pictures = [*block, *[block[-1]] * (-len(block) % period)]
        return self._prepare(torch.stack(pictures).unflatten(0, (-1, period)).transpose(0, 1))

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast)


def _in_order(scores: Tensor) -> Tensor:
    """Scores [period, K, t] of interleaved videos in the order of time, [K, t * period]."""
    return scores.permute(1, 2, 0).flatten(1)


class _Sliding:
    """Windows of ``frames * period`` neighbouring frames, one after the other; the last one is moved back."""

    def __init__(self, scorer: VideoScorer) -> None:
        self._scorer = scorer
        self._size = scorer._recipe.frames * scorer._recipe.period
        self._last: list[Tensor] = []
        self._parts: list[Tensor] = []

    def add(self, block: list[Tensor]) -> None:
        new = len(block)
        window = block
        if new < self._size:  # the end of the video: reach back, or repeat the last frame of a short video
            window = [*self._last, *block][-self._size :]
            window = [*window, *[window[-1]] * (self._size - len(window))]
            new_from = self._size - new if self._last else 0
        else:
            new_from = 0
        self._last = block
        model = self._scorer._model
        frames = self._scorer._interleave(window)
        with self._scorer._precision():
            scores = model.frame_scores(frames) if hasattr(model, "frame_scores") else model(frames).unsqueeze(2)
        if scores.shape[2] == frames.shape[2]:
            self._parts.append(_in_order(scores)[:, new_from : new_from + new])
        else:
            self._parts.append(scores.mean((0, 2)).unsqueeze(1))

    def result(self) -> Tensor:
        return torch.cat(self._parts, dim=1)


class _Unrolled:
    """A causal network with the state of all frames so far."""

    def __init__(self, scorer: VideoScorer, streamer: Streamer) -> None:
        self._scorer = scorer
        self._streamer = streamer
        self._state: State | None = None
        self._parts: list[Tensor] = []

    def add(self, block: list[Tensor]) -> None:
        frames = self._scorer._interleave(block)
        with self._scorer._precision():
            scores, self._state = self._streamer(frames, self._state)
        self._parts.append(_in_order(scores)[:, : len(block)])

    def result(self) -> Tensor:
        return torch.cat(self._parts, dim=1)


class _WholeVideo:
    """A network that is not causal, over the whole video in one piece."""

    def __init__(self, scorer: VideoScorer) -> None:
        self._scorer = scorer
        self._pictures: list[Tensor] = []

    def add(self, block: list[Tensor]) -> None:
        self._pictures += block

    def result(self) -> Tensor:
        frames = self._scorer._interleave(self._pictures)
        with self._scorer._precision():
            scores = self._scorer._model.frame_scores(frames)
        in_order = _in_order(scores)
        return in_order[:, : len(self._pictures)] if scores.shape[2] == frames.shape[2] else in_order
