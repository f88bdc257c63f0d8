"""Optical flow between neighbouring frames: OpenCV's DIS, stored in eight bits, and the stacks that networks take.

A field holds the displacement of every pixel from one frame to the next, in pixels, x before y. It is cut off at
``bound`` and stored as ``round((v + bound) * 255 / (2 bound))``: with the usual bound of 20 a step is 0.16 pixels.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from rcu_ops.video.decode import VideoError, open_video
from rcu_ops.video.transform import resize_short_side

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FlowPart",
    "compute_flow",
    "dequantize",
    "flow_pictures",
    "flow_stacks",
    "mirror",
    "mirror_pictures",
    "open_flow",
    "quantize",
    "require_cv2",
    "scale_pictures",
]

BOUND = 20.0


def require_cv2() -> Any:
    """OpenCV, or an ImportError that says how to get it."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("optical flow needs OpenCV: pip install 'rcu-ops[flow]'") from error
    return cv2


def quantize(flow: np.ndarray, bound: float = BOUND) -> np.ndarray:
    """Displacements in pixels to uint8; what lies beyond ``bound`` is cut off."""
    return np.rint((np.clip(flow, -bound, bound) + bound) * (255 / (2 * bound))).astype(np.uint8)


def dequantize(fields: np.ndarray, bound: float = BOUND) -> np.ndarray:
    """What :func:`quantize` stored, float32 pixels, right to half a step (``bound / 255``)."""
    return fields.astype(np.float32) * np.float32(2 * bound / 255) - np.float32(bound)


