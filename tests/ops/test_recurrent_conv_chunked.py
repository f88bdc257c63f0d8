"""The library form of recurrent_conv in chunks of frames side by side, which CUDA tensors take: the same code on CPU
tensors, called as the bindings call it, and on meta tensors, where it takes the roads of a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rcu_ops import _library, reference
from rcu_ops.ops import _recurrent_conv_chunked as chunked
from tests.ops import extended_precision as exact
from tests.tolerance import assert_close_to_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 1],
}
OPTIONS = list(itertools.product((False, True), repeat=3))  # h0 given, update="mean", reverse

needs_kernels = pytest.mark.skipif(
    not _library.has_kernel("recurrent_conv", "CPU"), reason="the library was built without CPU kernels"
)


@pytest.fixture
def library_form(monkeypatch: pytest.MonkeyPatch):
    """Makes the compiled operators take the library form."""

    def set_frames(frames: int) -> None:
        monkeypatch.setenv("RCU_OPS_CHUNK", str(frames))
        monkeypatch.setenv("RCU_OPS_CHUNK_LIBRARY", "1")

    return set_frames


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight with spectral radius below 1, an fp32 state."""
    n, c, _, height, width = shape
    weight = torch.eye(c, dtype=torch.float64) * torch.rand(c).double() + 0.3 * torch.randn(c, c).double() / c**0.5
    return torch.randn(shape).to(dtype), (0.75 * weight).to(dtype), torch.randn(n, c, height, width)


