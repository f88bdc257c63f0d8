"""Soft nearest neighbours in numpy's extended precision, and the bound within which a nearest frame may differ.

Written from the equations, one frame at a time, independently of ``rcu_ops.reference``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _extended(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(np.longdouble)


def soft_neighbors(a: Tensor, b: Tensor, temperature: float = 1.0, mask_b: Tensor | None = None) -> Tensor:
    """soft [N,T,C] in fp64, rounded once."""
    queries, keys = _extended(a), _extended(b)
    soft = np.zeros_like(queries)
    for n in range(len(queries)):
        there = slice(None) if mask_b is None else mask_b[n].numpy()
        frames = keys[n][there]
        for t in range(queries.shape[1] if len(frames) else 0):
            distance = ((queries[n, t] - frames) ** 2).sum(-1)
            z = np.exp(-(distance - distance.min()) / np.longdouble(temperature))
            soft[n, t] = (z / z.sum()) @ frames
    return torch.from_numpy(soft.astype(np.float64))


def check_indices(
    got: Tensor, a: Tensor, b: Tensor, temperature: float = 1.0, mask_b: Tensor | None = None
) -> tuple[int, int]:
    """Fail unless every index is the nearest frame to the soft neighbour, or as near as rounding can tell.

    Returns how many rows there were, and how many differed from fp64 within the bound. The bound is the usual one for
    sums of n products, n eps, on the numbers that are compared, ``sum_j z_j |b_j - b_i|^2``, plus what an error of
    n eps in the distances does to z.
    """
    eps = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
    queries, keys = _extended(a), _extended(b)
    gamma = (keys.shape[2] + keys.shape[1] + 16) * eps
    rows = excused = 0
    for n in range(len(queries)):
        where = np.arange(keys.shape[1]) if mask_b is None else np.flatnonzero(mask_b[n].numpy())
        frames = keys[n][where]
        between = ((frames[:, None] - frames[None]) ** 2).sum(-1)
        for t in range(queries.shape[1]):
            index = int(got[n, t])
            if not len(where):
                assert index == -1
                continue
            assert index in where, f"frame {t} of sample {n} maps to {index}, which is not there"
            distance = ((queries[n, t] - frames) ** 2).sum(-1)
            z = np.exp(-(distance - distance.min()) / np.longdouble(temperature))
            z /= z.sum()
            spread = z @ between
            best, mine = int(spread.argmin()), int(np.flatnonzero(where == index)[0])
            rows += 1
            if spread[mine] == spread[best]:
                assert mine == best, f"a tie went to frame {index}, not the lowest"
                continue
            anchor = z.argmax()
            scale = spread[mine] + spread[best] + between[anchor, mine] + between[anchor, best]
            wrong_z = 4 * z * (1 + (distance + distance.min()) / np.longdouble(temperature))
            bound = gamma * (scale + wrong_z @ abs(between[:, mine] - between[:, best]))
            assert spread[mine] - spread[best] <= bound, (
                f"frame {t} of sample {n} maps to {index}, farther than {where[best]} by "
                f"{float(spread[mine] - spread[best]):.3e}; rounding explains {float(bound):.3e}"
            )
            excused += 1
    return rows, excused
