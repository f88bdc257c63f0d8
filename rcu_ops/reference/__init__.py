"""The operators in plain PyTorch: the definition every kernel is held against.

Nothing here knows a kernel; this package imports torch alone.
"""

from rcu_ops.reference.cycle_consistency import (
    CycleConsistency,
    cycle_back,
    cycle_back_backward,
    cycle_consistency,
    soft_nearest_neighbor,
    soft_nearest_neighbor_backward,
    temporal_cycle_loss,
)
from rcu_ops.reference.fast_gru import fast_gru, fast_gru_backward
from rcu_ops.reference.nonlocal_gates import (
    nonlocal_attention,
    nonlocal_attention_backward,
    relational_lstm_step,
    relational_lstm_step_backward,
)
from rcu_ops.reference.recurrent_conv import recurrent_conv, recurrent_conv_affine_act, recurrent_conv_backward
from rcu_ops.reference.recurrent_conv_batch_norm import recurrent_conv_batch_norm
from rcu_ops.reference.srtg import srtg_fuse, srtg_fuse_backward, srtg_squeeze

__all__ = [
    "CycleConsistency",
    "cycle_back",
    "cycle_back_backward",
    "cycle_consistency",
    "fast_gru",
    "fast_gru_backward",
    "nonlocal_attention",
    "nonlocal_attention_backward",
    "recurrent_conv",
    "recurrent_conv_affine_act",
    "recurrent_conv_backward",
    "recurrent_conv_batch_norm",
    "relational_lstm_step",
    "relational_lstm_step_backward",
    "soft_nearest_neighbor",
    "soft_nearest_neighbor_backward",
    "srtg_fuse",
    "srtg_fuse_backward",
    "srtg_squeeze",
    "temporal_cycle_loss",
]
