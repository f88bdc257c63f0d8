"""Batch normalisation by moving statistics while training ("partial BN" of the segment networks)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("batch", "moving", "frozen")


class MovingBatchNorm3d(nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that normalises by its moving statistics in training too.

    The batch moves them by ``momentum``, a small number (0.001), and with 0 not at all; nor does a single number per
    channel, which has no variance. In evaluation it is ``nn.BatchNorm3d``.

    Attributes:
        batch_momentum: what ``momentum`` was of the ``nn.BatchNorm3d`` that this was made of.
    """

    batch_momentum: float | None = 0.1

    def forward(self, input: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T,H,W]."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training and self.momentum and input.numel() > input.shape[1]:
            with torch.no_grad():
                wide = input.to(torch.promote_types(input.dtype, torch.float32))
                var, mean = torch.var_mean(wide, (0, 2, 3, 4))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        # Copies: backward needs the statistics of this call, which a second call of the layer would change.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def set_batch_norm_mode(model: nn.Module, mode: str, momentum: float = 0.001) -> nn.Module:
    """Choose what the batch normalisations of ``model`` do while it trains; parameters and their names stay.

    Args:
        model: changed in place, where it is no normalisation itself.
        mode: "batch": statistics of the batch, as usual, also after another mode; "moving": the moving ones, updated
            with ``momentum``; "frozen": the moving ones, never updated.
        momentum: of "moving".

    Returns:
        The model.

    Raises:
        ValueError: an unknown mode, a momentum outside of (0, 1].
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum: expected a number above 0, at most 1, got {momentum}")
    for module in model.modules():
        if mode == "batch":
            if isinstance(module, MovingBatchNorm3d):
                module.momentum = module.batch_momentum
                setattr(module, "__class__", nn.BatchNorm3d)  # noqa: B010 - for the type checker it stays what it is
            continue
        if type(module) is nn.BatchNorm3d and module.running_mean is not None:
            usual = module.momentum
            module.__class__ = MovingBatchNorm3d
            setattr(module, "batch_momentum", usual)  # noqa: B010
        if isinstance(module, MovingBatchNorm3d):
            module.momentum = momentum if mode == "moving" else 0.0
    return model
