from __future__ import annotations

import functools
import http.server
import itertools
import os
import socket
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("av")
import av

from rcu_ops.video import BrokenVideoError, VideoError, VideoReader, open_video, read_frames
from rcu_ops.video.containers import declared_size, has_movie_index
from rcu_ops.video.decode import _Converter, _ToRGB, _webcam, upright
from tests.video.clips import damage, picture, recognise, set_display_matrix, write_audio, write_clip


def read_all(source, **options):
    with open_video(source, **options) as reader:
        return list(reader), reader


def read_until_broken(source):
    frames = []
    with open_video(source) as reader, pytest.raises(BrokenVideoError) as caught:
        frames.extend(reader)
    return frames, caught.value


def order(frames):
    return [recognise(frame.image) for frame in frames]


def test_frames_come_in_order_with_their_times(tmp_path):
    frames, reader = read_all(write_clip(tmp_path / "a.mp4", 12))
    assert order(frames) == list(range(12))
    assert [frame.index for frame in frames] == list(range(12))
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(12))
    assert (reader.height, reader.width, reader.frame_count, reader.frames_read) == (48, 64, 12, 12)
    assert (reader.frame_rate, reader.codec, reader.live, reader.rotation) == (25.0, "h264", False, 0)
    assert frames[0].image.dtype == np.uint8
    assert frames[0].image.shape == (48, 64, 3)


def test_variable_frame_rate(tmp_path):
    times = [0, 10, 50, 51, 400, 1000, 1010]
    for name in ("a.mp4", "a.mkv"):
        frames, reader = read_all(write_clip(tmp_path / name, times=times))
        assert order(frames) == list(range(7))
        assert np.allclose([1000 * frame.time_seconds for frame in frames], times, atol=0.1)
        assert reader.repaired_times == 0


def test_one_frame(tmp_path):
    frames, _ = read_all(write_clip(tmp_path / "a.mp4", 1))
    assert [(frame.index, frame.time_seconds) for frame in frames] == [(0, 0.0)]


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    frames, _ = read_all(write_clip(tmp_path / "a.png", 1, codec="png", pixel_format="rgb24", container="image2"))
    assert order(frames) == [0]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "height", "width"),
    [
        ("ffv1", "yuv444p", 47, 63),
        ("ffv1", "yuv420p", 47, 63),
        ("ffv1", "gray", 48, 64),
        ("ffv1", "gray10le", 47, 63),
        ("libx264", "yuv420p10le", 48, 64),
        ("libx265", "yuv422p10le", 64, 80),
        ("ffv1", "yuva420p", 1, 1),
    ],
)
def test_pixel_formats_and_odd_sizes(tmp_path, codec, pixel_format, height, width):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_clip(
        tmp_path / "a.mkv", 6, codec=codec, pixel_format=pixel_format, height=height, width=width, options=options
    )
    frames, reader = read_all(path)
    assert (reader.pixel_format, reader.height, reader.width) == (pixel_format, height, width)
    assert order(frames) == list(range(6))
    for frame in frames:
        assert frame.image.shape == (height, width, 3)
        assert np.abs(frame.image.astype(int) - picture(frame.index, height, width)).max() <= 4


