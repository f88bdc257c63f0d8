"""Every operator's GPU kernels on a GPU: numerics, determinism, races, streams, graphs, devices, large tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import OPERATORS, _evidence
from tests.gpu.problems import Outputs, Problem, Tensors, fast_gru_inputs, gpu_backends, on, problems
from tests.tolerance import assert_close_to_reference

pytestmark = pytest.mark.gpu

ALL = [(problem, backend) for problem in problems() for backend in gpu_backends(problem.operator)]
STRESSED = (
    *("probe", "C64 contiguous", "C256 channels_last", "C33 odd", "one frame", "one frame many columns"),
    *("C64 many columns", "C256 many columns", "wide", "paper", "few channels"),
)
# One of each operator, backend and kernel family for what takes many runs.
FEW = [(problem, backend) for problem, backend in ALL if problem.name in STRESSED]


def names(pairs: list[tuple[Problem, str]]) -> list[str]:
    return [f"{problem}-{backend}" for problem, backend in pairs]


def dtype_of_stress(problem: Problem) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in problem.dtypes else problem.dtypes[0]


def run(problem: Problem, backend: str, given: Tensors) -> Outputs:
    """Skips, with the backend's own reason, what it does not take."""
    with rcu_ops.use_backend(backend):
        try:
            return problem.call(given)
        except ValueError as error:
            if "cannot run" in str(error):
                pytest.skip(str(error))
            raise


