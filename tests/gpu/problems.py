"""What the GPU tests run: small problems of every operator in the registry, with their exact results.

An operator with more to say than its ``probe`` adds a function to :data:`PROBLEMS`; the others are run on random
numbers in the shapes of their probe, so that from its first day a new operator is tried for repeatability, races,
streams, graphs and devices. Its numbers are judged once it has problems of its own.

There is nothing more exact to hold fp64 results against. fp64 inputs are therefore small integers with which nothing
rounds, whatever the order of additions, and not one bit of a result may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rcu_ops
from rcu_ops import reference
from rcu_ops.ops import OPERATORS
from tests.ops.fast_gru_inputs import NAMES as FAST_GRU_NAMES
from tests.ops.fast_gru_inputs import inputs as fast_gru_inputs

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

GPU_BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """One call, with or without its gradients.

    Attributes:
        operator: its name in the registry.
        name: of this problem.
        make: from a dtype to inputs on the CPU.
        call: the public function on inputs of any device.
        exact: the reference; it gets fp64 inputs. None: nothing here judges the numbers, only that they repeat.
        eager: the yardstick of the tolerance rule: eager PyTorch in the inputs' dtype.
        dtypes: that the operator takes here.
    """

    operator: str
    name: str
    make: Callable[[torch.dtype], Tensors]
    call: Callable[[Tensors], Outputs]
    exact: Callable[[Tensors], Outputs] | None = None
    eager: Callable[[Tensors], Outputs] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}".replace(" ", "_")


def on(inputs: Tensors, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensors:
    """Copies elsewhere that keep strides; ``dtype``: of the floating ones."""
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None, copy=True)
        for name, value in inputs.items()
    }


def problems() -> list[Problem]:
    """Of every operator in the registry."""
    return [problem for name in OPERATORS for problem in PROBLEMS.get(name, _probed)(name)]


def gpu_backends(operator: str) -> list[str]:
    """Those of the operator's backends that run on a GPU and are more than plain PyTorch."""
    return [backend.name for backend in OPERATORS[operator].backends if backend.name in GPU_BACKENDS]


# ---- from the registry alone ---------------------------------------------------------------------------------------


def _probed(name: str) -> Iterator[Problem]:
    operator = OPERATORS[name]

    def make(dtype: torch.dtype) -> Tensors:
        return {
            str(index): torch.randn_like(value) if value.is_floating_point() else value
            for index, value in enumerate(operator.probe("cpu"))
            if isinstance(value, Tensor)
        }

    def call(run: Callable[..., Any], inputs: Tensors) -> Outputs:
        values = [inputs.get(str(index), value) for index, value in enumerate(operator.probe("cpu"))]
        found = run(*values)
        return tuple(found) if isinstance(found, Sequence) else (found,)

    yield Problem(
        name,
        "probe",
        make,
        lambda inputs: call(lambda *values: operator.select(*values).run(*values), inputs),
        dtypes=(torch.float32,),
    )


# ---- recurrent_conv ------------------------------------------------------------------------------------------------

