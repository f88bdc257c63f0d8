"""fuse_for_inference: the same numbers from fewer modules."""

from __future__ import annotations

import copy
import gc
import pickle
import struct
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rcu_ops import _library
from rcu_ops.models import create_model
from rcu_ops.nn import (
    FrameConv3d,
    RecurrentConv3d,
    convert_to_recurrent,
    frame_kernel,
    fuse_for_inference,
    fuse_for_training,
    packed_conv,
)
from rcu_ops.nn.frame_kernel import Panels, Plan
from rcu_ops.nn.fuse import FusedFrameConv3d, FusedRecurrentConv3d
from rcu_ops.ops import _recurrent_conv_chunked as chunked
from rcu_ops.ops import recurrent_conv_affine_act
from rcu_ops.ops._kept import Kept
from rcu_ops.streaming import Streamer
from tests.networks import CAUSAL_MODELS, assert_same, calibrated, eager_frame_scores, perturb, small_model
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_fused_models_are_equal_and_leave_nothing_unfused(name: str) -> None:
    model = small_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse_for_inference(model)
    clip = torch.randn(6, 3, 4, 32, 32)
    exact = copy.deepcopy(model).double().frame_scores(clip.double())
    with torch.no_grad():
        assert_same(fused.frame_scores(clip), exact, model.frame_scores(clip))
    assert type(fused) is type(model)
    assert not any(isinstance(module, (RecurrentConv3d, nn.BatchNorm3d)) for module in fused.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", ["sum", "mean"])
def test_fused_network_against_plain_pytorch(dtype: torch.dtype, update: str) -> None:
    model = create_model("rcn_resnet18", num_classes=64, width=4, update=update)
    perturb(model)
    model = calibrated(model).to(dtype)
    clip = torch.randn(2, 3, 4, 32, 32).to(dtype)
    exact = eager_frame_scores(copy.deepcopy(model).double(), clip.double())
    with torch.no_grad():
        assert_same(fuse_for_inference(model).frame_scores(clip), exact, eager_frame_scores(model, clip))


def test_residual_goes_into_the_recurrent_layer() -> None:
    fused = fuse_for_inference(small_model("rcn_resnet18"))
    for block in (fused.layer1[0], fused.layer2[0]):
        calls = [node for node in block.graph.nodes if node.op in ("call_module", "call_function", "call_method")]
        assert all(node.op == "call_module" for node in calls)
        assert len(calls[-1].args) == 2
        assert isinstance(block.conv2, FusedRecurrentConv3d)
    assert isinstance(fused.layer2[0].get_submodule("downsample.0"), FusedFrameConv3d)


def test_dropout_goes() -> None:
    """It does nothing in evaluation mode."""
    block = nn.Sequential(FrameConv3d(4, 4, 1), nn.BatchNorm3d(4), nn.Dropout3d(), nn.ReLU(), nn.Dropout()).eval()
    fused = fuse_for_inference(block)
    assert not any(isinstance(module, (nn.Dropout, nn.Dropout3d)) for module in fused.modules())
    x = torch.randn(2, 4, 3, 5, 5)
    assert_close_to_reference(fused(x), copy.deepcopy(block).double()(x.double()), block(x))


def test_the_old_model_is_untouched() -> None:
    model = small_model("rcn_resnet18")
    before, structure = copy.deepcopy(model.state_dict()), repr(model)
    fused = fuse_for_inference(model)
    for parameter in fused.parameters():
        parameter.data.add_(1)
    assert repr(model) == structure
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_streams_move_between_a_model_and_its_fused_form() -> None:
    model = small_model("rcn_resnet18", dtype=torch.float64)
    fused = fuse_for_inference(model)
    clip = torch.randn(2, 3, 5, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = model.frame_scores(clip)
        _, state = Streamer(model)(clip[:, :, :2])
        second, state = Streamer(fused)(clip[:, :, 2:4], state)
        third, _ = Streamer(model)(clip[:, :, 4:], state)
    torch.testing.assert_close(torch.cat([second, third], 2), whole[:, :, 2:])


def test_copies_and_pickles() -> None:
    fused = fuse_for_inference(small_model("rcn_resnet18"))
    clip = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        scores = fused(clip)
        assert torch.equal(copy.deepcopy(fused)(clip), scores)
        assert torch.equal(pickle.loads(pickle.dumps(fused))(clip), scores)
        other = fuse_for_inference(small_model("rcn_resnet18"))
        other.load_state_dict(fused.state_dict())
        assert torch.equal(other(clip), scores)


def test_changed_weights_are_seen() -> None:
    """The kept layouts of weights follow changes in place."""
    fused = fuse_for_inference(small_model("rcn_resnet18"))
    clip = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        before = fused(clip)
        for parameter in fused.parameters():
            parameter.mul_(1.5)
        after = fused(clip)
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(fused)(clip))  # a copy starts without kept layouts


@torch.no_grad()
def test_other_weights_in_the_place_of_the_last_ones_are_seen() -> None:
    """functional_call's temporaries, freed after each call, lie where those of the call before lay."""
    fused = fuse_for_inference(small_model("rcn_resnet18"))
    frames = torch.randn(1, 3, 2, 32, 32)
    for scale in (0.5, 2.0, 0.25, 1.0):
        weights = {name: value * scale for name, value in fused.state_dict().items()}
        twin = copy.deepcopy(fused)
        twin.load_state_dict(weights)
        assert torch.equal(torch.func.functional_call(fused, weights, (frames,)), twin(frames))
        del weights

    kept, memory, made = Kept(), bytearray(16), []
    for value in (1.0, 2.0):
        memory[:4] = struct.pack("f", value)
        weight = torch.frombuffer(memory, dtype=torch.float32)
        made += [kept.get((weight,), None, weight.clone)[0].item() for _ in range(2)]
        del weight
    assert made == [1.0, 1.0, 2.0, 2.0]


def test_threads_that_keep_other_forms_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may put its own form, or plan, in the place of one that has just been found."""
    kept, weight = Kept(), torch.ones(2)

    class Form:
        def __hash__(self) -> int:
            kept.clear()
            return 1

    form = Form()
    assert [kept.get((weight,), form, lambda: "made") for _ in range(2)] == ["made", "made"]

    panels, layer = Panels(), fuse_for_inference(FrameConv3d(16, 16, 3, padding=1).eval())
    frame = torch.randn(1, 16, 1, 8, 8)

    class Processor:
        def __eq__(self, other: object) -> bool:
            panels._planned = ((), Plan("another thread's", False, [], (1, 0, 0, 0)))
            return True

    monkeypatch.setattr(frame_kernel, "_isa", Processor)
    plan = Plan(None, False, [], (1, 16, 8, 8))
    monkeypatch.setattr(frame_kernel, "_make_plan", lambda *_: plan)
    with torch.no_grad():
        assert [panels.plan(layer, frame, layer.weight) for _ in range(2)] == [plan, plan]


def test_weights_loaded_under_inference_mode_are_seen() -> None:
    """Nothing counts writes to tensors that were made there."""
    with torch.inference_mode():
        fused, other = (fuse_for_inference(small_model("rcn_resnet18")) for _ in range(2))
        for parameter in other.parameters():
            parameter.mul_(1.5)
        clip = torch.randn(1, 3, 1, 32, 32)
        for model in (fused, other):
            Streamer(model)(clip, Streamer(model)(clip)[1])
        fused.load_state_dict(other.state_dict())
        assert torch.equal(fused(clip), other(clip))
        states = [Streamer(model)(clip)[1] for model in (fused, other)]
        scores = [Streamer(model)(clip, state)[0] for model, state in zip((fused, other), states, strict=True)]
        assert torch.equal(*scores)


def test_weights_changed_in_place_under_inference_mode_are_seen() -> None:
    with torch.inference_mode():
        layers = RecurrentConv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), FrameConv3d(16, 16, 3, padding=1)
        fused = fuse_for_inference(nn.Sequential(*layers).eval())
        frame = torch.randn(1, 16, 1, 8, 8)

        def second(model: nn.Module) -> Tensor:
            streamer = Streamer(model)
            return streamer(frame, streamer(frame)[1])[0]

        before = second(fused)
        for parameter in fused.parameters():
            parameter.mul_(1.5)
        assert torch.equal(second(fused), second(copy.deepcopy(fused)))
        assert not torch.equal(second(fused), before)


@pytest.mark.skipif(not _library.has_kernel("recurrent_conv", "CPU"), reason="the library has no CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_powers_of_the_recurrent_weight_are_kept(
    inference: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where long clips run in chunks, as on a GPU: made once, the same numbers, anew after a change, gone with it."""
    monkeypatch.setenv("RCU_OPS_CHUNK", "3")
    monkeypatch.setenv("RCU_OPS_CHUNK_LIBRARY", "1")
    made: list[tuple[int, int]] = []
    make = chunked._powers
    monkeypatch.setattr(chunked, "_powers", lambda m, count, d: made.append((count, len(m))) or make(m, count, d))
    with torch.inference_mode() if inference else torch.no_grad():
        conv = RecurrentConv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)).to(dtype).eval()
        fused, clip = FusedRecurrentConv3d(conv, None, relu=True), torch.randn(1, 3, 11, 6, 6).to(dtype)

        first = fused(clip)
        assert made == [(3, 8)] and torch.equal(fused(clip), first) and made == [(3, 8)]
        if inference:
            fused.load_state_dict({name: value * 0.5 for name, value in fused.state_dict().items()})
        else:
            fused.weight_hh.mul_(0.5)
        second = fused(clip)
        assert len(made) == 2 and not torch.equal(second, first)
        assert torch.equal(copy.deepcopy(fused)(clip), second) and len(made) == 3
        monkeypatch.setenv("RCU_OPS_CHUNK", "4")
        fused(clip)
        assert made[3:] == [(4, 8)] and len(fused._powers._forms) == 1
        # Another weight, and no module: nothing is kept.
        x, scale = torch.randn(1, 8, 11, 2, 2).to(dtype), torch.ones(8)
        with fused._powers.offered(fused.weight_hh):
            for _ in range(2):
                recurrent_conv_affine_act(x, fused.weight_hh.clone(), scale, scale)
        assert len(made) == 6 and torch.ops.rcu_ops.recurrent_conv_powers_are_kept(fused.weight_hh.data_ptr()) is False
    kept = weakref.ref(next(iter(fused._powers._forms.values()))[0])
    del fused
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (3, 16, 9, 8), (2, 12, 1, 1), (0, 4, 5, 5)])
def test_bf16_convolutions_in_either_arithmetic(
    shape: tuple[int, ...], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors where fp32 is faster the kept weight is fp32; the result is rounded once, to bf16."""
    if not packed_conv._library_takes(torch.bfloat16):
        pytest.skip("the matrix library takes no bf16 on this processor")
    used = torch.float32 if wide else torch.bfloat16
    monkeypatch.setattr(packed_conv, "arithmetic", lambda dtype: (used, ""))
    n, c, height, width = shape
    frames, residual = torch.randn(n, c, height, width), torch.randn(n, 6, height, width)
    weight, bias = torch.randn(6, c, 1, 3, 3) / c**0.5, torch.randn(6)
    given = [value.bfloat16() for value in (frames, weight, bias, residual)]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    arguments = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}

    def plain(frames: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.relu(F.conv2d(frames, weight.squeeze(2), bias, padding=1) + residual)

    packed = packed_conv.PackedWeights()
    for _ in range(2):
        with torch.no_grad():
            got = packed_conv.conv2d_act(packed, *given[:3], **arguments, residual=given[3], relu=True)
        assert got.dtype == torch.bfloat16 and got.shape == residual.shape
        assert [kept.dtype for kept, _ in packed._forms.values()] == ([used] if n else [])
        if n:
            assert_close_to_reference(got, plain(*(v.double() for v in given)), plain(*given))
        given[1].mul_(-2)  # seen: the second round


def test_convolutions_whose_weight_is_not_kept() -> None:
    frames, residual = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 6, 5, 5).double()
    weight, bias = torch.randn(6, 4, 1, 3, 3).double(), torch.randn(6).double()
    arguments = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    packed = packed_conv.PackedWeights()
    got = packed_conv.conv2d_act(packed, frames, weight, bias, **arguments, residual=residual, relu=True)
    assert torch.equal(got, F.relu(F.conv2d(frames, weight.squeeze(2), bias, padding=1) + residual))
    assert not packed._forms


def test_arithmetic_of_bf16_convolutions_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        def __init__(self, isas: list[str], fast_pairs: bool) -> None:
            self.cpu_isas, self.cpu_multiplies_pairs = lambda: isas, lambda: fast_pairs

    def chosen(native: object, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.dtype, str]:
        monkeypatch.setattr(packed_conv._library, "native", lambda: native)
        return packed_conv.arithmetic.__wrapped__(dtype)

    monkeypatch.setattr(packed_conv, "_library_takes", lambda dtype: True)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert chosen(Processor(["avx512", "avx512_bf16"], False)) == (
        fp32,
        "this processor multiplies bf16 at half the rate of fp32",
    )
    assert chosen(Processor(["avx2", "avx512"], False)) == (fp32, "avx512 has no bf16 arithmetic")
    assert chosen(Processor(["avx512", "avx512_bf16"], True))[0] == bf16
    assert chosen(Processor(["avx512_bf16", "amx"], True))[0] == bf16
    assert chosen(Processor(["portable"], False))[0] == bf16
    assert chosen(None)[0] == bf16 and "_native" in chosen(None)[1]
    assert chosen(Processor(["avx512"], False), fp32)[0] == fp32
    monkeypatch.setattr(packed_conv, "_library_takes", lambda dtype: False)
    assert chosen(Processor(["avx512"], False)) == (
        bf16,
        "the weights of torch.bfloat16 convolutions are not kept: the matrix library does not take them",
    )


def test_fusing_then_casting_keeps_the_affine_part_in_fp32() -> None:
    model = small_model("rcn_resnet18")
    fused = fuse_for_inference(model).bfloat16()
    layer = fused.stem.conv
    assert layer.weight_xh.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, fuse_for_inference(model).stem.conv.scale)
    assert fused.double().stem.conv.scale.dtype == torch.float64


class Odd(nn.Module):
    """Additions in several spellings, a bare recurrent layer, a broadcast residual, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = RecurrentConv3d(3, 4, 3, padding=1, bias=True)
        self.bn_a = nn.BatchNorm3d(4, affine=False)
        self.b = FrameConv3d(4, 4, 3, padding=1, padding_mode="reflect")
        self.bn_b = nn.BatchNorm3d(4)
        self.c = RecurrentConv3d(4, 4, 1)
        self.d = RecurrentConv3d(4, 4, 3, padding=1, padding_mode="replicate")
        self.bn_d = nn.BatchNorm3d(4)
        self.twice = RecurrentConv3d(4, 4, 3, padding=1)
        self.bn_twice = nn.BatchNorm3d(4)
        self.e = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.bn_e = nn.BatchNorm3d(4)
        self.f = FrameConv3d(4, 4, 3, padding="same")
        self.bn_f = nn.BatchNorm3d(4)
        self.g = FrameConv3d(4, 4, 1)
        self.bn_g = nn.BatchNorm3d(4)
        self.shift = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_a(self.a(x))
        x = self.bn_b(self.b(x)).add_(x).relu_()
        x = torch.relu(self.c(x))
        x = F.relu(self.shift + self.bn_d(self.d(x)))
        x = self.bn_twice(self.twice(self.twice(x)))
        x = F.relu(self.bn_e(self.e(x)))
        x = F.relu(torch.add(x.mean((3, 4), keepdim=True), self.bn_f(self.f(x))))
        x += self.bn_b(x)
        y = self.bn_g(self.g(x))
        return y + y


def test_unusual_patterns() -> None:
    model = Odd()
    perturb(model)
    calibrated(model)
    x = torch.randn(2, 3, 4, 8, 8)
    fused = fuse_for_inference(model)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        assert_close_to_reference(fused(x), exact, model(x))
    kinds = {name: type(module) for name, module in fused.named_modules()}
    assert kinds["a"] is kinds["c"] is kinds["d"] is FusedRecurrentConv3d
    assert kinds["b"] is kinds["f"] is FusedFrameConv3d
    assert kinds["twice"] is RecurrentConv3d
    assert kinds["e"] is nn.Conv3d
    assert "bn_e" not in kinds
    assert kinds["bn_b"] is nn.BatchNorm3d  # still called by itself


class Untraceable(nn.Module):
    """Control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = RecurrentConv3d(3, 4, 3)
        self.bn = nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if y.sum() > 0 else -y


class InPlace(Untraceable):
    """The result of an in-place call is not used; dropping the call would change the result."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y.relu_()
        return y


@pytest.mark.parametrize("kind", [Untraceable, InPlace])
def test_untraceable_modules_stay_and_are_reported(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.Sequential(RecurrentConv3d(4, 4, 3), nn.BatchNorm3d(4), nn.ReLU())).eval()
    with pytest.warns(UserWarning, match=r"left these modules as they are.*: 0$"):
        fused = fuse_for_inference(model)
    assert isinstance(fused.get_submodule("0"), kind)
    x = torch.randn(1, 3, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _Standardised(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3, 4), keepdim=True)
        return F.conv3d(input, weight / weight.std(), self.bias, self.stride, self.padding)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rcn_resnet18", "i3d_resnet18", "r2plus1d_resnet18"])
def test_parametrized_weights_are_taken_as_they_are(name: str) -> None:
    model = small_model(name)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv3d):
            parametrizations.weight_norm(module)
        elif isinstance(module, RecurrentConv3d):
            parametrize.register_parametrization(module, "weight_xh", _Halved())
            parametrize.register_parametrization(module, "weight_hh", _Halved())
    clip = torch.randn(1, 3, 4, 32, 32)
    scores = model.eval()(clip)
    fused = fuse_for_inference(model)
    # What is fused is moved, cast and saved as all other weights are; halves over time stand alone.
    assert not any("original" in key for key in fused.layer2.state_dict() if ".temporal." not in key)
    torch.testing.assert_close(fused(clip), scores)
    torch.testing.assert_close(fused.double()(clip.double()).float(), scores)
    assert torch.equal(model(clip), scores)


