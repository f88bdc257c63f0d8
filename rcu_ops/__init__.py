"""rcu-ops: kernels, modules and networks for recurrent video models that stream one frame at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rcu_ops._version import __version__

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as _error:  # not installed, or one of its libraries is missing
    # `rcu-ops` is part of this package and tells it in one line: what needs torch raises when it is asked for.
    _why_no_torch: Exception | None = _error
else:
    _why_no_torch = None
    from rcu_ops.ops import (
        cycle_consistency,
        explain,
        fast_gru,
        fast_gru_step,
        nonlocal_attention,
        recurrent_conv,
        recurrent_conv_affine_act,
        recurrent_conv_batch_norm,
        relational_lstm_step,
        soft_nearest_neighbor,
        srtg_fuse,
        srtg_squeeze,
        temporal_cycle_loss,
        use_backend,
        warmup,
    )

if TYPE_CHECKING:
    from rcu_ops import models, nn, reference, streaming
    from rcu_ops.models import create_model, list_models, load_weights
    from rcu_ops.nn import convert_to_recurrent, fuse_for_inference, fuse_for_training
    from rcu_ops.streaming import Streamer

_LAZY = {
    "Streamer": "rcu_ops.streaming",
    "convert_to_recurrent": "rcu_ops.nn",
    "create_model": "rcu_ops.models",
    "fuse_for_inference": "rcu_ops.nn",
    "fuse_for_training": "rcu_ops.nn",
    "list_models": "rcu_ops.models",
    "load_weights": "rcu_ops.models",
}
_LAZY_MODULES = ("analysis", "models", "nn", "reference", "streaming", "video")

__all__ = [
    "Streamer",
    "__version__",
    "analysis",
    "convert_to_recurrent",
    "create_model",
    "cycle_consistency",
    "explain",
    "fast_gru",
    "fast_gru_step",
    "fuse_for_inference",
    "fuse_for_training",
    "list_models",
    "load_weights",
    "models",
    "nn",
    "nonlocal_attention",
    "recurrent_conv",
    "recurrent_conv_affine_act",
    "recurrent_conv_batch_norm",
    "reference",
    "relational_lstm_step",
    "soft_nearest_neighbor",
    "srtg_fuse",
    "srtg_squeeze",
    "streaming",
    "temporal_cycle_loss",
    "use_backend",
    "video",
    "warmup",
]


def __getattr__(name: str) -> Any:
    # Modules and models load when first touched: importing rcu_ops brings the operators and nothing heavier.
    if _why_no_torch is not None and name in __all__:
        raise ImportError(f"rcu_ops.{name}: PyTorch cannot be imported: {_why_no_torch}") from _why_no_torch
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"rcu_ops.{name}")
    raise AttributeError(f"module 'rcu_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
