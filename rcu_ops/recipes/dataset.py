"""Training clips, every one a function of (seed, epoch, place in the list) and of the file.

Batches are cut from one endless sequence of shuffled passes over the list, so a step's clips follow from its number:
on one process or many, with any number of workers, from the start or resumed. A file that cannot be used is replaced by
the next one of the list that can, which depends on the files alone.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rcu_ops.recipes.config import Recipe
from rcu_ops.recipes.lists import LabelledVideo
from rcu_ops.video import BrokenVideoError, VideoError, VideoReader, open_video
from rcu_ops.video.flow import flow_pictures, mirror_pictures, open_flow, scale_pictures
from rcu_ops.video.sample import jittered_clip, regular_clips, segment_positions
from rcu_ops.video.transform import (
    center_crop,
    corner_crops,
    flip,
    multi_scale_crop,
    normalize,
    random_crop,
    resize_short_side,
)

__all__ = [
    "Clip",
    "ClipBatch",
    "ClipDataset",
    "ClipSampler",
    "collate",
    "load_clips",
    "mix_seed",
    "network_input",
    "read_clip",
]


def mix_seed(*parts: int) -> int:
    """A seed in [0, 2^63) for each tuple of integers, the same everywhere."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Excerpt(NamedTuple):
    """Frames of a video.

    Attributes:
        images: uint8 RGB [T, H, W, 3]. times: seconds [T].
        fault: why the file breaks after the frames that could be used, or None.
    """

    images: np.ndarray
    times: np.ndarray
    fault: str | None


def read_clip(source: str, choose: Callable[[int], Sequence[int]], span: tuple[float, float] | None = None) -> Excerpt:
    """The frames that ``choose(frame_count)`` asks for, decoded from the start of the video.

    Containers announce a number of frames that can be wrong. When the video ends (or breaks) before a chosen frame,
    ``choose`` is asked again with the number of frames that there are.

    With a ``span`` (start and end in seconds, the end not included) ``choose`` chooses among the frames within it, by
    the average frame rate, and numbers them from 0.

    Raises:
        VideoError: the video cannot be opened, not one frame of it (or of the span) decodes, or its picture size
            changes on the way.
    """
    with open_video(source) as reader:
        announced = reader.frame_count
        if announced is not None:
            indices = _chosen(reader, announced, choose, span)
            found, fault = _collect(reader, set(indices))
            if len(found) == len(set(indices)):
                return _excerpt(reader.name, found, indices, None)
        else:
            _, fault = _collect(reader, set())
        count = reader.frames_read
    with open_video(source) as reader:
        indices = _chosen(reader, count, choose, span)
        found, _ = _collect(reader, set(indices))
        return _excerpt(reader.name, found, indices, fault)


def _chosen(
    reader: VideoReader, count: int, choose: Callable[[int], Sequence[int]], span: tuple[float, float] | None
) -> Sequence[int]:
    """What ``choose`` takes of ``count`` frames, or of those within the span, as indices from the video's start."""
    if span is None:
        return choose(count)
    if not reader.frame_rate:
        raise VideoError(f"{reader.name}: it has no frame rate, by which seconds are found")
    # A start or end on a frame's time is that frame, whichever way the product is rounded.
    first, stop = (math.ceil(seconds * reader.frame_rate - 1e-6) for seconds in span)
    stop = min(stop, count)
    if first >= stop:
        raise VideoError(f"{reader.name}: no frame from {span[0]:g} to {span[1]:g} seconds")
    return [first + index for index in choose(stop - first)]


Found = dict[int, tuple[np.ndarray, float]]


def _collect(reader: VideoReader, wanted: set[int]) -> tuple[Found, str | None]:
    """The wanted frames, and why the video breaks if it does before the last of them; reads on to the end for none."""
    found: Found = {}
    try:
        for frame in reader:
            if frame.index in wanted:
                found[frame.index] = (frame.image, frame.time_seconds)
                if len(found) == len(wanted):
                    break
    except BrokenVideoError as error:
        return found, f"broke at frame {error.frame_index}: {error.reason}"
    return found, None


def _excerpt(name: str, found: Found, indices: Sequence[int], fault: str | None) -> Excerpt:
    if not found.keys() >= set(indices):
        raise VideoError(f"{name}: two passes over it give different numbers of frames")
    images = [found[index][0] for index in indices]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise VideoError(f"{name}: its picture size changes")
    return Excerpt(np.stack(images), np.asarray([found[index][1] for index in indices]), fault)


