"""Modules of recurrent video networks, conversion of 3D CNNs into them, and fusion for inference."""

from rcu_ops.nn.aggregators import AGGREGATORS, Aggregator, FastGRU, make_aggregator
from rcu_ops.nn.batch_norm import set_batch_norm_mode
from rcu_ops.nn.causality import register_per_frame, streaming_obstacles
from rcu_ops.nn.convert import FrameClassifier, convert_to_recurrent
from rcu_ops.nn.fuse import fuse_for_inference
from rcu_ops.nn.fuse_training import fuse_for_training
from rcu_ops.nn.gating import FeatureGate
from rcu_ops.nn.layer_choice import choose_layers
from rcu_ops.nn.nonlocal_block import NonLocalBlock
from rcu_ops.nn.recurrent_conv import FrameConv3d, RecurrentConv3d
from rcu_ops.nn.relational_fold import FoldedRelationalLSTM, fold_relations
from rcu_ops.nn.relational_lstm import RelationalLSTM
from rcu_ops.nn.residual_rnn import ResidualRNN
from rcu_ops.nn.running_mean import RunningMean
from rcu_ops.nn.srtg import SRTG
from rcu_ops.nn.stream_state import StreamPass, active_slot

__all__ = [
    "AGGREGATORS",
    "SRTG",
    "Aggregator",
    "FastGRU",
    "FeatureGate",
    "FoldedRelationalLSTM",
    "FrameClassifier",
    "FrameConv3d",
    "NonLocalBlock",
    "RecurrentConv3d",
    "RelationalLSTM",
    "ResidualRNN",
    "RunningMean",
    "StreamPass",
    "active_slot",
    "choose_layers",
    "convert_to_recurrent",
    "fold_relations",
    "fuse_for_inference",
    "fuse_for_training",
    "make_aggregator",
    "register_per_frame",
    "set_batch_norm_mode",
    "streaming_obstacles",
]
