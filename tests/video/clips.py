"""Small videos made for tests. The n-th picture of a clip is a plain shade, by which it is recognised again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

STEP = 12  # between the shades of neighbouring pictures: lossy codecs move a plain shade by less than half of it


def shade(index: int) -> int:
    return 20 + STEP * (index % 18)


def picture(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), shade(index), dtype=np.uint8)


def recognise(image: np.ndarray) -> int:
    """Which picture of a clip (of at most 18) this is."""
    return round((float(image.mean()) - 20) / STEP)


def write_clip(
    path: Path,
    count: int = 10,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    height: int = 48,
    width: int = 64,
    times: Sequence[int] | None = None,
    images: Sequence[np.ndarray] | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode pictures 0, 1, ...; ``times`` are presentation times in milliseconds (40 ms apart unless given).

    Times out of order are for codecs of single pictures: packets are then written in the order of ``images``.
    """
    import av

    times = [40 * index for index in range(count)] if times is None else times
    images = [picture(index, height, width) for index in range(len(times))] if images is None else images
    ordered = all(earlier < later for earlier, later in itertools.pairwise(times))
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        # AVI counts frames, it has no times.
        base = Fraction(1, 25) if path.suffix == ".avi" else Fraction(1, 1000)
        stream.codec_context.time_base = base
        for number, (time, image) in enumerate(zip(times, images, strict=True)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = round(time / 1000 / base) if ordered else number, base
            for packet in stream.encode(frame):
                if not ordered:
                    packet.pts, packet.dts = times[number], number - len(times)
                output.mux(packet)
        output.mux(stream.encode(None))
    return path


def write_audio(path: Path, *, cover: bool = False) -> Path:
    """Half a second of silence; with ``cover`` also a picture that is attached, not a video."""
    import av

    with av.open(str(path), "w") as output:
        sound = output.add_stream("aac", rate=16000, layout="mono")
        if cover:
            art = output.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 64, 48, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic.value
            output.start_encoding()
            frame = av.VideoFrame.from_ndarray(picture(3), format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            output.mux(art.encode(frame))
        for index in range(8):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 1024 * index
            output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    return path


def set_display_matrix(path: Path, matrix: Sequence[Sequence[int]]) -> None:
    """Overwrite the display matrix [[a, b], [c, d]] of the only track of an MP4 file."""
    data = bytearray(path.read_bytes())
    assert data.count(b"tkhd") == 1
    start = data.index(b"tkhd") + 4 + 40  # version 0: forty bytes of other fields
    (a, b), (c, d) = matrix
    values = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], dtype=">i4")
    data[start : start + 36] = values.tobytes()
    path.write_bytes(data)


def damage(path: Path, packet: int) -> None:
    """Overwrite the bytes of the packet with this number (in file order)."""
    import av

    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        position, size = packets[packet].pos, packets[packet].size
    data = bytearray(path.read_bytes())
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
