from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.analysis import accuracy_report, early_accuracy, observed_frames


def test_observed_frames_by_hand():
    assert [observed_frames(10, step, 10) for step in range(1, 11)] == list(range(1, 11))
    assert [observed_frames(3, step, 10) for step in range(1, 11)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    # 0.07 * 100 is 7.000000000000001 in floating point: integers keep it at 7.
    assert observed_frames(100, 7, 100) == 7


@given(st.integers(1, 10**9), st.integers(1, 200), st.data())
def test_observed_frames_is_the_exact_ceiling(num_frames, steps, data):
    step = data.draw(st.integers(1, steps))
    exact = Fraction(num_frames) * Fraction(step, steps)
    observed = observed_frames(num_frames, step, steps)
    assert observed - 1 < exact <= observed
    assert 1 <= observed <= num_frames


def test_accuracy_by_hand():
    # The right class (1) is behind after frame 1, level after frame 3 (a tie goes to class 0), ahead after frame 4.
    late = np.array([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    # The right class (0) is ahead from the only frame on.
    early = np.array([[1.0], [0.0]])
    assert early_accuracy([late, early], [1, 0], steps=4).tolist() == [0.5, 0.5, 0.5, 1.0]


def _brute_force(scores, labels, steps):
    accuracies = []
    for step in range(1, steps + 1):
        right = 0
        for video, label in zip(scores, labels, strict=True):
            totals = [sum(map(Fraction, row[: -(-video.shape[1] * step // steps)])) for row in video.tolist()]
            right += totals.index(max(totals)) == label
        accuracies.append(right / len(scores))
    return accuracies


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_against_brute_force(num_videos, num_classes, steps, seed):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(-3, 4, (num_classes, rng.integers(1, 15))).astype(np.float32) for _ in range(num_videos)]
    labels = rng.integers(0, num_classes, num_videos)
    assert early_accuracy(scores, labels, steps=steps).tolist() == _brute_force(scores, labels, steps)


@given(st.integers(0, 2**32 - 1))
def test_the_whole_video_gives_the_video_accuracy(seed):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(size=(5, rng.integers(1, 30))) for _ in range(6)]
    labels = rng.integers(0, 5, 6)
    assert early_accuracy(scores, labels)[-1] == accuracy_report(scores, labels).video_top1


def test_the_future_does_not_matter():
    rng = np.random.default_rng(0)
    scores, labels = [rng.normal(size=(4, 20)) for _ in range(8)], rng.integers(0, 4, 8)
    changed = [np.concatenate([video[:, :10], 100 * rng.normal(size=(4, 10))], axis=1) for video in scores]
    assert early_accuracy(changed, labels)[:5].tolist() == early_accuracy(scores, labels)[:5].tolist()


def test_small_scores_are_accumulated_in_double_precision():
    # In float32, 2**24 + 1 is 2**24: the ones of class 1 would be lost.
    video = np.array([[2.0**24, 1.5], [2.0**24, 2.0]], dtype=np.float32)
    assert early_accuracy([video], [1], steps=2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_unusable_steps(steps, error):
    with pytest.raises(error, match="steps: expected"):
        early_accuracy([np.zeros((2, 2))], [0], steps=steps)


def test_a_step_outside_is_refused():
    with pytest.raises(ValueError, match="num_frames: expected at least 1, got 0"):
        observed_frames(0, 1, 10)
    with pytest.raises(ValueError, match="step: expected 1 to 10, got 11"):
        observed_frames(5, 11, 10)
