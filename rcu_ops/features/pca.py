"""Principal components fitted in batches, so that the features need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcu_ops.cli_errors import UserError
from rcu_ops.report import replacing
from rcu_ops.tensor_files import not_safetensors

__all__ = ["PCA", "fit_pca", "load_pca", "save_pca"]


@dataclass(frozen=True)
class PCA:
    """``y = (x - mean) components^T``.

    Attributes:
        mean: float32 [F]. components: float32 [D,F], orthonormal rows. explained: float32 [D], the share of the
        variance each component explains.
    """

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[K,F] -> [K,D]; ValueError for another size."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: expected [K,{len(self.mean)}], got {list(features.shape)}")
        return (features - self.mean) @ self.components.T


def fit_pca(batches: Iterable[np.ndarray], components: int) -> PCA:
    """Fit by scikit-learn's ``IncrementalPCA``.

    Args:
        batches: features [n,F], any n >= 0; they are joined to batches of at least ``2 * components`` rows.
        components: D.

    Raises:
        UserError: scikit-learn is not installed, or there are fewer rows or columns than components.
    """
    try:
        from sklearn.decomposition import IncrementalPCA
    except ImportError as error:
        raise UserError("PCA needs scikit-learn: pip install 'rcu-ops[features]'") from error
    if components < 1:
        raise UserError(f"--pca: expected at least 1, got {components}")
    solver = IncrementalPCA(n_components=components)
    rows = 0
    for batch in _joined(batches, components):
        if min(batch.shape) < components:
            raise UserError(
                f"--pca: {components} components need at least as many clips and as large a feature, got "
                f"{batch.shape[0]} clips of {batch.shape[1]}"
            )
        solver.partial_fit(batch)
        rows += len(batch)
    if not rows:
        raise UserError("--pca: there are no features")
    parts = (solver.mean_, solver.components_, solver.explained_variance_ratio_)
    mean, axes, explained = (np.ascontiguousarray(part, dtype=np.float32) for part in parts)
    return PCA(mean, axes, explained)


def _joined(batches: Iterable[np.ndarray], components: int) -> Iterator[np.ndarray]:
    """Batches of at least ``2 * components`` rows; what is left over at the end joins the last one."""
    enough = 2 * components
    held: list[np.ndarray] = []
    ready: np.ndarray | None = None
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= enough:
            if ready is not None:
                yield ready
            ready, held = np.concatenate(held), []
    rest = [*([] if ready is None else [ready]), *held]
    if rest:
        yield np.concatenate(rest)


def save_pca(path: Path, pca: PCA) -> None:
    """Write a safetensors file with ``mean``, ``components`` and ``explained``."""
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        save_file({"mean": pca.mean, "components": pca.components, "explained": pca.explained}, temporary)


def load_pca(path: Path) -> PCA:
    """Read what :func:`save_pca` wrote; UserError for anything else."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        pca = PCA(arrays["mean"], arrays["components"], arrays["explained"])
    except SafetensorError as error:
        raise UserError(f"{path} {not_safetensors(path, error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as principal components: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: holds no principal components: there is no {error} in it") from error
    if pca.components.ndim != 2 or pca.components.shape[1:] != pca.mean.shape:
        raise UserError(f"{path}: its components and mean do not fit each other")
    return pca
