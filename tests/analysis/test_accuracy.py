from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcu_ops.analysis import accuracy_report, score_clips, score_unrolled, topk_correct


def test_topk_by_hand():
    scores = [[0.1, 0.9, 0.5], [0.4, 0.3, 0.2], [0.0, 0.0, 1.0]]
    assert topk_correct(scores, [1, 2, 0], 1).tolist() == [True, False, False]
    assert topk_correct(scores, [2, 1, 0], 2).tolist() == [True, True, True]


def test_topk_ties_go_to_the_lowest_class():
    tied = np.zeros((4, 4))
    assert topk_correct(tied, [0, 1, 2, 3], 2).tolist() == [True, True, False, False]


@given(st.integers(1, 6), st.integers(1, 7), st.data())
def test_exactly_k_classes_are_among_the_k_best(num_classes, k, data):
    row = data.draw(st.lists(st.integers(-2, 2), min_size=num_classes, max_size=num_classes))
    hits = [bool(topk_correct([row], [label], k)[0]) for label in range(num_classes)]
    assert sum(hits) == min(k, num_classes)
    ranked = sorted(range(num_classes), key=lambda label: (-row[label], label))
    assert [label for label in ranked if hits[label]] == ranked[:k]


def test_report_by_hand():
    # Video 0 (label 0): two clips, one right; the mean [0.55, 0.45] is right.
    # Video 1 (label 1): three clips, two right by a little, one wrong by a lot; the mean is wrong.
    scores = [
        np.array([[0.9, 0.2], [0.1, 0.8]]),
        np.array([[0.4, 0.4, 1.0], [0.6, 0.6, 0.0]]),
    ]
    report = accuracy_report(scores, [0, 1])
    assert report.clip_top1 == pytest.approx(3 / 5)
    assert report.video_top1 == pytest.approx(1 / 2)
    assert (report.clip_top5, report.video_top5) == (1.0, 1.0)
    assert (report.num_clips, report.num_videos) == (5, 2)


class _BrightestChannel(torch.nn.Module):
    """Scores are the channels' mean brightness, per frame or over the clip."""

    def frame_scores(self, clip: torch.Tensor) -> torch.Tensor:
        return clip.mean(dim=(-1, -2))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.frame_scores(clip).mean(dim=-1)


def test_scoring_a_model():
    video = torch.randn(3, 11, 4, 5, requires_grad=True)
    model = _BrightestChannel()
    clips = score_clips(model, video, 4, num_clips=3)
    assert clips.shape == (3, 3)
    assert not clips.requires_grad
    for column, start in zip(clips.T, (0, 3, 7), strict=True):
        assert torch.equal(column, model(video[None, :, start : start + 4])[0])
    assert torch.equal(score_unrolled(model, video), video.mean(dim=(-1, -2)))


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 20))
def test_constant_scores_make_clip_and_video_accuracy_equal(num_videos, outputs):
    rng = np.random.default_rng(num_videos * 100 + outputs)
    columns = rng.normal(size=(num_videos, 7))
    labels = rng.integers(0, 7, num_videos)
    report = accuracy_report([np.repeat(c[:, None], outputs, axis=1) for c in columns], labels)
    assert report.clip_top1 == report.video_top1 == (columns.argmax(axis=1) == labels).mean()
    assert report.clip_top5 == report.video_top5


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        ([], [], ValueError, "scores: expected at least one video"),
        ([np.zeros((2, 0))], [0], ValueError, r"scores\[0\]: expected shape \[K, T\]"),
        ([np.zeros(3)], [0], ValueError, r"scores\[0\]: expected shape \[K, T\].*got \[3\]"),
        ([np.zeros((2, 3)), np.zeros((3, 3))], [0, 0], ValueError, r"scores\[1\]: expected 2 classes.*got 3"),
        ([np.full((2, 3), np.nan)], [0], ValueError, r"scores\[0\]: expected finite"),
        ([np.zeros((2, 3), dtype=complex)], [0], TypeError, r"scores\[0\]: expected real numbers"),
        ([np.zeros((2, 3))], [0, 1], ValueError, r"labels: expected one per video, shape \[1\], got \[2\]"),
        ([np.zeros((2, 3))], [0.0], TypeError, "labels: expected integers"),
        ([np.zeros((2, 3))], [2], ValueError, r"labels\[0\]: expected 0 to 1, got 2"),
        ([np.zeros((2, 3))], [-1], ValueError, r"labels\[0\]: expected 0 to 1, got -1"),
    ],
)
def test_unusable_input_is_refused(scores, labels, error, message):
    with pytest.raises(error, match=message):
        accuracy_report(scores, labels)


def test_tensors_of_any_dtype_are_taken():
    scores = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32):
        assert accuracy_report([scores.to(dtype)], torch.tensor([1])).clip_top1 == 1.0


def test_a_video_without_frames_is_refused():
    with pytest.raises(ValueError, match=r"video: expected shape \[3, T, H, W\]"):
        score_unrolled(_BrightestChannel(), torch.zeros(3, 0, 4, 4))
    with pytest.raises(ValueError, match=r"video: expected shape"):
        score_clips(_BrightestChannel(), torch.zeros(1, 3, 4, 4, 4), 2)
