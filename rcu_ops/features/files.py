"""One file of features per video, grown clip by clip.

While a video is under way its rows lie in ``NAME.part``: raw little-endian float32 after a header with their size. A
row that a kill cut off is dropped and computed again; the whole rows before it are kept.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from rcu_ops.cli_errors import UserError
from rcu_ops.report import replacing
from rcu_ops.tensor_files import not_safetensors
from rcu_ops.video.sample import spread_over

__all__ = [
    "FORMATS",
    "FeaturePart",
    "feature_files",
    "features_shape",
    "read_features",
    "select_steps",
    "write_features",
]

FORMATS = ("safetensors", "npy")

_HEADER = struct.Struct("<8sI")
_MAGIC = b"rcufeat1"


class FeaturePart:
    """Rows of features of a video that is under way.

    Args:
        path: the file of the rows; an existing one is gone on with.

    Attributes:
        rows: how many there are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        self.rows = 0
        if path.is_file() and path.stat().st_size >= _HEADER.size:
            with path.open("r+b") as file:
                magic, self._size = _HEADER.unpack(file.read(_HEADER.size))
                if magic != _MAGIC or self._size < 1:
                    raise UserError(f"{path}: this is not a file of features under way; remove it")
                self.rows = (path.stat().st_size - _HEADER.size) // (4 * self._size)
                file.truncate(_HEADER.size + 4 * self._size * self.rows)

    def append(self, features: np.ndarray) -> None:
        """Add rows [n,F]; they are on the disk when this returns."""
        if self._size == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._size = features.shape[1]
            self._path.write_bytes(_HEADER.pack(_MAGIC, self._size))
        if features.shape[1] != self._size:
            raise UserError(f"{self._path}: holds features of size {self._size}, got {features.shape[1]}")
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(features, dtype="<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(features)

    def read(self) -> np.ndarray:
        """All rows, float32 [rows,F]."""
        data = np.fromfile(self._path, dtype="<f4", offset=_HEADER.size)
        return data.reshape(self.rows, self._size).astype(np.float32)

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


def write_features(path: Path, features: np.ndarray) -> None:
    """Features [K,F] as ``.safetensors`` (under the name ``features``) or ``.npy``; whole or not at all."""
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, features)
        else:
            from safetensors.numpy import save_file

            save_file({"features": np.ascontiguousarray(features)}, temporary)


def read_features(path: Path) -> np.ndarray:
    """What :func:`write_features` wrote, float32 [K,F]; UserError for anything else."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            try:
                found = load_file(path)["features"]
            except SafetensorError as error:
                raise UserError(f"{path} {not_safetensors(path, error)}") from error
            except KeyError as error:
                raise UserError(f"{path}: holds no features: there is no {error} in it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as features: {error}") from error
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind != "f":
        raise UserError(f"{path}: expected features [K,F], got {found.dtype} {list(found.shape)}")
    return found.astype(np.float32, copy=False)


def features_shape(path: Path) -> tuple[int, int]:
    """[K,F] of a file of features, without reading them."""
    if path.suffix == ".npy":
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    else:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            shape = tuple(file.get_slice("features").get_shape())
    return int(shape[0]), int(shape[1])


def feature_files(folder: Path) -> list[Path]:
    """Every file of features below a folder, sorted; those of other runs in it (``pca_…``) are not among them."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".npy")
        and not any(part.startswith((".", "pca_")) for part in path.relative_to(folder).parts)
    )


def select_steps(features: np.ndarray, steps: int) -> np.ndarray:
    """The sequence that a recurrent network reads: ``x_t = a_sigma(t)``, [K,F] -> [T,F]."""
    return features[spread_over(len(features), steps).numpy()]
