"""Tangents of forward-mode differentiation: right in the reference, refused by the kernels, dropped by nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rcu_ops
from rcu_ops.nn import fuse_for_inference
from tests.networks import small_model

CLIP, WEIGHT, CHANNELS = (1, 3, 4, 2, 2), (3, 3), (3,)
GATES, MAPS, STATE = (2, 4, 3, 4), (2, 4, 3, 4), (2, 3, 4)
CLIPS, WEIGHTS = (1, 3, 4, 1, 2, 2), [(2, 4), (2, 4), (2, 4, 1), (4, 4), (4, 4)]

CALLS: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "recurrent_conv": (rcu_ops.recurrent_conv, [CLIP, WEIGHT]),
    "recurrent_conv_affine_act": (rcu_ops.recurrent_conv_affine_act, [CLIP, WEIGHT, CHANNELS, CHANNELS]),
    "recurrent_conv_batch_norm": (rcu_ops.recurrent_conv_batch_norm, [CLIP, WEIGHT, CHANNELS, CHANNELS]),
    "fast_gru": (rcu_ops.fast_gru, [CLIPS, *WEIGHTS]),
    "fast_gru_step": (rcu_ops.fast_gru_step, [CLIPS[:1] + CLIPS[2:]] * 2 + WEIGHTS),
    "nonlocal_attention": (rcu_ops.nonlocal_attention, [(2, 3, 4), (2, 5, 4), (2, 5, 4)]),
    "relational_lstm_step": (rcu_ops.relational_lstm_step, [GATES, MAPS, MAPS, GATES, STATE]),
    "soft_nearest_neighbor": (rcu_ops.soft_nearest_neighbor, [(2, 3, 4), (2, 5, 4)]),
    "temporal_cycle_loss": (rcu_ops.temporal_cycle_loss, [(2, 3, 4), (2, 5, 4)]),
    "srtg_squeeze": (rcu_ops.srtg_squeeze, [CLIP]),
    "srtg_fuse": (rcu_ops.srtg_fuse, [CLIP, (1, 4, 3)]),
}


def _first(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]  # type: ignore[index]


def _tangent(call: Callable[..., object], args: list[Tensor], directions: list[Tensor]) -> Tensor | None:
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, d) for a, d in zip(args, directions, strict=True)]
        return forward_ad.unpack_dual(_first(call(*duals))).tangent


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_right_and_kernels_refuse(name: str) -> None:
    call, shapes = CALLS[name]
    torch.manual_seed(0)
    args = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    directions = [torch.randn_like(a) for a in args]
    with rcu_ops.use_backend("reference"):
        got = _tangent(call, args, directions)
        step = 1e-6
        ahead, behind = (
            _first(call(*(a + sign * step * d for a, d in zip(args, directions, strict=True)))) for sign in (1, -1)
        )
    assert got is not None
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    with rcu_ops.use_backend("auto"):
        if rcu_ops.explain(name, *args).backend == "reference":
            pytest.skip("no kernel here")
        with pytest.raises(NotImplementedError, match=r"has no jvp .* take rcu_ops\.use_backend\('reference'\)"):
            _tangent(call, args, directions)
        with pytest.raises(NotImplementedError, match="has no jvp"):
            torch.func.jvp(lambda *a: _first(call(*a)), tuple(args), tuple(directions))
        # Within a dual level, what has no tangent runs as ever.
        with forward_ad.dual_level():
            _first(call(*args))


def test_the_gate_passes_no_tangent_on() -> None:
    a = torch.randn(2, 3, 4)
    assert _tangent(lambda a: rcu_ops.cycle_consistency(a, a.detach()).gate, [a], [a]) is None


def test_kept_weights_of_fused_models() -> None:
    """Convolutions on weights in a library's layout have no derivative: they stand back."""
    plain = small_model("rcn_resnet18", dtype=torch.float32)
    model = fuse_for_inference(plain)
    clip = torch.randn(1, 3, 1, 32, 32)
    with rcu_ops.use_backend("reference"):
        got = _tangent(model, [clip], [clip])
        wanted = _tangent(plain.double(), [clip.double()], [clip.double()])
    assert got is not None and wanted is not None
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
