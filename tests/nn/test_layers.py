"""RecurrentConv3d, FrameConv3d and FeatureGate: maths, layouts, arguments, errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.nn import FeatureGate, FrameConv3d, RecurrentConv3d
from rcu_ops.nn.frames import batch_to_frames, frames_to_batch
from tests.tolerance import assert_close_to_reference

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "frame_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def explicit_loop(layer: RecurrentConv3d, x: Tensor) -> Tensor:
    """The layer in plain PyTorch: a 2D convolution per frame and a 1x1 convolution of the state."""
    h = None
    frames = []
    padding = layer.padding if isinstance(layer.padding, str) else layer.padding[1:]
    for t in range(x.shape[2]):
        frame = x[:, :, t]
        xh = F.conv2d(
            frame, layer.weight_xh[:, :, 0], layer.bias, layer.stride[1:], padding, layer.dilation[1:], layer.groups
        )
        h = xh if h is None else F.conv2d(h, layer.weight_hh[:, :, None, None]) + xh
        if layer.update == "mean" and t > 0:
            h = h / 2
        frames.append(h)
    return torch.stack(frames, dim=2)


def off_identity(layer: RecurrentConv3d) -> RecurrentConv3d:
    with torch.no_grad():
        layer.weight_hh.mul_(0.6).add_(0.3 * torch.randn_like(layer.weight_hh) / layer.weight_hh.shape[0] ** 0.5)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", ["sum", "mean"])
def test_layer_is_the_explicit_loop(layout: str, dtype: torch.dtype, update: str) -> None:
    layer = off_identity(RecurrentConv3d(6, 10, 3, stride=2, padding=1, bias=True, update=update)).to(dtype)
    x = LAYOUTS[layout](torch.randn(2, 6, 5, 9, 7).to(dtype))
    exact = explicit_loop(copy.deepcopy(layer).double(), x.double())
    with torch.no_grad():
        if dtype == torch.float64:  # the loop is no more exact than the layer
            torch.testing.assert_close(layer(x), exact)
        else:
            assert_close_to_reference(layer(x), exact, explicit_loop(layer, x))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": (1, 3, 5), "padding": (0, 1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 5, "padding": "valid", "stride": (1, 2, 3)},
        {"kernel_size": 3, "padding": 1, "groups": 2, "bias": True},
        {"kernel_size": 1},
        {"kernel_size": 7, "stride": 2, "padding": 3},
    ],
    ids=str,
)
def test_convolution_arguments(arguments: dict) -> None:
    layer = off_identity(RecurrentConv3d(4, 6, **arguments)).double()
    x = torch.randn(2, 4, 3, 12, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), explicit_loop(layer, x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(0, 1, 2), "same"])
@pytest.mark.parametrize("layer_type", [FrameConv3d, RecurrentConv3d])
def test_padding_modes_are_conv3ds(mode: str, padding: tuple[int, ...] | str, layer_type: type) -> None:
    layer = layer_type(3, 4, (1, 3, 5), padding=padding, padding_mode=mode, bias=True).double()
    conv = nn.Conv3d(3, 4, (1, 3, 5), padding=padding, padding_mode=mode).double()
    with torch.no_grad():
        conv.weight.copy_(layer.weight_xh if layer_type is RecurrentConv3d else layer.weight)
        conv.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 1, 8, 9, dtype=torch.float64)  # one frame: no recurrence yet
    torch.testing.assert_close(layer(x), conv(x))


def test_non_negative_layer_is_a_relu_rnn_at_every_position() -> None:
    layer = RecurrentConv3d(3, 5, 1).double()
    with torch.no_grad():
        layer.weight_xh.abs_()
        layer.weight_hh.uniform_(0, 0.3)
    rnn = nn.RNN(3, 5, nonlinearity="relu", bias=False, batch_first=True).double()
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(layer.weight_xh.flatten(1))
        rnn.weight_hh_l0.copy_(layer.weight_hh)
    x = torch.rand(2, 3, 6, 4, 3, dtype=torch.float64)
    by_position = rnn(x.permute(0, 3, 4, 2, 1).reshape(-1, 6, 3))[0].reshape(2, 4, 3, 6, 5)
    torch.testing.assert_close(layer(x), by_position.permute(0, 4, 3, 1, 2))


def test_identity_state_sums_or_averages_the_past() -> None:
    x = torch.randn(1, 2, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        for update in ("sum", "mean"):
            layer = RecurrentConv3d(2, 2, 1, update=update).double()
            layer.weight_xh.copy_(torch.eye(2).view(2, 2, 1, 1, 1))
            expected = x.clone()
            for t in range(1, 4):
                expected[:, :, t] += expected[:, :, t - 1]
                if update == "mean":
                    expected[:, :, t] /= 2
            torch.testing.assert_close(layer(x), expected)


def test_causal() -> None:
    layer = off_identity(RecurrentConv3d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 6, 8, 8)
    changed = x.clone()
    changed[:, :, 4:] = torch.nan
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :, :4], layer(changed)[:, :, :4])


@pytest.mark.parametrize("layout", ["channels_last_3d", "frame_major"])
def test_frames_are_a_view(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 5, 4, 6))
    frames = frames_to_batch(x)
    assert frames.data_ptr() == x.data_ptr()
    assert torch.equal(frames.view(2, 5, 3, 4, 6).transpose(1, 2), x)
    back = batch_to_frames(frames, 2, 5)
    assert back.data_ptr() == x.data_ptr()
    assert back.stride() == x.stride()


@pytest.mark.parametrize("layer_type", [FrameConv3d, RecurrentConv3d])
def test_channels_last_stays(layer_type: type) -> None:
    layer = layer_type(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("stride", [1, 2, (2, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frame_conv_is_conv3d(stride: int | tuple[int, ...], layout: str) -> None:
    frame = FrameConv3d(4, 6, 3, stride, 1, groups=2).double()
    spatial = (1, stride, stride) if isinstance(stride, int) else stride
    conv = nn.Conv3d(4, 6, (1, 3, 3), spatial, (0, 1, 1), groups=2).double()
    conv.load_state_dict(frame.state_dict())
    x = LAYOUTS[layout](torch.randn(2, 4, 7, 8, 9, dtype=torch.float64))
    torch.testing.assert_close(frame(x), conv(x))


def test_empty_batch() -> None:
    layer = RecurrentConv3d(3, 4, 3, padding=1)
    assert layer(torch.empty(0, 3, 2, 8, 8)).shape == (0, 4, 2, 8, 8)
    assert FrameConv3d(3, 4, 3)(torch.empty(0, 3, 2, 8, 8)).shape == (0, 4, 2, 6, 6)


def test_gradients() -> None:
    layer = off_identity(RecurrentConv3d(2, 3, 3, padding=1, bias=True)).double()
    x = torch.randn(1, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_initialisation() -> None:
    assert torch.equal(RecurrentConv3d(3, 64, 3).weight_hh, torch.eye(64))
    random = RecurrentConv3d(3, 256, 3, hidden_init="random", bias=True)
    assert abs(random.weight_hh.std().item() / (2 / 256) ** 0.5 - 1) < 0.05
    assert abs(random.weight_xh.std().item() / (2 / (9 * 256)) ** 0.5 - 1) < 0.1
    assert not random.bias.any()


def test_parameters_and_copies() -> None:
    layer = off_identity(RecurrentConv3d(4, 6, 3, groups=2, bias=True))
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight_xh": (6, 2, 1, 3, 3),
        "weight_hh": (6, 6),
        "bias": (6,),
    }
    other = RecurrentConv3d(4, 6, 3, groups=2, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 3, 6, 6)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (1, 6, 3, 4, 4)
    assert repr(RecurrentConv3d(4, 6, 3)) == (
        "RecurrentConv3d(4, 6, kernel_size=(1, 3, 3), stride=(1, 1, 1), bias=False, update='sum')"
    )
    assert repr(RecurrentConv3d(4, 6, 3, 2, 1, 2, 2, True, "reflect", update="mean")) == (
        "RecurrentConv3d(4, 6, kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), dilation=(1, 2, 2), "
        "groups=2, bias=True, update='mean', padding_mode='reflect')"
    )


@pytest.mark.parametrize("layer_type", [FrameConv3d, RecurrentConv3d])
@pytest.mark.parametrize(
    ("argument", "value"),
    [("kernel_size", (3, 3, 3)), ("padding", (1, 1, 1)), ("dilation", (2, 1, 1)), ("kernel_size", (3, 3))],
)
def test_temporal_extent_is_refused(layer_type: type, argument: str, value: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=argument):
        layer_type(3, 4, **{"kernel_size": 3, argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("stride", (2, 1, 1)),
        ("update", "product"),
        ("hidden_init", "zero"),
        ("padding_mode", "wrap"),
        ("padding", "full"),
        ("groups", 4),  # divides what comes in alone
        ("groups", 3),  # divides what goes out alone
        ("groups", 0),
    ],
)
def test_bad_arguments(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        RecurrentConv3d(4, 6, **{"kernel_size": 3, argument: value})


def test_same_padding_needs_stride_one() -> None:
    with pytest.raises(ValueError, match="'same'"):
        RecurrentConv3d(4, 4, 3, stride=2, padding="same")


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 2, 8, 8)])
def test_wrong_clips(shape: tuple[int, ...]) -> None:
    for layer in (RecurrentConv3d(3, 4, 3), FrameConv3d(3, 4, 3), FeatureGate(3, causal=True)):
        with pytest.raises(ValueError, match="C = 3"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("causal", [True, False])
def test_gate(causal: bool) -> None:
    gate = FeatureGate(3, causal=causal).double()
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for n, t in itertools.product(range(2), range(4)):
        pooled = x[n, :, t].mean((1, 2)) if causal else x[n].mean((1, 2, 3))
        factors = torch.sigmoid(gate.fc.weight @ pooled + gate.fc.bias)
        expected[n, :, t] = factors[:, None, None] * x[n, :, t]
    torch.testing.assert_close(gate(x), expected)
