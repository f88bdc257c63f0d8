"""What the two frozen networks of FASTER say of the clips of a list of videos, on disk.

A cache is a folder: ``settings.json`` says what it depends on (digest of both networks' weights, of the list, and how
clips are sampled), and every ``shard-NNNNN.safetensors`` holds a few videos. A shard is written whole, under a
temporary name, with the digest of those settings in its metadata: after a kill the same command goes on with the first
shard that is missing, and a shard of other weights or another sampling is refused, not read.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcu_ops.cli_errors import UserError
from rcu_ops.models.faster import Faster
from rcu_ops.progress import Progress
from rcu_ops.recipes.dataset import mix_seed, network_input, read_clip
from rcu_ops.recipes.lists import LabelledVideo, VideoList
from rcu_ops.report import replacing
from rcu_ops.run_folder import SETTINGS, claim_folder
from rcu_ops.tensor_files import not_safetensors
from rcu_ops.video import VideoError
from rcu_ops.video.sample import random_clips, regular_clips
from rcu_ops.video.transform import center_crop, flip, random_crop, resize_short_side

__all__ = ["ClipCache", "ClipSampling", "Example", "remove_cache", "write_cache"]

_FORMAT = 1
_DIGEST = "rcu_ops_cache"
_PROBLEMS = "rcu_ops_problems"


@dataclass(frozen=True)
class ClipSampling:
    """Which clips of a video, and what of their pictures.

    Attributes:
        clips: per video. views: 0: uniformly spaced clips and the centre, once (test). V >= 1: V times random clips in
            the order of the video, at a random place of a randomly scaled picture, mirrored or not (training).
        size: side of the networks' input. scales: range of the short side before the crop; the lower one in tests.
        seed: of everything random.
    """

    clips: int
    views: int = 0
    size: int = 224
    scales: tuple[int, int] = (256, 320)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clips < 1 or self.size < 1 or self.views < 0:
            raise ValueError(
                f"clips, size, views: expected at least 1, 1, 0, got {self.clips}, {self.size}, {self.views}"
            )
        if not self.size <= self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales: expected two numbers, rising, from the size {self.size} on, got {self.scales}")

    def read(self, video: LabelledVideo, index: int, view: int, clip_length: int) -> Tensor:
        """The clips, uint8 [K,L,size,size,3]. VideoError if the video cannot be used."""
        generator = torch.Generator()

        def choose(count: int) -> list[int]:
            generator.manual_seed(mix_seed(self.seed, index, view))
            if self.views:
                frames = random_clips(count, clip_length, self.clips, generator=generator)
            else:
                frames = regular_clips(count, clip_length, self.clips)
            return [int(frame) for frame in frames.flatten()]

        frames = torch.from_numpy(read_clip(str(video.path), choose).images)
        if self.views:
            low, high = self.scales
            frames = resize_short_side(frames, low + int(torch.randint(high - low + 1, (), generator=generator)))
            frames = flip(random_crop(frames, self.size, generator=generator), generator=generator)
        else:
            frames = center_crop(resize_short_side(frames, self.scales[0]), self.size)
        return frames.unflatten(0, (self.clips, clip_length))


class Example(NamedTuple):
    """One view of one video, float32.

    Attributes:
        video: its place in the list. label: its class.
        expensive: what the expensive network says of clips 0, 1 + x, 2 (1 + x), ... for the cache's pattern 1:x.
            cheap: what the cheap one says of every clip. Features [k,C,l,h,w].
        expensive_scores, cheap_scores: [k,classes], the networks' own.
    """

    video: int
    label: int
    expensive: Tensor
    cheap: Tensor
    expensive_scores: Tensor
    cheap_scores: Tensor

    def inputs(self, pattern: int, takes: str, stored_pattern: int, clips: list[int] | None = None) -> Tensor:
        """What an aggregator takes of these clips in the pattern 1:``pattern`` (-1: all cheap): [K,...].

        ``clips`` are the numbers of those to use, the first by default all; the pattern runs over them.
        """
        expensive, cheap = (
            (self.expensive, self.cheap) if takes == "features" else (self.expensive_scores, self.cheap_scores)
        )
        numbers = list(range(len(cheap))) if clips is None else clips
        parts = []
        for place, number in enumerate(numbers):
            if pattern >= 0 and place % (1 + pattern) == 0:
                parts.append(expensive[number // (1 + stored_pattern)])
            else:
                parts.append(cheap[number])
        return torch.stack(parts)


def weights_digest(model: Faster) -> str:
    """SHA-256 of the parameters and buffers of both networks, by name; the aggregator has no part in it."""
    digest = hashlib.sha256()
    for part in ("expensive", "cheap"):
        for name, tensor in sorted(getattr(model, part).state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{part}.{name} {values.dtype} {list(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_cache(
    model: Faster, videos: VideoList, sampling: ClipSampling, out: Path, *, shard: int = 16, clip_batch: int = 8
) -> dict[str, str]:
    """Write what is missing of the cache in ``out``.

    Args:
        model: in evaluation mode; its pattern says which clips the expensive network sees.
        videos: labelled per video. sampling: of clips.
        out: the folder; one of another model, list or sampling raises UserError.
        shard: videos in a file. clip_batch: clips that a network sees at once.

    Returns:
        ``{name: reason}`` of the videos that could not be used.
    """
    if model.pattern[0] != 1:
        raise UserError("--model-option pattern: the cache of all patterns is pattern=0, got all clips cheap")
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "list": videos.digest,
        "pattern": model.pattern[1],
        "clip length": model.clip_length,
        "shard": shard,
        "count": len(videos.videos),
        "classes": model.aggregator.num_classes,
        "channels": model.aggregator.channels,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sampling).items()},
    }
    claim_folder(out, identity, "a cache")
    digest = _digest(identity)
    problems: dict[str, str] = {}
    numbers = list(enumerate(videos.videos))
    with Progress(len(numbers), label="cache", unit="videos") as bar:
        for number, first in enumerate(range(0, len(numbers), shard)):
            path = _shard(out, number)
            taken = numbers[first : first + shard]
            found = _read_problems(path, digest) if path.is_file() else None
            if found is None:
                tensors: dict[str, Tensor] = {}
                found = {}
                for index, video in taken:
                    try:
                        tensors.update(_run(model, sampling, video, index, clip_batch))
                    except VideoError as error:
                        found[video.name] = str(error)
                        bar.write(f"rcu-ops: warning: {error}", stream=sys.stderr)
                    bar.update()
                _write_shard(path, tensors, digest, found)
            else:
                bar.update(len(taken))
            problems.update(found)
    return problems


@torch.inference_mode()
def _run(
    model: Faster, sampling: ClipSampling, video: LabelledVideo, index: int, clip_batch: int
) -> Iterator[tuple[str, Tensor]]:
    parameter = next(model.parameters())
    assert video.label is not None
    results: list[tuple[str, Tensor]] = [(f"{index}/label", torch.tensor(video.label))]
    for view in range(max(1, sampling.views)):
        clips = sampling.read(video, index, view, model.clip_length)
        for name, network, taken in (
            ("expensive", model.expensive, [k for k in range(len(clips)) if model.is_expensive(k)]),
            ("cheap", model.cheap, list(range(len(clips)))),
        ):
            features, scores = [], []
            for batch in clips[taken].split(clip_batch):
                found = network.features(network_input(batch.to(parameter.device), parameter.dtype))  # type: ignore[operator]
                features.append(found)
                scores.append(network.head(found).mean(2))  # type: ignore[operator]
            # Half precision on disk: features follow a ReLU and batch normalisation, far from its range's ends.
            for suffix, parts in (("", features), ("_scores", scores)):
                kept = torch.cat(parts).to("cpu", torch.float16).contiguous()
                if not torch.isfinite(kept).all():
                    raise VideoError(f"{video.name}: the {name} network's output is not finite in half precision")
                results.append((f"{index}/{view}/{name}{suffix}", kept))
    return iter(results)


def _write_shard(path: Path, tensors: dict[str, Tensor], digest: str, problems: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_DIGEST: digest, _PROBLEMS: json.dumps(problems)})


def remove_cache(folder: Path) -> None:
    """Remove the cache in ``folder``, if there is one, and nothing else."""
    if not (folder / SETTINGS).is_file():
        return
    try:
        for path in (*folder.glob("shard-*.safetensors"), folder / SETTINGS):
            path.unlink()
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be replaced: {error.strerror or error}") from error


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read_problems(path: Path, digest: str) -> dict[str, str]:
    """The unusable videos of a shard; UserError if it belongs to another cache or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} {not_safetensors(path, error)}; remove it, and it is made again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if metadata.get(_DIGEST) != digest:
        raise UserError(f"{path}: was made with other weights or another sampling than {SETTINGS} says; remove it")
    return dict(json.loads(metadata.get(_PROBLEMS, "{}")))