def check_forward(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> Tensor:
    h, h_n = torch.ops.rcu_ops.recurrent_conv(x, weight, h0, mean, reverse)
    update = "mean" if mean else "sum"
    want = exact.recurrent_conv(x, weight, h0, update=update, reverse=reverse)
    start = None if h0 is None else h0.to(x.dtype)
    rough = reference.recurrent_conv(x, weight, start, update=update, reverse=reverse, state_dtype=x.dtype)
    assert_close_to_reference(h, want[0], rough[0], "h")
    assert_close_to_reference(h_n, want[1], rough[1], "h_n")
    return h


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(library_form, dtype: torch.dtype, layout: str) -> None:
    """Chunks of one frame to half the clip, whole and not; with every combination of state, update and direction."""
    for i, (frames, length) in enumerate(((2, 1), (9, 3), (9, 4), (16, 4), (17, 8), (23, 5), (8, 7), (24, 6))):
        with_h0, mean, reverse = OPTIONS[i]
        x, weight, state = inputs((2, 12, frames, 3, 5), dtype)
        h0 = state if with_h0 else None
        library_form(length)
        h = check_forward(LAYOUTS[layout](x), weight, h0, mean, reverse)

        grad_h, grad_h_n = LAYOUTS[layout](torch.randn_like(x)) if i != 3 else None, torch.randn_like(state)
        dx, _, dh0 = torch.ops.rcu_ops.recurrent_conv_backward(grad_h, grad_h_n, h, weight, h0, mean, reverse, False)
        assert dx.stride() == torch.empty_like(h).stride()
        given = (x, weight, h0, grad_h, grad_h_n, mean, reverse)
        want, rough = input_gradients(torch.float64, *given), input_gradients(dtype, *given)
        for a, b, c, name in zip((dx, dh0), want, rough, ("dx", "dh0"), strict=False):
            assert_close_to_reference(a, b, c, f"{name} of {frames} frames in chunks of {length}")


def input_gradients(
    to: torch.dtype,
    x: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    grad_h: Tensor | None,
    grad_h_n: Tensor,
    mean: bool,
    reverse: bool,
) -> list[Tensor]:
    """dx and, with h0, dh0, by autograd in a dtype."""
    leaves = [v.to(to).requires_grad_() for v in (x, h0) if v is not None]
    outputs = reference.recurrent_conv(
        leaves[0], weight.to(to), *leaves[1:], update=("sum", "mean")[mean], reverse=reverse, state_dtype=to
    )
    grads = [torch.zeros_like(outputs[0]) if grad_h is None else grad_h.to(to), grad_h_n.to(to)]
    return list(torch.autograd.grad(outputs, leaves, grads))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_act(library_form, dtype: torch.dtype) -> None:
    for i, layout in enumerate(LAYOUTS):
        x, weight, state = inputs((2, 12, 11, 3, 5), dtype)
        x, h0, relu, mean = LAYOUTS[layout](x), (None, state)[i % 2], i != 1, i == 2
        residual = LAYOUTS["sliced"](torch.randn_like(x)) if i else None
        scale, shift = torch.randn(12), torch.randn(12)
        library_form(4)
        y, h_n = torch.ops.rcu_ops.recurrent_conv_affine_act(x, weight, scale, shift, h0, residual, mean, relu)
        assert torch.equal(h_n, torch.ops.rcu_ops.recurrent_conv(x, weight, h0, mean, False)[1])

        def epilogue(h: Tensor, scale=scale, shift=shift, residual=residual, relu=relu) -> Tensor:
            scale, shift = (v.to(h.dtype).view(1, -1, 1, 1, 1) for v in (scale, shift))
            y = scale * h + shift if residual is None else scale * h + shift + residual.to(h.dtype)
            return y.relu() if relu else y

        update = ("sum", "mean")[mean]
        want = epilogue(exact.recurrent_conv(x, weight, h0, update=update)[0])
        start = None if h0 is None else h0.to(dtype)
        rough = epilogue(reference.recurrent_conv(x, weight, start, update=update, state_dtype=dtype)[0])
        assert_close_to_reference(y, want, rough, f"y of {layout}")


@needs_kernels
def test_the_operators_reach_the_library_form(library_form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove the CPU kernels."""
    x, weight, _ = inputs((1, 4, 9, 1, 2), torch.bfloat16)
    before = torch.ops.rcu_ops.recurrent_conv(x, weight, None, False, False)
    library_form(4)
    monkeypatch.setattr(chunked._Factor, "accumulate", lambda *_, **__: None)  # products of nothing
    after = torch.ops.rcu_ops.recurrent_conv(x, weight, None, False, False)
    assert torch.equal(after[0], x) and not torch.equal(before[0], x)


@pytest.mark.parametrize("radius", [0.5, 1.0, 1.05])
def test_a_growing_state(radius: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.linalg.qr(torch.randn(24, 24)).Q * radius).to(dtype)
        x = torch.randn(1, 24, 200, 1, 2).to(dtype)
        got = run(x, weight, 16)
        want = exact.recurrent_conv(x, weight, None, update="sum", reverse=False)
        rough = reference.recurrent_conv(x, weight, None, state_dtype=dtype)
        for a, b, c, name in zip(got, want, rough, ("h", "h_n"), strict=True):
            assert_close_to_reference(a, b, c, name)


def run(x: Tensor, weight: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Without a first state, forwards; h and the last state."""
    y, last = torch.empty_like(x), torch.empty_like(x[:, :, 0], dtype=torch.float32)
    none, no = (None,) * 3, False
    torch.ops.rcu_ops.recurrent_conv_chunked_(
        x, weight, None, y, last, *none, frames, chunked.NO_STATE, no, 1.0, 1.0, 1.0, no, no
    )
    return y, last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_true_fp32_state(dtype: torch.dtype) -> None:
    """W = I over 2048 frames: a state rounded to bf16 at every frame would stop growing at half of it. And a rotation
    by an angle that no 16-bit number holds, where single 16-bit factors would be off by 2^-9 of the state."""
    x = (torch.rand(1, 4, 2048, 1, 3) + 0.5).to(dtype)
    _, h_n = run(x, torch.eye(4, dtype=dtype), 32)
    assert (h_n.double() / x.double().sum(2) - 1).abs().max() < 2**-13

    angle = torch.tensor(0.3)
    weight = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2).to(dtype)
    x = torch.randn(1, 2, 400, 1, 8).to(dtype)
    _, h_n = run(x, weight, 16)
    want = exact.recurrent_conv(x, weight, None, update="sum", reverse=False)[1]
    assert (h_n - want).abs().max() < 2**-14 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_split_precision_is_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: without the low parts the test above fails by far."""
    real = torch.sub

    def without_low(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return real(a, b, out=out).zero_()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "sub", without_low)
        x = (torch.rand(1, 4, 2048, 1, 3) + 0.5).to(dtype)
        _, h_n = run(x, torch.eye(4, dtype=dtype), 32)
    assert (h_n.double() / x.double().sum(2) - 1).abs().max() > 2**-9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_stay_in_their_position(value: float) -> None:
    x, weight, _ = inputs((1, 6, 12, 1, 5), torch.bfloat16)
    clean = run(x, weight, 4)[0]
    x[0, 2, 3, 0, 1] = value
    h = run(x, weight, 4)[0]
    others = [0, 2, 3, 4]
    assert torch.equal(h[..., others], clean[..., others])
    assert torch.equal(h[:, :, :3], clean[:, :, :3])
    assert not h[0, :, 4:, 0, 1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_tensors_take_the_products_of_a_gpu(dtype: torch.dtype) -> None:
    """Nothing but operators that have kernels there, and products whose shapes, dtypes and strides are as they must be:
    16-bit data multiplied as bf16 with sums in fp32, in place, rows of every matrix adjacent in memory."""
    found: list[str] = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "baddbmm" in str(func):
                found.append(str(func))
                out, a, b = args[:3]
                assert a.dtype == b.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
                assert out is kwargs["out"] and out.dtype == torch.float32
                assert out.shape == (a.shape[0], a.shape[1], b.shape[2]) and a.shape[::2] == b.shape[:2]
                assert all(v.stride(2) == 1 and v.stride(1) >= v.shape[2] for v in (out, a, b))
                return out  # torch has no meta kernel for products with another dtype of their sums
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, 64, 21, 3, 5, dtype=dtype, device="meta")
    y, h0, last = torch.empty_like(x), *(torch.empty(2, 64, 3, 5, device="meta") for _ in range(2))
    weight = torch.empty(64, 64, dtype=dtype, device="meta")
    with Products():
        chunked.chunked_scan(
            x, weight, h0, y, last, None, None, None, 4, chunked.STATE, True, 0.5, 0.5, 1.0, False, True
        )
    name = "aten.baddbmm.out" if dtype == torch.float32 else "aten.baddbmm.dtype_out"
    exact_products = 1 + 3 + 1  # the first state, frames 1 to 3, the projection
    carried = (5 - 1) * (2 if dtype == torch.float32 else 1)
    assert found == [name] * (exact_products + carried + 2)


def test_repeatable() -> None:
    x, weight, _ = inputs((1, 16, 40, 3, 3), torch.bfloat16)
    first, second = run(x, weight, 8), run(x, weight, 8)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
