"""Encode pictures to an MP4 file."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rcu_ops.report import replacing
from rcu_ops.video.decode import VideoError, require_av

__all__ = ["VideoWriter"]

_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first one that this build of PyAV has
_TIME_BASE = Fraction(1, 90_000)
_BT709 = 1  # the number of BT.709 in H.264's tables of matrices, primaries and transfer curves


class VideoWriter:
    """Encodes uint8 RGB pictures with their own time stamps (H.264 where PyAV has it) into an MP4 file.

    The file appears under its name when :meth:`close` succeeds. Leaving the ``with`` block by an error throws the
    unfinished file away.

    Args:
        path: the file to write.
        height, width: of every picture given to :meth:`write`. An odd side gets its last row or column repeated, since
            4:2:0 video has even sides.
        frame_rate: a hint for the encoder; the time stamps decide.

    Raises:
        VideoError: no encoder; a picture of another size; the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, *, frame_rate: float = 25.0) -> None:
        av = require_av()
        self.path = Path(path)
        self.height, self.width = height, width
        self._av = av
        self._reformatter = av.video.reformatter.VideoReformatter()  # one for all pictures, see decode._ToRGB
        self._last_pts = -1
        self._closed = False
        self.codec = next((name for name in _ENCODERS if name in av.codecs_available), "")
        if not self.codec:
            raise VideoError(f"this PyAV has none of the encoders {', '.join(_ENCODERS)}")
        self._file = replacing(self.path)
        try:
            temporary = self._file.__enter__()
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            try:
                self._stream = self._add_stream(frame_rate)
            except BaseException:
                self._container.close()
                raise
        except BaseException as error:
            self._drop_file()
            raise self._failure(error) from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, image: np.ndarray, time_seconds: float) -> None:
        """Encode one picture [height, width, 3], shown from ``time_seconds`` on. Times must increase."""
        if image.shape != (self.height, self.width, 3) or image.dtype != np.uint8:
            raise VideoError(
                f"image: expected uint8 [{self.height}, {self.width}, 3], got {image.dtype} {list(image.shape)}"
            )
        if self.height % 2 or self.width % 2:
            image = np.pad(image, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = self._reformatter.reformat(frame, format="yuv420p", dst_colorspace="ITU709")
        self._last_pts = max(self._last_pts + 1, round(time_seconds / _TIME_BASE))
        frame.pts, frame.time_base = self._last_pts, _TIME_BASE
        self._mux(frame)

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._mux(None)
            self._container.close()
        except BaseException as error:
            self._drop_file()
            raise self._failure(error) from error
        self._file.__exit__(None, None, None)

    def discard(self) -> None:
        """Throw the unfinished file away."""
        if not self._closed:
            self._closed = True
            try:
                self._container.close()
            except (self._av.error.FFmpegError, OSError):
                pass  # a file that is thrown away need not be finished
            finally:
                self._drop_file()

    def _drop_file(self) -> None:
        error = VideoError(f"{self.path}: discarded")
        self._file.__exit__(type(error), error, None)

    def _failure(self, error: BaseException) -> BaseException:
        if isinstance(error, (self._av.error.FFmpegError, OSError)):
            return VideoError(f"{self.path}: cannot be written: {getattr(error, 'strerror', None) or error}")
        return error

    def _add_stream(self, frame_rate: float) -> Any:
        options = {"crf": "20", "preset": "veryfast"} if self.codec == "libx264" else {}
        rate = Fraction(frame_rate).limit_denominator(1001)
        stream = self._container.add_stream(self.codec, rate=rate, options=options)
        stream.width, stream.height = self.width + self.width % 2, self.height + self.height % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = _TIME_BASE
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1
        if self.codec != "libx264":
            context.bit_rate = max(500_000, int(stream.width * stream.height * float(rate) * 0.2))
        return stream

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except (self._av.error.FFmpegError, OSError) as error:
            raise self._failure(error) from error