class ClipKey(NamedTuple):
    """Which clip: the pass over the list, the place in the list, and the step, which may decide on the clip's shape."""

    epoch: int
    place: int
    step: int = 0


class Clip(NamedTuple):
    """One training example.

    Attributes:
        frames: uint8 [T, crop, crop, 3], or 2 flow_length channels of flow; None when no video of the list can be used.
        target: int64 [] (one label), or float32 of the classes present: [K, T] in each frame, [K] in an action's.
        problems: (place in the list, reason) of the files that were found unusable, or broken in part, on the way.
    """

    frames: torch.Tensor | None
    target: torch.Tensor
    problems: list[tuple[int, str]]


class ClipBatch(NamedTuple):
    """Examples stacked: frames uint8 [N, T, crop, crop, 3] or None, targets [N], [N, K, T] or [N, K], all problems."""

    frames: torch.Tensor | None
    target: torch.Tensor
    problems: list[tuple[int, str]]


class ClipDataset(Dataset[Clip]):
    """Augmented training clips of a list of videos, looked up by :class:`ClipKey`.

    Temporal jitter, scale, crop place and mirroring are drawn, in this order, from a generator that is seeded with
    (seed, epoch, place in the list).
    """

    def __init__(self, videos: Sequence[LabelledVideo], recipe: Recipe, seed: int) -> None:
        self._videos = videos
        self._recipe = recipe
        self._seed = seed
        self._unusable: set[int] = set()  # of this worker; only saves trying them again

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, key: ClipKey) -> Clip:
        problems: list[tuple[int, str]] = []
        for further in range(len(self._videos)):
            index = (key.place + further) % len(self._videos)
            if index in self._unusable:
                continue
            try:
                frames, target, fault = self._load(index, key)
            except VideoError as error:
                self._unusable.add(index)
                problems.append((index, str(error)))
                continue
            if fault is not None:
                problems.append((index, fault))
            return Clip(frames, target, problems)
        return Clip(None, torch.zeros(()), problems)

    def _load(self, index: int, key: ClipKey) -> tuple[torch.Tensor, torch.Tensor, str | None]:
        recipe, video = self._recipe, self._videos[index]
        grid = recipe.grid(key.step)
        generator = torch.Generator()

        def choose(frame_count: int) -> list[int]:
            generator.manual_seed(mix_seed(self._seed, key.epoch, key.place))
            if recipe.sampling == "segments":
                drawn = generator if recipe.jitter else None
                clip = segment_positions(frame_count, recipe.frames, snippet=recipe.snippet, generator=drawn)[0]
            elif recipe.jitter:
                clip = jittered_clip(frame_count, grid.frames, stride=grid.period, generator=generator)
            else:
                clip = regular_clips(frame_count, grid.frames, 1, stride=grid.period)[0]
            return [int(frame) for frame in clip]

        if recipe.input == "flow":
            fields = open_flow(video.path)
            frames = flow_pictures(fields, torch.tensor(choose(len(fields))), recipe.flow_length)
            times, fault = np.arange(len(frames)), None
        else:
            images, times, fault = read_clip(str(video.path), choose, video.span)
            frames = torch.from_numpy(images)
        low, high = grid.scales
        scale = low + int(torch.randint(high - low + 1, (), generator=generator))
        frames = resize_short_side(frames, scale)
        cut = multi_scale_crop if recipe.multi_scale else random_crop
        frames = cut(frames, grid.crop, generator=generator)
        mirrored = mirror_pictures if recipe.input == "flow" else None
        frames = flip(frames, probability=recipe.flip, generator=generator, mirrored=mirrored).contiguous()
        if recipe.dense:
            target = torch.from_numpy(video.present(times, recipe.classes)).float()
        elif recipe.loss == "bce":
            target = torch.from_numpy(video.present(times, recipe.classes)).any(1).float()
            target[video.label] = 1.0  # also where frames are so far apart that none of the chosen ones is within it
        else:
            target = torch.tensor(video.label, dtype=torch.int64)
        return frames, target, fault


