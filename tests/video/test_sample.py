from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.video.sample import clip_span, jittered_clip, regular_clips, sliding_clips

frame_counts, lengths, strides = st.integers(1, 400), st.integers(1, 40), st.integers(1, 8)


def assert_clips(clips, frame_count, length, stride):
    """Every clip advances by the stride until the last frame is reached, and stays there."""
    assert clips.dtype == torch.int64
    assert clips.shape[-1] == length
    assert clips.min() >= 0
    assert clips.max() <= frame_count - 1
    for clip in clips.reshape(-1, length).tolist():
        assert clip == [min(clip[0] + stride * n, frame_count - 1) for n in range(length)]
        if clip_span(length, stride) <= frame_count:
            assert clip[-1] - clip[0] == clip_span(length, stride) - 1


@given(frame_counts, lengths, st.integers(1, 30), strides)
def test_regular_clips(frame_count, length, count, stride):
    clips = regular_clips(frame_count, length, count, stride=stride)
    assert clips.shape == (count, length)
    assert_clips(clips, frame_count, length, stride)
    starts = clips[:, 0]
    gaps = starts.diff()
    room = max(0, frame_count - clip_span(length, stride))
    if count == 1:
        assert starts.item() == room // 2
    else:
        assert starts[0] == 0
        assert starts[-1] == room
        assert gaps.min() >= 0
        assert gaps.max() - gaps.min() <= 1


@given(frame_counts, lengths, st.integers(1, 50), strides)
def test_sliding_clips(frame_count, length, step, stride):
    clips = sliding_clips(frame_count, length, step, stride=stride)
    assert_clips(clips, frame_count, length, stride)
    starts = clips[:, 0]
    assert starts[0] == 0
    assert clips[-1, -1] == frame_count - 1
    assert all(gap == step for gap in starts.diff()[:-1].tolist())
    assert all(0 < gap <= step for gap in starts.diff().tolist())
    if step <= clip_span(length, stride):
        covered = {frame for start in starts.tolist() for frame in range(start, start + clip_span(length, stride))}
        assert covered >= set(range(frame_count))


@given(frame_counts, lengths, strides, st.integers(0, 2**31))
def test_jittered_clip(frame_count, length, stride, seed):
    clip = jittered_clip(frame_count, length, stride=stride, generator=torch.Generator().manual_seed(seed))
    assert clip.shape == (length,)
    assert_clips(clip, frame_count, length, stride)
    again = jittered_clip(frame_count, length, stride=stride, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(clip, again)


def test_jitter_reaches_every_start():
    generator = torch.Generator().manual_seed(0)
    starts = {int(jittered_clip(20, 4, stride=5, generator=generator)[0]) for _ in range(200)}
    assert starts == {0, 1, 2, 3, 4}


def test_ten_clips_by_hand():
    assert regular_clips(26, 8).tolist() == [list(range(2 * n, 2 * n + 8)) for n in range(10)]
    assert regular_clips(5, 3, 1, stride=2).tolist() == [[0, 2, 4]]
    assert regular_clips(2, 4, 2).tolist() == [[0, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: regular_clips(0, 8), "frame_count"),
        (lambda: regular_clips(8, 0), "clip_length"),
        (lambda: regular_clips(8, 8, 0), "clip_count"),
        (lambda: regular_clips(8, 8, stride=0), "stride"),
        (lambda: sliding_clips(8, 8, 0), "step"),
        (lambda: jittered_clip(0, 8), "frame_count"),
    ],
)
def test_arguments_below_one(call, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        call()
