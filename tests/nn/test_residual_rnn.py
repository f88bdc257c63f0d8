"""The residual stack against single library layers, its twin, its step, gradients, full graphs and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from rcu_ops import Streamer
from rcu_ops.models import ResLSTM, create_model
from rcu_ops.nn import ResidualRNN
from tests.tolerance import assert_close_to_reference

LIBRARY = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = list(LIBRARY)


def library_layers(stack: ResidualRNN) -> list[nn.Module]:
    """Single-layer library modules with the stack's parameters."""
    layers = []
    for each in stack.layers:
        hidden, features = each.weight_hh_l0.shape[1], each.weight_ih_l0.shape[1]
        layer = LIBRARY[stack.cell](features, hidden, batch_first=True, dtype=each.weight_ih_l0.dtype)
        layer.load_state_dict(each.state_dict())
        layers.append(layer)
    return layers


def by_single_layers(stack: ResidualRNN, x: Tensor) -> tuple[Tensor, Tensor]:
    """(m^L, x^L) of Eq. 1 written out over library layers."""
    m = x
    for layer in library_layers(stack):
        m, _ = layer(x)
        x = m + x if stack.residual else m
    return m, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_equation_1(cell: str, depth: int, residual: bool, dtype: torch.dtype) -> None:
    for output, index in (("m", 0), ("x", 1)):
        stack = ResidualRNN(7, None if residual else 5, depth, cell=cell, residual=residual, output=output).to(dtype)
        x = torch.randn(3, 6, 7).to(dtype)
        with torch.no_grad():
            expected = by_single_layers(stack, x)[index]
            exact = by_single_layers(copy.deepcopy(stack).double(), x.double())[index]
            got, _ = stack(x)
        assert got.dtype == dtype
        assert_close_to_reference(got, exact, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_the_plain_twin_is_the_library_stack(cell: str) -> None:
    stack = ResidualRNN(6, 4, 3, cell=cell, residual=False, dtype=torch.float64)
    whole = LIBRARY[cell](6, 4, 3, batch_first=True, dtype=torch.float64)
    whole.load_state_dict(
        {
            name.replace("l0", f"l{index}"): value
            for index, each in enumerate(stack.layers)
            for name, value in each.state_dict().items()
        }
    )
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    (got, state), (expected, expected_state) = stack(x), whole(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(state, expected_state)
    later, _ = stack(x, state)
    torch.testing.assert_close(later, whole(x, expected_state)[0])


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_chunks_are_the_sequence(cell: str, residual: bool) -> None:
    stack = ResidualRNN(5, 5, 3, cell=cell, residual=residual, output="x", dtype=torch.float64)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    whole, last = stack(x)
    state, outputs = None, []
    for t in range(9):
        output, state = stack.step(x[:, t], state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)
    torch.testing.assert_close(state, last)
    first, state = stack(x[:, :4])
    second, state = stack(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)


class PooledFrames(nn.Module):
    """A network over clips with a stack in the middle: per-frame means, the stack, a classifier."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = ResidualRNN(3, num_layers=2, cell=cell, dtype=torch.float64)
        self.fc = nn.Linear(3, 4, dtype=torch.float64)

    def frame_scores(self, clip: Tensor) -> Tensor:
        return self.fc(self.rnn(clip.mean((3, 4)).transpose(1, 2))[0]).transpose(1, 2)


@pytest.mark.parametrize("cell", CELLS)
def test_inside_a_streamed_network(cell: str) -> None:
    model = PooledFrames(cell).eval()
    clip = torch.randn(3, 3, 7, 4, 4, dtype=torch.float64)
    expected = model.frame_scores(clip)
    streamer = Streamer(model)
    first, state = streamer(clip[:, :, :3])
    second, _ = streamer(clip[:, :, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 2), expected)
    anew = torch.tensor([False, True, False])
    again, _ = streamer(clip[:, :, 3:], state, anew)
    torch.testing.assert_close(again[1], model.frame_scores(clip[1:2, :, 3:])[0])
    torch.testing.assert_close(again[0], expected[0, :, 3:])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell: str) -> None:
    stack = ResidualRNN(3, num_layers=2, cell=cell, output="x", dtype=torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in stack.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(stack, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *stack.parameters()))
    assert torch.autograd.gradgradcheck(lambda x: run(x, *stack.parameters()), (x,))


def test_residual_gradient_does_not_vanish_with_forgotten_layers() -> None:
    """With layers that put out nothing, x^L is x^0: the identity path carries the gradient through any depth."""
    stack = ResidualRNN(4, num_layers=5, output="x", dtype=torch.float64)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    output, _ = stack(x)
    assert torch.equal(output, x)
    output.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("cell", CELLS)
def test_full_graph_with_gradients(cell: str) -> None:
    torch.compiler.reset()
    model = create_model("res_lstm", num_classes=5, input_size=6, num_layers=3, cell=cell).double()
    features = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = (features, *model.parameters())
    scores, expected = compiled(features), model(features)
    torch.testing.assert_close(scores, expected)
    got = torch.autograd.grad(scores.square().sum(), wanted)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), wanted))


def test_inductor() -> None:
    torch.compiler.reset()
    model = create_model("res_lstm", num_classes=64, input_size=8).eval()
    features = torch.randn(2, 5, 8)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(features.double())
        assert_close_to_reference(torch.compile(model, fullgraph=True)(features), exact, model(features))


@pytest.mark.parametrize("cell", CELLS)
def test_export_with_any_batch_and_length(cell: str) -> None:
    model = create_model("res_lstm", num_classes=5, input_size=6, cell=cell).double().eval()
    with torch.no_grad():
        shapes = ({0: Dim("N", min=1, max=512), 1: Dim("T", min=1, max=512)},)
        program = export(model, (torch.randn(2, 4, 6, dtype=torch.float64),), dynamic_shapes=shapes)
        for n, t in ((1, 1), (3, 25)):
            features = torch.randn(n, t, 6, dtype=torch.float64)
            torch.testing.assert_close(program.module()(features), model(features))


def test_operator_obeys_torch() -> None:
    layer = ResidualRNN(4, num_layers=1).layers[0]
    arguments = ("lstm", torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4), torch.randn(2, 4), layer.weights)
    torch.library.opcheck(torch.ops.rcu_ops.rnn_layer.default, arguments)
    grads = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    cell, x, h, c, weights = arguments
    given = (
        cell,
        *grads,
        x.detach(),
        h,
        c,
        [weight.detach() for weight in weights],
    )  # traced, there is no second order
    torch.library.opcheck(torch.ops.rcu_ops.rnn_layer_backward.default, given)


def test_empty_batch_and_autocast() -> None:
    stack = ResidualRNN(4, num_layers=2, output="x")
    output, (h, c) = stack(torch.zeros(0, 3, 4))
    assert output.shape == (0, 3, 4)
    assert h.shape == c.shape == (2, 0, 4)
    x = torch.randn(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = stack(x)
    torch.testing.assert_close(output.float(), stack(x)[0], atol=0.05, rtol=0.05)


def test_numbers_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("res_lstm")
    assert isinstance(model, ResLSTM)
    counted = sum(parameter.numel() for parameter in model.rnn.parameters())
    assert round(counted / 1e6, 2) == 16.79
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 52_224
    assert model(torch.empty(2, 25, 1024, device="meta")).shape == (2, 51)


def test_network() -> None:
    model = create_model("res_lstm", num_classes=3, input_size=4, classify="x").double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    scores = model.frame_scores(x)
    assert scores.shape == (2, 3, 6)
    torch.testing.assert_close(model(x), scores[:, :, -1])
    torch.testing.assert_close(model(x), by_single_layers(model.rnn, x)[1][:, -1] @ model.head.weight.T)
    state = None
    for t in range(6):
        step, state = model.step(x[:, t], state)
        torch.testing.assert_close(step, scores[:, :, t])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "mlp"}, "cell: expected one of 'lstm', 'gru', 'rnn', got 'mlp'"),
        ({"output": "h"}, "output: expected one of 'm', 'x', got 'h'"),
        ({"num_layers": 0}, "num_layers: expected 1 to 5, got 0"),
        ({"num_layers": 6}, "num_layers: expected 1 to 5, got 6"),
        ({"hidden_size": 8}, "hidden_size = input_size = 4, got 8"),
        ({"hidden_size": 0}, "expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualRNN(4, **options)


def test_bad_inputs() -> None:
    stack = ResidualRNN(4)
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"x: expected \[N,T,F\] with T >= 1 and F = 4, got \[2, 3, 5\]"):
        stack(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="T >= 1"):
        stack(torch.zeros(2, 0, 4))
    with pytest.raises(ValueError, match=r"x: expected \[N,F\]"):
        stack.step(x)
    with pytest.raises(ValueError, match="dtype"):
        stack(x.double())
    with pytest.raises(TypeError, match=r"state: expected a pair \(h, c\) of tensors for lstm cells, got Tensor"):
        stack(x, torch.zeros(2, 2, 4))
    with pytest.raises(TypeError, match="state: expected one tensor h for gru cells, got tuple"):
        ResidualRNN(4, cell="gru")(x, (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))
    with pytest.raises(ValueError, match=r"state: expected \[L,N,H\] = \[2, 2, 4\], got \[1, 2, 4\]"):
        stack(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(ValueError, match="num_classes"):
        create_model("res_lstm", num_classes=0)
    with pytest.raises(ValueError, match="classify"):
        create_model("res_lstm", classify="h")
