"""The operators: schema, fake, checks, backend choice, autograd and the public functions."""

from rcu_ops.ops import _schema
from rcu_ops.ops._registry import OPERATORS, Explanation, current_backend, explain, use_backend
from rcu_ops.ops._warmup import warmup
from rcu_ops.ops.cycle_consistency import cycle_consistency, soft_nearest_neighbor, temporal_cycle_loss
from rcu_ops.ops.fast_gru import fast_gru, fast_gru_step
from rcu_ops.ops.nonlocal_gates import nonlocal_attention, relational_lstm_step
from rcu_ops.ops.recurrent_conv import recurrent_conv, recurrent_conv_affine_act
from rcu_ops.ops.recurrent_conv_batch_norm import recurrent_conv_batch_norm
from rcu_ops.ops.recurrent_conv_frame import OPERATOR as _FRAME  # noqa: F401 - defines the operator
from rcu_ops.ops.srtg import srtg_fuse, srtg_squeeze

_schema.load_kernels()

__all__ = [
    "OPERATORS",
    "Explanation",
    "current_backend",
    "cycle_consistency",
    "explain",
    "fast_gru",
    "fast_gru_step",
    "nonlocal_attention",
    "recurrent_conv",
    "recurrent_conv_affine_act",
    "recurrent_conv_batch_norm",
    "relational_lstm_step",
    "soft_nearest_neighbor",
    "srtg_fuse",
    "srtg_squeeze",
    "temporal_cycle_loss",
    "use_backend",
    "warmup",
]