def mirror(stacks: torch.Tensor) -> torch.Tensor:
    """Stacks [..., 2 L, T, H, W] of a video mirrored left to right: x displacements change their sign too."""
    signs = torch.tensor([-1.0, 1.0], dtype=stacks.dtype, device=stacks.device).repeat(stacks.shape[-4] // 2)
    return stacks.flip(-1) * signs.view(-1, 1, 1, 1)


def flow_stacks(fields: np.ndarray, starts: torch.Tensor, length: int = 10) -> torch.Tensor:
    """Snippets of ``length`` neighbouring fields as a temporal stream takes them.

    Args:
        fields: uint8 [F, 2, H, W], as ``rcu-ops flow`` stores them.
        starts: first field of every snippet, int64 [T] (:func:`rcu_ops.video.sample.segment_positions` with
            ``snippet=length``); fields beyond the last repeat it.
        length: fields of a snippet.

    Returns:
        float32 [2 length, T, H, W] in [-1, 1], x and y in turns: a view as the clip [N, 20, T, H, W] once batched.

    Raises:
        ValueError: fields of another shape, a start outside of them.
    """
    if fields.ndim != 4 or fields.shape[1] != 2 or 0 in fields.shape:
        raise ValueError(f"fields: expected [F,2,H,W] with nothing empty, got {list(fields.shape)}")
    if starts.dim() != 1 or int(starts.min()) < 0 or int(starts.max()) >= len(fields):
        raise ValueError(f"starts: expected numbers from 0 to {len(fields) - 1}, got {starts.tolist()}")
    return scale_pictures(flow_pictures(fields, starts, length)).permute(3, 0, 1, 2)


def flow_pictures(fields: np.ndarray, starts: torch.Tensor, length: int = 10) -> torch.Tensor:
    """The snippets of :func:`flow_stacks` as they are stored, in the order of pictures: uint8 [T, H, W, 2 length]."""
    indices = (starts[:, None] + torch.arange(length)).clamp(max=len(fields) - 1)
    taken = torch.from_numpy(np.ascontiguousarray(fields[indices.numpy()]))  # [T,L,2,H,W]
    return taken.flatten(1, 2).permute(0, 2, 3, 1).contiguous()


def scale_pictures(pictures: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 of any shape to [-1, 1], the largest displacement either way."""
    return (pictures.float() * (2 / 255) - 1).to(dtype)


def mirror_pictures(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [..., H, W, 2 L] of :func:`flow_pictures` mirrored left to right: x displacements change their sign."""
    mirrored = pictures.flip(-2)
    mirrored[..., ::2] = 255 - mirrored[..., ::2]
    return mirrored


def open_flow(source: str | os.PathLike[str]) -> np.ndarray:
    """The fields uint8 [F, 2, H, W] of a file of ``rcu-ops flow``, read from the disk as they are used.

    Raises:
        VideoError: there is no such file, or it holds anything else.
    """
    try:
        fields = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an .npy file of rcu-ops flow"
        raise VideoError(f"{source}: {reason}") from error
    if not isinstance(fields, np.ndarray) or fields.dtype != np.uint8 or fields.ndim != 4 or fields.shape[1] != 2:
        raise VideoError(f"{source}: expected uint8 [F,2,H,W] of rcu-ops flow, got another array")
    if 0 in fields.shape:
        raise VideoError(f"{source}: holds no flow")
    return fields


def _digest(source: str | os.PathLike[str]) -> bytes:
    """32 bytes that tell a video from others: its size, beginning and end; the name of what is no file."""
    digest = hashlib.sha256()
    ends = 1 << 20
    try:
        with open(source, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(0, size - ends)):
                file.seek(start)
                digest.update(file.read(ends))
    except OSError:
        digest.update(os.fsencode(source))
    return digest.digest()


class FlowPart:
    """The file of a flow that is under way: a header and whole fields; one that a kill cut off is dropped.

    It is locked while it is open, however the process ends: two runs cannot add to one file.

    Args:
        path: the file; an existing one is gone on with.
        source: the video. Its contents are named in the file, so that no other video goes on with its fields.

    Raises:
        VideoError: the file is something else, the flow of another video, or another run's.
    """

    _HEADER = struct.Struct("<8s32sII")
    _MAGIC = b"rcuflow2"

    def __init__(self, path: Path, source: str | os.PathLike[str]) -> None:
        self._path = path
        self._video = _digest(source)
        self._file: BinaryIO | None = None
        self.size: tuple[int, int] | None = None
        self.count = 0
        if path.is_file() and path.stat().st_size >= self._HEADER.size:
            try:
                self._go_on(self._locked("r+b"))
            except BaseException:
                self.close()
                raise

    def _go_on(self, file: BinaryIO) -> None:
        magic, video, height, width = self._HEADER.unpack(file.read(self._HEADER.size))
        if magic != self._MAGIC or not height or not width:
            raise VideoError(f"{self._path}: this is not a flow under way; remove it")
        if video != self._video:
            raise VideoError(f"{self._path}: holds the flow of another video under way; finish or remove it")
        self.size = (height, width)
        self.count = (os.fstat(file.fileno()).st_size - self._HEADER.size) // (2 * height * width)
        file.truncate(self._HEADER.size + 2 * height * width * self.count)
        file.seek(0, os.SEEK_END)

    def _locked(self, mode: str) -> BinaryIO:
        self._file = cast(BinaryIO, self._path.open(mode))
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.close()
                raise VideoError(f"{self._path}: another run is computing this flow") from error
        return self._file

    def append(self, field: np.ndarray) -> None:
        """Add a field uint8 [2, H, W]."""
        if self.size is None:
            file = self._locked("ab")
            if os.fstat(file.fileno()).st_size >= self._HEADER.size:  # since this one began
                self.close()
                raise VideoError(f"{self._path}: another run is computing this flow")
            file.truncate(0)
            self.size = (field.shape[1], field.shape[2])
            file.write(self._HEADER.pack(self._MAGIC, self._video, *self.size))
        if field.shape != (2, *self.size):
            raise VideoError(f"{self._path}: holds fields of {self.size}, got {field.shape[1:]}")
        assert self._file is not None
        self._file.write(np.ascontiguousarray(field).tobytes())
        self._file.flush()
        self.count += 1

    def finish(self, path: Path) -> None:
        """Write the fields as an ``.npy`` file [F, 2, H, W], without holding them in memory."""
        assert self.size is not None
        shape = (self.count, 2, *self.size)
        with path.open("wb") as file, self._path.open("rb") as source:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            source.seek(self._HEADER.size)
            while block := source.read(1 << 22):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the file to the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None


def compute_flow(source: str, *, scale: int = 256, bound: float = BOUND, skip: int = 0) -> Iterator[np.ndarray]:
    """Quantised fields uint8 [2, H, W] between neighbouring frames of a video, by OpenCV's DIS ("medium").

    Args:
        source: the video. scale: short side in pixels before the flow is taken. bound: see the module's description.
        skip: fields to leave out at the beginning (their frames are decoded, no more).

    Raises:
        ImportError: no OpenCV. VideoError: the video cannot be opened or changes its size. BrokenVideoError: it breaks,
            after the fields before.
    """
    cv2 = require_cv2()
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before: np.ndarray | None = None
    with open_video(source) as reader:
        for frame in reader:
            if frame.index < skip:
                continue
            picture = resize_short_side(torch.from_numpy(frame.image)[None], scale)[0].contiguous().numpy()
            grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
            if before is not None:
                if grey.shape != before.shape:
                    raise VideoError(f"{reader.name}: its picture size changes")
                yield quantize(method.calc(before, grey, None), bound).transpose(2, 0, 1)
            before = grey