def collate(clips: Sequence[Clip]) -> ClipBatch:
    """Stack examples; without frames if any example has none."""
    problems = [problem for clip in clips for problem in clip.problems]
    frames = [clip.frames for clip in clips if clip.frames is not None]
    if len(frames) < len(clips):
        return ClipBatch(None, torch.zeros(()), problems)
    return ClipBatch(torch.stack(frames), torch.stack([clip.target for clip in clips]), problems)


class ClipSampler(Sampler[list[ClipKey]]):
    """The keys of one process's parts of batches, from step ``start`` to the last one.

    Args:
        videos: number of videos.
        batch: clips in a step, over all processes and parts.
        seed: of the shuffling; every pass over the list has its own order.
        start, stop: steps, the last one not included.
        rank, processes: this process among how many.
        parts: parts in which a process takes its share of a step (gradient accumulation).
        multigrid: the recipe whose batches replace ``batch``, multiples of it; None: all have ``batch`` clips.

    Raises:
        ValueError: the batch cannot be divided equally.
    """

    def __init__(
        self,
        videos: int,
        batch: int,
        seed: int,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
        multigrid: Recipe | None = None,
    ) -> None:
        if batch % (processes * parts):
            raise ValueError(
                f"batch: expected a multiple of processes x accumulated parts = {processes} x {parts}, got {batch}"
            )
        self._videos = videos
        self._batch = batch
        self._seed = seed
        self._steps = range(start, stop)
        self._rank = rank
        self._parts = parts
        self.part_size = batch // (processes * parts)
        self._multigrid = multigrid
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __iter__(self) -> Iterator[list[ClipKey]]:
        for step in self._steps:
            before, size = step * self._batch, self.part_size
            if self._multigrid is not None:
                before = self._multigrid.clips_before(step)
                size *= self._multigrid.grid(step).batch // self._batch
            for part in range(self._parts):
                first = before + (self._rank * self._parts + part) * size
                yield [self._key(position, step) for position in range(first, first + size)]

    def _key(self, position: int, step: int) -> ClipKey:
        epoch, place = divmod(position, self._videos)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self._seed, epoch))
            self._order = epoch, torch.randperm(self._videos, generator=generator).tolist()
        return ClipKey(epoch, self._order[1][place], 0 if self._multigrid is None else step)


def load_clips(
    dataset: ClipDataset, sampler: ClipSampler, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[ClipBatch]:
    """The sampler's batches in its order, decoded by ``workers`` processes ahead of time, or here when it is 0.

    The processes are new ones, not forks: a process with threads (a decoder's, OpenMP's) cannot be forked safely.
    They leave SIGINT and SIGTERM, which terminals and batch systems send to every process of a group, to this one.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # the loader draws from it; torch's own is dropout's
    )
    if workers:
        resource_tracker.ensure_running()  # its first start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)  # starts the workers, which inherit what is blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def evaluation_picture(image: np.ndarray, recipe: Recipe) -> torch.Tensor:
    """One decoded picture [H, W, 3] scaled to ``eval_scale`` and centre-cropped: uint8 [crop, crop, 3]."""
    frames = resize_short_side(torch.from_numpy(image)[None], recipe.eval_scale)
    return center_crop(frames, recipe.crop)[0]


def evaluation_crops(image: np.ndarray, recipe: Recipe) -> torch.Tensor:
    """The crops of one picture [H, W, 3] that a clip's scores are averaged over: uint8 [eval_crops, crop, crop, 3]."""
    if recipe.eval_crops == 1:
        return evaluation_picture(image, recipe)[None]
    frames = resize_short_side(torch.from_numpy(image)[None], recipe.eval_scale)
    crops = corner_crops(frames, recipe.crop, mirror=recipe.eval_crops == 10 and recipe.input == "rgb")[:, 0]
    if recipe.eval_crops == 10 and recipe.input == "flow":
        crops = torch.cat([crops, mirror_pictures(crops)])
    return crops


def network_input(frames: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [N, T, H, W, C] normalised to [N, C, T, H, W], a view of the same memory order (channels last).

    Three channels are RGB, others stacks of flow.
    """
    if frames.shape[-1] != 3:
        return scale_pictures(frames, dtype).permute(0, 4, 1, 2, 3)
    count = frames.shape[:2]
    return normalize(frames.flatten(0, 1), dtype=dtype).unflatten(1, count).transpose(0, 1)