# Luma coefficients of red and blue by the number of the matrix in H.264's tables; 2 is "unspecified".
LUMA = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "yuvj420p"])
@pytest.mark.parametrize("matrix", sorted(LUMA))
@pytest.mark.parametrize("color_range", [0, 1, 2])
def test_colours_follow_the_matrix_and_range(pixel_format, matrix, color_range):
    """Against the definition: RGB from luma and colour differences, 8-bit scale."""
    luma, blue, red = 120, 90, 160
    decoded = av.VideoFrame(32, 32, pixel_format)
    for plane, value in zip(decoded.planes, (luma, blue, red), strict=True):
        deep = "10" in pixel_format
        samples = np.full(plane.buffer_size // (2 if deep else 1), value * (4 if deep else 1), "<u2" if deep else "u1")
        plane.update(samples.tobytes())
    decoded.colorspace, decoded.color_range = matrix, color_range
    image = _Converter(_ToRGB(av), decoded, None)()

    if color_range == 2 or pixel_format == "yuvj420p":
        y, b_y, r_y = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        y, b_y, r_y = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    k_red, k_blue = LUMA[matrix]
    r, b = y + 2 * (1 - k_red) * r_y, y + 2 * (1 - k_blue) * b_y
    g = (y - k_red * r - k_blue * b) / (1 - k_red - k_blue)
    assert np.abs(image.astype(int) - np.round(255 * np.array([r, g, b]))).max() <= 2


MATRICES = [
    ((a, 0), (0, d)) if straight else ((0, a), (d, 0)) for straight in (True, False) for a in (1, -1) for d in (1, -1)
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_orientations(tmp_path, matrix):
    """Every pixel must land where the matrix sends it."""
    ramp = np.zeros((32, 48, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(20, 230, 48)[None, :]
    ramp[..., 1] = np.linspace(20, 230, 32)[:, None]
    path = write_clip(tmp_path / "a.mp4", 1, height=32, width=48, images=[ramp], options={"crf": "1"})
    set_display_matrix(path, matrix)
    (frame,), reader = read_all(path)
    (a, b), (c, d) = matrix
    rows, columns = np.mgrid[:32, :48]
    x, y = a * columns + c * rows, b * columns + d * rows
    expected = np.zeros((y.max() - y.min() + 1, x.max() - x.min() + 1, 3), dtype=np.uint8)
    expected[y - y.min(), x - x.min()] = ramp
    assert (reader.height, reader.width) == expected.shape[:2]
    assert np.abs(frame.image.astype(int) - expected).mean() < 4
    assert frame.image.flags.c_contiguous
    # PyAV has its own idea of the angle of a plain turn.
    if (a, b) == (d, -c):
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).rotation % 360 == reader.rotation


def test_upright_composes_to_the_identity():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    for matrix in map(np.array, MATRICES):
        there = upright(image, matrix)
        back = upright(there, np.linalg.inv(matrix).round().astype(int))
        assert np.array_equal(back, image)


def test_packets_out_of_presentation_order(tmp_path):
    """A codec of single pictures, written in another order than it is shown in: time stamps decide."""
    shuffle = [3, 0, 1, 5, 2, 4, 9, 7, 8, 6]
    path = write_clip(
        tmp_path / "a.mkv",
        codec="ffv1",
        pixel_format="yuv444p",
        times=[40 * place for place in shuffle],
        images=[picture(place) for place in shuffle],
    )
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    frames, reader = read_all(path)
    assert order(frames) == list(range(10))
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(10))
    assert reader.repaired_times == 0


def test_b_frames_are_shown_in_order(tmp_path):
    options = {"bf": "3", "b-pyramid": "normal", "x264-params": "b-adapt=0:scenecut=0"}
    path = write_clip(tmp_path / "a.mov", 18, options=options)
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    frames, _ = read_all(path)
    assert order(frames) == list(range(18))
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(18))


def test_avi_follows_the_decoder(tmp_path, monkeypatch):
    """AVI has no presentation times. The demuxer makes some up, not always in the order of the pictures."""
    made_up = [1, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 12]
    decode = VideoReader._decode

    def with_made_up_times(reader):
        for stamp, decoded in zip(made_up, decode(reader), strict=True):
            decoded.pts = stamp
            yield decoded

    monkeypatch.setattr(VideoReader, "_decode", with_made_up_times)
    frames, reader = read_all(write_clip(tmp_path / "a.avi", 12, codec="mpeg4", options={"q": "2"}))
    assert order(frames) == list(range(12))
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(12))
    assert reader.repaired_times == 0


def test_time_stamps_that_are_missing(tmp_path):
    """A raw bitstream has none at all: frames are spaced by the frame rate."""
    frames, reader = read_all(write_clip(tmp_path / "a.h264", 8, container="h264", options={"bf": "0"}))
    assert order(frames) == list(range(8))
    times = [frame.time_seconds for frame in frames]
    assert times[0] == 0.0
    assert np.allclose(np.diff(times), 1 / reader.frame_rate)


def test_time_stamps_that_repeat_are_made_to_increase(tmp_path):
    times = [0, 40, 40, 40, 160, 200]
    path = write_clip(
        tmp_path / "a.mkv", codec="ffv1", pixel_format="yuv444p", times=times, images=[picture(i) for i in range(6)]
    )
    frames, reader = read_all(path)
    assert order(frames) == list(range(6))
    assert (np.diff([frame.time_seconds for frame in frames]) > 0).all()
    assert reader.repaired_times > 0


def test_times_count_from_the_first_frame(tmp_path):
    frames, _ = read_all(write_clip(tmp_path / "a.mkv", times=[5000, 5040, 5100]))
    assert np.allclose([frame.time_seconds for frame in frames], [0, 0.04, 0.1])


def test_every(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 10)
    frames, reader = read_all(path, every=3)
    assert order(frames) == [frame.index for frame in frames] == [0, 3, 6, 9]
    assert reader.frames_read == 10
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        open_video(path, every=0)


