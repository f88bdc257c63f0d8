"""fuse_for_training: the same training, by one operator per recurrent layer, on the same parameters."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import rcu_ops
from rcu_ops.models import create_model
from rcu_ops.nn import RecurrentConv3d, fuse_for_inference, fuse_for_training
from rcu_ops.streaming import Streamer
from tests.networks import perturb, small_model


class Block(nn.Module):
    """Two recurrent layers around a shortcut, with every option of the normalisation."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm3d, **options) -> None:
        super().__init__()
        self.conv1 = RecurrentConv3d(3, 6, 3, padding=1, update="mean")
        self.bn1 = norm(6, **options)
        self.conv2 = RecurrentConv3d(6, 6, 3, padding=1, bias=True)
        self.bn2 = norm(6, **options)
        self.shortcut = nn.Conv3d(3, 6, 1)
        perturb(self)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


def train(model: nn.Module, clip: Tensor, steps: int = 2) -> list[Tensor]:
    """Outputs and the gradients of every step, without changing the parameters."""
    found = []
    for step in range(steps):
        model.zero_grad()
        y = model(clip * (step + 1))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False, "eps": 1e-3}, {"momentum": 0.5}],
    ids=str,
)
def test_training_is_that_of_the_separate_layers(options) -> None:
    model = Block(**options).double()
    twin = copy.deepcopy(model)
    fused = fuse_for_training(twin)
    clip = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    for a, b in zip(train(model, clip), train(fused, clip), strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), (other, b) in zip(model.state_dict().items(), fused.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(model.eval()(clip), fused.eval()(clip))
    model.train(), fused.train()
    model.bn1.eval(), fused.bn1.eval()  # a frozen normalisation in a model that trains
    torch.testing.assert_close(model(clip), fused(clip))
    torch.testing.assert_close(model.state_dict(), fused.state_dict())


def test_nothing_is_left_unfused_and_everything_is_shared() -> None:
    model = create_model("rcn_resnet18", num_classes=5, width=4)
    structure = repr(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse_for_training(model)
    assert repr(model) == structure
    assert type(fused) is type(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    mine = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert {name: value.data_ptr() for name, value in fused.state_dict().items()} == mine
    assert all(a is b for a, b in zip(model.parameters(), fused.parameters(), strict=True))
    calls: list[object] = []
    for name, module in fused.named_modules():
        if isinstance(module, RecurrentConv3d) and "head" not in name:
            module.register_forward_hook(lambda *args, name=name: calls.append(name))
    fused.train()(torch.randn(1, 3, 2, 32, 32)).sum().backward()
    assert calls == []


def test_a_network_trains_and_streams() -> None:
    model = small_model("rcn_resnet18", dtype=torch.float64)
    fused = fuse_for_training(model)
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for a, b in zip(train(twin.train(), clip, 1), train(fused.train(), clip, 1), strict=True):
        torch.testing.assert_close(a, b)
    model.eval(), fused.eval()
    with torch.no_grad():
        whole, inferred = model.frame_scores(clip), fuse_for_inference(model).frame_scores(clip)
        first, state = Streamer(fused)(clip[:, :, :1])
        second, _ = Streamer(model)(clip[:, :, 1:], state)
    torch.testing.assert_close(inferred, whole)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)


def test_compile_copy_and_pickle() -> None:
    torch._dynamo.reset()
    fused = fuse_for_training(Block(momentum=None))
    clip = torch.randn(2, 3, 4, 5, 5)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    compiled = torch.compile(copies.pop(), backend="aot_eager", fullgraph=True)
    for other in (*copies, compiled):
        twin = copy.deepcopy(fused)
        for a, b in zip(train(twin, clip), train(other, clip), strict=True):
            torch.testing.assert_close(a, b)


def test_what_stays_unfused() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    with pytest.warns(UserWarning, match="fuse_for_training left these modules as they are.*Dropping"):
        assert isinstance(fuse_for_training(Dropping()), Dropping)
    hooked = Block()
    seen: list[int] = []
    hooked.bn1.register_forward_hook(lambda *_: seen.append(1))
    hooked.conv2.register_forward_hook(lambda *_: seen.append(1))
    fuse_for_training(hooked)(torch.randn(2, 3, 2, 4, 4))
    assert seen == [1, 1]
    activated = nn.Sequential(RecurrentConv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
    activated[2].register_forward_hook(lambda *_: seen.append(2))
    fuse_for_training(activated)(torch.randn(2, 3, 2, 4, 4))
    assert seen == [1, 1, 2]
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fuse_for_training(3)


def test_a_single_value_per_channel_is_refused_as_by_batch_norm() -> None:
    block = Block()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 3, 1, 1, 1))
    with pytest.raises(ValueError, match="more than one value per channel"):
        fuse_for_training(block)(torch.randn(1, 3, 1, 1, 1))


def _train_in_a_group(rank: int, directory: str) -> None:
    folder = Path(directory)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given = torch.load(folder / "given.pt")
    for backend in ("auto", "reference"):
        model = Block(nn.SyncBatchNorm).double()
        model.load_state_dict(given["state"])
        fused = fuse_for_training(model)
        clip = given["clip"][:1] if rank == 0 else given["clip"][1:]
        grad = given["grad"][:1] if rank == 0 else given["grad"][1:]
        with rcu_ops.use_backend(backend):
            y = fused(clip)
            y.backward(grad)
        gradients = {name: p.grad for name, p in fused.named_parameters()}
        torch.save({"y": y.detach(), "grads": gradients, "state": fused.state_dict()}, folder / f"{backend}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past the interpreter's end, where gloo's threads may still run and abort the process


def test_processes_share_statistics(tmp_path: Path) -> None:
    """Two processes with one sample and two are one process with three."""
    model = Block().double()
    clip = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64) + 2
    state = copy.deepcopy(model.state_dict())
    y = model(clip)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.save({"state": state, "clip": clip, "grad": grad}, tmp_path / "given.pt")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_train_in_a_group, args=(str(tmp_path),), nprocs=2)
    for backend in ("auto", "reference"):
        parts = [torch.load(tmp_path / f"{backend}{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sum(part["grads"][name] for part in parts), parameter.grad, msg=name)
        for part in parts:
            torch.testing.assert_close(part["state"], model.state_dict())
