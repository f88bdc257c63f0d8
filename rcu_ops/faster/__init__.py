"""Two-stage training of FASTER: a cache of what frozen networks say of clips, training of aggregators from it, curves.

The command is ``rcu-ops faster``.
"""

from __future__ import annotations

from rcu_ops.faster.cache import ClipCache, ClipSampling, write_cache
from rcu_ops.faster.training import AggregatorTraining, aggregate_scores

__all__ = ["AggregatorTraining", "ClipCache", "ClipSampling", "aggregate_scores", "write_cache"]
