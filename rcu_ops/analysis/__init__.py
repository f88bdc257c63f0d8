"""Evaluation of per-frame scores and of recurrent weights: numbers (CSV) and pictures (PNG).

======================  ====================================================================================
:mod:`.accuracy`        clip and video accuracy, top-1 and top-5; ten regularly spaced clips, or unrolled
:mod:`.early`           accuracy of accumulated scores against the observed fraction of the video
:mod:`.segments`        accuracy of ten equal segments relative to the first, sliding or unrolled
:mod:`.detection`       frame-wise mean average precision of dense multi-label scores, mAP@1 and mAP@8
:mod:`.alignment`       cycle errors and the shift between two videos, from the maps between their frames
:mod:`.relations`       where the gates of a Relational LSTM look, over the frames
:mod:`.spectrum`        entries, diagonal and eigenvalues of every layer's hidden-to-hidden matrix
:mod:`.confusion`       confusion matrices ordered by category, their difference, change per class
:mod:`.fusion`          fusion of streams, of features or scores
:mod:`.comparison`      means over the splits of a data set, accuracy against cost
:mod:`.top5`            the best classes of single videos beside their pictures
:mod:`.scores_io`       reading scores and labels from files
======================  ====================================================================================

Nothing here knows a kernel, a layer or a network: the functions take arrays (or anything ``numpy.asarray`` or
``torch.Tensor`` makes into one), and models are passed in and called.  Scores are ``[K, T]`` per video: K classes, T
outputs in time, where an output belongs to a frame (unrolled, causal networks) or to a clip (sliding window).
"""

from __future__ import annotations

from rcu_ops.analysis.accuracy import (
    AccuracyReport,
    accuracy_report,
    score_clips,
    score_unrolled,
    topk_correct,
)
from rcu_ops.analysis.alignment import Alignment, align_maps
from rcu_ops.analysis.detection import DetectionResult, average_precision, frame_map
from rcu_ops.analysis.early import early_accuracy, observed_frames
from rcu_ops.analysis.segments import segment_accuracy, segment_bounds
from rcu_ops.analysis.spectrum import LayerSpectrum, layer_spectrum, recurrent_spectra

__all__ = [
    "AccuracyReport",
    "Alignment",
    "DetectionResult",
    "LayerSpectrum",
    "accuracy_report",
    "align_maps",
    "average_precision",
    "early_accuracy",
    "frame_map",
    "layer_spectrum",
    "observed_frames",
    "recurrent_spectra",
    "score_clips",
    "score_unrolled",
    "segment_accuracy",
    "segment_bounds",
    "topk_correct",
]
