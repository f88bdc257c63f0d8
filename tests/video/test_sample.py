from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.video.sample import (
    clip_count,
    clip_span,
    jittered_clip,
    random_clips,
    regular_clips,
    segment_positions,
    sliding_clips,
    spread_over,
    strided_clips,
)

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


@given(frame_counts, lengths, st.integers(1, 12), strides, st.integers(0, 100))
def test_random_clips(frame_count, length, count, stride, seed):
    def draw():
        generator = torch.Generator().manual_seed(seed)
        return random_clips(frame_count, length, count, stride=stride, generator=generator)

    clips = draw()
    assert clips.shape == (count, length)
    assert_clips(clips, frame_count, length, stride)
    assert clips[:, 0].tolist() == sorted(clips[:, 0].tolist())
    assert torch.equal(clips, draw())


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


@given(frame_counts, st.integers(1, 40))
def test_clip_count_is_the_number_of_whole_clips_of_two_steps(frame_count, step):
    clips = strided_clips(frame_count, 2 * step, step)
    assert clip_count(frame_count, step) == len(clips)
    assert_clips(clips, frame_count, 2 * step, 1)
    assert clips[:, 0].tolist() == [step * i for i in range(len(clips))]


@given(frame_counts, lengths, st.integers(1, 30), strides)
def test_strided_clips(frame_count, length, step, stride):
    clips = strided_clips(frame_count, length, step, stride=stride)
    assert_clips(clips, frame_count, length, stride)
    last, span = clips[-1, 0].item(), clip_span(length, stride)
    assert last == 0 or last + span <= frame_count
    assert last + step + span > frame_count  # no further clip fits


def test_clip_count_of_the_paper():
    assert [clip_count(frames) for frames in (16, 24, 31, 32, 250)] == [1, 2, 2, 3, 30]
    assert clip_count(7) == 1


@given(st.integers(1, 10**6), st.integers(1, 300))
def test_spread_over(count, length):
    sigma = spread_over(count, length).tolist()
    assert len(sigma) == length
    assert sigma[0] == 0
    assert sigma == sorted(sigma)
    if length > 1:
        assert sigma[-1] == count - 1
        gaps = [b - a for a, b in pairwise(sigma)]
        assert max(gaps) - min(gaps) <= 1
        if count >= length:
            assert min(gaps) >= 1  # no clip twice while there are enough
        exact = [Fraction(t * (count - 1), length - 1) for t in range(length)]
        assert all(0 <= value - taken < 1 for value, taken in zip(exact, sigma, strict=True))


def test_spread_over_of_one_step_and_of_large_counts():
    assert spread_over(8, 1).tolist() == [0]
    assert spread_over(2**40 + 1, 3).tolist() == [0, 2**39, 2**40]


@given(frame_counts, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_segment_positions(frame_count, segments, snippet, positions, seed):
    fixed = segment_positions(frame_count, segments, snippet=snippet, positions=positions)
    generator = torch.Generator().manual_seed(seed)
    drawn = segment_positions(frame_count, segments, snippet=snippet, positions=positions, generator=generator)
    room = max(1, frame_count - snippet + 1)
    for starts in (fixed, drawn):
        assert starts.shape == (positions, segments)
        assert starts.min() >= 0
        assert starts.max() < room
        for row in starts.tolist():
            assert row == sorted(row)
            if room >= segments:
                assert all(s * room // segments <= x < (s + 1) * room // segments for s, x in enumerate(row))
    assert (fixed.diff(dim=0) >= 0).all()


def test_segment_positions_of_the_paper():
    assert segment_positions(80, 8, positions=4).tolist() == [[10 * s + p for s in range(8)] for p in (1, 3, 6, 8)]
    assert segment_positions(89, 8, snippet=10)[0].tolist() == [10 * s + 5 for s in range(8)]
    again = [segment_positions(800, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


@pytest.mark.parametrize("function", [clip_count, spread_over, strided_clips, segment_positions])
def test_sampling_refuses_nothing(function):
    arguments = (0, 4, 4) if function is strided_clips else (0, 4)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        function(*arguments)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        function(*([4] * (len(arguments) - 1)), 0)


def test_segments_refuse_empty_snippets():
    with pytest.raises(ValueError, match="snippet: expected at least 1, got 0"):
        segment_positions(4, 4, snippet=0)