# Every kernel that an H200 is given and most of its edges: padded channels and columns, words of 16 to 2 bytes, W in
# shared memory and in pieces, several blocks, one frame alone and frame after frame, many columns, many frames of few
# positions (in chunks too), many splits.
SCANS: dict[str, tuple[tuple[int, int, int, int, int], torch.memory_format]] = {
    "C64 contiguous": ((3, 64, 5, 16, 16), torch.contiguous_format),
    "C64 channels_last": ((3, 64, 5, 14, 14), torch.channels_last_3d),
    "C128 channels_last": ((2, 128, 4, 14, 14), torch.channels_last_3d),
    "C256 channels_last": ((2, 256, 4, 14, 14), torch.channels_last_3d),
    "C256 7x7": ((1, 256, 6, 7, 7), torch.contiguous_format),
    "C512 7x7": ((2, 512, 3, 7, 7), torch.contiguous_format),
    "C20 odd": ((2, 20, 4, 5, 7), torch.channels_last_3d),
    "C33 odd": ((2, 33, 3, 7, 3), torch.contiguous_format),
    "C130 odd": ((1, 130, 3, 5, 3), torch.contiguous_format),
    "one frame": ((2, 256, 1, 7, 7), torch.channels_last_3d),
    "one frame many columns": ((4, 64, 1, 48, 48), torch.channels_last_3d),
    "one frame C64": ((1, 64, 1, 28, 28), torch.contiguous_format),
    "one frame C1030": ((1, 1030, 1, 7, 7), torch.contiguous_format),
    "C512 many columns": ((6, 512, 3, 24, 24), torch.channels_last_3d),
    "many splits": ((4, 128, 6, 20, 20), torch.contiguous_format),
    "many frames": ((1, 64, 70, 3, 3), torch.contiguous_format),
    "many chunks": ((1, 512, 150, 3, 3), torch.channels_last_3d),
    "C64 many columns": ((6, 64, 3, 28, 28), torch.contiguous_format),
    "C64 56x56": ((6, 64, 5, 56, 56), torch.contiguous_format),
    "C60 many columns": ((21, 60, 4, 28, 28), torch.channels_last_3d),
    "C96 many columns": ((16, 96, 2, 40, 40), torch.channels_last_3d),
    "C256 many columns": ((12, 256, 3, 28, 28), torch.contiguous_format),
    "C200 many columns": ((12, 200, 3, 28, 28), torch.channels_last_3d),
}

# Whose first state is what a call hands on: in the state's dtype and x's memory format. Steps by words take no other.
STREAMED = ("one frame", "one frame many columns")

MOST_HALVINGS = 40  # frames of a problem with update="mean" that is to stay exact in fp64


def random_scan(title: str, dtype: torch.dtype) -> Tensors:
    """x, weight, h0, a residual, scale and shift of a scan; the recurrence stays bounded."""
    given = _random_scan(*SCANS[title], dtype)
    if title in STREAMED:
        state = torch.empty_like(given["x"].select(2, 0), dtype=torch.promote_types(dtype, torch.float32))
        given["h0"] = state.copy_(given["h0"])
    return given


def _random_scan(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> Tensors:
    n, c, _, height, width = shape
    if dtype == torch.float64:
        signs = torch.randint(0, 2, (c, 1)) * 2 - 1
        return {
            "x": torch.randint(-2, 3, shape).to(dtype).contiguous(memory_format=layout),
            "weight": (torch.eye(c)[torch.randperm(c)] * signs).to(dtype),
            "h0": torch.randint(-2, 3, (n, c, height, width)).to(dtype),
            "residual": torch.randint(-2, 3, shape).to(dtype).contiguous(memory_format=layout),
            "scale": torch.randint(1, 4, (c,)).to(dtype),
            "shift": torch.randint(-2, 3, (c,)).to(dtype),
        }
    weight = 0.5 * torch.eye(c, dtype=torch.float64) + 0.4 / c**0.5 * torch.randn(c, c, dtype=torch.float64)
    return {
        "x": torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout),
        "weight": weight.to(dtype),
        "h0": torch.randn(n, c, height, width, dtype=torch.float64).to(dtype),
        "residual": torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout),
        "scale": torch.rand(c) + 0.5,
        "shift": torch.randn(c),
    }


Recurrence = Callable[..., tuple[Tensor, Tensor]]


def _forward_and_backward(run: Recurrence, given: Tensors, options: dict[str, Any]) -> Outputs:
    """h and h_n, then the gradients of x, W and h0 for the residual and h0 as gradients of the outputs."""
    leaves = [given[name].detach().requires_grad_() for name in ("x", "weight", "h0")]
    with torch.enable_grad():
        outputs = run(*leaves, **options)
    gradients = [given["residual"], given["h0"].to(outputs[1].dtype)]
    return tuple(v.detach() for v in (*outputs, *torch.autograd.grad(outputs, leaves, gradients)))


def _scan_problems(name: str) -> Iterator[Problem]:
    for index, (title, (shape, _)) in enumerate(SCANS.items()):
        # Every halving takes a bit of an fp64 integer, which has 52 to give.
        update = "sum" if shape[2] > MOST_HALVINGS else ("sum", "mean")[index % 2]
        options: dict[str, Any] = {"update": update, "reverse": index % 3 == 2}
        make = functools.partial(random_scan, title)

        def call(given: Tensors, options: dict[str, Any] = options) -> Outputs:
            return _forward_and_backward(rcu_ops.recurrent_conv, given, options)

        def exact(given: Tensors, options: dict[str, Any] = options) -> Outputs:
            return _forward_and_backward(reference.recurrent_conv, given, options)

        def eager(given: Tensors, options: dict[str, Any] = options) -> Outputs:
            return _forward_and_backward(reference.recurrent_conv, given, {**options, "state_dtype": given["x"].dtype})

        yield Problem(name, title, make, call, exact, eager)


