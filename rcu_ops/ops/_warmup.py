"""Compile the Triton kernels ahead of their first use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rcu_ops.ops import _registry, _selftest, _triton
from rcu_ops.progress import track

MEMORY_FORMATS = (torch.channels_last_3d, torch.contiguous_format)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Files of kernels by the number of dimensions of the sequences that they take.
FILES = {3: ("cycle_consistency",), 5: ("recurrent_conv", "srtg"), 6: ("fast_gru",)}


def warmup(
    shapes: Iterable[Sequence[int]],
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    memory_formats: Iterable[torch.memory_format] = MEMORY_FORMATS,
    training: bool = True,
    inference: bool = True,
    files: Iterable[str] | None = None,
    device: torch.device | str | int | None = None,
) -> int:
    """Compile the Triton kernels that calls of these shapes will need, so that no call has to wait for the compiler.

    Without it the first call of each kind compiles, a second or so each; Triton keeps what it compiled on disk, so
    later processes only load it. The number of frames and the update rule are no part of what is compiled: one T
    stands for all (up to 2^31 elements, where offsets become wider). States are taken as the operators return them
    (fp32). The self-tests of the kernels on the device are run too, if they have not been. Kernels of the CUDA and CPU
    backends are compiled when the package is built and need no warm-up.

    Args:
        shapes: [N,C,T,H,W] of the sequences that :func:`rcu_ops.recurrent_conv`, or :func:`rcu_ops.srtg_squeeze` and
            :func:`rcu_ops.srtg_fuse`, will get; [N,K,C,L,H,W] of the features that :func:`rcu_ops.fast_gru` will get,
            with R = C // 4; [N,T,C] of both sequences that :func:`rcu_ops.cycle_consistency`,
            :func:`rcu_ops.soft_nearest_neighbor` and :func:`rcu_ops.temporal_cycle_loss` will get, without masks.
        dtypes: of the sequences: fp16, bf16, fp32. fp32 is compiled for the current
            ``torch.get_float32_matmul_precision()``.
        memory_formats: torch.channels_last_3d, torch.contiguous_format or both.
        training: compile forward and backward.
        inference: compile forward, and :func:`rcu_ops.recurrent_conv_affine_act`.
        files: of kernels to compile, of "recurrent_conv", "srtg", "fast_gru", "cycle_consistency"; None: all that take
            sequences of such shapes.
        device: the CUDA device to compile for; the current one by default.

    Returns:
        The number of different kernels compiled or found compiled.

    Raises:
        RuntimeError: no CUDA device, or triton is not installed. ValueError: a shape of another number of dimensions, a
        file, memory format or device that cannot be warmed up, neither training nor inference. TypeError: another
        dtype.
    """
    every = [file for found in FILES.values() for file in found]
    wanted = every if files is None else list(files)
    for file in wanted:
        if file not in every:
            raise ValueError(f"files: expected some of {', '.join(every)}, got {file!r}")
    sequences = [_shape(shape, wanted) for shape in shapes]
    dtypes, memory_formats = list(dtypes), list(memory_formats)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TypeError(f"dtypes: expected float16, bfloat16 or float32, got {dtype}")
    for memory_format in memory_formats:
        if memory_format not in MEMORY_FORMATS:
            raise ValueError(f"memory_formats: expected channels_last_3d or contiguous_format, got {memory_format}")
    if not (training or inference):
        raise ValueError("training, inference: expected at least one to be True")
    if not torch.cuda.is_available():
        raise RuntimeError("warmup: there is no CUDA device; the kernels are compiled for the GPU that will run them")
    if not _triton.PRESENT:
        raise RuntimeError("warmup: the package triton is not installed")
    target = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
    if target.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {target}")

    arch = _triton.kernels("launch").architecture(target)
    launches: dict[tuple[Any, ...], Any] = {}
    for shape, dtype, memory_format in itertools.product(sequences, dtypes, memory_formats):
        for file in FILES[len(shape)]:
            if file not in wanted:
                continue
            kernels = _triton.kernels(file)
            found: Iterator[Any]
            if file == "recurrent_conv":
                found = planned(kernels, shape, dtype, memory_format, arch, training, inference)
            elif file == "srtg":
                found = planned_srtg(kernels, shape, dtype, memory_format, training)
            elif file == "fast_gru":  # its kernels read their own matrices, whatever the memory format
                found = planned_fast_gru(kernels, shape, dtype, arch, training, inference)
            else:
                found = planned_cycle_consistency(kernels, shape, dtype, training)
            for launch in found:
                launches.setdefault(launch.key(), launch)
    with torch.cuda.device(target):
        for launch in track(list(launches.values()), label="compiling Triton kernels", unit="kernels"):
            launch.compile_ahead()
    for dtype, operator in itertools.product(dtypes, _registry.OPERATORS):
        if _selftest.known(f"{operator}/triton"):
            _selftest.why_not(f"{operator}/triton", target, dtype)
    return len(launches)


def _shape(shape: Sequence[int], files: Sequence[str]) -> tuple[int, ...]:
    if len(shape) not in FILES or min(shape) < 1:
        expected = "[N,T,C], [N,C,T,H,W] or [N,K,C,L,H,W]"
        raise ValueError(f"shapes: expected {expected} of positive sizes, got {list(shape)}")
    if len(shape) == 6 and shape[2] < 4:
        raise ValueError(f"shapes: expected at least 4 channels in [N,K,C,L,H,W], got {list(shape)}")
    if len(shape) == 5 and shape[1] > _triton.MAX_CHANNELS and "recurrent_conv" in files:
        raise ValueError(f"shapes: the kernels take at most {_triton.MAX_CHANNELS} channels, got {list(shape)}")
    return tuple(shape)


def planned(
    kernels: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    arch: int,
    training: bool,
    inference: bool,
) -> Iterator[Any]:
    """Every launch that calls of one shape can make, with and without the optional arguments, on meta tensors."""

    def like(size: tuple[int, ...]) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta").to(memory_format=memory_format)

    x = like(shape)
    weight = torch.empty(shape[1], shape[1], dtype=dtype, device="meta")
    per_channel = torch.empty(shape[1], device="meta")
    state = torch.empty_like(x.select(2, 0), dtype=torch.float32)
    for h0 in (None, state):
        yield from kernels.plan_forward(x, weight, h0, False, False, arch)[1]
        if inference:
            for residual, relu in itertools.product((None, x), (False, True)):
                fused = (x, weight, per_channel, per_channel, h0, residual, False, relu, arch)
                yield from kernels.plan_affine_act(*fused)[1]
        if training:
            for grad_h, grad_h_n in ((x, None), (x, state), (None, state)):
                backward = (grad_h, grad_h_n, x, weight, h0, False, False, True, arch)
                yield from kernels.plan_backward(*backward)[1]


def planned_srtg(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, training: bool
) -> Iterator[Any]:
    """The same for :func:`rcu_ops.srtg_squeeze` and :func:`rcu_ops.srtg_fuse`."""
    n, c, t, *_ = shape
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    h = torch.empty(n, t, c, device="meta")
    yield from kernels.plan(kernels.SQUEEZE, x)[1]
    for gate in (None, torch.empty(n, dtype=torch.bool, device="meta")):
        for fusion in (kernels.MUL, kernels.ADD):
            yield from kernels.plan(fusion, x, h, gate)[1]
        if training:
            yield from kernels.plan(kernels.BACKWARD, x, h, gate, x)[1]


def planned_cycle_consistency(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, training: bool
) -> Iterator[Any]:
    """The same for alignments of two sequences of one shape, without masks; losses are computed in fp32."""
    a, grads = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(3, *shape[:2], device="meta")
    if shape[1] <= kernels.SHORT:
        yield from kernels.plan_short_cycle(a, a, None, None, 1.0)[1]
    else:
        yield from kernels.plan_cycle(a, a, None, None, 1.0)[1]
    for x in (a, a.float()):
        for need_index in (True, False):
            yield from kernels.plan_soft(x, x, None, 1.0, need_index)[1]
        yield from kernels.plan_back(x, x, None, 1.0)[1]
        if training:
            yield from kernels.plan_soft_backward(x, x, x, None, 1.0)[1]
            yield from kernels.plan_back_backward(x, x, *grads, None, 1.0)[1]


def planned_fast_gru(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, arch: int, training: bool, inference: bool
) -> Iterator[Any]:
    """The same for :func:`rcu_ops.fast_gru`; three clips stand for any number."""
    n, _, c, *positions = shape

    def empty(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    x, state, r = empty(n, 3, c, *positions), empty(n, c, *positions, kind=torch.float32), c // 4
    weights = empty(2 * r, c), empty(2 * r, c), empty(2, c, r), empty(c, c), empty(c, c)
    for o0 in (None, state, state.to(dtype)):
        if inference:
            yield from kernels.plan_forward(x, *weights, o0, False, arch).launches()
        if training:
            forward = kernels.plan_forward(x, *weights, o0, True, arch)
            yield from forward.launches()
            o, o_n, *saved = forward.results
            nothing = [empty(0), empty(0)]
            for kept, (grad_o, grad_o_n) in itertools.product((saved, nothing), ((x, None), (x, o_n), (None, o_n))):
                arguments = (grad_o, grad_o_n, x, *weights, o0, o, *kept, True, True, arch)
                yield from kernels.plan_backward(*arguments).launches()
