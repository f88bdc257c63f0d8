"""The video networks by name, and loading of weights into them."""

from rcu_ops.models.c3d import C3D
from rcu_ops.models.faster import Faster
from rcu_ops.models.registry import create_model, list_models, register_model
from rcu_ops.models.relational import RelationalTwoBranch
from rcu_ops.models.res_lstm import ResLSTM
from rcu_ops.models.resnet import VideoResNet
from rcu_ops.models.resnet_v2 import TemporalSegmentNetwork
from rcu_ops.models.weights import LoadReport, load_weights

__all__ = [
    "C3D",
    "Faster",
    "LoadReport",
    "RelationalTwoBranch",
    "ResLSTM",
    "TemporalSegmentNetwork",
    "VideoResNet",
    "create_model",
    "list_models",
    "load_weights",
    "register_model",
]