@torch.no_grad()
def test_hooks_and_forwards_of_others_are_kept() -> None:
    model = small_model("rcn_resnet18")
    called: list[str] = []
    block = model.layer2[0]
    watched = {"conv": block.conv1, "relu": block.relu, "shortcut": block.downsample, "block": model.layer4[1]}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    clip = torch.randn(1, 3, 2, 32, 32)
    scores = model(clip)
    expected = called.copy()
    called.clear()
    fused = fuse_for_inference(model)
    assert called == []
    torch.testing.assert_close(fused(clip), scores)
    assert sorted(called) == sorted(expected) == ["block", "conv", "relu", "relu", "shortcut"]

    # A hook makes the weight: what it was when the model was fused is not what it is.
    pruned = nn.Sequential(RecurrentConv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()).eval()
    prune.l1_unstructured(pruned[0], "weight_xh", amount=0.5)
    pruned(clip)
    pruned[0].weight_xh_orig.mul_(3)
    torch.testing.assert_close(fuse_for_inference(pruned)(clip), pruned(clip))

    standardised = nn.Sequential(_Standardised(3, 8, 3), nn.BatchNorm3d(8)).eval()
    standardised[1].running_var.fill_(9)
    torch.testing.assert_close(
        fuse_for_inference(standardised)(clip[:, :, [0, 1, 0]]), standardised(clip[:, :, [0, 1, 0]])
    )


