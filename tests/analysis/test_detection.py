from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.analysis import average_precision, frame_map


def _brute_force(scores, positive):
    """Mean over the positives of the precision of "at least this score", in exact arithmetic."""
    precisions = []
    for own, is_positive in zip(scores, positive, strict=True):
        if is_positive:
            accepted = [truth for score, truth in zip(scores, positive, strict=True) if score >= own]
            precisions.append(Fraction(sum(accepted), len(accepted)))
    return float(sum(precisions) / len(precisions)) if precisions else math.nan


def test_by_hand():
    # Ranks of the positives: 1, 3 and 4; precision there: 1, 2/3, 3/4.
    assert average_precision([0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 1, 0]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert average_precision([1.0, 2.0], [0, 1]) == 1.0
    assert average_precision([2.0, 1.0], [0, 1]) == 0.5
    assert math.isnan(average_precision([1.0, 2.0], [0, 0]))


def test_ties_do_not_depend_on_the_order():
    # A score that is always the same knows nothing: its average precision is the share of positives.
    for positive in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert average_precision(np.zeros(4), positive) == 0.25
    assert average_precision([0.0, -0.0], [0, 1]) == 0.5


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_against_brute_force_with_many_ties(pairs):
    scores, positive = zip(*pairs, strict=True)
    expected = _brute_force(scores, positive)
    for dtype in (np.float32, np.float64, np.int64):
        got = average_precision(np.array(scores, dtype=dtype), np.array(positive))
        assert got == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_order_and_monotone_maps_do_not_matter(pairs, random):
    before = average_precision(*map(np.array, zip(*pairs, strict=True)))
    random.shuffle(pairs)
    scores, positive = map(np.array, zip(*pairs, strict=True))
    assert average_precision(scores, positive) == pytest.approx(before, rel=1e-12, nan_ok=True)
    assert average_precision(
        np.argsort(np.argsort(np.unique(scores)))[np.searchsorted(np.unique(scores), scores)], positive
    ) == (pytest.approx(before, rel=1e-12, nan_ok=True))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]))
def test_map_against_brute_force(seed, every):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, 3)
    scores = [rng.integers(0, 6, (4, n)).astype(np.float32) for n in lengths]
    labels = [rng.random((4, n)) < 0.3 for n in lengths]
    labels[0][0, 0] = True
    result = frame_map(scores, labels, every=every)
    for k in range(4):
        pooled = [(s[k, t], y[k, t]) for s, y in zip(scores, labels, strict=True) for t in range(0, s.shape[1], every)]
        expected = _brute_force(*zip(*pooled, strict=True))
        assert result.average_precision[k] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert (k in result.excluded) == math.isnan(expected)
    known = [value for value in result.average_precision if not math.isnan(value)]
    assert result.mean == pytest.approx(sum(known) / len(known))
    assert result.num_frames == sum(len(range(0, n, every)) for n in lengths)


def test_every_eighth_frame_counts_from_each_videos_start():
    scores = [np.zeros((1, 9)), np.zeros((1, 9))]
    labels = [np.zeros((1, 9), dtype=bool) for _ in scores]
    labels[0][0, [0, 7]] = True
    labels[1][0, 8] = True
    result = frame_map(scores, labels, every=8)
    assert (result.num_frames, int(result.positives[0])) == (4, 2)
    assert result.mean == 0.5


def test_frame_numbers_decide_which_frames_are_looked_at():
    # A live stream that dropped frames 1 to 7: output 1 is frame 8.
    scores = [np.array([[0.0, 1.0, 2.0]])]
    labels = [np.array([[0, 1, 0]])]
    result = frame_map(scores, labels, every=8, frames=[np.array([0, 8, 9])])
    assert (result.num_frames, result.mean) == (2, 1.0)


def test_classes_without_positives_are_left_out_and_listed():
    labels = np.array([[1, 0], [0, 0], [0, 1]])
    result = frame_map([np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])], [labels])
    assert result.excluded == (1,)
    assert np.isnan(result.average_precision[1])
    assert result.mean == pytest.approx((1.0 + 0.5) / 2)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([np.zeros((2, 3))], {}, ValueError, "expected at least one positive frame"),
        ([np.ones((2, 4))], {}, ValueError, r"labels\[0\]: expected shape \[2, 3\], got \[2, 4\]"),
        ([np.full((2, 3), 2)], {}, ValueError, r"labels\[0\]: expected only 0 and 1"),
        ([np.full((2, 3), "a")], {}, TypeError, r"labels\[0\]: expected bool or numbers"),
        ([], {}, ValueError, "labels: expected one per video, 1, got 0"),
        ([np.ones((2, 3))], {"every": 0}, ValueError, "every: expected at least 1"),
        ([np.ones((2, 3))], {"frames": []}, ValueError, "frames: expected one per video"),
        ([np.ones((2, 3))], {"frames": [np.arange(2)]}, ValueError, r"frames\[0\]: expected 3 integers"),
        ([np.ones((2, 3))], {"frames": [np.arange(3.0)]}, ValueError, r"frames\[0\]: expected 3 integers"),
    ],
)
def test_unusable_input(labels, options, error, message):
    with pytest.raises(error, match=message):
        frame_map([np.zeros((2, 3))], labels, **options)


def test_unusable_vectors():
    with pytest.raises(ValueError, match="two vectors of one length"):
        average_precision([1.0], [1, 0])
    with pytest.raises(ValueError, match="NaN"):
        average_precision([np.nan], [1])