def test_read_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 10)
    images = read_frames(path, [7, 2, 2, 0])
    assert images.shape == (4, 48, 64, 3)
    assert [recognise(image) for image in images] == [7, 2, 2, 0]
    with pytest.raises(VideoError, match="frame 10 was asked for, the video has 10 frames"):
        read_frames(path, [10])
    with pytest.raises(ValueError, match="indices"):
        read_frames(path, [])


def test_a_conversion_happens_only_when_asked_for(tmp_path):
    with open_video(write_clip(tmp_path / "a.mp4", 3)) as reader:
        frame = next(reader)
        assert frame._image is None
        assert frame.image is frame.image


def test_close_ends_iteration(tmp_path):
    reader = open_video(write_clip(tmp_path / "a.mp4", 5))
    next(reader)
    reader.close()
    assert list(reader) == []


# Files that cannot be used


def test_missing_empty_directory_and_text(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "text.txt").write_text("not a video\n" * 50)
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(20_000))
    for name, complaint in {
        "missing.mp4": "no such file",
        "empty.mp4": "the file is empty",
        "": "this is a directory",
        "text.mp4": "not a video file",
        "text.txt": "this is a text file",
        "noise.mkv": "not a video file",
    }.items():
        with pytest.raises(VideoError, match=complaint) as caught:
            open_video(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert "expected a video file" in str(caught.value)


def test_audio_only(tmp_path):
    with pytest.raises(VideoError, match="it has sound but no video"):
        open_video(write_audio(tmp_path / "a.m4a"))


def test_cover_art_is_not_a_video(tmp_path):
    path = write_audio(tmp_path / "a.mp4", cover=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match="it has sound but no video"):
        open_video(path)


def test_streams_are_checked(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 2)
    assert open_video(path, stream=0).stream_index == 0
    for wrong in (1, -1):
        with pytest.raises(VideoError, match=f"stream {wrong} is not a video stream"):
            open_video(path, stream=wrong)


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 2).rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read_all("concat:a.mp4")[0]) == 2
    assert len(read_all(f"file://{tmp_path}/concat:a.mp4")[0]) == 2


# Files that break half-way


def test_a_damaged_packet_ends_the_video_at_its_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 12, options={"bf": "0", "g": "4"})
    damage(path, 7)
    frames, error = read_until_broken(path)
    assert order(frames) == list(range(7))
    assert error.frame_index == 7
    assert error.time_seconds == pytest.approx(6 * 0.04)
    assert str(path) in str(error)
    assert "broke at frame 7 (after 0.240 s)" in str(error)


def test_a_break_between_b_frames_keeps_every_frame_before_it(tmp_path):
    options = {"bf": "3", "b-pyramid": "none", "x264-params": "b-adapt=0:scenecut=0"}
    path = write_clip(tmp_path / "a.mp4", 17, options=options)
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    broken = next(n for n, (one, two) in enumerate(itertools.pairwise(stamps)) if n > 5 and two < one)
    first_lost = sorted(stamps).index(min(stamps[broken:]))
    damage(path, broken)
    frames, error = read_until_broken(path)
    assert order(frames) == list(range(error.frame_index))
    assert 0 < error.frame_index <= first_lost + 1


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4", "fragmented.mp4"])
def test_a_file_cut_short_is_told_from_one_that_ends(tmp_path, name):
    flags = {"a.mp4": "+faststart", "fragmented.mp4": "+frag_keyframe+empty_moov"}.get(name)
    noise = np.random.default_rng(0).integers(-8, 9, (18, 96, 128, 3))  # pictures outweigh headers
    whole = write_clip(
        tmp_path / name,
        18,
        height=96,
        width=128,
        images=[(picture(n, 96, 128) + grain).astype(np.uint8) for n, grain in enumerate(noise)],
        codec="mpeg4",
        options={"q": "2", "g": "3"},
        container_options={"movflags": flags} if flags else {},
    )
    frames, _ = read_all(whole)
    assert order(frames) == list(range(18))
    data = whole.read_bytes()
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(data[: int(len(data) * 0.7)])
    kept, error = read_until_broken(cut)
    assert 0 < len(kept) < 18
    assert order(kept) == list(range(len(kept)))
    assert error.frame_index == len(kept)
    assert "cut short" in str(error) or "ends inside this frame" in str(error)


def test_a_file_without_its_index(tmp_path):
    whole = write_clip(tmp_path / "a.mp4", 18).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"its index \(moov box\) is missing"):
        open_video(cut)


