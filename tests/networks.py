"""Networks for tests: small, with sensible activations, and one written out without the package's modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.models import VideoResNet, create_model
from tests.tolerance import assert_close_to_reference

CAUSAL_MODELS = {
    "rcn_resnet18": {},
    "rcn_resnet18_mean_gated": {"update": "mean", "gating": True},
    "rcn_resnet18_last_four": {"recurrent_layers": ("last", 4)},
    "rcn_resnet18_random": {"hidden_init": "random", "update": "mean"},
    "rcn_resnet34": {},
    "rcn_resnet50": {},
    "rcn_resnet50_spaced": {"recurrent_layers": ("spaced", 4), "stem_pool": True},
}
"""Every causal network family and option: a registered name, perhaps with a suffix, and its arguments."""


def assert_same(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The tolerance rule; in fp64, where ``eager`` is the exact result itself, ``torch.testing``'s own tolerance."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact)
    else:
        assert_close_to_reference(got, exact, eager, by_sample=True)


def small_model(name: str, *, dtype: torch.dtype = torch.float32, classes: int = 64, width: int = 4) -> VideoResNet:
    """A causal model of CAUSAL_MODELS (or any registered one) with few planes, calibrated, in evaluation mode.

    Many classes, so that the errors the tolerance rule compares are taken over many numbers.
    """
    registered = "_".join(name.split("_")[:2])
    model = create_model(registered, num_classes=classes, width=width, **CAUSAL_MODELS.get(name, {}))
    assert isinstance(model, VideoResNet)
    perturb(model)
    return calibrated(model).to(dtype)


def perturb(model: nn.Module) -> None:
    """Recurrent weights off the identity and affine parameters off 1 and 0, so that mixing them up shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_hh"):
                parameter.mul_(0.7).add_(0.2 * torch.randn_like(parameter) / parameter.shape[0] ** 0.5)
            elif ".bn" in name or "downsample.1" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def calibrated(model: nn.Module, frames: int = 6, size: int = 32) -> nn.Module:
    """Running statistics taken from random clips, so that activations stay near 1 through any depth.

    Channels that happen to vary little get the average variance: dividing by theirs would blow up rounding errors, and
    comparisons of errors would hang on one channel.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum = 1.0
    channels = next(p for p in model.parameters() if p.dim() == 5).shape[1]
    with torch.no_grad():
        model.train()(torch.randn(4, channels, frames, size, size))
        for norm in norms:
            assert norm.running_var is not None
            norm.running_var.clamp_(min=norm.running_var.mean())
    return model.eval()


def eager_frame_scores(model: VideoResNet, clip: Tensor) -> Tensor:
    """Per-frame scores [N,K,T] of a basic-block RCN in plain PyTorch: one frame after the other, explicit states.

    Reads the model's state dict alone and calls none of its modules.
    """
    weights = dict(model.state_dict())
    states: dict[str, Tensor] = {}
    updates = {name: getattr(module, "update", None) for name, module in model.named_modules()}

    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        if f"{name}.weight_hh" not in weights:
            return F.conv2d(x, weights[f"{name}.weight"][:, :, 0], weights.get(f"{name}.bias"), stride, padding)
        y = F.conv2d(x, weights[f"{name}.weight_xh"][:, :, 0], None, stride, padding)
        if name in states:
            y = F.conv2d(states[name], weights[f"{name}.weight_hh"][:, :, None, None]) + y
            if updates[name] == "mean":
                y = y / 2
        states[name] = y
        return y

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    scores = []
    for t in range(clip.shape[2]):
        x = F.relu(norm("stem.bn", conv("stem.conv", clip[:, :, t], 2, 3)))
        for stage in range(1, 5):
            block = 0
            while f"layer{stage}.{block}.bn1.weight" in weights:
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                shortcut = x
                if f"{name}.downsample.0.weight" in weights:
                    shortcut = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride, 0))
                y = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride, 1)))
                x = F.relu(norm(f"{name}.bn2", conv(f"{name}.conv2", y, 1, 1)) + shortcut)
                block += 1
        scores.append(conv("head.conv", x.mean((2, 3), keepdim=True), 1, 0).flatten(1))
    return torch.stack(scores, dim=2)
