"""SRTG: against plain PyTorch written out, its gate, its places in the blocks, its streaming forms."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rcu_ops
from rcu_ops import Streamer
from rcu_ops.models import VideoResNet, create_model
from rcu_ops.models.resnet import BLOCKS
from rcu_ops.nn import SRTG, streaming_obstacles
from tests.networks import assert_same, calibrated
from tests.tolerance import assert_close_to_reference


def recursion(module: SRTG, pooled: Tensor) -> Tensor:
    """The two LSTM layers written out: [N,T,C] -> [N,T,C]."""
    for layer in module.lstm.layers:
        w, u, bias = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0
        h = c = torch.zeros_like(pooled[:, 0])
        outputs = []
        for x in pooled.unbind(1):
            i, f, g, o = (x @ w.T + h @ u.T + bias).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        pooled = torch.stack(outputs, dim=1)
    return pooled


def consistent(a: Tensor, b: Tensor) -> bool:
    """Eqs. 4 and 5 for one sample [T,C], frame by frame, in both directions."""
    for queries, keys in ((a, b), (b, a)):
        for t, query in enumerate(queries):
            z = (-(query - keys).square().sum(1)).softmax(0)
            soft = (z[:, None] * keys).sum(0)
            if (soft - keys).square().sum(1).argmin() != t:
                return False
    return True


def written_out(module: SRTG, x: Tensor) -> Tensor:
    a = x.mean((3, 4)).transpose(1, 2)
    b = recursion(module, a)
    h = b.transpose(1, 2)[..., None, None]
    fused = x * h if module.fusion == "mul" else x + h
    if not module.gate:
        return fused
    if module.window is None:
        gate = torch.tensor([consistent(p.double(), q.double()) for p, q in zip(a, b, strict=True)])
        return torch.where(gate[:, None, None, None, None], fused, x)
    out = x.clone()
    for n in range(x.shape[0]):
        for t in range(x.shape[2]):
            start = max(0, t + 1 - module.window)
            if consistent(a[n, start : t + 1].double(), b[n, start : t + 1].double()):
                out[n, :, t] = fused[n, :, t]
    return out


def copying(module: SRTG) -> SRTG:
    """Weights that make every layer of the LSTM answer an input along an axis with an output along it."""
    c = module.channels
    with torch.no_grad():
        for name, parameter in module.lstm.named_parameters():
            parameter.zero_()
            if ".weight_ih" in name:
                parameter[2 * c : 3 * c] = 10 * torch.eye(c)
            elif ".bias_ih" in name:  # the input gate open, the past forgotten, the output gate open
                parameter[:c], parameter[c : 2 * c], parameter[3 * c :] = 10, -10, 10
    return module


def one_open_one_closed(frames: int, size: int = 3) -> Tensor:
    """Two samples [2, 6, T, size, size]: every frame on an axis of its own, and all frames on the same one."""
    x = torch.zeros(2, 6, frames, size, size)
    for t in range(frames):
        x[0, t, t] = 10 + torch.rand(size, size)
        x[1, 0, t] = 10 + torch.rand(size, size)
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": False}, {"fusion": "add"}, {"gate": False, "fusion": "add"}, {"window": 3}, {"window": 1}],
    ids=str,
)
def test_against_plain_pytorch(options: dict, dtype: torch.dtype) -> None:
    module = SRTG(5, **options).to(dtype)
    x = torch.randn(3, 5, 6, 4, 3).to(dtype)
    exact = written_out(copy.deepcopy(module).double(), x.double())
    with torch.no_grad():
        assert_same(module(x), exact, written_out(module, x))
        other = module(x.contiguous(memory_format=torch.channels_last_3d))
        assert other.is_contiguous(memory_format=torch.channels_last_3d) or module.window is not None
        assert_same(other, exact, written_out(module, x))


@pytest.mark.parametrize("options", [{}, {"fusion": "add"}, {"window": 4}, {"window": 9}], ids=str)
def test_gates_open_and_close_by_sample(options: dict) -> None:
    module = copying(SRTG(6, **options)).double()
    x = one_open_one_closed(5).double()
    y = module(x)
    torch.testing.assert_close(y, written_out(module, x))
    assert not torch.equal(y[0, :, 1:], x[0, :, 1:])
    assert torch.equal(y[1, :, 1:], x[1, :, 1:])


def test_one_frame_is_consistent() -> None:
    module = SRTG(4).double()
    x = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(
        module(x), x * recursion(module, x.mean((3, 4)).transpose(1, 2))[:, 0, :, None, None, None]
    )


def test_empty_batch() -> None:
    for options in ({"gate": False}, {"window": 2}, {}):
        assert SRTG(4, **options)(torch.empty(0, 4, 3, 2, 2)).shape == (0, 4, 3, 2, 2)


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"fusion": "add"}, {"window": 2}], ids=str)
def test_gradients(options: dict) -> None:
    module = copying(SRTG(6, **options)).double()
    x = one_open_one_closed(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
    (grad,) = torch.autograd.grad(module(x).sum(), x)
    if not options:
        assert torch.equal(grad[1], torch.ones_like(grad[1]))  # closed: nothing but the main stream
        assert not torch.equal(grad[0], torch.ones_like(grad[0]))


def test_arguments() -> None:
    for name, options in (
        ("channels", {"channels": 0}),
        ("fusion", {"channels": 3, "fusion": "max"}),
        ("window", {"channels": 3, "window": 0}),
        ("window", {"channels": 3, "window": 4, "gate": False}),
    ):
        with pytest.raises(ValueError, match=name):
            SRTG(**options)
    with pytest.raises(ValueError, match="C = 3"):
        SRTG(3)(torch.zeros(1, 4, 2, 2, 2))
    assert "window=4" in repr(SRTG(3, window=4))


# ---- in networks ----------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("block", "placement"),
    [(block, place) for block, kind in BLOCKS.items() for place in kind.placements],
)
def test_places(block: str, placement: str) -> None:
    model = VideoResNet(block, (1, 1, 1, 1), "i3d", 5, width=4, srtg=placement).eval().double()
    part = model.layer2[0]
    assert isinstance(part.srtg, SRTG)
    x = torch.randn(2, part.conv1.in_channels, 3, 8, 8, dtype=torch.float64)
    part(x)  # the number of channels suits the place
    part.srtg = Doubled()

    def at(place: str, value: Tensor) -> Tensor:
        return 2 * value if place == placement else value

    shortcut = at("res", part.downsample(x))
    out = part.bn1(part.conv1(at("start", x))).relu()
    if block == "basic":
        out = part.bn2(part.conv2(at("mid", out)))
    else:
        out = part.bn2(part.conv2(at("top", out))).relu()
        out = part.bn3(part.conv3(at("mid", out)))
    torch.testing.assert_close(part(x), at("final", (at("end", out) + shortcut).relu()))


@pytest.mark.parametrize("placement", ["top", "end", "start "])
def test_places_that_a_block_does_not_have(placement: str) -> None:
    with pytest.raises(ValueError, match=r"srtg: basic blocks have the places 'start', 'mid', 'res', 'final', got"):
        create_model("srtg_r3d_resnet34", srtg=placement)


def test_names_and_defaults() -> None:
    for family in ("r3d", "r2plus1d"):
        for depth in (34, 50, 101):
            with torch.device("meta"):
                model = create_model(f"srtg_{family}_resnet{depth}")
                plain = create_model(f"{family}_resnet{depth}", stem_pool=False, stem_mid_planes=None)
            gates = [module for module in model.modules() if isinstance(module, SRTG)]
            assert len(gates) == sum({34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth])
            assert all(gate.gate and gate.fusion == "mul" and gate.window is None for gate in gates)
            assert {block.placement for block in model.layer3} == {"final"}
            rest = {name for name, _ in model.named_parameters() if ".srtg." not in name}
            assert rest == {name for name, _ in plain.named_parameters()}


# ---- streaming ------------------------------------------------------------------------------------------------------


def causal_model(**options: object) -> VideoResNet:
    model = VideoResNet(
        "bottleneck", (1, 1, 1, 1), "rcn", 32, width=4, update="mean", srtg="final", srtg_fusion="add", **options
    )
    calibrated(model, size=16)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{"srtg_gate": False}, {"srtg_window": 3}, {"srtg_window": 1}], ids=str)
def test_any_chunks_equal_the_clip(options: dict, dtype: torch.dtype) -> None:
    model = causal_model(**options).to(dtype)
    assert model.causal
    assert not streaming_obstacles(model)
    clip = torch.randn(2, 3, 6, 16, 16).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double().frame_scores(clip.double())
        whole = model.frame_scores(clip)
        for chunks in ([1] * 6, [4, 2]):
            scores, state = [], None
            for frames in clip.split(chunks, dim=2):
                part, state = Streamer(model)(frames, state)
                scores.append(part)
            assert_same(torch.cat(scores, 2), exact, whole)


def test_streamed_gates_open_and_close() -> None:
    module = copying(SRTG(6, window=3)).double().eval()
    x = one_open_one_closed(6).double()
    state, parts = None, []
    for frames in x.split([1, 2, 3], dim=2):
        part, state = Streamer(module)(frames, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), module(x))
    # A sample that starts anew does not see its past: the second has one frame again, which is consistent.
    frame = x[:, :, :1]
    again, _ = Streamer(module)(frame, state, reset=torch.tensor([False, True]))
    torch.testing.assert_close(again[1], module(frame)[1])


def test_last_frame_of_a_window_is_that_of_the_whole_clip() -> None:
    whole, trailing = copying(SRTG(6)).double(), copying(SRTG(6, window=5)).double()
    x = one_open_one_closed(5).double()
    torch.testing.assert_close(trailing(x)[:, :, -1], whole(x)[:, :, -1])


def test_clip_gates_are_refused_by_name() -> None:
    model = causal_model().eval()
    assert not model.causal
    with pytest.raises(ValueError, match=r"layer1\.0\.srtg: its gate looks at the whole clip"):
        Streamer(model)


def test_trailing_window_equals_forward_on_the_window() -> None:
    model = VideoResNet("basic", (1, 1, 1, 1), "i3d", 7, width=4, temporal_strides=(1, 2, 2, 2), srtg="final")
    calibrated(model, size=16)
    clip = torch.randn(2, 3, 9, 16, 16)
    streamer = Streamer(model, window=4)
    with torch.no_grad():
        exact, eager = [], []
        padded = torch.cat([clip[:, :, :1].expand(-1, -1, 3, -1, -1), clip], dim=2)
        wide = copy.deepcopy(model).double()
        for t in range(9):
            eager.append(model(padded[:, :, t : t + 4]))
            exact.append(wide(padded[:, :, t : t + 4].double()))
        for chunks in ([1] * 9, [5, 4], [9]):
            state, parts = None, []
            for frames in clip.split(chunks, dim=2):
                scores, state = streamer(frames, state)
                parts.append(scores)
            assert_close_to_reference(torch.cat(parts, 2), torch.stack(exact, 2), torch.stack(eager, 2), by_sample=True)
        assert state is not None
        assert state["#window"].shape == (2, 3, 4, 16, 16)
        assert state["#frames"].tolist() == [9, 9]
        scores, _ = streamer(clip[:, :, :1], state, reset=torch.tensor([False, True]))
        torch.testing.assert_close(scores[1, :, 0], model(clip[:, :, :1].expand(-1, -1, 4, -1, -1))[1])
        with pytest.raises(ValueError, match="another window"):
            Streamer(causal_model(srtg_gate=False))(clip[:, :, :1], state)
        with pytest.raises(ValueError, match="#window"):
            Streamer(model, window=5)(clip[:, :, :1], state)
    with pytest.raises(ValueError, match="window"):
        Streamer(model, window=0)


# ---- several processes ----------------------------------------------------------------------------------------------


class Aligned(nn.Module):
    """A clip through an active and an open gate; what the operators of alignment say of two halves of its frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gated, self.open = nn.Conv3d(3, 6, 1), SRTG(6), SRTG(6, gate=False)

    def forward(self, clip: Tensor) -> Tensor:
        frames = rcu_ops.srtg_squeeze(self.open(self.gated(self.conv(clip))))
        a, b = frames.chunk(2, dim=1)
        soft, _ = rcu_ops.soft_nearest_neighbor(a, b)
        return soft.square().mean() + rcu_ops.temporal_cycle_loss(a, b, kind="classification")


def _gradients_in_a_group(rank: int, directory: str) -> None:
    folder = Path(directory)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given = torch.load(folder / "given.pt")
    for backend in ("auto", "reference"):
        model = Aligned().double()
        model.load_state_dict(given["state"])
        parallel = DistributedDataParallel(model)
        with rcu_ops.use_backend(backend):
            parallel(given["clip"][rank : rank + 1]).backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{backend}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past the interpreter's end, where gloo's threads may still run and abort the process


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes with a sample each have the gradients of one with both."""
    model, clip = Aligned().double(), torch.randn(2, 3, 6, 3, 3, dtype=torch.float64)
    torch.save({"state": model.state_dict(), "clip": clip}, tmp_path / "given.pt")
    model(clip).backward()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_gradients_in_a_group, args=(str(tmp_path),), nprocs=2)
    for backend in ("auto", "reference"):
        for rank in range(2):
            gradients = torch.load(tmp_path / f"{backend}{rank}.pt")
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert name.startswith("gated") or parameter.grad.abs().max() > 0, name  # no mean of nothing
                torch.testing.assert_close(gradients[name], parameter.grad)