def test_a_file_without_one_good_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3, options={"bf": "0"})
    for packet in range(3):
        damage(path, packet)
    with pytest.raises(VideoError, match="not one frame could be decoded"):
        open_video(path)


def test_damage_before_the_first_frame_is_skipped_and_counted(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 6, codec="mjpeg", pixel_format="yuvj420p")
    damage(path, 0)
    frames, reader = read_all(path)
    assert order(frames) == list(range(1, 6))
    assert reader.damaged_packets == 1


def test_declared_sizes(tmp_path):
    for name in ("a.mp4", "a.mkv", "a.avi"):
        path = write_clip(tmp_path / name, 5, codec="mpeg4")
        assert declared_size(path) == path.stat().st_size
    assert has_movie_index(tmp_path / "a.mp4") is True
    assert has_movie_index(tmp_path / "a.mkv") is None
    other = tmp_path / "other"
    for data in (b"", b"short", b"RIFF1234WAVE", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x00\x00\x00\x00\x00"):
        other.write_bytes(data)
        assert declared_size(other) is None


def test_headers_that_leave_the_size_open(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"x" * 20)
    assert declared_size(other) is None
    other.write_bytes((16).to_bytes(4, "big") + b"ftypisom0000" + bytes(4) + b"mdat" + b"x" * 100)
    assert declared_size(other) == 16
    large = (1).to_bytes(4, "big") + b"mdat" + (1 << 33).to_bytes(8, "big")
    other.write_bytes((16).to_bytes(4, "big") + b"ftypisom0000" + large)
    assert declared_size(other) == 16 + (1 << 33)


# Webcams and streams


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_http(tmp_path, server):
    write_clip(tmp_path / "a.mkv", 6)
    frames, reader = read_all(f"http://somebody:secret@{server}/a.mkv")
    assert order(frames) == list(range(6))
    assert reader.name == f"http://{server}/a.mkv"
    assert not reader.live
    with pytest.raises(VideoError, match="404") as caught:
        open_video(f"http://somebody:secret@{server}/b.mkv")
    assert "secret" not in str(caught.value)
    # This server sends whole files only, and this one's index lies beyond what FFmpeg would skip.
    write_clip(tmp_path / "long.mov", 6, codec="rawvideo", pixel_format="rgb24", height=256, width=256)
    with pytest.raises(VideoError, match="byte ranges"):
        open_video(f"http://{server}/long.mov")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_live_stream(tmp_path):
    """MPEG-TS over TCP: no announced length, damage in the middle is skipped, the end of the connection ends it."""
    options = {"bf": "0", "g": "3", "x264-params": "repeat-headers=1"}
    data = write_clip(tmp_path / "a.ts", 15, container="mpegts", options=options).read_bytes()
    port = _free_port()

    def send():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(data)
                return
            except ConnectionRefusedError:
                time.sleep(0.05)

    sender = threading.Thread(target=send)
    sender.start()
    frames, reader = read_all(f"tcp://127.0.0.1:{port}?listen=1", timeout=10)
    sender.join()
    assert reader.live
    assert reader.frame_count is None
    assert order(frames) == list(range(15))
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(15), atol=1e-3)


def test_nobody_answers():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        start = time.monotonic()
        with pytest.raises(VideoError, match=r"no answer within 0\.5 s"):
            open_video(f"http://127.0.0.1:{deaf.getsockname()[1]}/a.mp4", timeout=0.5)
        assert time.monotonic() - start < 10
    with pytest.raises(VideoError, match="cannot be opened"):
        open_video(f"rtsp://127.0.0.1:{_free_port()}/live", timeout=5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="device names of Linux")
def test_webcams(monkeypatch):
    with pytest.raises(VideoError, match=r"webcam:97: no such webcam \(/dev/video97\)"):
        open_video("webcam:97")
    with pytest.raises(VideoError, match="no such webcam"):
        open_video("/dev/video97")
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    address = _webcam("2")
    assert (address.url, address.format, address.live) == ("/dev/video2", "v4l2", True)
    assert _webcam("/dev/v4l/by-id/x").url == "/dev/v4l/by-id/x"
    assert _webcam("1", "darwin")[:2] == ("1", "avfoundation")
    assert _webcam("Integrated Camera", "win32")[:2] == ("video=Integrated Camera", "dshow")
    with pytest.raises(VideoError, match="name the camera"):
        _webcam("0", "win32")


def test_an_old_pyav_is_refused(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 1)
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(VideoError, match=r"video needs PyAV 17 or newer .*, got 16\.1\.0"):
        open_video(path)