def _affine_act_problems(name: str) -> Iterator[Problem]:
    def arguments(given: Tensors) -> list[Tensor]:
        return [given[key] for key in ("x", "weight", "scale", "shift", "h0", "residual")]

    def eager(given: Tensors) -> Outputs:
        rounded = {key: value.to(given["x"].dtype) for key, value in given.items()}
        return reference.recurrent_conv_affine_act(*arguments(rounded), state_dtype=given["x"].dtype)

    for title in SCANS:
        yield Problem(
            name,
            title,
            functools.partial(random_scan, title),
            lambda given: rcu_ops.recurrent_conv_affine_act(*arguments(given)),
            lambda given: reference.recurrent_conv_affine_act(*arguments(given)),
            eager,
        )


# ---- recurrent_conv_batch_norm -------------------------------------------------------------------------------------

# Scans that take statistics and gradient over, and scans that do not; with a residual and without.
NORMS = ("C64 channels_last", "C128 channels_last", "C256 7x7", "C512 7x7", "C20 odd", "C33 odd", "C130 odd")


def _batch_norm_problems(name: str) -> Iterator[Problem]:
    """y and h_n with all gradients. Where y is near zero ReLU's mask is a matter of rounding: no gradient arrives."""
    leaves = ("x", "weight", "gamma", "beta", "h0", "residual")

    def layers(given: Tensors, update: str, relu: bool = True) -> Outputs:
        dtype = given["x"].dtype
        h, h_n = reference.recurrent_conv(given["x"], given["weight"], given["h0"], update=update, state_dtype=dtype)
        y = F.batch_norm(h, None, None, given["gamma"].to(dtype), given["beta"].to(dtype), training=True, eps=1e-5)
        y = y + given["residual"] if "residual" in given else y
        return F.relu(y) if relu else y, h_n

    def with_gradients(run: Callable[[Tensors], Outputs], given: Tensors) -> Outputs:
        at = {key: value.detach().requires_grad_(key in leaves) for key, value in given.items()}
        with torch.enable_grad():
            outputs = run(at)
        grads = [given[key].to(o.dtype) for key, o in zip(("grad", "grad_h_n"), outputs, strict=True)]
        found = torch.autograd.grad(outputs, [at[key] for key in leaves if key in at], grads)
        return tuple(v.detach() for v in (*outputs, *found))

    for index, title in enumerate(NORMS):
        shape, layout = SCANS[title]
        update = ("sum", "mean")[index % 2]

        def make(
            dtype: torch.dtype,
            title: str = title,
            shape: Any = shape,
            layout: Any = layout,
            update: str = update,
            residual: bool = index > 2,
        ) -> Tensors:
            given = random_scan(title, dtype)
            given["gamma"], given["beta"] = given.pop("scale"), given.pop("shift")
            if not residual:
                given.pop("residual")
            exact = layers(on(given, "cpu", torch.float64), update, relu=False)[0]
            grad = torch.randn(shape) * (exact.abs() > 0.05)
            return given | {
                "grad": grad.to(dtype).contiguous(memory_format=layout),
                "grad_h_n": torch.randn(given["h0"].shape),
            }

        def call(given: Tensors, update: str = update) -> Outputs:
            y, h_n, _ = rcu_ops.recurrent_conv_batch_norm(
                *(given.get(key) for key in ("x", "weight", "gamma", "beta", "h0", "residual")), update=update
            )
            return y, h_n

        def separate(given: Tensors, update: str = update) -> Outputs:
            return with_gradients(functools.partial(layers, update=update), given)

        yield Problem(name, title, make, functools.partial(with_gradients, call), separate, separate, DTYPES[:3])


# ---- cycle_consistency ---------------------------------------------------------------------------------------------


