"""recurrent_conv_frame: one frame of a layer by one kernel, on every instruction set; where fused models take it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rcu_ops
from rcu_ops import _library
from rcu_ops.models import VideoResNet
from rcu_ops.nn import FrameConv3d, RecurrentConv3d, frame_kernel, fuse_for_inference
from rcu_ops.nn.fuse import FusedFrameConv3d
from rcu_ops.reference.recurrent_conv_frame import _rows as unpacked
from rcu_ops.reference.recurrent_conv_frame import pack_pairs, pack_panels, recurrent_conv_frame
from tests.tolerance import assert_close_to_reference

OPERATOR = torch.ops.rcu_ops.recurrent_conv_frame
built = pytest.mark.skipif(
    not _library.has_kernel("recurrent_conv_frame", "CPU"), reason="the kernel library was not built"
)
ISAS = [
    isa for isa in ("portable", "avx2", "avx512") if isa in (_library.native().cpu_isas() if _library.native() else [])
]

PAIRS = [isa for isa in ("avx512_bf16",) if _library.native() and isa in _library.native().cpu_isas()]
on_pairs = pytest.mark.skipif(not PAIRS, reason="this processor does not multiply pairs of bf16")

# n, c, h, w, o, kernel, stride, padding: rows of 1 to 30 positions (whole blocks, halves, overlaps, one by one), panels
# half full, runs of one to several pieces, kernels that are not square, strides that skip rows.
SHAPES = [
    (1, 3, 19, 30, 16, (7, 7), (2, 2), (3, 3)),
    (2, 20, 7, 7, 48, (3, 3), (1, 1), (1, 1)),
    (1, 70, 5, 11, 32, (3, 3), (1, 1), (1, 1)),
    (3, 7, 4, 30, 16, (1, 3), (1, 1), (0, 2)),
    (1, 33, 9, 29, 80, (1, 1), (2, 2), (0, 0)),
    (1, 5, 12, 60, 32, (2, 4), (3, 2), (1, 0)),
    (2, 210, 3, 16, 224, (1, 1), (1, 1), (0, 0)),
    (1, 390, 1, 1, 80, (1, 1), (1, 1), (0, 0)),
    (2, 20, 5, 4, 48, (3, 3), (1, 1), (1, 1)),
]

CASES = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(SHAPES[0], torch.float16), (SHAPES[2], torch.float16)]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def arguments(
    shape: tuple[Any, ...], dtype: torch.dtype, recurrent: bool, sliced: bool = False, pairs: bool = False
) -> dict[str, Any]:
    n, c, h, w, o, kernel, stride, padding = shape
    size = [(x + 2 * p - k) // s + 1 for x, k, s, p in zip((h, w), kernel, stride, padding, strict=True)]
    weight = (torch.randn(o, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    weight_hh = (torch.randn(o, o) / o**0.5).to(dtype) if recurrent else None
    if weight_hh is not None:
        weight_hh.diagonal()[::2] += 0.75  # some within [1/2, 2], some not

    def frames(channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(n, channels, height, width).to(dtype)
        if not sliced:
            return last(x)
        wide = last(torch.full((n + 1, channels + 3, height + 2, width + 1), torch.nan, dtype=dtype))
        view = wide[1:, 2 : 2 + channels, 1:-1, :-1]
        return view.copy_(x)

    return {
        "frame": frames(c, h, w, dtype),
        "panels": (pack_pairs if pairs else pack_panels)(weight, weight_hh),
        "bias": torch.randn(o),
        "state": frames(o, *size, torch.float32) if recurrent else None,
        "scale": torch.randn(o) if recurrent else None,
        "shift": torch.randn(o) if recurrent else None,
        "residual": frames(o, *size, dtype) if n != 2 else None,
        "channels": o,
        "geometry": [*kernel, *stride, *padding],
        "mean": n == 1,
        "relu": n != 3,
    }


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}


def rounded(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Eager PyTorch: a convolution and a recurrence at the frame's dtype, the latter from an fp32 state."""
    dtype = given["frame"].dtype
    alone: dict[str, Any] = dict.fromkeys(("state", "scale", "shift", "residual"))
    rows = unpacked(given["panels"], given["state"] is not None, given["channels"])
    w = rows[-given["channels"] :]
    if given["state"] is not None:
        alone["panels"] = F.pad(rows[: -given["channels"]], (0, -given["channels"] % 32))
        alone["panels"] = alone["panels"].unflatten(1, (-1, 32)).transpose(0, 1).contiguous()
    y = recurrent_conv_frame(**{**given, **alone, "relu": False})[0]
    if given["state"] is not None:
        y = y.float() + torch.einsum("io,nihw->nohw", w, given["state"])
        y = y * 0.5 if given["mean"] else y
    h = y.float()
    if given["scale"] is not None:
        y = (h * given["scale"].view(-1, 1, 1) + given["shift"].view(-1, 1, 1)).to(dtype)
    y = y if given["residual"] is None else y + given["residual"]
    return (y.relu() if given["relu"] else y).to(dtype), h


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_equals_the_definition(
    shape: tuple[Any, ...], dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and states, from dense and sliced tensors, bit for bit the same from both and on one thread."""
    monkeypatch.setenv("RCU_OPS_CPU_ISA", isa)
    _equals_the_definition(shape, dtype, False, monkeypatch)


@built
@on_pairs
@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_equal_the_definition(shape: tuple[Any, ...], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for products of bf16 pairs."""
    monkeypatch.setenv("RCU_OPS_CPU_ISA", isa)
    _equals_the_definition(shape, torch.bfloat16, True, monkeypatch)


def _equals_the_definition(
    shape: tuple[Any, ...], dtype: torch.dtype, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCU_OPS_POISON_SCRATCH", "1")
    for recurrent in (False, True):
        given = arguments(shape, dtype, recurrent, sliced=recurrent, pairs=pairs)
        got = OPERATOR(**given)
        exact, eager = recurrent_conv_frame(**wide(given)), rounded(given)
        assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=torch.channels_last)
        assert_close_to_reference(got[0], exact[0], eager[0])
        if not recurrent:
            assert got[1].numel() == 0
            continue
        assert_close_to_reference(got[1], exact[1], eager[1], "state")
        dense = given | {k: last(given[k]) for k in ("frame", "state", "residual") if given[k] is not None}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            again = OPERATOR(**dense)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@built
def test_nan_and_infinity_stay_where_they_are_seen() -> None:
    """Padding is zeros, and NaN beside it reaches the positions that see it, and no others."""
    given = arguments((1, 16, 9, 9, 16, (3, 3), (1, 1), (1, 1)), torch.float32, True)
    given["relu"] = False
    given["frame"][0, 3, 4, 8] = torch.nan
    y, _ = OPERATOR(**given)
    bad = torch.zeros(9, 9, dtype=torch.bool)
    bad[3:6, 7:] = True
    assert torch.equal(y[0].isnan().all(0), bad) and torch.equal(y[0].isnan().any(0), bad)


@pytest.mark.parametrize("channels", [5, 8])
def test_pairs_hold_what_panels_hold(channels: int) -> None:
    """Both layouts give back the same rows; of a diagonal in [1/2, 2] pairs hold what lies beyond 1."""
    weight, weight_hh = torch.randn(48, channels, 2, 3).bfloat16(), torch.randn(48, 48).bfloat16()
    weight_hh.diagonal().copy_(torch.linspace(-1, 3, 48))
    pairs, panels = pack_pairs(weight, weight_hh), pack_panels(weight, weight_hh)
    even = channels + channels % 2
    assert pairs.shape == (2, (6 * even + 48) // 2 + 1, 32, 2)
    rows = unpacked(pairs, True, 48)
    assert torch.equal(rows[-48:], weight_hh.t().float())
    assert torch.equal(rows[:-48].unflatten(0, (6, even))[:, :channels].flatten(0, 1), unpacked(panels, True, 48)[:-48])
    ones = pairs[:, -1, :, 0].flatten()[:48].bool()
    assert torch.equal(ones, (weight_hh.diagonal() >= 0.5) & (weight_hh.diagonal() <= 2)) and 0 < ones.sum() < 48


@built
@on_pairs
@pytest.mark.parametrize("isa", PAIRS)
def test_pairs_add_up_a_state_that_is_not_finite(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W v where v holds an infinity, as fp32 has it, NaN where it holds NaN, and nothing of either elsewhere."""
    monkeypatch.setenv("RCU_OPS_CPU_ISA", isa)
    o = 48
    weight, weight_hh = torch.randn(o, 8, 3, 3).bfloat16() / 8, torch.randn(o, o).bfloat16() / 8
    weight_hh.diagonal().copy_(torch.linspace(0.5, 2, o))
    weight_hh[5, 5] = 1  # stored as zero
    given = arguments((1, 8, 9, 9, o, (3, 3), (1, 1), (1, 1)), torch.bfloat16, True)
    given |= {"relu": False, "mean": False, "panels": pack_pairs(weight, weight_hh)}
    given["state"][0, 5, 2, 3] = torch.inf
    given["state"][0, 7, 8, 8] = torch.nan
    (y, v), (exact_y, exact_v) = OPERATOR(**given), recurrent_conv_frame(**given)
    assert torch.equal(v.isnan(), exact_v.isnan()) and torch.equal(v.isinf(), exact_v.isinf())
    assert torch.equal(v[v.isinf()], exact_v[v.isinf()]) and v[0, :, 2, 3].isinf().all()
    assert v.isfinite().sum() == o * 79 and torch.equal(y.isfinite(), exact_y.isfinite())


@built
@on_pairs
@pytest.mark.parametrize("isa", PAIRS)
def test_pairs_ask_for_their_processor_and_dtype(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCU_OPS_CPU_ISA", isa)
    given = arguments((1, 8, 9, 9, 16, (3, 3), (1, 1), (1, 1)), torch.bfloat16, True, pairs=True)
    torch.library.opcheck(OPERATOR.default, tuple(given.values()))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        OPERATOR(**given)
    assert counter.get_total_flops() == 2 * 81 * 16 * (9 * 8 + 16)
    for name, value in {"panels": given["panels"][:, :-1], "frame": given["frame"].float()}.items():
        with pytest.raises(RuntimeError, match=name):
            OPERATOR(**{**given, name: value, "residual": None})
    monkeypatch.setenv("RCU_OPS_CPU_ISA", "avx512")
    with pytest.raises(RuntimeError, match="pairs of bf16, which it does not multiply"):
        OPERATOR(**given)


@built
def test_empty_batch_and_errors() -> None:
    given = arguments((1, 8, 9, 9, 16, (3, 3), (1, 1), (1, 1)), torch.float32, True)
    empty = {k: v[:0] if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in given.items()}
    assert OPERATOR(**empty)[0].shape == (0, 16, 9, 9)
    wrong = {
        "frame": given["frame"].double(),
        "panels": given["panels"][:, :-1],
        "bias": given["bias"][:-1],
        "state": given["state"][..., :-1],
        "residual": given["residual"].bfloat16(),
        "channels": 15,
        "geometry": [3, 3, 1, 1, 1],
    }
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            OPERATOR(**{**given, name: value})
    with pytest.raises(RuntimeError, match="adjacent channels"):
        OPERATOR(**{**given, "frame": given["frame"].contiguous()})


@built
def test_operator_check_and_flops() -> None:
    given = arguments((1, 8, 9, 9, 16, (3, 3), (1, 1), (1, 1)), torch.float32, True)
    torch.library.opcheck(OPERATOR.default, tuple(given.values()))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        OPERATOR(**given)
    assert counter.get_total_flops() == 2 * 81 * 16 * (9 * 8 + 16)


class Layers(nn.Module):
    """A recurrent block with a strided shortcut, as in a video ResNet."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.a = RecurrentConv3d(16, 32, 3, stride=2, padding=1, bias=True, update=update)
        self.bn_a = nn.BatchNorm3d(32)
        self.b = RecurrentConv3d(32, 32, 3, padding=1, update=update)
        self.bn_b = nn.BatchNorm3d(32)
        self.shortcut = FrameConv3d(16, 32, 1, stride=(1, 2, 2))
        self.bn_s = nn.BatchNorm3d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn_a(self.a(x)))
        return torch.relu(self.bn_b(self.b(y)) + self.bn_s(self.shortcut(x)))


@built
@pytest.mark.parametrize("update", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_take_the_kernel(dtype: torch.dtype, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame at a time on adjacent channels: the whole clip's numbers, whoever's weights change in between."""
    monkeypatch.setattr(frame_kernel, "why_not_here", lambda dtype: None)
    calls = []
    run = frame_kernel.OPERATOR
    monkeypatch.setattr(frame_kernel, "OPERATOR", lambda *args: calls.append(args[0].shape) or run(*args))
    model = Layers(update).eval().to(dtype)
    for norm in (model.bn_a, model.bn_b, model.bn_s):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 2)
    clip = torch.randn(1, 16, 4, 18, 15).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    fused = fuse_for_inference(model)
    streamer = rcu_ops.Streamer(fused)
    with torch.no_grad():
        for _ in range(2):
            found, state = [], None
            for t in range(4):
                y, state = streamer(clip[:, :, t : t + 1], state)
                found.append(y)
            exact = copy.deepcopy(model).double()(clip.double())
            with rcu_ops.use_backend("reference"):
                eager = model(clip)
            assert_close_to_reference(torch.cat(found, 2), exact, eager)
            for source, target in ((model.a, fused.a), (model.b, fused.b)):
                source.weight_hh.mul_(-0.5)  # in place: the kept panels are made anew
                target.weight_hh.mul_(-0.5)
    assert len(calls) == 2 * (3 + 3 + 4)  # the first frame has no state; the shortcut needs none


@built
def test_streams_that_do_not_take_it_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_kernel, "why_not_here", lambda dtype: None)
    layer = fuse_for_inference(Layers("sum").eval()).a
    frame = last(torch.randn(1, 16, 18, 15))

    def reason(frame: Tensor = frame, **changed: Any) -> str:
        for name, value in changed.items():
            monkeypatch.setattr(layer, name, value)
        return frame_kernel.why_not(layer, frame, layer.weight_xh) or ""

    with torch.no_grad():
        assert reason() == ""
        assert "several frames" in reason(frame.expand(2, -1, -1, -1))
        assert "adjacent" in reason(frame.contiguous())
        assert "shorter" in reason(frame[..., :11])
        with rcu_ops.use_backend("reference"):
            assert "reference" in reason()
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in reason()
        assert "groups" in reason(groups=2)


@built
def test_frames_of_another_size_or_number_get_their_own_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_kernel, "why_not_here", lambda dtype: None)
    layer = fuse_for_inference(Layers("sum").eval()).a
    sizes = {(1, 18, 15): (9, 8), (1, 20, 15): (10, 8), (1, 20, 11): None, (2, 20, 15): None}
    with torch.no_grad():
        for (frames, *size), expected in [*sizes.items(), *sizes.items()]:
            plan = layer._panels.plan(layer, torch.randn(1, 16, frames, *size), layer.weight_xh)
            assert (None if plan is None else plan.shape) == (None if expected is None else (1, 32, *expected))


@built
@on_pairs
def test_heads_of_one_position_take_it_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled to one position, a frame in bf16 goes by pairs; in fp32, and where rows are short, it does not."""
    monkeypatch.setenv("RCU_OPS_CPU_ISA", "avx512_bf16")
    monkeypatch.setattr(frame_kernel, "why_not_here", lambda dtype: None)
    monkeypatch.setattr(frame_kernel, "arithmetic", lambda dtype: (dtype, ""))
    frame_kernel._in_pairs.cache_clear()
    head = fuse_for_inference(nn.Sequential(nn.Dropout(), FrameConv3d(40, 48, 1), nn.BatchNorm3d(48)).eval().bfloat16())
    layer = next(m for m in head.modules() if isinstance(m, FusedFrameConv3d))
    one = torch.randn(1, 40, 1, 1, 1).bfloat16()
    calls = []
    run = frame_kernel.OPERATOR
    monkeypatch.setattr(frame_kernel, "OPERATOR", lambda *args: calls.append(args[0].shape) or run(*args))
    with torch.no_grad():
        weight, bias = layer.weight[:, :, 0, 0, 0].double(), layer.bias.double()
        exact = weight @ one.flatten().double() + bias
        eager = F.conv3d(one, layer.weight, layer.bias).flatten()
        assert_close_to_reference(head(one).flatten(), exact, eager)
        assert calls == [(1, 40, 1, 1)]
        assert "shorter" in (frame_kernel.why_not(layer, last(torch.randn(1, 40, 1, 2).bfloat16()), layer.weight) or "")
        assert "shorter" in (frame_kernel.why_not(layer.float(), one[:, :, 0].float(), layer.weight) or "")
    frame_kernel._in_pairs.cache_clear()


def test_the_rule_of_processor_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, pairs = frame_kernel._why_not_on.__wrapped__, frame_kernel._in_pairs.__wrapped__
    monkeypatch.setattr(frame_kernel, "_in_pairs", pairs)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert "float64" in rule(torch.float64, "avx512")
    monkeypatch.setattr(frame_kernel, "arithmetic", lambda dtype: (dtype, ""))
    monkeypatch.setattr(frame_kernel._library, "has_kernel", lambda *_: True)
    for isa in ("avx512", "avx512_bf16", "amx"):
        assert rule(fp32, isa) is None and not pairs(fp32, isa)
    assert rule(bf16, "avx512_bf16") is None and pairs(bf16, "avx512_bf16")
    for isa in ("avx512", "amx"):
        assert "bfloat16" in rule(bf16, isa) and not pairs(bf16, isa)
    for isa in (None, "portable", "avx2"):
        assert "AVX-512" in rule(fp32, isa)
    monkeypatch.setattr(frame_kernel, "arithmetic", lambda dtype: (fp32, ""))
    for isa in ("avx512", "avx512_bf16"):  # bf16 is slow: widened to fp32
        assert rule(bf16, isa) is None and not pairs(bf16, isa)


@built
def test_resnet_streams_bit_for_bit_from_a_fork() -> None:
    """Two calls from one state give the same scores and leave that state alone."""
    model = fuse_for_inference(VideoResNet(num_classes=8).eval())
    streamer = rcu_ops.Streamer(model)
    clip = torch.randn(1, 3, 2, 112, 112).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        _, state = streamer(clip[:, :, :1])
        kept = {name: value.clone() for name, value in state.items()}
        first, second = streamer(clip[:, :, 1:], state)[0], streamer(clip[:, :, 1:], state)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(state[name], value) for name, value in kept.items())
