from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rcu_ops.recipes import dataset as module
from rcu_ops.recipes.config import get_recipe
from rcu_ops.recipes.dataset import (
    ClipDataset,
    ClipKey,
    ClipSampler,
    collate,
    load_clips,
    mix_seed,
    network_input,
    read_clip,
)
from rcu_ops.recipes.lists import LabelledVideo, read_list
from rcu_ops.video import BrokenVideoError, VideoError, open_video
from rcu_ops.video.transform import normalize
from tests.recipes.motion import FRAMES, RATE, VIDEOS, write_video
from tests.video.clips import recognise, write_clip

RECIPE = dataclasses.replace(
    get_recipe("kinetics_resnet18"), classes=2, frames=4, crop=24, scales=(24, 36), eval_scale=24, batch=4
)
NAMES = ("up", "down")


def _videos(motion, dense=False):
    return read_list(motion / ("dense.csv" if dense else "list.csv"), 2, NAMES, dense=dense).videos


def test_a_clip_is_a_function_of_seed_and_key(motion):
    key = ClipKey(3, 5)
    first = ClipDataset(_videos(motion), RECIPE, seed=1)
    again = ClipDataset(_videos(motion), RECIPE, seed=1)
    _ = again[ClipKey(0, 0)], again[ClipKey(3, 4)]  # what came before does not matter
    assert torch.equal(first[key].frames, again[key].frames)
    assert first[key].target == 1
    assert first[key].frames.shape == (4, 24, 24, 3)
    assert first[key].frames.dtype == torch.uint8
    others = [ClipDataset(_videos(motion), RECIPE, seed=2)[key], first[ClipKey(4, 5)], first[ClipKey(3, 7)]]
    assert not any(torch.equal(first[key].frames, other.frames) for other in others)


def test_workers_give_the_same_batches(motion):
    def batches(workers):
        sampler = ClipSampler(VIDEOS, 4, 7, start=2, stop=5)
        return list(load_clips(ClipDataset(_videos(motion), RECIPE, 7), sampler, workers=workers))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.frames, b.frames)
        assert torch.equal(a.target, b.target)


def test_augmentation_covers_what_it_should(motion):
    data = ClipDataset(_videos(motion), RECIPE, seed=0)
    with open_video(motion / "up_0.mp4") as reader:
        source = np.stack([frame.image for frame in reader])
    # Stripes are the same along a row: what identifies a frame of this video is its mean over columns.
    scale = dataclasses.replace(RECIPE, crop=40, scales=(40, 40), eval_scale=40, flip=0.0)
    plain = ClipDataset(_videos(motion), scale, seed=0)
    starts = set()
    for epoch in range(60):
        clip = plain[ClipKey(epoch, 0)].frames.numpy()
        rows = clip.astype(float).mean(2)
        matches = [
            start
            for start in range(FRAMES - 3)
            if np.abs(rows - source[start : start + 4].astype(float).mean(2)).max() < 1
        ]
        starts.update(matches)
    assert starts == set(range(FRAMES - 3))
    assert len({data[ClipKey(epoch, 0)].frames.numpy().tobytes() for epoch in range(8)}) == 8


def test_frames_are_a_period_apart(tmp_path):
    video = LabelledVideo("v", write_clip(tmp_path / "v.mp4", 18), 0)
    data = ClipDataset([video], dataclasses.replace(RECIPE, period=3), seed=0)
    starts = set()
    for epoch in range(40):
        shown = [recognise(frame.numpy()) for frame in data[ClipKey(epoch, 0)].frames]
        assert shown == list(range(shown[0], shown[0] + 12, 3))
        starts.add(shown[0])
    assert starts == set(range(18 - 9))


