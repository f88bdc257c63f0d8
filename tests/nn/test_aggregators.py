"""The aggregators of clips: against their equations written out, step = forward, gradients, full graphs, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rcu_ops
from rcu_ops.nn import AGGREGATORS, Aggregator, FastGRU, make_aggregator
from tests import process_group

C, CLASSES = 8, 5


def made(name: str, **options: object) -> Aggregator:
    aggregator = make_aggregator(name, C, CLASSES, **options).double().eval()
    for module in aggregator.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return aggregator


def inputs(aggregator: Aggregator, clips: int = 4, batch: int = 2) -> Tensor:
    shape = (C, 2, 3, 3) if aggregator.takes == "features" else (CLASSES,)
    return torch.randn(batch, clips, *shape, dtype=torch.float64)


def transition(aggregator: Aggregator, o: Tensor, x: Tensor) -> Tensor:
    """One application of the paper's f; for the LSTM o is (h, c) joined."""
    w = dict(aggregator.named_parameters())
    if isinstance(aggregator, FastGRU):

        def mix(weight: Tensor, value: Tensor) -> Tensor:
            return F.conv3d(value, weight[:, :, None, None, None])

        vo = w.get("weight_vo", w["weight_vx"])
        r1, z1 = (mix(w["weight_ux"], x) + mix(w["weight_uo"], o)).relu().chunk(2, 1)
        r, z = mix(w["weight_w"][0], r1).sigmoid(), mix(w["weight_w"][1], z1).sigmoid()
        return (1 - z) * o + z * (mix(w["weight_vx"], x) + mix(vo, r * o)).tanh()
    if type(aggregator).__name__ == "ConcatAggregator":
        a, b = w["project.weight"].split(C, dim=1)
        return aggregator.bn(F.conv3d(o, a) + F.conv3d(x, b)).relu()
    if type(aggregator).__name__ == "GRUAggregator":
        from_x = F.linear(x, w["from_x.weight"], w["from_x.bias"]).split(C, 1)
        g = w["gates_from_o.weight"].split(C, 0)
        r, z = (from_x[0] + o @ g[0].T).sigmoid(), (from_x[1] + o @ g[1].T).sigmoid()
        return (1 - z) * o + z * (from_x[2] + (r * o) @ w["candidate_from_o.weight"].T).tanh()
    cell = nn.LSTMCell(C, C).double()
    cell.load_state_dict({name.removesuffix("_l0").rpartition(".")[2]: p for name, p in w.items() if "lstm" in name})
    return torch.cat(cell(x, tuple(o.chunk(2, 1))), 1)


def written_out(aggregator: Aggregator, x: Tensor) -> Tensor:
    if aggregator.takes == "scores":
        return torch.stack([x[:, : k + 1].mean(1) for k in range(x.shape[1])], 1)
    kind = type(aggregator).__name__
    if kind in ("LSTMAggregator", "GRUAggregator"):
        x = x.mean((3, 4, 5))
    o = x[:, 0] if kind != "LSTMAggregator" else torch.cat([x[:, 0], torch.zeros_like(x[:, 0])], 1)
    scores = []
    for k in range(x.shape[1]):
        o = o if k == 0 else transition(aggregator, o, x[:, k])
        read = o[:, :C]
        scores.append(aggregator.fc(read.mean((2, 3, 4)) if read.dim() == 5 else read))
    return torch.stack(scores, 1)


CASES = [(name, {}) for name in AGGREGATORS] + [
    ("fast_gru", {"tie_candidate": True}),
    ("fast_gru", {"reduction": 2, "recompute": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equations(name: str, options: dict) -> None:
    aggregator = made(name, **options)
    x = inputs(aggregator)
    scores, _ = aggregator(x)
    assert scores.shape == (2, 4, CLASSES)
    torch.testing.assert_close(scores, written_out(aggregator, x))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_step_and_chunks_equal_forward(name: str) -> None:
    aggregator = made(name)
    x = inputs(aggregator, clips=5)
    expected, last = aggregator(x)
    state, scores = None, []
    for x_k in x.unbind(1):
        score, state = aggregator.step(x_k, state)
        scores.append(score)
    torch.testing.assert_close(torch.stack(scores, 1), expected)
    first, state = aggregator(x[:, :2])
    rest, after = aggregator(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)
    assert after.keys() == last.keys()
    for key, value in after.items():
        assert value.shape[0] == 2
        torch.testing.assert_close(value, last[key])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradients(name: str) -> None:
    aggregator = made(name)
    x = inputs(aggregator, clips=3, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregator(x)[0], (x,), fast_mode=True)
    if name != "average":  # which has nothing to train
        aggregator.train()(x.detach().repeat(2, *[1] * (x.dim() - 1)))[0].square().sum().backward()
        assert all(parameter.grad is not None for parameter in aggregator.parameters())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_full_graphs(name: str) -> None:
    torch.compiler.reset()
    aggregator = made(name)
    x = inputs(aggregator)
    compiled = torch.compile(lambda x: aggregator(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), aggregator(x)[0])


def test_average_of_many_16_bit_scores_is_their_mean() -> None:
    aggregator = make_aggregator("average", C, CLASSES)
    x = torch.full((1, 4096, CLASSES), 3.0, dtype=torch.bfloat16)
    assert torch.equal(aggregator(x)[0], x)


def test_states_are_those_of_the_operator() -> None:
    module = FastGRU(C, CLASSES, reduction=2)
    x = torch.randn(1, 3, C, 1, 2, 2)
    weights = (module.weight_ux, module.weight_uo, module.weight_w, module.weight_vx, module.weight_vo)
    assert module.weight_w.shape == (2, C, C // 2)
    for got, expected in zip(module.states(x), rcu_ops.fast_gru(x, *weights), strict=True):
        assert torch.equal(got, expected)
    assert len(list(FastGRU(C, CLASSES, tie_candidate=True).parameters())) == len(list(module.parameters())) - 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="aggregator: expected one of 'average'"):
        make_aggregator("sum", C, CLASSES)
    with pytest.raises(ValueError, match="channels, num_classes"):
        make_aggregator("gru", 0, CLASSES)
    with pytest.raises(ValueError, match="reduction"):
        FastGRU(C, CLASSES, reduction=3)
    for name in AGGREGATORS:
        aggregator = made(name)
        for bad in (inputs(aggregator)[:, 0], inputs(aggregator)[:, :0], inputs(aggregator)[:, :, :3]):
            with pytest.raises(ValueError, match="x: expected"):
                aggregator(bad)
        _, state = aggregator(inputs(aggregator))
        with pytest.raises(ValueError, match="state: holds 2 samples, but x has N = 1"):
            aggregator(inputs(aggregator)[:1], state)
        with pytest.raises(ValueError, match=r"state: expected the entries .*, got none"):
            aggregator(inputs(aggregator), {})


def test_checkpointing_and_ddp_change_no_gradient() -> None:
    plain = FastGRU(C, num_classes=CLASSES)
    again, parallel = copy.deepcopy(plain), copy.deepcopy(plain)
    x = torch.randn(3, 4, C, 2, 3, 3)
    plain(x)[0].square().sum().backward()
    checkpoint(again, x, use_reentrant=False)[0].square().sum().backward()
    with process_group.alone():
        DistributedDataParallel(parallel)(x)[0].square().sum().backward()
    for wanted, *found in zip(*(m.parameters() for m in (plain, again, parallel)), strict=True):
        assert wanted.grad.any() and all(torch.equal(p.grad, wanted.grad) for p in found)
