"""Frames of a file, a webcam or a network stream, one at a time, in presentation order.

:func:`open_video` returns a :class:`VideoReader`, an iterator over :class:`Frame`. Decoding is PyAV's (FFmpeg), which
is imported when the first video is opened.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from rcu_ops.video.containers import declared_size, has_movie_index

__all__ = ["BrokenVideoError", "Frame", "VideoError", "VideoReader", "open_video", "read_frames", "require_av"]

# Frames held back to put them in order. Intra-only codecs come in packet order whatever their time stamps say; the
# others are put in order by the decoder itself, which can hold 16 pictures by its standards.
_REORDER_DEPTH = 16
_OLDEST_AV = 17
_LIVE_TIMEOUT_SECONDS = 15.0
_LIVE_ERROR_LIMIT = 250
_LIVE_SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srtp", "udp", "tcp", "srt", "mms", "mmsh", "mmst"}
_TEXT_FORMATS = {"tty", "srt", "ass", "webvtt", "subviewer", "microdvd", "lrc", "ffmetadata"}
_EXPECTED = "expected a video file, webcam:0 or a stream address"


class VideoError(ValueError):
    """A source that cannot be read as a video. The message is one line."""


class BrokenVideoError(VideoError):
    """A source that broke after some frames had been read.

    Attributes:
        frame_index: index of the first frame that could not be read; as many frames were read.
        time_seconds: time stamp of the last frame that was read.
        reason: what was wrong, without the source's name.
    """

    def __init__(self, source: str, frame_index: int, time_seconds: float, reason: str) -> None:
        self.frame_index = frame_index
        self.time_seconds = time_seconds
        self.reason = reason
        super().__init__(f"{source}: broke at frame {frame_index} (after {time_seconds:.3f} s): {reason}")


class Frame:
    """One picture of a video.

    Attributes:
        index: position in presentation order, from 0, before any frame is skipped.
        time_seconds: presentation time since the first frame; strictly increasing.
        image: uint8 RGB array [H, W, 3], upright (rotation metadata applied). It is converted when first asked for,
            so that a dropped frame costs no conversion.
    """

    __slots__ = ("_image", "_make", "index", "time_seconds")

    def __init__(self, index: int, time_seconds: float, image: np.ndarray | Callable[[], np.ndarray]) -> None:
        self.index = index
        self.time_seconds = time_seconds
        self._make = None if isinstance(image, np.ndarray) else image
        self._image = image if isinstance(image, np.ndarray) else None

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 RGB [H, W, 3]."""
        if self._image is None:
            assert self._make is not None
            self._image, self._make = self._make(), None
        return self._image

    def __repr__(self) -> str:
        return f"Frame(index={self.index}, time_seconds={self.time_seconds:.6f})"


class _Address(NamedTuple):
    """What to hand to FFmpeg for a source, and whether it is live."""

    url: str
    format: str | None
    options: dict[str, str]
    live: bool
    path: Path | None  # a regular local file


class _Fault(NamedTuple):
    """Why reading stopped early, and the time stamp from which frames are damaged (None: unknown)."""

    reason: str
    limit: int | None