def test_flip_and_jitter_can_be_fixed(motion):
    still = dataclasses.replace(RECIPE, crop=40, scales=(40, 40), eval_scale=40, jitter=False)
    data = {flip: ClipDataset(_videos(motion), dataclasses.replace(still, flip=flip), seed=0) for flip in (0.0, 1.0)}
    plain, mirrored = (data[flip][ClipKey(0, 1)].frames for flip in (0.0, 1.0))
    with open_video(motion / "down_1.mp4") as reader:
        source = np.stack([frame.image for frame in reader])
    middle = source[(FRAMES - 4) // 2 :][:4]
    offsets = [x for x in range(5) if np.array_equal(plain.numpy(), middle[:, :, x : x + 40])]
    assert offsets
    assert torch.equal(mirrored, plain.flip(2))


def test_sampler_shares_are_the_whole(motion):
    def keys(**options):
        return [list(part) for part in ClipSampler(5, 4, 9, start=0, stop=10, **options)]

    whole = keys()
    ranks = [keys(rank=rank, processes=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    parts = keys(parts=2)
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole
    both = [keys(rank=rank, processes=2, parts=2) for rank in range(2)]
    assert [both[0][2 * s] + both[0][2 * s + 1] + both[1][2 * s] + both[1][2 * s + 1] for s in range(10)] == whole
    assert [list(part) for part in ClipSampler(5, 4, 9, start=6, stop=10)] == whole[6:]
    assert len(ClipSampler(5, 4, 9, start=6, stop=10, parts=2)) == 8


def test_every_pass_visits_every_video_once_in_its_own_order():
    keys = [key for part in ClipSampler(7, 3, 0, start=0, stop=14) for key in part]
    passes = [[key.place for key in keys if key.epoch == epoch] for epoch in range(6)]
    assert [key.epoch for key in keys] == sorted(key.epoch for key in keys)
    assert all(sorted(places) == list(range(7)) for places in passes)
    assert len({tuple(places) for places in passes}) == 6


def test_sampler_refuses_unequal_shares():
    with pytest.raises(ValueError, match="batch: expected a multiple of processes x accumulated parts = 2 x 3, got 8"):
        ClipSampler(5, 8, 0, start=0, stop=1, processes=2, parts=3)


def test_dense_targets_follow_the_times_of_the_frames(motion):
    recipe = dataclasses.replace(RECIPE, loss="bce", frames=14, jitter=False)
    clip = ClipDataset(_videos(motion, dense=True), recipe, seed=0)[ClipKey(0, 2)]
    expected = torch.zeros(2, 14)
    expected[0] = 1
    expected[1, 4:8] = 1  # from 4/25 s up to, not including, 8/25 s
    assert torch.equal(clip.target, expected)
    strided = dataclasses.replace(recipe, frames=5, period=3)  # frames 0, 3, 6, 9, 12: span 13, start (14 - 13) // 2
    assert torch.equal(
        ClipDataset(_videos(motion, dense=True), strided, seed=0)[ClipKey(0, 2)].target, expected[:, 0:13:3]
    )


def test_unusable_videos_are_replaced_and_reported_once(motion, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    good = _videos(motion)
    bad = [LabelledVideo(name, tmp_path / name, 0) for name in ("text.mp4", "gone.mp4")]
    videos = [good[0], *bad, good[1]]
    data = ClipDataset(videos, RECIPE, seed=0)
    clip = data[ClipKey(0, 1)]
    assert [place for place, _ in clip.problems] == [1, 2]
    assert "not a video file" in clip.problems[0][1]
    assert "no such file" in clip.problems[1][1]
    assert clip.target == good[1].label
    again = data[ClipKey(0, 1)]
    assert again.problems == []
    assert torch.equal(again.frames, clip.frames)
    fresh = ClipDataset(videos, RECIPE, seed=0)[ClipKey(0, 1)]
    assert torch.equal(fresh.frames, clip.frames)


def test_a_list_of_unusable_videos_gives_no_frames(tmp_path):
    videos = [LabelledVideo(name, tmp_path / name, 0) for name in ("a.mp4", "b.mp4")]
    data = ClipDataset(videos, RECIPE, seed=0)
    batch = collate([data[ClipKey(0, 0)], data[ClipKey(0, 1)]])
    assert batch.frames is None
    assert [place for place, _ in batch.problems] == [0, 1]


def _cut(source, target, share):
    """Cut the end of a file off; returns the number of frames that are left."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    with open_video(target) as reader, pytest.raises(BrokenVideoError) as caught:
        list(reader)
    return caught.value.frame_index


def test_a_video_that_breaks_half_way_gives_its_good_part(motion, tmp_path):
    write_video(tmp_path / "whole.mp4", 1, 3, count=40)
    usable = _cut(tmp_path / "whole.mp4", tmp_path / "cut.mp4", 0.8)
    assert 4 <= usable < 40
    asked = []

    def choose(count):
        asked.append(count)
        return list(range(count - 4, count))

    excerpt = read_clip(str(tmp_path / "cut.mp4"), choose)
    assert asked == [40, usable]
    assert excerpt.images.shape[0] == 4
    np.testing.assert_array_equal(np.round(excerpt.times * RATE), np.arange(usable - 4, usable))
    assert excerpt.fault.startswith(f"broke at frame {usable}: ")
    clip = ClipDataset([LabelledVideo("cut.mp4", tmp_path / "cut.mp4", 0)], RECIPE, 0)[ClipKey(0, 0)]
    assert clip.frames.shape == (4, 24, 24, 3)


@pytest.mark.parametrize("announced", [None, 5, FRAMES, 100])
def test_frame_counts_of_containers_are_not_trusted(motion, monkeypatch, announced):
    def open_misleading(source):
        reader = open_video(source)
        reader.frame_count = announced
        return reader

    monkeypatch.setattr(module, "open_video", open_misleading)
    counts = []

    def choose(count):
        counts.append(count)
        return [0, count - 1, count - 1]

    excerpt = read_clip(str(motion / "up_0.mp4"), choose)
    with open_video(motion / "up_0.mp4") as reader:
        source = [frame.image for frame in reader]
    last = 4 if announced == 5 else FRAMES - 1
    assert counts[-1] == last + 1
    assert excerpt.fault is None
    np.testing.assert_array_equal(excerpt.images, np.stack([source[0], source[last], source[last]]))


def test_pictures_that_change_their_size_and_times_without_a_rate(motion, monkeypatch):
    class Changing:
        """The video's frames, those from the third on a row shorter."""

        def __init__(self, reader):
            self._reader = reader

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._reader.close()

        def __iter__(self):
            for frame in self._reader:
                image = frame.image[1:] if frame.index > 1 else frame.image
                yield SimpleNamespace(index=frame.index, image=image, time_seconds=frame.time_seconds)

    source = str(motion / "up_0.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_video", lambda path: Changing(open_video(path)))
        assert len(read_clip(source, lambda count: [0, 1]).images) == 2
        with pytest.raises(VideoError, match=r"up_0\.mp4: its picture size changes"):
            read_clip(source, lambda count: [1, 2])

    def open_timeless(path):
        reader = open_video(path)
        reader.frame_rate = None
        return reader

    monkeypatch.setattr(module, "open_video", open_timeless)
    with pytest.raises(VideoError, match="it has no frame rate, by which seconds are found"):
        read_clip(source, lambda count: [0], span=(0.0, 1.0))


def test_seeds_are_distinct_and_fixed():
    seeds = {mix_seed(a, b) for a in range(40) for b in range(40)} | {mix_seed(a) for a in range(40)}
    assert len(seeds) == 40 * 41
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 23) != mix_seed(12, 3)
    # Another seed for the same numbers would break the resumption of every run there is.
    assert mix_seed(0, 0) == 5046677104938694277
    assert mix_seed(1, 2, 3) == 1517167407554927345


def test_network_input_is_normalised_and_channels_last():
    frames = torch.randint(256, (2, 3, 6, 5, 3), dtype=torch.uint8)
    got = network_input(frames)
    assert got.shape == (2, 3, 3, 6, 5)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    for index in range(2):
        assert torch.equal(got[index], normalize(frames[index]))
