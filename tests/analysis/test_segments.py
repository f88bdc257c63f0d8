from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.analysis import accuracy_report, segment_accuracy, segment_bounds
from rcu_ops.analysis.segments import segment_curve


def test_bounds_by_hand():
    assert [segment_bounds(20, s) for s in range(10)] == [(2 * s, 2 * s + 2) for s in range(10)]
    assert [segment_bounds(7, s, 3) for s in range(3)] == [(0, 2), (2, 4), (4, 7)]
    # Fewer outputs than segments: every segment takes one, in order.
    assert [segment_bounds(3, s) for s in range(10)] == [(0, 1)] * 4 + [(1, 2)] * 3 + [(2, 3)] * 3


@given(st.integers(1, 500), st.integers(1, 20))
def test_bounds_partition_the_video(num_frames, segments):
    bounds = [segment_bounds(num_frames, s, segments) for s in range(segments)]
    assert all(0 <= start < stop <= num_frames for start, stop in bounds)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_frames
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1
    if num_frames >= segments:
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
    else:
        assert set(lengths) == {1}
        assert sorted({start for start, _ in bounds}) == list(range(num_frames))


def test_accuracy_by_hand():
    # Ten outputs: the right class wins in the last five segments only.
    forgetful = np.stack([np.repeat([0.0, 1.0], 5), np.repeat([1.0, 0.0], 5)])
    right = np.stack([np.ones(4), np.zeros(4)])
    accuracy = segment_accuracy([forgetful, right], [0, 0])
    assert accuracy.tolist() == [0.5] * 5 + [1.0] * 5
    curve = segment_curve("model", [forgetful, right], [0, 0], mode="sliding")
    assert curve.relative.tolist() == [0.0] * 5 + [0.5] * 5
    assert (curve.num_videos, curve.short_videos) == (2, 1)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_against_brute_force(segments, seed):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(-3, 4, (3, rng.integers(1, 40))).astype(float) for _ in range(4)]
    labels = rng.integers(0, 3, 4)
    expected = np.zeros(segments)
    for video, label in zip(scores, labels, strict=True):
        length = video.shape[1]
        for s in range(segments):
            # Output t is in segment s when floor(s T / S) <= t < floor((s + 1) T / S); if none is, take the one there.
            inside = [t for t in range(length) if s * length // segments <= t < (s + 1) * length // segments]
            totals = video[:, inside or [s * length // segments]].sum(axis=1).tolist()
            expected[s] += totals.index(max(totals)) == label
    assert segment_accuracy(scores, labels, segments=segments).tolist() == (expected / 4).tolist()


def test_one_segment_is_the_video():
    rng = np.random.default_rng(3)
    scores, labels = [rng.normal(size=(4, n)) for n in (1, 5, 33)], [0, 1, 2]
    assert segment_accuracy(scores, labels, segments=1)[0] == accuracy_report(scores, labels).video_top1


def test_small_scores_are_averaged_in_double_precision():
    # In float32, 2**24 + 1 is 2**24: the ones of class 1 would be lost.
    video = np.array([[2.0**24, 0.0, 0.0], [2.0**24, 1.0, 1.0]], dtype=np.float32)
    assert segment_accuracy([video], [1], segments=1).tolist() == [1.0]


def test_unusable_arguments():
    with pytest.raises(ValueError, match="mode: expected one of unrolled, sliding, got 'both'"):
        segment_curve("model", [np.zeros((2, 2))], [0], mode="both")
    with pytest.raises(ValueError, match="segments: expected at least 1, got 0"):
        segment_accuracy([np.zeros((2, 2))], [0], segments=0)
    with pytest.raises(ValueError, match="segment: expected 0 to 9, got 10"):
        segment_bounds(4, 10)
