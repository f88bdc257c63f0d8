from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from rcu_ops.video import Frame, VideoError
from rcu_ops.video.realtime import RealtimeFrames

IMAGE = np.zeros((2, 2, 3), dtype=np.uint8)


def clip(count, interval):
    return [Frame(index, index * interval, IMAGE) for index in range(count)]


def test_a_fast_consumer_gets_every_frame_not_before_its_time():
    start = time.perf_counter()
    taken = []
    with RealtimeFrames(clip(10, 0.03), paced=True) as frames:
        for frame in frames:
            taken.append(frame.index)
            assert time.perf_counter() - start >= frame.time_seconds
            assert frames.due <= time.perf_counter()
    assert taken == list(range(10))
    assert frames.dropped == 0


def test_a_slow_consumer_drops_frames_and_does_not_lag():
    taken = []
    with RealtimeFrames(clip(40, 0.01), paced=True) as frames:
        start = time.perf_counter()
        for frame in frames:
            taken.append(frame.index)
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    assert frames.dropped > 0
    assert len(taken) + frames.dropped == 40
    assert taken == sorted(set(taken))
    assert taken[-1] == 39
    # All forty at the consumer's pace would take two seconds.
    assert seconds < 1.5


def test_the_clock_starts_with_the_first_frame():
    """Frames cut from the middle of a video come at once, not after the time before them."""
    frames = [Frame(index, 2.0 + index * 0.03, IMAGE) for index in range(3)]
    start = time.perf_counter()
    with RealtimeFrames(frames, paced=True) as paced:
        for frame in paced:
            assert abs(paced.due - start - 0.03 * frame.index) < 0.5
    assert frame.index == 2
    assert time.perf_counter() - start >= 0.06


def test_a_live_source_is_taken_as_it_comes():
    offered = threading.Event()

    def source():
        yield Frame(0, 0.0, IMAGE)
        yield Frame(1, 100.0, IMAGE)
        yield Frame(2, 200.0, IMAGE)
        offered.set()

    with RealtimeFrames(source(), paced=False) as frames:
        taken = [next(frames).index]
        assert offered.wait(5)
        taken += [frame.index for frame in frames]
    assert taken[-1] == 2
    assert len(taken) + frames.dropped == 3


def test_an_error_comes_after_the_last_frame():
    def source():
        yield Frame(0, 0.0, IMAGE)
        raise VideoError("broke")

    with RealtimeFrames(source(), paced=True) as frames:
        assert next(frames).index == 0
        with pytest.raises(VideoError, match="broke"):
            next(frames)
        with pytest.raises(StopIteration):
            next(frames)


def test_closing_does_not_wait_for_frames_that_are_not_due():
    start = time.perf_counter()
    with RealtimeFrames(clip(2, 1000.0), paced=True) as frames:
        next(frames)
    assert time.perf_counter() - start < 10
    assert not frames._thread.is_alive()


def test_closing_without_a_read():
    with RealtimeFrames(clip(2, 1.0), paced=True) as frames:
        pass
    assert not frames._thread.is_alive()