def _alignment_problems(name: str) -> Iterator[Problem]:
    """Soft neighbours or losses per frame, with their gradients."""

    def make(dtype: torch.dtype, t: int, s: int, c: int) -> Tensors:
        sequences = {"a": torch.randn(3, t, c), "b": torch.randn(3, s, c), "grad": torch.randn(3, t, c)}
        return {key: (value / (2 * c) ** 0.5).to(dtype) for key, value in sequences.items()}

    def with_gradients(run: Callable[[Tensor, Tensor], Any], given: Tensors) -> Outputs:
        leaves = [given[key].detach().requires_grad_() for key in ("a", "b")]
        with torch.enable_grad():
            found = run(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        weights = given["grad"] if outputs[0].dim() == 3 else given["grad"][..., 0]
        gradients = torch.autograd.grad(outputs[0], leaves, weights.to(outputs[0].dtype))
        return tuple(output.detach() for output in (*outputs, *gradients))

    def eager_loss(a: Tensor, b: Tensor) -> Tensor:
        soft, _ = reference.soft_nearest_neighbor(a, b, state_dtype=a.dtype)
        return -reference.cycle_back(soft, a, state_dtype=a.dtype)[0]

    losses = name == "temporal_cycle_loss"
    options: dict[str, Any] = {"kind": "classification"} if losses else {}
    ours = functools.partial(getattr(rcu_ops, name), **options, **({"reduction": "none"} if losses else {}))
    exact = functools.partial(getattr(reference, name), **options)

    def eager(a: Tensor, b: Tensor) -> Any:
        return eager_loss(a, b) if losses else reference.soft_nearest_neighbor(a, b, state_dtype=a.dtype)

    # many pairs: more than a GPU of up to 132 multiprocessors takes by differences
    for title, t, s, c in (("probe", 13, 17, 40), ("long", 70, 100, 40), ("many pairs", 350, 352, 100)):
        yield Problem(
            name,
            title,
            functools.partial(make, t=t, s=s, c=c),
            lambda given: with_gradients(ours, given),
            lambda given: with_gradients(exact, given),
            lambda given: with_gradients(eager, given),
            (torch.float32, torch.bfloat16),
        )

    def beside_a_far_scene(dtype: torch.dtype, frames: int) -> Tensors:
        """Every other frame, from the first on, is of a scene of far larger numbers, and has no gradient."""
        given = make(dtype, frames, frames, 40)
        far = (torch.arange(frames) % 2 == 0)[:, None]
        a = given["a"] + 1e3 * torch.randn(3, 1, 40, dtype=dtype) * far
        return {"a": a, "b": a + 0.3 * given["b"], "grad": given["grad"] * ~far}

    def of_near_frames(run: Callable[[Tensor, Tensor], Any], given: Tensors) -> Outputs:
        return tuple(output[:, 1::2] for output in with_gradients(run, given))

    for frames in (24, 80):
        yield Problem(
            name,
            f"{frames} frames beside a far scene",
            functools.partial(beside_a_far_scene, frames=frames),
            lambda given: of_near_frames(ours, given),
            lambda given: of_near_frames(exact, given),
            lambda given: of_near_frames(eager, given),
            (torch.float32,),
        )


# ---- fast_gru ------------------------------------------------------------------------------------------------------

# [N,K,C,L,H,W], R, channels innermost, o0 given: odd sizes, whole 16-byte words, many channels with few columns (in
# clusters, where a GPU's parts have room for fewer than for the paper's) and with many, and the paper's channels.
RECURRENCES: dict[str, tuple[tuple[int, ...], int, bool, bool]] = {
    "probe": ((2, 3, 19, 1, 3, 5), 5, True, True),
    "C64 contiguous": ((2, 4, 64, 2, 7, 7), 16, False, False),
    "C33 odd": ((3, 3, 33, 1, 5, 3), 7, False, True),
    "C512 7x7": ((1, 3, 512, 1, 7, 7), 128, True, True),
    "C1024 7x7": ((1, 3, 1024, 1, 7, 7), 256, True, False),
    "C256 many columns": ((3, 3, 256, 1, 7, 7), 64, False, True),
    "paper": ((1, 3, 2048, 1, 7, 7), 512, False, False),
}


def _fast_gru_problems(name: str) -> Iterator[Problem]:
    """o and o_n with all gradients, gates saved and recomputed in turn; or one step."""
    step = name == "fast_gru_step"
    for index, (title, (shape, hidden, innermost, with_o0)) in enumerate(RECURRENCES.items()):

        def make(
            dtype: torch.dtype,
            shape: Any = shape,
            hidden: int = hidden,
            innermost: bool = innermost,
            o0: bool = with_o0,
        ) -> Tensors:
            values = fast_gru_inputs(shape, hidden, dtype, o0 or step)
            given = {key: value for key, value in zip(FAST_GRU_NAMES, values, strict=True) if value is not None}
            given |= {"grad_o": torch.randn(shape).to(dtype), "grad_o_n": torch.randn(shape[:1] + shape[2:])}
            if innermost:
                given |= {key: given[key].movedim(2, -1).contiguous().movedim(-1, 2) for key in ("x", "grad_o")}
            return given

        def whole(run: Recurrence, given: Tensors) -> Outputs:
            leaves = [given[key].detach().requires_grad_() for key in FAST_GRU_NAMES if key in given]
            with torch.enable_grad():
                outputs = run(*leaves)
            grads = [given[key].to(output.dtype) for key, output in zip(("grad_o", "grad_o_n"), outputs, strict=True)]
            return tuple(v.detach() for v in (*outputs, *torch.autograd.grad(outputs, leaves, grads)))

        def one(run: Recurrence, given: Tensors) -> Outputs:
            return (run(given["x"][:, :1], *(given[key] for key in FAST_GRU_NAMES[1:]))[1],)

        def ours_one(given: Tensors) -> Outputs:
            arguments = (
                given["x"][:, 0],
                given["o0"].to(given["grad_o_n"].dtype),
                *(given[k] for k in FAST_GRU_NAMES[1:6]),
            )
            return (rcu_ops.fast_gru_step(*arguments),)

        def ours(given: Tensors, recompute: bool = index % 2 == 1) -> Outputs:
            return whole(functools.partial(rcu_ops.fast_gru, recompute=recompute), given)

        def exact(given: Tensors) -> Outputs:
            return (one if step else whole)(reference.fast_gru, given)

        def eager(given: Tensors) -> Outputs:
            return (one if step else whole)(functools.partial(reference.fast_gru, state_dtype=given["x"].dtype), given)

        # exp and tanh round in fp64 too, so nothing would be exact there.
        yield Problem(name, title, make, ours_one if step else ours, exact, eager, DTYPES[:3])


# ---- nonlocal_gates ------------------------------------------------------------------------------------------------

# B, N, M, D, Dv: weights that stay on chip and that do not, odd sizes, the suite's 49 and 196 positions.
RELATIONS = {
    "probe": (2, 49, 49, 128, 96),
    "196 positions": (1, 196, 196, 64, 80),
    "few channels": (3, 49, 49, 64, 64),
    "odd": (3, 37, 21, 33, 70),
    "many keys": (1, 40, 2100, 24, 40),
    "wide heads": (2, 49, 49, 512, 512),
    "wide heads, more positions": (1, 100, 100, 264, 264),
}


def _relation_problems(name: str) -> Iterator[Problem]:
    """With their gradients; the step without the problem that has other keys than queries."""
    steps = name == "relational_lstm_step"

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
        b, n, m, d, e = shape
        lead = (b, 4) if steps else (b,)
        size = (2.0 / d**0.5) ** 0.5
        given = {"query": torch.randn(*lead, n, d) * size, "key": torch.randn(*lead, m, d) * size}
        given["value"] = torch.randn(*lead, m, e)
        given = given | {"x": torch.randn(b, 4, n, e), "cell": torch.randn(b, n, e)} if steps else given
        return {key: value.to(dtype) for key, value in (given | {"grad": torch.randn(b, n, e)}).items()}

    def with_gradients(run: Callable[..., Any], given: Tensors) -> Outputs:
        names = ("x", "query", "key", "value", "cell") if steps else ("query", "key", "value")
        leaves = [given[key].detach().requires_grad_() for key in names]
        with torch.enable_grad():
            found = run(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        gradients = torch.autograd.grad(outputs, leaves, [given["grad"].to(o.dtype) for o in outputs])
        return tuple(v.detach() for v in (*outputs, *gradients))

    ours, definition = getattr(rcu_ops, name), getattr(reference, name)
    for title, (b, n, m, d, e) in RELATIONS.items():
        if steps and title == "many keys":
            continue
        yield Problem(
            name,
            title,
            functools.partial(make, (b, n, n if steps else m, d, e)),
            functools.partial(with_gradients, ours),
            functools.partial(with_gradients, definition),
            lambda given: with_gradients(functools.partial(definition, state_dtype=given["query"].dtype), given),
            (torch.float32, torch.bfloat16, torch.float16),
        )


# ---- the gate of SRTG and its data path ----------------------------------------------------------------------------


def _cycle_problems(name: str) -> Iterator[Problem]:
    """Index maps and gates of a sequence and a noisy copy, as one kernel takes them and longer."""
    kinds = (("probe", 16, 40, 0.0), ("wide", 16, 1032, 0.0), ("33 frames", 33, 40, 0.0), ("long", 300, 40, 0.0))
    for title, frames, channels, far in (*kinds, ("cut", 150, 40, 1e3)):

        def make(dtype: torch.dtype, frames: int = frames, channels: int = channels, far: float = far) -> Tensors:
            scenes = torch.randn(3, 2, channels)[:, torch.arange(frames) * 2 // frames]
            a = torch.randn(3, frames, channels) + far * scenes
            return {"a": a.to(dtype), "b": (a + 0.05 * torch.randn(a.shape)).to(dtype)}

        def call(given: Tensors) -> Outputs:
            return tuple(rcu_ops.cycle_consistency(given["a"], given["b"]))

        def exact(given: Tensors) -> Outputs:
            return tuple(reference.cycle_consistency(given["a"], given["b"]))

        # 16-bit formats have not the digits for differences within a far scene.
        yield Problem(name, title, make, call, exact, exact, DTYPES[:3] if far == 0 else (torch.float32,))


def _gate_data_problems(name: str) -> Iterator[Problem]:
    """Spatial means, or the gated product, in both memory layouts, number by number and by packs of numbers."""
    number_by_number, packs = (2, 35, 3, 5, 7), (2, 36, 3, 4, 8)
    for title, shape, layout in (
        ("probe", number_by_number, torch.contiguous_format),
        ("channels_last", number_by_number, torch.channels_last_3d),
        ("packs", packs, torch.contiguous_format),
        ("packs channels_last", packs, torch.channels_last_3d),
    ):

        def make(dtype: torch.dtype, shape: tuple[int, ...] = shape, layout: torch.memory_format = layout) -> Tensors:
            x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            return {"x": x, "h": torch.randn(shape[0], shape[2], shape[1]), "gate": torch.tensor([True, False])}

        def call(given: Tensors, module: Any = rcu_ops) -> Outputs:
            if name == "srtg_squeeze":
                return (module.srtg_squeeze(given["x"]),)
            return (module.srtg_fuse(given["x"], given["h"], given["gate"]),)

        def eager(given: Tensors) -> Outputs:
            if name == "srtg_squeeze":
                return (given["x"].mean((3, 4), dtype=torch.float32).mT,)
            factor = given["h"].mT[..., None, None].to(given["x"].dtype)
            return (torch.where(given["gate"][:, None, None, None, None], given["x"] * factor, given["x"]),)

        yield Problem(name, title, make, call, functools.partial(call, module=reference), eager, DTYPES[:3])


PROBLEMS: dict[str, Callable[[str], Iterator[Problem]]] = {
    "recurrent_conv": _scan_problems,
    "recurrent_conv_affine_act": _affine_act_problems,
    "recurrent_conv_batch_norm": _batch_norm_problems,
    "nonlocal_attention": _relation_problems,
    "relational_lstm_step": _relation_problems,
    "soft_nearest_neighbor": _alignment_problems,
    "temporal_cycle_loss": _alignment_problems,
    "cycle_consistency": _cycle_problems,
    "srtg_squeeze": _gate_data_problems,
    "srtg_fuse": _gate_data_problems,
    "fast_gru": _fast_gru_problems,
    "fast_gru_step": _fast_gru_problems,
}
