"""How the CUDA kernels cut a relation, for GPUs that are not there, asked of rcu_ops._native."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rcu_ops import _library
from rcu_ops.ops import nonlocal_gates

native = _library.native()
pytestmark = pytest.mark.skipif(native is None, reason="rcu_ops._native was not built for this Python")

KINDS = ("attend", "step", "query_gradient", "key_gradient")
GPUS = (
    {"architecture": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024},
    {"architecture": 86, "multiprocessors": 10, "shared_bytes": 99 * 1024},
    {"architecture": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024},
)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: str(g["architecture"]))
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_slice_has_one_owner(kind, gpu) -> None:
    rng = random.Random(7)
    for _ in range(60):
        b, g = rng.randint(0, 3), 4 if kind == "step" else rng.choice([1, 4])
        n, m = rng.choice([0, 1, 31, 32, 33, 49, 196]), rng.choice([0, 1, 49, 64, 65, 300, 5000])
        d, e = rng.choice([0, 1, 64, 1024]), rng.choice([0, 1, 65, 130, 1024])
        dtype = rng.choice(["float64", "float32", "bfloat16", "float16"])
        plan = native.nonlocal_gates_gpu_plan(kind, b, g, n, m, d, e, dtype, **gpu, end=1 << 30)
        assert plan["shared_bytes"] <= gpu["shared_bytes"]
        assert len(plan["places"]) == plan["blocks"]
        problems = b if kind == "step" else b * g
        own = m if kind == "key_gradient" else n
        owned = {
            (problem, row, split)
            for problem, first, rows, split in plan["places"]
            for row in range(first, first + rows)
        }
        assert owned == set(itertools.product(range(problems), range(own), range(plan["splits"])))
        assert len(owned) == sum(rows for _, _, rows, _ in plan["places"])
        assert plan["resident"] == (plan["chunk"] == (n if kind == "key_gradient" else m)) or not plan["resident"]


def test_the_suite_keeps_its_weights_on_chip() -> None:
    for positions, gpu in itertools.product((49, 196), (GPUS[0], GPUS[2])):
        for kind in KINDS:
            plan = native.nonlocal_gates_gpu_plan(kind, 24, 4, positions, positions, 1024, 1024, "float32", **gpu)
            assert plan["resident"], (kind, positions)
            assert plan["blocks"] >= gpu["multiprocessors"] or plan["splits"] * plan["slice"] >= 1024
    assert "weights in shared memory" in plan["text"]
    long = native.nonlocal_gates_gpu_plan("attend", 1, 1, 4096, 4096, 64, 64, "float32")
    assert not long["resident"] and "made again for every 64 channels" in long["text"]


def test_few_rows_are_shared_by_blocks() -> None:
    few = native.nonlocal_gates_gpu_plan("step", 1, 4, 49, 49, 1024, 1024, "float32")
    many = native.nonlocal_gates_gpu_plan("step", 64, 4, 49, 49, 1024, 1024, "float32")
    assert few["splits"] == 16 and many["splits"] == 1
    assert "channels shared by 16 blocks" in few["text"]


def test_when_the_matrix_unit_is_used() -> None:
    plan = native.nonlocal_gates_gpu_tile_plan
    for positions, rows in ((49, 32), (196, 16), (5, 16)):
        for gpu in GPUS[0], GPUS[2]:
            found = plan(True, 24, 4, positions, positions, 1024, 1024, "bfloat16", **gpu)
            assert found["why_not"] is None and found["rows"] == rows and found["shared_bytes"] <= gpu["shared_bytes"]
            assert found["blocks"] == 24 * found["tiles"] * found["shares"]
            assert found["tiles"] == -(-positions // rows)
            assert found["cluster"] == (gpu["architecture"] == 90 and found["shares"] > 1)
    suite = plan(True, 24, 4, 49, 49, 1024, 1024, "bfloat16", **GPUS[2])
    assert suite["cluster"] and suite["shares"] == 4 and 2 * (suite["shared_bytes"] + 1024) <= 228 * 1024
    assert plan(False, 5, 1, 20, 30, 64, 64, "float16")["tiles"] == 1
    for changed, why in (
        ({"dtype": "float32"}, "16-bit"),
        ({"m": 300}, "more than 256 keys"),
        ({"d": 36}, "multiple of 8"),
        ({"misalignment": 2}, "aligned to 16 bytes"),
        ({"m": 256, "shared_bytes": 99 * 1024}, "shared memory"),
        ({"b": 0}, "nothing"),
    ):
        sizes = {"b": 2, "g": 1, "n": 40, "m": 40, "d": 64, "e": 64, "dtype": "bfloat16"} | changed
        assert why in plan(False, **sizes)["why_not"]
        text = native.nonlocal_gates_gpu_plan("attend", **sizes)["text"]
        assert text.startswith("plain: ") and why in text


def test_clusters_need_code_for_them() -> None:
    sizes = (24, 4, 49, 49, 1024, 1024, "bfloat16")
    assert not native.nonlocal_gates_gpu_tile_plan(True, *sizes, **GPUS[2], sm90a=False)["cluster"]
    text = native.nonlocal_gates_gpu_plan("step", *sizes, **GPUS[2], sm90a=False)["text"]
    assert text.startswith("tiles: ")
    assert native.nonlocal_gates_gpu_plan("step", *sizes, **GPUS[2])["text"].startswith("clusters of 4")


def test_when_gradients_run_on_the_matrix_unit() -> None:
    plan = native.nonlocal_gates_gpu_gradient_plan
    for positions, of_keys, gpu in itertools.product((49, 196, 256), (False, True), GPUS):
        found = plan(of_keys, 24, 4, positions, positions, 1024, 1024, "float16", **gpu)
        assert found["why_not"] is None and found["shared_bytes"] <= gpu["shared_bytes"]
        assert found["tiles"] == -(-positions // 32) and found["padded"] == -(-positions // 64) * 64
        assert found["blocks"] == 96 * found["tiles"] * found["shares"]
        assert 32 * (found["padded"] + 4) * 8 + 128 + 2 * 96 * 128 == found["shared_bytes"]
    few = plan(True, 1, 4, 49, 49, 1024, 1024, "bfloat16", **GPUS[2])
    assert few["shares"] == 16 and plan(False, 1, 4, 49, 49, 1024, 1024, "bfloat16", **GPUS[2])["shares"] == 8
    text = native.nonlocal_gates_gpu_plan("step", 24, 4, 49, 49, 1024, 1024, "bfloat16")["text"]
    assert "gradients 192 blocks of 32 queries, then 192 of 32 keys, on the matrix unit" in text
    for changed, why in (
        ({"dtype": "float32"}, "16-bit"),
        ({"m": 300}, "more than 256 queries or keys"),
        ({"n": 300}, "more than 256 queries or keys"),
        ({"e": 36}, "multiple of 8"),
        ({"misalignment": 4}, "aligned to 16 bytes"),
        ({"m": 256, "shared_bytes": 64 * 1024}, "shared memory"),
        ({"b": 0}, "nothing"),
    ):
        sizes = {"b": 2, "g": 1, "n": 40, "m": 40, "d": 64, "e": 64, "dtype": "bfloat16"} | changed
        assert why in plan(False, **sizes)["why_not"] and why in plan(True, **sizes)["why_not"]
        text = native.nonlocal_gates_gpu_plan("key_gradient", **sizes)["text"]
        assert text.startswith("gradients plain: ") and why in text


def test_when_the_librarys_attention_is_taken() -> None:
    why_not = native.nonlocal_gates_why_not_library
    assert why_not(2, 1568, 1568, 128, 128, "float32") is None
    assert why_not(2, 1568, 1568, 512, 512, "float32") is None
    for changed, why in (
        ({"m": 767}, "so few positions"),
        ({"n": 49}, "so few positions"),
        ({"d": 512, "e": 512}, "so few positions"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"masked": True}, "mask"),
        ({"count": True}, "softmax alone"),
        ({"e": 64}, "as wide as keys"),
    ):
        sizes = {"b": 2, "n": 800, "m": 800, "d": 128, "e": 128, "dtype": "float32"} | changed
        assert why in why_not(**sizes)
    for width in (256, 1024):
        assert why_not(96, 49, 49, width, width, "bfloat16", architecture=80) is None
    for changed, why in (
        ({"d": 264, "e": 264, "misalignment": 2}, "aligned"),
        ({"d": 36, "e": 36}, "whole eights"),
        ({"b": 65536}, "too many samples"),
        ({"dtype": "float32"}, "dtype"),
        ({"masked": True}, "masks"),
        ({"architecture": 75}, "sm_80"),
        ({"m": 0}, "nothing"),
    ):
        sizes = {"b": 2, "n": 40, "m": 40, "d": 128, "e": 128, "dtype": "float16", "architecture": 90} | changed
        assert why in why_not(**sizes)


def test_who_runs_wide_heads() -> None:
    def said(kind: str, dtype: str, b: int = 24, p: int = 49, d: int = 1024, **more: object) -> str:
        return str(native.nonlocal_gates_gpu_plan(kind, b, 4, p, p, d, d, dtype, **GPUS[2], **more)["said"])

    attention, products, tiles = "PyTorch's scaled_dot_product_attention", "PyTorch's batched products", "matrix unit"
    for kind, then in (("attend", ""), ("step", ", then the cell update")):
        forward, _, gradients = said(kind, "bfloat16").partition("; ")
        assert forward == f"{attention}, which is faster here{then}" and tiles in gradients
        assert said(kind, "bfloat16", attention=False).startswith("clusters of 4")
        assert said(kind, "bfloat16", masked=True).startswith("clusters of 4")
        assert said(kind, "bfloat16", p=784, masked=True).startswith(products)
        assert f"gradients by {products}" in said(kind, "bfloat16", p=196, d=512)
        assert "gradients by" not in said(kind, "float16", p=196, d=512)
        forward, _, gradients = said(kind, "float32").partition("; ")
        assert forward.startswith(products) and forward.endswith(f"96 maps of weights at a time{then}")
        assert gradients.startswith(f"gradients by {products}") and "48 maps" in gradients
        assert said(kind, "float32", d=64).startswith("plain: ")
    assert said("step", "bfloat16", d=256).startswith("clusters of 4")  # not measured
    assert said("attend", "bfloat16", d=256).startswith(attention)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="kind: expected attend, step"):
        native.nonlocal_gates_gpu_plan("other", 1, 1, 1, 1, 1, 1, "float32")
    with pytest.raises(ValueError, match="dtype: expected float64"):
        native.nonlocal_gates_gpu_plan("attend", 1, 1, 1, 1, 1, 1, "int8")


# Kind, dtype, positions, channels, gradients; whether auto leaves it to PyTorch's own operations.
CHOICES = [
    ("attention", torch.float32, 49, 1024, False, True),
    ("attention", torch.float32, 49, 256, True, False),
    ("attention", torch.bfloat16, 49, 1024, False, False),
    ("attention", torch.bfloat16, 49, 1024, True, True),
    ("attention", torch.bfloat16, 65, 512, False, True),
    ("attention", torch.bfloat16, 1500, 512, False, True),
    ("attention", torch.float32, 1600, 512, True, False),  # the weights' map would be larger than the tensors
    ("step", torch.bfloat16, 49, 1024, False, True),
    ("step", torch.float16, 196, 512, True, True),
    ("step", torch.float32, 49, 256, True, False),
    ("step", torch.float32, 2000, 512, False, False),
]


@pytest.mark.parametrize(("kind", "dtype", "positions", "channels", "gradients", "pytorch"), CHOICES, ids=str)
def test_where_auto_prefers_pytorch_to_triton(kind, dtype, positions, channels, gradients, pytorch) -> None:
    lead = (2, 4) if kind == "step" else (2,)
    with FakeTensorMode():
        x = torch.empty(*lead, positions, channels, dtype=dtype, device="cuda", requires_grad=gradients)
        cell = torch.empty(2, positions, channels, dtype=dtype, device="cuda")
        arguments = (x, x, x, x, cell) if kind == "step" else (x, x, x, None, 1.0, False)
    operator = nonlocal_gates.STEP if kind == "step" else nonlocal_gates.ATTENTION
    reason = operator.backend("triton").why_passed(arguments)
    assert (reason is not None) == pytorch
    if pytorch:
        assert "PyTorch's own operations were measured faster for heads of more than 256 channels" in reason
    if kind == "attention" and gradients:
        with torch.no_grad():
            later = operator.backend("triton").why_passed(arguments)
            assert (later is not None) == (pytorch and (dtype == torch.float32 or positions > 64))


def test_the_choice_leaves_a_tracers_sizes_open() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x):
            x = x if nonlocal_gates._why_pytorch_attends(x, x, x, None, 1.0, False) is None else -x
            return x * (1 if nonlocal_gates._why_pytorch_steps(x, x, x, x, x) is None else 2)

    sizes = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("p", min=2, max=4096)}
    x = torch.ones(2, 196, 512, dtype=torch.bfloat16)
    for strict in (False, True):
        with torch.no_grad():
            exported = torch.export.export(Layer(), (x,), dynamic_shapes=(sizes,), strict=strict).module()
            # Nothing is known of the positions: the kernels attend, and PyTorch steps.
            assert all(torch.equal(exported(y), 2 * y) for y in (x, x[:, :49], x.repeat(1, 9, 1)))
    with torch.no_grad():
        assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="eager", dynamic=False)(x), -2 * x)
