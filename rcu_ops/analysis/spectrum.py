"""Entries, diagonal and eigenvalues of the hidden-to-hidden matrices, layer by layer (paper 1, Fig. 4).

A layer whose eigenvalues are near 1 keeps what it has seen; near 0 it forgets, above 1 it grows with time.  The numbers
are of ``w_hh`` itself; with ``update="mean"`` the state is multiplied by ``w_hh / 2`` per frame, so its memory is that
of half these eigenvalues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcu_ops import report
from rcu_ops.analysis._checks import to_numpy

KEY = "weight_hh"


@dataclass(frozen=True)
class LayerSpectrum:
    """Statistics of one layer's C x C matrix; standard deviations are of the population (divided by n)."""

    name: str
    channels: int
    entries_mean: float
    entries_std: float
    diagonal_mean: float
    diagonal_std: float
    eigenvalues: np.ndarray
    """complex128 ``[C]``, largest modulus first."""

    @property
    def modulus(self) -> np.ndarray:
        """Absolute values of the eigenvalues, float64 ``[C]``."""
        return np.abs(self.eigenvalues)

    @property
    def spectral_radius(self) -> float:
        """Largest modulus: growth per frame of the slowest-fading direction."""
        return float(self.modulus.max())


def layer_spectrum(name: str, weight: Any) -> LayerSpectrum:
    """Statistics of one matrix ``[C, C]``; trailing dimensions of size 1 (``[C, C, 1, 1, 1]``) are dropped.

    Computed in float64.  Raises ValueError for a matrix that is not square, is empty, or holds NaN or infinity.
    """
    matrix = to_numpy(weight)
    shape = list(matrix.shape)
    if matrix.ndim > 2 and matrix.size == np.prod(shape[:2]):
        matrix = matrix.reshape(shape[:2])
    if matrix.ndim != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name}: expected a square matrix [C, C], got shape {shape}")
    if matrix.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {matrix.dtype}")
    matrix = matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    eigenvalues = np.linalg.eigvals(matrix).astype(np.complex128)
    order = np.lexsort((-eigenvalues.imag, -eigenvalues.real, -np.abs(eigenvalues)))
    diagonal = np.diagonal(matrix)
    return LayerSpectrum(
        name=name,
        channels=shape[0],
        entries_mean=float(matrix.mean()),
        entries_std=float(matrix.std()),
        diagonal_mean=float(diagonal.mean()),
        diagonal_std=float(diagonal.std()),
        eigenvalues=eigenvalues[order],
    )