def same(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def faults_show_here() -> Iterator[None]:
    """An error inside a kernel belongs to the test that launched it."""
    yield
    torch.cuda.synchronize()


def test_the_binary_s_kernels_are_there() -> None:
    assert _library.load_error() is None
    built = [name for name in OPERATORS if _library.has_kernel(name, "CUDA")]
    assert "recurrent_conv" in built
    assert {v.operator for v in _evidence.VARIANTS} >= {"recurrent_conv"}


JUDGED = [(problem, backend) for problem, backend in ALL if problem.exact is not None]


@pytest.mark.parametrize(("problem", "backend"), JUDGED, ids=names(JUDGED))
def test_tolerance_rule(problem, backend) -> None:
    """Against fp64 on the same GPU; outputs are poisoned with NaN."""
    for dtype in problem.dtypes:
        if backend == "triton" and dtype == torch.float64:
            continue  # the kernels keep an fp32 state and say so
        given = problem.make(dtype)
        got = run(problem, backend, on(given, "cuda"))
        exact = problem.exact(on(given, "cuda", torch.float64))
        eager = problem.eager(on(given, "cuda"))
        for index, (g, e, r) in enumerate(zip(got, exact, eager, strict=True)):
            if not g.is_floating_point() or dtype == torch.float64:
                assert torch.equal(g, e)
            else:
                assert_close_to_reference(g, e, r, f"{dtype} output {index}")


@pytest.mark.parametrize(("problem", "backend"), FEW, ids=names(FEW))
def test_the_same_bits_a_hundred_times(problem, backend) -> None:
    given = on(problem.make(dtype_of_stress(problem)), "cuda")
    first = run(problem, backend, given)
    for _ in range(99):
        assert same(first, run(problem, backend, given))


@pytest.mark.parametrize(("problem", "backend"), FEW, ids=names(FEW))
def test_the_same_bits_beside_other_work(problem, backend) -> None:
    """Races show when blocks and warps run in another order: beside copies, products and itself on other streams."""
    kinds = [on(problem.make(dtype_of_stress(problem)), "cuda") for _ in range(3)]
    alone = [run(problem, backend, given) for given in kinds]
    noise = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(5)]
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(streams[3]):
            noise @ noise
        with torch.cuda.stream(streams[4]):
            noise.clone()
        together = []
        for stream, given in zip(streams, kinds, strict=False):
            with torch.cuda.stream(stream):
                together.append(run(problem, backend, given))
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("problem", "backend"), FEW, ids=names(FEW))
def test_the_current_stream_orders_the_work(problem, backend) -> None:
    """Inputs that arrive late on a side stream: work on any other stream would read what was there before."""
    given = on(problem.make(dtype_of_stress(problem)), "cuda")
    want = run(problem, backend, given)
    late = {name: torch.zeros_like(value) for name, value in given.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for name, value in given.items():
            late[name].copy_(value)
        got = run(problem, backend, late)
        for value in late.values():  # after the kernels have read them, and not before
            value.zero_()
    side.synchronize()
    assert same(got, want)


@pytest.mark.parametrize(("problem", "backend"), FEW, ids=names(FEW))
def test_in_a_cuda_graph(problem, backend) -> None:
    """Captured once, replayed on other inputs: no allocation, synchronisation or host decision inside."""
    first, second = (on(problem.make(dtype_of_stress(problem)), "cuda") for _ in range(2))
    want = [run(problem, backend, given) for given in (first, second)]
    held = {name: value.clone() for name, value in first.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(problem, backend, held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(problem, backend, held)
    for given, expected in ((second, want[1]), (first, want[0])):
        for name, value in given.items():
            held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same(outputs, expected)


@pytest.mark.parametrize("backend", gpu_backends("fast_gru"))
@pytest.mark.parametrize(  # by columns, in one launch of all blocks together, and step by step
    ("samples", "channels"), [(3, 64), (1, 256), (3, 256)], ids=["64_channels", "49_columns", "147_columns"]
)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_a_training_step_of_fast_gru_in_a_cuda_graph(recompute, samples, channels, backend) -> None:
    """Forward and backward captured in one graph, gradients accumulated by autograd where the leaves keep them."""
    shape = (samples, 4, channels, 1, 7, 7)

    def draw() -> list[Tensor]:
        tensors = [
            value for value in fast_gru_inputs(shape, channels // 4, torch.bfloat16, with_o0=False) if value is not None
        ]
        return [value.cuda() for value in (*tensors, torch.randn(shape).bfloat16())]

    def train(leaves: list[Tensor], grad: Tensor) -> Outputs:
        for leaf in leaves:
            leaf.grad = None
        o, _ = rcu_ops.fast_gru(*leaves, recompute=recompute)
        o.backward(grad)
        return (o.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))

    draws = [draw() for _ in range(2)]
    with rcu_ops.use_backend(backend):
        want = [tuple(v.clone() for v in train([t.requires_grad_() for t in given[:-1]], given[-1])) for given in draws]
        held = [value.detach().clone() for value in draws[0]]
        leaves = [value.requires_grad_() for value in held[:-1]]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                train(leaves, held[-1])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = train(leaves, held[-1])
    assert all(len(results) == 7 for results in (got, *want))
    for given, expected in ((draws[1], want[1]), (draws[0], want[0])):
        with torch.no_grad():
            for value, new in zip(held, given, strict=True):
                value.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert same(got, expected)


@pytest.mark.parametrize(("problem", "backend"), FEW, ids=names(FEW))
def test_on_the_second_device(problem, backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    inputs = problem.make(dtype_of_stress(problem))
    here, there = (run(problem, backend, on(inputs, f"cuda:{index}")) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in there)
    assert same(here, tuple(value.to("cuda:0") for value in there))


# ---- what the library leaves of dead queries -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dead_queries_of_wide_heads(dtype) -> None:
    """The library's attention and products may make NaN of them, and of all that they reach: it is made again."""
    query, key, value, grad = ((torch.randn(2, 100, 512) * 0.2).to("cuda", dtype) for _ in range(4))
    query[0, 70], key = -torch.inf, key.abs() + 0.1

    def run(function, kind: torch.dtype) -> Outputs:
        leaves = [t.to(kind).requires_grad_() for t in (query, key, value)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))

    with rcu_ops.use_backend("cuda"):
        got = run(rcu_ops.nonlocal_attention, dtype)
    assert not got[0][0, 70].any() and not got[1][0, 70].any()
    exact = run(rcu_ops.reference.nonlocal_attention, torch.float64)
    eager = run(lambda *t: rcu_ops.reference.nonlocal_attention(*t, state_dtype=dtype), dtype)
    for index, (g, e, r) in enumerate(zip(got, exact, eager, strict=True)):
        assert_close_to_reference(g, e, r, f"output {index}")


# ---- more than 2^31 elements ---------------------------------------------------------------------------------------

LARGE = [((9, 64, 64, 256, 256), torch.contiguous_format), ((9, 64, 64, 256, 256), torch.channels_last_3d)]


@pytest.mark.parametrize("backend", gpu_backends("recurrent_conv"))
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=["contiguous", "channels_last"])
def test_recurrent_conv_of_more_than_2_to_the_31_elements(shape, layout, backend) -> None:
    """The last sample, all of whose offsets are beyond 2^31, is what it is on its own."""
    n, c, t, height, width = shape
    assert (n - 1) * c * t * height * width >= 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    for sample in x:
        sample.normal_()
    weight = (0.5 * torch.eye(c, device="cuda") + 0.05 * torch.randn(c, c, device="cuda")).bfloat16()
    with rcu_ops.use_backend(backend), torch.no_grad():
        h, h_n = rcu_ops.recurrent_conv(x, weight)
        for sample in (n - 1, 0):
            alone, last = rcu_ops.recurrent_conv(x[sample : sample + 1], weight)
            assert torch.equal(h[sample : sample + 1], alone)
            assert torch.equal(h_n[sample : sample + 1], last)
        del alone, last
        dx, _, _ = torch.ops.rcu_ops.recurrent_conv_backward(x, None, h, weight, None, False, False, False)
        part = (x[n - 1 :], None, h[n - 1 :], weight, None, False, False, False)
        assert torch.equal(dx[n - 1 :], torch.ops.rcu_ops.recurrent_conv_backward(*part)[0])