class ClipCache:
    """A complete cache, read view by view.

    Args:
        folder: what :func:`write_cache` wrote.

    Attributes:
        settings: what it depends on. pattern: x of its pattern 1:x. clips: per video. classes, channels: of the
            networks' scores and features. views: per video, at least 1.

    Raises:
        UserError: not a cache, an incomplete one, or shards of another.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            shards = -(-self.settings["count"] // self.settings["shard"])
            self.pattern = int(self.settings["pattern"])
            self.clips = int(self.settings["clips"])
            self.classes = int(self.settings["classes"])
            self.channels = int(self.settings["channels"])
            self.views = max(1, int(self.settings["views"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: this is not a cache of clips ({error})") from error
        digest = _digest(self.settings)
        self.digest = digest
        self._videos: list[tuple[Path, int]] = []
        for number in range(shards):
            path = _shard(folder, number)
            if not path.is_file():
                raise UserError(f"{folder}: the cache is not complete; run `rcu-ops faster cache` again")
            _read_problems(path, digest)
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                found = sorted({int(key.partition("/")[0]) for key in file.keys()})  # noqa: SIM118 - not a dict
            self._videos += [(path, index) for index in found]
        if not self._videos:
            raise UserError(f"{folder}: none of its videos could be used")

    def __len__(self) -> int:
        """How many videos."""
        return len(self._videos)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """The example (place, view)."""
        from safetensors import safe_open

        place, view = key
        path, index = self._videos[place]
        with safe_open(path, framework="pt") as file:
            parts = [
                file.get_tensor(f"{index}/{view}/{name}").float()
                for name in ("expensive", "cheap", "expensive_scores", "cheap_scores")
            ]
            label = int(file.get_tensor(f"{index}/label"))
        return Example(index, label, *parts)

    def holds(self, pattern: int) -> bool:
        """Whether clips in the pattern 1:``pattern`` (-1: all cheap) are all in it."""
        return pattern < 0 or (1 + pattern) % (1 + self.pattern) == 0