def require_av() -> ModuleType:
    """The ``av`` package, or a :class:`VideoError` that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise VideoError(f"reading and writing video needs PyAV (pip install 'rcu-ops[video]'): {error}") from error
    if int(av.__version__.split(".")[0]) < _OLDEST_AV:
        # Earlier ones convert every video to RGB by the matrix of BT.601, whatever it says.
        raise VideoError(f"video needs PyAV {_OLDEST_AV} or newer (pip install 'rcu-ops[video]'), got {av.__version__}")
    return av


def _open_any_metadata(av: ModuleType, url: str, **arguments: Any) -> Any:
    """``av.open``, told to accept metadata that is no UTF-8 where PyAV takes that argument: 19 refuses it."""
    try:
        return av.open(url, metadata_errors="replace", **arguments)
    except TypeError as error:
        if "metadata_errors" not in str(error):
            raise
    return av.open(url, **arguments)


def open_video(
    source: str | os.PathLike[str],
    *,
    every: int = 1,
    stream: int | None = None,
    options: Mapping[str, str] | None = None,
    timeout: float = _LIVE_TIMEOUT_SECONDS,
) -> VideoReader:
    """Open a video and read its first frame.

    Args:
        source: a file; a webcam as ``webcam``, ``webcam:1`` or ``/dev/video1``; a stream's address
            (``rtsp://…``, ``http://…``).
        every: give only frames whose index is a multiple of this.
        stream: index of the video stream among the container's streams; the one FFmpeg thinks best unless told
            (the largest picture, cover art never).
        options: options of FFmpeg's demuxer and protocol, such as ``{"video_size": "1280x720"}`` for a webcam.
        timeout: seconds to wait for a live source, when opening it and for every read.

    Raises:
        VideoError: the source is missing, empty, not a video, has no picture, or not one frame of it can be decoded.
        ValueError: an argument is out of its range.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    return VideoReader(source, every=every, stream=stream, options=options, timeout=timeout)


class VideoReader(Iterator[Frame]):
    """Iterates once over the frames of a video; made by :func:`open_video`, closed by ``close`` or ``with``.

    Iterating raises :class:`BrokenVideoError` where the source breaks, after every good frame before the break.
    Damage in a live source is counted and skipped instead, since the next key frame heals it.

    Attributes:
        name: the source as the user wrote it, without the user name and password of an address.
        live: whether frames arrive at their own pace and have no end that is known (webcam, stream).
        height, width: of the first frame, upright.
        frame_rate: average frames per second, or None.
        frame_count: number of frames announced by the container (an estimate, before ``every``), or None.
        duration_seconds: duration announced by the container, or None.
        codec, pixel_format, rotation: of the first frame; rotation in degrees, counterclockwise, already applied.
        stream_index: which stream of the container is read.
        frames_read: frames decoded so far, those skipped by ``every`` included.
        repaired_times: frames whose time stamp was missing or not later than the one before, and was made up.
        damaged_packets: packets of a live source, or before the first frame of a file, that did not decode.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        every: int,
        stream: int | None,
        options: Mapping[str, str] | None,
        timeout: float,
    ) -> None:
        # Messages and results carry the name: a password in an address must not reach them.
        self.name = re.sub(r"(://)[^/@]*@", r"\1", os.fspath(source))
        self._every = every
        self._av = require_av()
        self._to_rgb = _ToRGB(self._av)
        self._address = _resolve(os.fspath(source))
        self.live = self._address.live
        self.frames_read = 0
        self.repaired_times = 0
        self.damaged_packets = 0
        self._fault: _Fault | None = None
        self._last_time = 0.0
        self._container = self._open_container(options or {}, timeout)
        try:
            self._stream = self._choose_stream(stream)
            # Only slices are decoded in parallel: with frame threads an error surfaces frames later than it belongs.
            self._stream.thread_type = "SLICE"
            self._describe()
            self._frames = self._present()
            self._first: Frame | None = self._read_first()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> VideoReader:
        return self

    def __next__(self) -> Frame:
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        return next(self._frames)

    def close(self) -> None:
        """Release the source; iterating ends."""
        if hasattr(self, "_frames"):
            self._frames.close()
        self._first = None
        self._container.close()

    # Opening

    def _open_container(self, options: Mapping[str, str], timeout: float) -> Any:
        address = self._address
        remote = address.path is None
        try:
            container = _open_any_metadata(
                self._av,
                address.url,
                format=address.format,
                options={**address.options, **options},
                timeout=timeout if remote else None,
            )
        except self._av.error.ExitError as error:
            raise VideoError(f"{self.name}: no answer within {timeout:g} s") from error
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.name}: {_why_not_opened(address, error)}; {_EXPECTED}") from error
        if container.format.name in _TEXT_FORMATS:
            container.close()
            raise VideoError(f"{self.name}: this is a text file; {_EXPECTED}")
        # A file served over a network has a duration, a camera behind the same address has none.
        self.live = address.live or (remote and container.duration is None)
        return container

    def _choose_stream(self, index: int | None) -> Any:
        container = self._container
        if index is not None:
            if not 0 <= index < len(container.streams) or container.streams[index].type != "video":
                raise VideoError(f"{self.name}: stream {index} is not a video stream")
            return container.streams[index]
        attached = self._av.stream.Disposition.attached_pic
        pictures = [stream for stream in container.streams.video if not stream.disposition & attached]
        if not pictures:
            has_audio = len(container.streams.audio) > 0
            what = "it has sound but no video" if has_audio else "it has no video stream"
            raise VideoError(f"{self.name}: {what}; {_EXPECTED}")
        best = container.streams.best("video")
        return best if best in pictures else pictures[0]

    def _describe(self) -> None:
        stream = self._stream
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{self.name}: no decoder for its video stream")
        self.stream_index: int = stream.index
        self.codec: str = context.name
        rate = stream.average_rate or stream.guessed_rate
        self.frame_rate = float(rate) if rate else None
        if stream.duration is not None and stream.time_base is not None:
            self.duration_seconds: float | None = float(stream.duration * stream.time_base)
        elif self._container.duration is not None and not self.live:
            self.duration_seconds = self._container.duration / 1_000_000
        else:
            self.duration_seconds = None
        if stream.frames:
            self.frame_count: int | None = stream.frames
        elif self.duration_seconds and self.frame_rate:
            self.frame_count = max(1, round(self.duration_seconds * self.frame_rate))
        else:
            self.frame_count = None
        # AVI and raw bitstreams carry no presentation times: what the demuxer makes up is the right set of times, in
        # an order that the pictures do not follow.
        no_timestamps = bool(self._container.format.flags & _format_flag(self._av, "no_timestamps"))
        self._pair_times = self._container.format.name != "avi" and not no_timestamps
        if self.live:
            self._depth = 0
        elif context.codec.intra_only or not self._pair_times:
            self._depth = _REORDER_DEPTH
        else:
            # The decoder has put these in order already; a little slack is for streams that understate their delay.
            self._depth = 4

    def _read_first(self) -> Frame:
        try:
            frame = next(self._frames)
        except StopIteration:
            raise VideoError(f"{self.name}: it has a video stream but not one frame in it") from None
        except BrokenVideoError as error:
            hint = ""
            if self._address.path is None and self._container.format.name.startswith("mov") and not self.live:
                hint = "; if its index lies at its end, the server must send parts of files (byte ranges): download it"
            raise VideoError(f"{self.name}: not one frame could be decoded: {error.reason}{hint}") from error
        return frame

    # Packets to pictures

    def _decode(self) -> Iterator[Any]:
        """Pictures in the decoder's order. Sets ``_fault`` and ends where the source breaks."""
        decoder = self._stream.codec_context
        packets = self._container.demux(self._stream)
        seen = failures = 0
        any_frame = False
        while True:
            try:
                packet = next(packets)
            except (StopIteration, self._av.error.EOFError):
                self._fault = self._cut_short(seen)
                break
            except (self._av.error.FFmpegError, OSError) as error:
                self._fault = _Fault(_reason(error), None)
                break
            if packet.size == 0:  # PyAV's mark of the end; the decoder is drained below
                continue
            seen += 1
            try:
                if packet.is_corrupt and not self.live:
                    raise self._av.error.InvalidDataError(0, "the file ends inside this frame")
                frames = decoder.decode(packet)
            except (self._av.error.FFmpegError, OSError) as error:
                if not self.live and any_frame:
                    self._fault = _Fault(_reason(error), packet.pts)
                    break
                self.damaged_packets += 1
                failures += 1
                self._fault = _Fault(_reason(error), packet.pts)
                if self.live and failures >= _LIVE_ERROR_LIMIT:
                    break
                continue
            if frames:
                any_frame, failures, self._fault = True, 0, None
            yield from frames
        limit = self._fault.limit if self._fault is not None else None
        try:
            rest = decoder.decode(None)
        except (self._av.error.FFmpegError, OSError):
            rest = []
        # After a break, what the decoder still holds may lie on either side of it: only what comes before is whole.
        yield from (frame for frame in rest if limit is None or (frame.pts is not None and frame.pts < limit))

    def _cut_short(self, packets: int) -> _Fault | None:
        """The fault of a file that ended early although the demuxer saw nothing wrong with it."""
        path = self._address.path
        if path is None:
            return self._fault
        declared, actual = declared_size(path), path.stat().st_size
        if declared is None or declared <= actual or (self._stream.frames and packets >= self._stream.frames):
            return self._fault
        return _Fault(_sizes(actual, declared), None)

    def _in_order(self) -> Iterator[tuple[Any, int | None]]:
        """Pictures and their time stamps, both in presentation order."""
        if self._depth == 0:
            for picture in self._decode():
                yield picture, picture.pts
            return
        pictures: deque[Any] = deque()
        times: list[tuple[int, int]] = []
        waiting: list[tuple[int, int, Any]] = []
        latest = 0
        for count, picture in enumerate(self._decode()):
            latest = latest if picture.pts is None else picture.pts
            if self._pair_times:
                # A picture without a time stamp stays behind the one it came after.
                heapq.heappush(waiting, (latest, count, picture))
                if len(waiting) > self._depth:
                    first = heapq.heappop(waiting)[2]
                    yield first, first.pts
            else:
                pictures.append(picture)
                heapq.heappush(times, (latest, count))
                if len(pictures) > self._depth:
                    yield pictures.popleft(), heapq.heappop(times)[0]
        while waiting:
            first = heapq.heappop(waiting)[2]
            yield first, first.pts
        while pictures:
            yield pictures.popleft(), heapq.heappop(times)[0]

    def _present(self) -> Generator[Frame, None, None]:
        base = self._stream.time_base or Fraction(1, 1000)
        interval = 1.0 / self.frame_rate if self.frame_rate else 0.04
        origin: int | None = None
        index, previous = 0, None
        for picture, stamp in self._in_order():
            if index == 0 or picture.key_frame:  # asking every picture costs PyAV 20 bytes that never come back
                matrix = _display_matrix(picture)
            if index == 0:
                self.rotation = _rotation_degrees(matrix)
                self.pixel_format: str = picture.format.name
                turned = self.rotation in (90, 270)
                self.height: int = picture.width if turned else picture.height
                self.width: int = picture.height if turned else picture.width
            if origin is None and stamp is not None:
                # Frames without a stamp may have come first: they have taken the times before this one.
                origin = stamp - (round(index * interval / base) if index else 0)
            seconds = None if stamp is None or origin is None else float((stamp - origin) * base)
            if seconds is None or (previous is not None and seconds <= previous):
                self.repaired_times += previous is not None or stamp is None
                seconds = 0.0 if previous is None else previous + interval
            previous = self._last_time = seconds
            self.frames_read = index + 1
            if index % self._every == 0:
                yield Frame(index, seconds, _Converter(self._to_rgb, picture, matrix))
            index += 1
        if self._fault is not None:
            raise BrokenVideoError(self.name, index, self._last_time, self._fault.reason)


class _ToRGB:
    """Pictures as uint8 RGB arrays, by one converter for all pictures of a reader.

    A converter of its own for every picture takes up to three times as long, and what FFmpeg allocates for each leaves
    holes in the heap: a long video's memory grew.
    """

    def __init__(self, av: ModuleType) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._lock = threading.Lock()  # frames may be looked at in several threads

    def __call__(self, picture: Any) -> np.ndarray:
        with self._lock:
            array: np.ndarray = self._reformatter.reformat(picture, format="rgb24").to_ndarray()
        return array


class _Converter:
    """Turns a decoded picture into an upright RGB array when called."""

    __slots__ = ("_matrix", "_picture", "_to_rgb")

    def __init__(self, to_rgb: _ToRGB, picture: Any, matrix: np.ndarray | None) -> None:
        self._to_rgb = to_rgb
        self._picture = picture
        self._matrix = matrix

    def __call__(self) -> np.ndarray:
        return upright(self._to_rgb(self._picture), self._matrix)


def read_frames(source: str | os.PathLike[str], indices: Sequence[int]) -> np.ndarray:
    """The frames of a video at ``indices`` (any order, repeats allowed), as uint8 RGB [len(indices), H, W, 3].

    The video is decoded from its start, once, up to the largest index: every index is then exact, which seeking does
    not give for all files.

    Raises:
        VideoError: as :func:`open_video`; or the video ends before the largest index.
        ValueError: ``indices`` is empty or has a negative entry.
    """
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(f"indices: expected at least one index, none negative, got {list(indices)}")
    wanted, last = set(indices), max(indices)
    images: dict[int, np.ndarray] = {}
    with open_video(source) as reader:
        for frame in reader:
            if frame.index in wanted:
                images[frame.index] = frame.image
            if frame.index == last:
                break
        if last not in images:
            raise VideoError(f"{reader.name}: frame {last} was asked for, the video has {reader.frames_read} frames")
    return np.stack([images[index] for index in indices])


def upright(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """``image`` [H, W, C] turned and mirrored as a display matrix says; C-contiguous.

    ``matrix`` is [[a, b], [c, d]] with entries in {-1, 0, 1}: a pixel at column x, row y is shown at column ax + cy,
    row bx + dy (rows grow downwards), moved back into the picture. None leaves the image as it is.
    """
    if matrix is None:
        return image
    (a, b), (c, d) = matrix.tolist()
    if a == 0:  # x becomes rows: transpose, after which rows follow b and columns follow c
        image = image.transpose(1, 0, 2)
        row_sign, column_sign = b, c
    else:
        row_sign, column_sign = d, a
    return np.ascontiguousarray(image[::row_sign, ::column_sign])


def _display_matrix(picture: Any) -> np.ndarray | None:
    """The nearest right-angled turn or reflection to a picture's display matrix; None when there is nothing to do."""
    data = picture.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    values = np.frombuffer(data, dtype=np.int32, count=9).astype(np.float64).reshape(3, 3)[:2, :2]
    if abs(values[0, 0]) + abs(values[1, 1]) >= abs(values[0, 1]) + abs(values[1, 0]):
        values = np.diag(np.diag(values))
    else:
        values = values - np.diag(np.diag(values))
    matrix = np.sign(values).astype(np.int64)
    if abs(round(float(np.linalg.det(matrix)))) != 1 or np.array_equal(matrix, np.eye(2)):
        return None  # a degenerate matrix says nothing
    return matrix


def _rotation_degrees(matrix: np.ndarray | None) -> int:
    """Counterclockwise degrees in {0, 90, 180, 270} that a display matrix turns rows by, a mirroring left aside."""
    if matrix is None:
        return 0
    (a, b), _ = matrix.tolist()
    return {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}[(a, b)]


def _resolve(source: str) -> _Address:
    """Tell files, webcams and streams apart; check what can be checked without FFmpeg."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if scheme and scheme[1].lower() != "file":
        name = scheme[1].lower()
        # Interleaved in TCP, RTSP survives firewalls and loses no packets.
        options = {"rtsp_transport": "tcp"} if name in ("rtsp", "rtsps") else {}
        return _Address(source, None, options, name in _LIVE_SCHEMES, None)
    webcam = re.fullmatch(r"webcam(?::(.*))?", source)
    if webcam:
        return _webcam(webcam[1] or "0")
    if source == "":
        raise VideoError(f"the source is an empty string; {_EXPECTED}")
    path = Path(source[len("file://") :] if scheme else source)
    try:
        mode = path.stat()
    except FileNotFoundError as error:
        if source.startswith("/dev/video"):
            raise VideoError(f"{source}: no such webcam; {_EXPECTED}") from error
        raise VideoError(f"{source}: no such file; {_EXPECTED}") from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{source!r}: {getattr(error, 'strerror', None) or error}; {_EXPECTED}") from error
    if stat.S_ISCHR(mode.st_mode):
        return _Address(source, "v4l2", {}, True, None)
    if stat.S_ISDIR(mode.st_mode):
        raise VideoError(f"{source}: this is a directory; {_EXPECTED}")
    if stat.S_ISREG(mode.st_mode) and mode.st_size == 0:
        raise VideoError(f"{source}: the file is empty; {_EXPECTED}")
    regular = path if stat.S_ISREG(mode.st_mode) else None
    # "file:" keeps FFmpeg from reading a colon in the name as a protocol.
    return _Address(f"file:{path}", None, {}, False, regular)


def _webcam(device: str, platform: str = sys.platform) -> _Address:
    if platform.startswith("linux"):
        path = f"/dev/video{device}" if device.isdigit() else device
        if not os.path.exists(path):
            found = sorted(str(entry) for entry in Path("/dev").glob("video*"))
            raise VideoError(f"webcam:{device}: no such webcam ({path}); found {', '.join(found) or 'none'}")
        return _Address(path, "v4l2", {}, True, None)
    if platform == "darwin":
        # AVFoundation refuses its own default rate on most cameras; 30 is what they all offer.
        return _Address(device, "avfoundation", {"framerate": "30"}, True, None)
    if device.isdigit():
        raise VideoError(f"webcam:{device}: on Windows name the camera, as in 'webcam:Integrated Camera'")
    return _Address(f"video={device}", "dshow", {}, True, None)


def _why_not_opened(address: _Address, error: Exception) -> str:
    if address.path is not None:
        declared, actual = declared_size(address.path), address.path.stat().st_size
        if has_movie_index(address.path) is False:
            cut = f", {_sizes(actual, declared)}" if declared is not None and declared > actual else ""
            return f"its index (moov box) is missing{cut}"
        if declared is not None and declared > actual:
            return _sizes(actual, declared)
    if isinstance(error, ValueError) and getattr(error, "errno", None) is not None:
        return "this is not a video file that FFmpeg knows" if address.path else "no video there that FFmpeg knows"
    return f"cannot be opened: {_reason(error)}"


def _sizes(actual: int, declared: int) -> str:
    return f"the file is cut short ({actual:,} of {declared:,} bytes)"


def _reason(error: BaseException) -> str:
    """FFmpeg's explanation in one line, without its error number and call."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")


def _format_flag(av: ModuleType, name: str) -> int:
    return int(getattr(av.format.Flags, name).value)
