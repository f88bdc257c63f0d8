"""How long a video file says it is, read from its outermost boxes, without a decoder.

A demuxer that reaches the end of a file which was cut short mostly reports an ordinary end. The sizes written in the
container's own headers tell the difference exactly.
"""

from __future__ import annotations

import os
from typing import BinaryIO

__all__ = ["declared_size", "has_movie_index"]

_MP4_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"}
_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"


def declared_size(path: str | os.PathLike[str]) -> int | None:
    """Bytes the file should have according to its own headers, at least.

    Knows MP4 and QuickTime, Matroska and WebM, AVI. None for every other kind of file, and where the headers leave the
    size open (a recording that was not finalised).
    """
    with open(path, "rb") as file:
        start = file.read(12)
        file.seek(0)
        if start[4:8] in _MP4_FIRST_BOXES:
            return max((end for _, end in _mp4_boxes(file)), default=None)
        if start[:4] == _EBML_HEADER:
            return _matroska_end(file)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            return _riff_end(file)
    return None


def has_movie_index(path: str | os.PathLike[str]) -> bool | None:
    """Whether an MP4 or QuickTime file has its index (the ``moov`` box); None for every other kind of file."""
    with open(path, "rb") as file:
        start = file.read(8)
        file.seek(0)
        if start[4:8] not in _MP4_FIRST_BOXES:
            return None
        return any(kind == b"moov" for kind, _ in _mp4_boxes(file))


def _mp4_boxes(file: BinaryIO) -> list[tuple[bytes, int]]:
    """Kind and end offset of every top-level box whose header can be read."""
    boxes: list[tuple[bytes, int]] = []
    position = 0
    while True:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return boxes
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:  # 0 is "up to the end of the file"; anything else below 8 is not a box
            return boxes
        position += size
        boxes.append((header[4:8], position))


def _matroska_end(file: BinaryIO) -> int | None:
    position = 0
    while True:
        file.seek(position)
        header = file.read(12)
        if len(header) < 5:
            return None
        width = 9 - header[4].bit_length()
        if not 1 <= width <= 8 or len(header) < 4 + width:
            return None
        size = int.from_bytes(header[4 : 4 + width], "big") & ((1 << (7 * width)) - 1)
        if size == (1 << (7 * width)) - 1:  # all ones: unknown, as in a live recording
            return None
        position += 4 + width + size
        if header[:4] == _MATROSKA_SEGMENT:
            return position
        if header[:4] != _EBML_HEADER:
            return None


def _riff_end(file: BinaryIO) -> int | None:
    """End of the last RIFF chunk: files beyond 1 GB have several."""
    position = 0
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8 or header[:4] != b"RIFF":
            return position or None
        size = int.from_bytes(header[4:8], "little")
        if size == 0:  # a recording that was not finalised
            return None
        position += 8 + size + size % 2