def recurrent_weights(source: torch.nn.Module | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """``(layer, weight)`` of every recurrent layer, in the order of the module or mapping.

    ``source`` is a module (every submodule that has a tensor ``weight_hh``) or a state dict (every key that is
    ``weight_hh`` or ends in ``.weight_hh``).  The layer's name is the key without ``.weight_hh``; the prefix
    ``module.`` of wrapped models is dropped.  Raises ValueError when there is none.
    """
    found = list(_module_weights(source) if isinstance(source, torch.nn.Module) else _mapping_weights(source))
    if not found:
        raise ValueError(f"no recurrent layer found: expected at least one weight named {KEY!r}")
    return [(name.removeprefix("module."), weight) for name, weight in found]


def _module_weights(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, submodule in module.named_modules():
        weight = getattr(submodule, KEY, None)
        if isinstance(weight, torch.Tensor):
            yield name or type(submodule).__name__, weight


def _mapping_weights(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, weight in mapping.items():
        if key == KEY:
            yield KEY, weight
        elif key.endswith("." + KEY):
            yield key.removesuffix("." + KEY), weight


def recurrent_spectra(source: torch.nn.Module | Mapping[str, Any]) -> list[LayerSpectrum]:
    """:func:`layer_spectrum` of every recurrent layer of a module or state dict, see :func:`recurrent_weights`."""
    return [layer_spectrum(name, weight) for name, weight in recurrent_weights(source)]


def natural_order(names: Sequence[str]) -> list[str]:
    """Names in network order as far as names tell it: the stem first, then numbers compared as numbers.

    For files that do not keep the order of their entries.
    """

    def key(name: str) -> tuple[Any, ...]:
        bare = name.removeprefix("module.")
        is_stem = bare.startswith(("stem", "conv1"))
        parts = re.split(r"(\d+)", bare)
        return (not is_stem, [int(part) if part.isdigit() else part for part in parts])

    return sorted(names, key=key)


def write_csv(path: str | Path, spectra: Sequence[LayerSpectrum]) -> None:
    """One row per layer in network order: mean and standard deviation of entries, diagonal, eigenvalues."""
    pairs = ("entries", "diagonal", "eigenvalue_modulus", "eigenvalue_real")
    spread = [f"{pair}_{kind}" for pair in pairs for kind in ("mean", "std")]
    header = ("layer", "name", "channels", *spread, "spectral_radius")
    rows = [
        (
            index + 1,
            s.name,
            s.channels,
            s.entries_mean,
            s.entries_std,
            s.diagonal_mean,
            s.diagonal_std,
            float(s.modulus.mean()),
            float(s.modulus.std()),
            float(s.eigenvalues.real.mean()),
            float(s.eigenvalues.real.std()),
            s.spectral_radius,
        )
        for index, s in enumerate(spectra)
    ]
    report.write_csv(path, header, rows)


def write_eigenvalues_csv(path: str | Path, spectra: Sequence[LayerSpectrum]) -> None:
    """Every eigenvalue: ``layer, name, real, imaginary, modulus``."""
    rows = [
        (index + 1, s.name, float(value.real), float(value.imag), float(abs(value)))
        for index, s in enumerate(spectra)
        for value in s.eigenvalues
    ]
    report.write_csv(path, ("layer", "name", "real", "imaginary", "modulus"), rows)


def plot(path: str | Path, spectra: Sequence[LayerSpectrum]) -> None:
    """Three panels as PNG: entries and diagonal, eigenvalues (mean ± std per layer), eigenvalues in the plane."""
    figure, (matrix, eigen, plane) = report.new_figure(
        width=12.6, height=4.1, ncols=3, gridspec_kw={"width_ratios": (1, 1, 1.12)}
    )
    layers = np.arange(1, len(spectra) + 1)

    def bars(axes: Any, index: int, shift: float, mean: list[float], std: list[float], label: str) -> None:
        style = report.series(index)
        axes.errorbar(layers + shift, mean, yerr=std, **style, elinewidth=1.0, capsize=2.5, label=label)

    bars(matrix, 0, -0.12, [s.entries_mean for s in spectra], [s.entries_std for s in spectra], "all entries")
    bars(matrix, 1, 0.12, [s.diagonal_mean for s in spectra], [s.diagonal_std for s in spectra], "diagonal")
    matrix.set_ylabel("w_hh, mean ± std")
    modulus = [s.modulus for s in spectra]
    real = [s.eigenvalues.real for s in spectra]
    bars(eigen, 2, -0.12, [float(m.mean()) for m in modulus], [float(m.std()) for m in modulus], "modulus")
    bars(eigen, 3, 0.12, [float(r.mean()) for r in real], [float(r.std()) for r in real], "real part")
    eigen.axhline(1, color=report.GREY, linewidth=1.0, linestyle=(0, (2, 2)), zorder=0)
    eigen.set_ylabel("eigenvalues of w_hh, mean ± std")
    low, high = eigen.get_ylim()
    eigen.set_ylim(min(low, 0.0), max(high, 1.1))
    for axes in (matrix, eigen):
        axes.set_xticks(report.integer_ticks(len(spectra)))
        axes.set_xlim(0.4, len(spectra) + 0.6)
        axes.set_xlabel("recurrent layer, in network order")
        axes.legend(
            frameon=False, fontsize=9, labelcolor=report.INK, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )
    _plot_plane(figure, plane, spectra)
    report.save_figure(figure, path)


def _plot_plane(figure: Any, axes: Any, spectra: Sequence[LayerSpectrum]) -> None:
    """All eigenvalues in the complex plane, coloured by depth, with the unit circle."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    circle = np.exp(2j * np.pi * np.arange(361) / 360)
    axes.plot(circle.real, circle.imag, color=report.GREY, linewidth=1.0, linestyle=(0, (2, 2)))
    norm = Normalize(1, max(2, len(spectra)))
    colours = colormaps["viridis"]
    for index, s in enumerate(spectra):
        axes.scatter(
            s.eigenvalues.real, s.eigenvalues.imag, s=6, color=colours(norm(index + 1)), alpha=0.75, linewidths=0
        )
    reach = 1.1 * max(1.0, *(s.spectral_radius for s in spectra))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="real part", ylabel="imaginary part")
    if len(spectra) > 1:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.8, pad=0.02, ticks=[1, len(spectra)])
        bar.set_label("recurrent layer", size=9, color=report.INK, labelpad=-8)
        bar.ax.tick_params(labelsize=9, labelcolor=report.INK, color=report.GREY)
        bar.outline.set_visible(False)