@pytest.mark.parametrize("prepare", [fuse_for_inference, fuse_for_training])
def test_weights_with_a_graph_of_gradients_are_copied(prepare) -> None:
    model = nn.Sequential(FrameConv3d(3, 4, 1), RecurrentConv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8)).eval()
    clip = torch.randn(1, 3, 2, 5, 5)
    for layer, name in ((model[0], "weight"), (model[1], "weight_xh")):
        prune.l1_unstructured(layer, name, amount=0.5)
    model(clip)
    assert not model[1].weight_xh.is_leaf
    other = prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(other(clip), model(clip))


def test_models_prepared_for_training_fuse() -> None:
    model = small_model("rcn_resnet18")
    clip = torch.randn(1, 3, 2, 32, 32)
    for prepared in (nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), fuse_for_training(model)):
        fused = fuse_for_inference(prepared)
        assert not any(isinstance(m, (RecurrentConv3d, nn.BatchNorm3d, nn.SyncBatchNorm)) for m in fused.modules())
        torch.testing.assert_close(fused(clip), model(clip))


def test_converted_networks_fuse() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    converted = calibrated(convert_to_recurrent(model))
    fused = fuse_for_inference(converted)
    assert sum(isinstance(module, FusedRecurrentConv3d) for module in fused.modules()) == 2
    x = torch.randn(1, 3, 4, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(fused.frame_scores(x), converted.frame_scores(x))


def test_baselines_fuse_too() -> None:
    model = small_model("i3d_resnet18", dtype=torch.float64)
    fused = fuse_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fused.modules())
    clip = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(clip), model(clip))


def test_shared_blocks_stay_shared() -> None:
    block = nn.Sequential(RecurrentConv3d(3, 3, 3, padding=1), nn.BatchNorm3d(3))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = nn.ModuleList([nn.ModuleDict({"block": block}), nn.ModuleDict({"block": block})])

        def forward(self, x: Tensor) -> Tensor:
            for holder in self.holder:
                x = holder["block"](x)
            return x

    model = Twice().eval()
    fused = fuse_for_inference(model)
    assert fused.holder[0]["block"] is fused.holder[1]["block"]
    x = torch.randn(1, 3, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_errors() -> None:
    model = create_model("rcn_resnet18", width=4)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fuse_for_inference(model)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1 is in training mode"):
        fuse_for_inference(model)
    with pytest.raises(TypeError, match="model"):
        fuse_for_inference(None)
