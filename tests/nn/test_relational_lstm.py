"""The Relational LSTM and the non-local block: against equations, nn.LSTM, loops; steps, streams, numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rcu_ops import Streamer
from rcu_ops.models import VideoResNet, create_model
from rcu_ops.nn import NonLocalBlock, RelationalLSTM, RunningMean, fold_relations
from tests import process_group
from tests.networks import assert_same, calibrated


def small(dtype: torch.dtype = torch.float64, **options: object) -> RelationalLSTM:
    module = RelationalLSTM(6, 4, 3, **options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or name.startswith("bn"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        if module.bn is not None:
            module.bn.running_mean.normal_()
            module.bn.running_var.uniform_(0.5, 2)
    return module.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, normalize: str) -> Tensor:
    if normalize == "softmax":
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return query @ key.mT @ value / key.shape[-2]


def by_equation_3(module: RelationalLSTM, x: Tensor) -> Tensor:
    """H_1 … H_T through the 1x1 convolution, gate by gate and frame by frame, [N,C,T,H,W]."""
    n, _, t, height, width = x.shape
    if module.bn is not None:
        bn = module.bn
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    maps_x = [part.chunk(4) for part in module.weight_x.split(module.sizes_x)]
    maps_h = [part.chunk(4) for part in module.weight_h.split(module.sizes_h)]
    zeros = [torch.zeros(len(w), dtype=x.dtype) for w in (module.weight_x, module.weight_h)]
    bias_x, bias_h = (
        zero if bias is None else bias for zero, bias in zip(zeros, (module.bias_x, module.bias_h), strict=True)
    )
    biases_x = [part.chunk(4) for part in bias_x.split(module.sizes_x)]
    biases_h = [part.chunk(4) for part in bias_h.split(module.sizes_h)]
    h = c = x.new_zeros(n, height * width, module.hidden_channels)
    outputs = []
    for step in range(t):
        frame = x[:, :, step].flatten(2).mT
        gates = []
        for gate in range(4):
            theta, phi, g, theta_h = (F.linear(frame, m[gate], b[gate]) for m, b in zip(maps_x, biases_x, strict=True))
            phi_h, g_h = (F.linear(h, m[gate], b[gate]) for m, b in zip(maps_h, biases_h, strict=True))
            gates.append(attend(theta, phi, g, module.normalize) + attend(theta_h, phi_h, g_h, module.normalize))
        i, f, o, new = (*(each.sigmoid() for each in gates[:3]), gates[3].tanh())
        c = f * c + i * new
        h = o * c.tanh()
        y = h if module.conv is None else F.linear(h, module.conv.weight)
        outputs.append(y.mT.unflatten(2, (height, width)))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": "count"}, {"bias": True}, {"norm": False, "project": False}],
    ids=["default", "count", "bias", "bare"],
)
def test_equation_3(options: dict[str, object], dtype: torch.dtype) -> None:
    module = small(dtype, **options)
    x = torch.randn(8, 6, 3, 4, 3).to(dtype)
    with torch.no_grad():
        exact = by_equation_3(copy.deepcopy(module).double(), x.double())
        assert_same(module(x), exact, by_equation_3(module, x))
        assert_same(module(x, last_only=True), exact[:, :, -1:], by_equation_3(module, x)[:, :, -1:])


def library_lstm(module: RelationalLSTM) -> nn.LSTM:
    """nn.LSTM (gates i, f, g, o) with the maps g(X) and g(H): attention over a single key is its value."""
    lstm = nn.LSTM(module.channels, module.hidden_channels, batch_first=True, bias=False, dtype=torch.float64)
    order = [0, 1, 3, 2]
    g_x = module.weight_x.split(module.sizes_x)[2].chunk(4)
    g_h = module.weight_h.split(module.sizes_h)[1].chunk(4)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.cat([g_x[index] for index in order]))
        lstm.weight_hh_l0.copy_(torch.cat([g_h[index] for index in order]))
    return lstm


def test_at_one_position_it_is_an_lstm() -> None:
    module = small(norm=False, project=False)
    x = torch.randn(3, 6, 5, 1, 1, dtype=torch.float64)
    expected, _ = library_lstm(module)(x[..., 0, 0].mT)
    torch.testing.assert_close(module(x)[..., 0, 0].mT, expected)


def test_uniform_attention_is_an_lstm_of_the_means() -> None:
    module = small(norm=False, project=False)
    with torch.no_grad():
        theta, _, _, theta_h = module.weight_x.data.split(module.sizes_x)
        theta.zero_()
        theta_h.zero_()
    x = torch.randn(2, 6, 4, 3, 5, dtype=torch.float64)
    expected, _ = library_lstm(module)(x.mean((3, 4)).mT)
    got = module(x)
    torch.testing.assert_close(got, expected.mT[..., None, None].expand_as(got))


def test_permuting_positions_permutes_the_output() -> None:
    module = small()
    x = torch.randn(2, 6, 3, 4, 3, dtype=torch.float64)
    order = torch.randperm(12)
    permuted = x.flatten(3)[..., order].unflatten(3, (4, 3))
    torch.testing.assert_close(module(permuted).flatten(3), module(x).flatten(3)[..., order])


def test_the_first_step_sees_no_memory() -> None:
    """r(X, H_0 = 0) is 0 without biases, whatever the maps of the hidden state are."""
    module = small()
    x = torch.randn(1, 6, 1, 2, 2, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.weight_h.normal_()
        module.weight_x.data.split(module.sizes_x)[3].normal_()
    torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize("normalize", ["softmax", "count"])
def test_steps_and_chunks(normalize: str) -> None:
    module = small(normalize=normalize)
    x = torch.randn(2, 6, 5, 2, 3, dtype=torch.float64)
    whole = module(x)
    state, outputs = None, []
    for t in range(5):
        y, state = module.step(x[:, :, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 2), whole)
    with torch.no_grad():
        streamer = Streamer(module)
        first, state = streamer(x[:, :, :2])
        second, _ = streamer(x[:, :, 2:], state)
        torch.testing.assert_close(torch.cat([first, second], 2), whole)
        again, _ = streamer(x[:, :, 2:], state, torch.tensor([True, False]))
        torch.testing.assert_close(again[0], module(x[:1, :, 2:])[0])
        torch.testing.assert_close(again[1], whole[1, :, 2:])


def test_gradients() -> None:
    module = RelationalLSTM(2, norm=False, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


def test_checkpointing_and_ddp_change_no_gradient() -> None:
    modules = {"lstm": RelationalLSTM(6, 4, 3), "block": NonLocalBlock(6, 4, memory=1)}
    nn.init.ones_(modules["block"].bn.weight)
    x = torch.randn(3, 6, 3, 2, 2)
    plain, again, parallel = (nn.Sequential(*copy.deepcopy(modules).values()) for _ in range(3))

    def gradients(call: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        call(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p is not model[1].out.bias)
        return [p.grad for p in model.parameters()]

    wanted = gradients(plain, plain)
    found = [gradients(lambda x: checkpoint(again, x, use_reentrant=False), again)]
    with process_group.alone():
        found.append(gradients(DistributedDataParallel(parallel), parallel))
    for got in found:
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_refuses_another_length() -> None:
    module, clip = small(), torch.randn(2, 6, 3, 2, 2, dtype=torch.float64)
    program = torch.jit.trace(module, clip, check_trace=False)
    torch.testing.assert_close(program(clip[:1]), module(clip[:1]))
    with pytest.raises(RuntimeError, match="Expected 3 elements in a list but found 4"):
        program(torch.cat([clip, clip[:, :, :1]], 2))


def test_numbers_of_the_paper() -> None:
    module = RelationalLSTM(2048, norm=False, device="meta")
    gates = module.weight_x.numel() + module.weight_h.numel()
    assert round(gates / 1e6, 2) == 41.94
    assert round(module.conv.weight.numel() / 1e6, 2) == 2.10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 2048, 4, 7, 7, device="meta"))
    per_step = counter.get_total_flops() / 2 / 4 - 49 * module.conv.weight.numel()
    assert round(per_step / 1e9, 2) == 2.09


def test_relational_errors() -> None:
    for options, message in (
        ({"channels": 5}, "channels: expected an even number"),
        ({"channels": 4, "hidden_channels": 0}, "hidden_channels: expected at least 1"),
        ({"channels": 4, "normalize": "max"}, "normalize: expected one of 'softmax', 'count'"),
    ):
        with pytest.raises(ValueError, match=message):
            RelationalLSTM(**options)
    module = small()
    with pytest.raises(ValueError, match=r"expected a clip \[N,C,T,H,W\] with C = 6"):
        module(torch.zeros(1, 5, 2, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x: expected \[N,C,H,W\]"):
        module.step(torch.zeros(1, 6, 1, 2, 2, dtype=torch.float64))
    wrong = torch.zeros(1, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state: expected h \[N,P,hidden_channels\] = \[1, 4, 4\], got \[1, 3, 4\]"):
        module.step(torch.zeros(1, 6, 2, 2, dtype=torch.float64), (wrong, wrong))


# ---- folded for inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"normalize": "count"}, {"bias": True, "project": False}], ids=["default", "count", "bias"]
)
def test_folded_is_the_same(options: dict[str, object], dtype: torch.dtype) -> None:
    module = small(dtype, **options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folded = fold_relations(module)
    x = torch.randn(8, 6, 4, 4, 3).to(dtype)
    with torch.no_grad():
        exact = by_equation_3(copy.deepcopy(module).double(), x.double())
        assert_same(folded(x), exact, by_equation_3(module, x))
        streamer = Streamer(folded)
        first, state = streamer(x[:, :, :1])
        second, _ = streamer(x[:, :, 1:], state)
        assert_same(torch.cat([first, second], 2), exact, by_equation_3(module, x))
        # A stream moves between both forms: its state is the same.
        moved, _ = streamer(x[:, :, 1:], Streamer(module)(x[:, :, :1])[1])
        assert_same(moved, exact[:, :, 1:], by_equation_3(module, x)[:, :, 1:])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_fold_halves_the_weights_of_a_step() -> None:
    module = RelationalLSTM(2048, norm=False, project=False, device="meta").eval()
    folded = fold_relations(module)
    assert 2 * folded.weight_h.numel() == module.weight_h.numel() == 8 * 1024**2
    assert folded.weight_x.shape == module.weight_x.shape
    counts = []
    for each in (module, folded):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(torch.empty(1, 2048, 4, 7, 7, device="meta"))
        counts.append(counter.get_total_flops() / 2 / 4)
    assert counts[0] - counts[1] == 49 * 4 * 1024**2


def test_fold_refuses() -> None:
    for options, message in (
        ({"normalize": "count", "bias": True}, "the bias of phi does not cancel"),
        ({"key_channels": 1}, "the fold would take 160 multiplications per position and frame instead of 104"),
    ):
        with pytest.raises(ValueError, match=message):
            fold_relations(RelationalLSTM(6, 4, **options).eval())
    with pytest.raises(ValueError, match="expected evaluation mode"):
        fold_relations(small().train())
    folded = fold_relations(small(torch.float32))
    with pytest.raises(ValueError, match="it is folded already"):
        fold_relations(folded)
    with pytest.raises(ValueError, match=r"made and checked for torch\.float32, got torch\.bfloat16"):
        folded.to(torch.bfloat16)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_refuses_what_rounds_too_much(dtype: torch.dtype) -> None:
    """Equal channels of H, of which phi takes differences: exactly 0 by itself, not so in the rounded product."""
    module = RelationalLSTM(8, 8, norm=False).eval()
    with torch.no_grad():
        for weight, sizes, part in ((module.weight_x, module.sizes_x, 2), (module.weight_h, module.sizes_h, 1)):
            rows = weight.split(sizes)[part].view(4, 8, 8)
            rows.copy_(rows[:, :1].expand_as(rows).clone())
        phi = module.weight_h.split(module.sizes_h)[0]
        # One difference per row, times a power of two: no dtype and no order of summation rounds it.
        size, pairs = 16 / torch.finfo(dtype).eps, torch.rand(32, 8).argsort(1)
        phi.zero_().scatter_(1, pairs[:, :1], size).scatter_(1, pairs[:, 1:2], -size)
    module = module.to(dtype)
    with pytest.raises(ValueError, match=rf"folded in {dtype}, the \w+ error of its hidden states is .*, more than"):
        fold_relations(module, torch.randn(1, 8, 6, 3, 3).to(dtype))


# ---- the non-local block --------------------------------------------------------------------------------------------


def block(**options: object) -> NonLocalBlock:
    module = NonLocalBlock(4, **options).double().eval()
    nn.init.normal_(module.bn.weight)
    return module


def by_loops(module: NonLocalBlock, x: Tensor) -> Tensor:
    """The block frame by frame, every frame over the frames it sees, in plain PyTorch."""
    t, positions = x.shape[2], x.shape[3] * x.shape[4]
    theta, phi, g = module.qkv(x.permute(0, 2, 3, 4, 1).flatten(2, 3)).chunk(3, -1)  # [N,T,P,D]
    frames = []
    for frame in range(t):
        seen = range(t) if module.memory is None else range(max(0, frame - module.memory), frame + 1)
        key, value = (torch.cat([each[:, s] for s in seen], 1) for each in (phi, g))
        assert key.shape[1] == len(seen) * positions
        frames.append(attend(theta[:, frame], key, value, {"gaussian": "softmax", "dot": "count"}[module.kind]))
    y = module.out(torch.stack(frames, 1)).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
    return x + module.bn(y)


@pytest.mark.parametrize("kind", ["gaussian", "dot"])
@pytest.mark.parametrize("memory", [None, 0, 2, 9])
def test_block(kind: str, memory: int | None) -> None:
    module = block(kind=kind, memory=memory)
    x = torch.randn(2, 4, 5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_loops(module, x))


def test_a_new_block_changes_nothing() -> None:
    x = torch.randn(2, 4, 3, 2, 2)
    assert torch.equal(NonLocalBlock(4)(x), x)


@pytest.mark.parametrize("kind", ["gaussian", "dot"])
@pytest.mark.parametrize("memory", [0, 2, 9])
def test_block_streams(kind: str, memory: int) -> None:
    module = block(kind=kind, memory=memory)
    x = torch.randn(2, 4, 6, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        state, outputs = None, []
        for t in range(6):
            y, state = module.step(x[:, :, t], state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 2), whole)
        streamer = Streamer(module)
        first, state = streamer(x[:, :, :3])
        second, _ = streamer(x[:, :, 3:], state)
        torch.testing.assert_close(torch.cat([first, second], 2), whole)
        anew, _ = streamer(x[:, :, 3:], state, torch.tensor([False, True]))
        torch.testing.assert_close(anew[1], module(x[1:, :, 3:])[0])
        torch.testing.assert_close(anew[0], whole[0, :, 3:])


def test_block_refuses() -> None:
    with pytest.raises(ValueError, match="attends to the whole clip"):
        Streamer(block())
    with pytest.raises(ValueError, match="has no steps"):
        block().step(torch.zeros(1, 4, 2, 2, dtype=torch.float64))
    for option, value in (("kind", "cosine"), ("memory", -1), ("inner_channels", 0)):
        with pytest.raises(ValueError, match=option):
            NonLocalBlock(4, **{option: value})


@pytest.mark.parametrize(("name", "memory"), [("rcn_resnet18", 3), ("i3d_resnet18", None)])
def test_blocks_in_networks(name: str, memory: int | None) -> None:
    after = ("layer2.1", "layer3.0")
    model = create_model(name, num_classes=5, width=2, nonlocal_after=after, nonlocal_memory=3)
    plain = create_model(name, num_classes=5, width=2)
    assert isinstance(model, VideoResNet)
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, NonLocalBlock)}
    assert list(blocks) == [f"{each}.relation" for each in after]
    assert {each.memory for each in blocks.values()} == {memory}
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if ".relation." not in n})
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(clip), plain.eval()(clip))  # new blocks change nothing
        for each in blocks.values():
            nn.init.normal_(each.bn.weight)
        calibrated(model, frames=8).double()
        if memory is not None:
            clip = clip.double()
            streamer = Streamer(model)
            first, state = streamer(clip[:, :, :5])
            second, _ = streamer(clip[:, :, 5:], state)
            torch.testing.assert_close(torch.cat([first, second], 2), model.frame_scores(clip))
    with pytest.raises(ValueError, match=r"nonlocal_after: .* got \['layer2.2'\]"):
        create_model(name, width=2, nonlocal_after=("layer2.2",))


def test_running_mean() -> None:
    module = RunningMean().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = torch.stack([x[..., : t + 1].mean(2) for t in range(6)], 2)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("normalize", ["softmax", "count"])
def test_attention_is_what_the_relations_sum_with(normalize: str) -> None:
    module = small(normalize=normalize, bias=True, norm=False)
    x = torch.randn(2, 6, 3, 2, 3, dtype=torch.float64)
    position = 4
    with torch.no_grad():
        found = module.attention(x, position)
        assert found.shape == (2, 3, 2, 4, 2, 3)
        theta, phi, _, theta_h = (
            part.chunk(4, -1)
            for part in F.linear(x.permute(0, 2, 3, 4, 1).flatten(2, 3), module.weight_x, module.bias_x).split(
                module.sizes_x, -1
            )
        )
        h, state = torch.zeros(2, 6, 4, dtype=torch.float64), None
        for t in range(3):
            phi_h = F.linear(h, module.weight_h, module.bias_h).split(module.sizes_h, -1)[0].chunk(4, -1)
            for gate in range(4):
                for source, (query, key) in enumerate(
                    ((theta[gate][:, t], phi[gate][:, t]), (theta_h[gate][:, t], phi_h[gate]))
                ):
                    scores = query[:, position, None] @ key.mT
                    expected = scores.softmax(-1) if normalize == "softmax" else scores / 6
                    torch.testing.assert_close(found[:, t, source, gate].flatten(1), expected[:, 0])
            _, state = module.step(x[:, :, t], state)
            h = state[0]
        torch.testing.assert_close(module.attention(x[:, :, 2:], position, None)[:, 0, 0], found[:, 2, 0])
    with pytest.raises(ValueError, match="position: expected 0 to 5, got 6"):
        module.attention(x, 6)
