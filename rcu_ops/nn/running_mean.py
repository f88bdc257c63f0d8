"""The mean of all frames so far."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.nn.stream_state import active_slot
from rcu_ops.reference.recurrent_conv import state_dtype_of


class RunningMean(nn.Module):
    """``y_t = (x_0 + … + x_t) / (t + 1)``: temporal average pooling whose last output is the mean over the clip.

    Shape:
        [N,C,T] -> [N,C,T]; sums in fp32 (fp64 for fp64).
    """

    carries_state: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T] -> [N,C,T]."""
        slot = active_slot(self)
        wide = x.to(state_dtype_of(x.dtype))
        sums = wide.cumsum(2)
        count = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=wide.dtype).expand(x.shape[0], 1, -1)
        if slot is not None:
            before, frames = slot.read(x, (x.shape[0], x.shape[1]), "sum"), slot.read(x, (x.shape[0],), "frames")
            if before is not None and frames is not None:
                # A sum as a product with one, for which autograd keeps the one: were this recomputed by a checkpoint,
                # outside of the stream, the number of tensors kept would differ, and torch raises instead of giving the
                # gradients of a mean that begins with this chunk.
                sums = torch.addcmul(before[..., None], sums, torch.ones_like(sums))
                count = count + frames[:, None, None]
            slot.write(sums[..., -1].clone(), "sum")
            slot.write(count[:, 0, -1].clone(), "frames")
        return (sums / count).to(x.dtype)
