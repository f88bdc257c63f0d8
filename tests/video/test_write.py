from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("av")
import av

from rcu_ops.video import VideoError, open_video
from rcu_ops.video.synthetic import sample_frames, write_sample_clip
from rcu_ops.video.write import VideoWriter
from tests.video.clips import picture


def test_pictures_and_times_survive(tmp_path):
    times = [0.0, 0.01, 0.5, 0.51, 3.0]
    with VideoWriter(tmp_path / "a.mp4", 48, 64) as writer:
        for index, moment in enumerate(times):
            writer.write(picture(index), moment)
        assert not (tmp_path / "a.mp4").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    with open_video(tmp_path / "a.mp4") as reader:
        frames = list(reader)
    assert np.allclose([frame.time_seconds for frame in frames], times, atol=1e-4)
    for frame in frames:
        assert np.abs(frame.image.astype(int) - picture(frame.index)).max() <= 3


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colours_survive(tmp_path, colour):
    """Encoder and decoder must mean the same colour matrix and range."""
    plain = np.full((32, 32, 3), colour, dtype=np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
        writer.write(plain, 0.0)
    with open_video(tmp_path / "a.mp4") as reader:
        assert np.abs(next(reader).image.astype(int) - plain).max() <= 4


def test_odd_sizes_are_padded_with_the_edge(tmp_path):
    """Stripes would be blurred if pictures were scaled to even sizes instead."""
    stripes = np.where((np.arange(64) // 8 + np.arange(48)[:, None] // 8) % 2, 200, 50).astype(np.uint8)
    stripes = np.repeat(stripes[..., None], 3, 2)
    with VideoWriter(tmp_path / "a.mp4", 47, 63) as writer:
        writer.write(stripes[:47, :63], 0.0)
    with open_video(tmp_path / "a.mp4") as reader:
        image = next(reader).image
    assert image.shape == (48, 64, 3)
    assert np.abs(image.astype(int) - stripes).mean() <= 3


def test_times_that_do_not_increase_are_pushed_on(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 48, 64) as writer:
        for index in range(3):
            writer.write(picture(index), 0.0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="mid-way"), VideoWriter(path, 48, 64) as writer:
        writer.write(picture(0), 0.0)
        raise RuntimeError("mid-way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_discard_without_a_frame(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 48, 64)
    writer.discard()
    writer.discard()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_another_size_are_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 48, 64) as writer:
        writer.write(picture(0), 0.0)
        for wrong in (picture(0, 64, 48), picture(0).astype(np.float32), picture(0)[..., 0]):
            with pytest.raises(VideoError, match=r"image: expected uint8 \[48, 64, 3\], got"):
                writer.write(wrong, 1.0)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "a.mp4", 48, 64)
    with pytest.raises(ValueError, match="NaN"):
        VideoWriter(tmp_path / "a.mp4", 48, 64, frame_rate=float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_sample_clip(tmp_path):
    assert all(np.array_equal(a, b) for a, b in zip(sample_frames(4, 36, 48), sample_frames(4, 36, 48), strict=True))
    write_sample_clip(tmp_path / "a.mp4", frame_count=10, frame_rate=10, height=96, width=128)
    source = list(sample_frames(10, 96, 128))
    with open_video(tmp_path / "a.mp4") as reader:
        frames = list(reader)
    assert len(frames) == 10
    assert frames[-1].time_seconds == pytest.approx(0.9)
    for frame in frames:
        near = np.abs(frame.image.astype(int) - source[frame.index]).mean()
        far = np.abs(frame.image.astype(int) - source[(frame.index + 5) % 10]).mean()
        assert near < far / 2
    # Its motion is periodic: the last step is no larger than the others.
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(source, source[1:] + source[:1], strict=True)]
    assert max(steps) < 2.5 * min(steps)
