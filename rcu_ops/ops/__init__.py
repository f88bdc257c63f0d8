"""The operators: schema, fake, checks, backend choice, autograd and the public functions."""

from rcu_ops.ops import _schema
from rcu_ops.ops._registry import OPERATORS, Explanation, current_backend, explain, use_backend
from rcu_ops.ops._warmup import warmup
from rcu_ops.ops.fast_gru import fast_gru, fast_gru_step
from rcu_ops.ops.nonlocal_gates import nonlocal_attention, relational_lstm_step
from rcu_ops.ops.recurrent_conv import recurrent_conv, recurrent_conv_affine_act

_schema.load_kernels()

__all__ = [
    "OPERATORS",
    "Explanation",
    "current_backend",
    "explain",
    "fast_gru",
    "fast_gru_step",
    "nonlocal_attention",
    "recurrent_conv",
    "recurrent_conv_affine_act",
    "relational_lstm_step",
    "use_backend",
    "warmup",
]
