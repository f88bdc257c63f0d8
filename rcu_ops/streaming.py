"""Running a causal network over a stream, one chunk of frames at a time, with explicit state.

    streamer = Streamer(model.eval())
    state = None
    with torch.inference_mode():
        for frames in chunks:                       # [N,3,t,H,W], any t >= 1
            scores, state = streamer(frames, state)  # [N,K,t]

The scores are those of one pass over the whole clip, whatever the chunks. The state is a ``dict[str, Tensor]``: one
entry per recurrent layer (with a trailing window, ``"#window"``: its frames), ``"#frames"``, the number of frames each
sample has seen, and ``"#size"`` [N,0,H,W], whose shape is the frames' size. It belongs to the caller: a call changes
neither the state it is given nor anything in the model, so streams can be forked, stored and resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rcu_ops.nn.causality import carries_state, register_per_frame, streaming_obstacles
from rcu_ops.nn.stream_state import StreamPass
from rcu_ops.report import replacing
from rcu_ops.stream_graph import ChunkGraphs, State
from rcu_ops.tensor_files import not_safetensors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "FRAMES_KEY",
    "State",
    "Streamer",
    "detach_state",
    "load_state",
    "register_per_frame",
    "save_state",
    "state_bytes",
    "state_to",
]

FRAMES_KEY = "#frames"
SIZE_KEY = "#size"
WINDOW_KEY = "#window"

_FILE_FORMAT = "rcu-ops stream state"


class Streamer:
    """Runs a causal model chunk by chunk; equal to the model over the whole clip.

    Args:
        model: in evaluation mode (dropout and batch statistics would make chunks differ from the clip), made of layers
            that treat every frame alone or carry their state (:class:`rcu_ops.nn.RecurrentConv3d` and others). Its
            ``frame_scores(clip)`` is called if it has one, else the model itself; the result has time in dimension 2.
        window: None: the model itself runs frame by frame. A number W: any clip model, causal or not, is run on the
            last W frames for every new frame, at W frames' cost each: ``scores[:, :, t] = model(frames t-W+1 … t)``,
            with the stream's first frame repeated where frames before it are missing. The state is those frames. This
            is how networks stream whose layers look at a whole clip: temporal gates (:class:`rcu_ops.nn.SRTG`, whose
            pooling and LSTM stream as they are), 3D convolutions, temporal strides.
        graph: run every chunk as a CUDA graph, captured at the first chunk of each shape (and the start of a stream and
            resets count as shapes of their own). No gradients then. Changes of weights in place are seen, other
            parameters in their place are not: make a new Streamer. Where there can be no graph (on the CPU, when the
            capture fails, when chunks come in too many shapes) the chunk runs without one and a warning says why;
            :meth:`graph_report` keeps count.

    Raises:
        ValueError: a module is in training mode; modules that look at several frames at once, or that are not known to
            treat frames alone (all listed by name; see ``register_per_frame``).

    Outside ``torch.no_grad`` / ``inference_mode`` the returned state carries gradients, through any number of chunks.
    For truncated backpropagation through time cut it with :func:`detach_state`.
    """

    def __init__(self, model: nn.Module, graph: bool = False, *, window: int | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.model = model
        self.graph = graph
        self._modules = list(model.modules())
        self._check_mode()
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 frame, got {window}")
        self.window = window
        obstacles = streaming_obstacles(model) if window is None else []
        if obstacles:
            listing = "\n  ".join(f"{name}: {reason}" for name, reason in obstacles)
            raise ValueError(f"model: cannot run frame by frame:\n  {listing}")
        # Wrappers such as torch.compile's put a prefix before every name; states should not depend on it.
        self._names = {
            module: name.replace("_orig_mod.", "") for name, module in model.named_modules() if carries_state(module)
        }
        self._advance: Callable[..., tuple[Tensor, State]] = self._run
        self._graphs = ChunkGraphs(self._run, [*model.parameters(), *model.buffers()]) if graph else None

    def compile(self, **options: Any) -> Streamer:
        """Run chunks through ``torch.compile(**options)``; returns the streamer. One compilation per chunk shape."""
        self._advance = torch.compile(self._run, **options)
        return self

    def export(
        self,
        frames: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        any_length: bool = False,
    ) -> ExportedProgram:
        """One call of this streamer as a program that needs neither the model's code nor a Streamer.

            start = streamer.export(frames)             # start(frames) -> (scores, state)
            step = streamer.export(frames, state)       # step(frames, state) -> (scores, state)
            torch.export.save(step, "step.pt2")

        and in another process, where ``import rcu_ops`` registers the operators::

            step = torch.export.load("step.pt2").module()
            scores, state = step(frames, state)

        The programs hold the weights as they are now and compute no gradients. They serve
        ``torch._inductor.aoti_compile_and_package`` too. On a CPU a Streamer is faster: it keeps weights in the layout
        of the kernels, which a program cannot.

        Args:
            frames, state, reset: as for a call. They are examples: the program takes any batch size, and the other
                sizes, dtypes and the device that they have. It takes the arguments that are given here, no others;
                with ``reset`` it costs what a reset costs at every chunk.
            any_length: the program takes any number of frames, not that of ``frames``. Not with a window, nor with
                layers that go from frame to frame in Python (:class:`rcu_ops.nn.RelationalLSTM`,
                :class:`rcu_ops.nn.NonLocalBlock` with a memory): torch.export then says that t is a constant.

        Raises:
            ValueError, TypeError: as a call does; ``any_length`` with a window.
        """
        from rcu_ops.stream_export import export_chunk  # torch.export takes a tenth of a second to import

        if any_length and self.window is not None:
            raise ValueError("any_length: a program with a window takes as many frames as the example has")
        plain = Streamer(self.model, window=self.window)
        with torch.no_grad():
            plain(frames, state, reset)  # a wrong argument is told in the words of a call, not of torch.export
        return export_chunk(self.model, plain, frames, state, reset, any_length)

    def graph_report(self) -> str:
        """Which chunks have run as CUDA graphs, which have not, and why."""
        return "made with graph=False" if self._graphs is None else self._graphs.report()

    def __call__(
        self, frames: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Scores of the next frames.

        Args:
            frames: [N,C,t,H,W], t >= 1.
            state: what the previous call returned; None at the start.
            reset: bool [N]; the samples that start anew with this chunk. Nothing of their old state, NaN included,
                reaches their scores.

        Returns:
            ``(scores [N,K,t], state)``.

        Raises:
            ValueError: a module has been put into training mode; frames and state differ in batch size, frame size,
                dtype or device; the state is another model's; the model does not give one output per frame.
        """
        self._check_mode()
        self._check_frames(frames)
        n, t = frames.shape[0], frames.shape[2]
        fresh = None
        seen = None
        if state is not None:
            seen = state.get(FRAMES_KEY)
            if seen is None:
                raise ValueError(f"state: expected what this Streamer returned, got no entry {FRAMES_KEY!r}")
            if seen.shape[0] != n:
                raise ValueError(
                    f"state: holds {seen.shape[0]} streams, but frames are {list(frames.shape)} with N = {n}"
                )
            fresh = self._check_reset(reset, frames)
        elif reset is not None:
            self._check_reset(reset, frames)  # everything starts here anyway

        if state is not None and (WINDOW_KEY in state) != (self.window is not None):
            raise ValueError("state: expected what this Streamer returned, got that of one with another window")
        if state is not None and self.window is None:
            # Layers see the size of their own maps only, and frames of 111 and of 112 pixels give maps of one size.
            size = state.get(SIZE_KEY)
            if size is None:
                raise ValueError(f"state: expected what this Streamer returned, got no entry {SIZE_KEY!r}")
            if size.shape[2:] != frames.shape[3:]:
                raise ValueError(
                    f"frames: expected {list(size.shape[2:])} as those of the state, got {list(frames.shape[3:])}: a "
                    "stream keeps one frame size"
                )
        own = (FRAMES_KEY, SIZE_KEY)
        carried = None if state is None else {key: value for key, value in state.items() if key not in own}
        scores, written = (self._graphs or self._advance)(frames, carried, fresh)
        if carried is not None and (unknown := carried.keys() - written.keys()):
            raise ValueError(f"state: has entries that this model does not: {', '.join(sorted(unknown))}")
        if scores.dim() < 3 or scores.shape[0] != n or scores.shape[2] != t:
            raise ValueError(
                f"model: expected scores [{n},K,{t}], one per frame, got {list(scores.shape)}: the model needs a "
                "frame_scores(clip) method, or a forward that keeps time in dimension 2"
            )
        if seen is None:
            seen = torch.zeros(n, dtype=torch.int64, device=frames.device)
        elif fresh is not None:
            seen = seen.masked_fill(fresh, 0)
        written[FRAMES_KEY] = seen + t
        if self.window is None:
            written[SIZE_KEY] = seen.new_empty(n, 0, *frames.shape[3:])
        return scores, written

    def _run(self, frames: Tensor, carried: State | None, fresh: Tensor | None) -> tuple[Tensor, State]:
        """The pure function of a chunk: what is compiled and captured."""
        if self.window is not None:
            return self._run_windows(frames, carried, fresh, self.window)
        with StreamPass(self._names, carried, fresh) as stream:
            scores = getattr(self.model, "frame_scores", self.model)(frames)
        return scores, stream.written

    def _run_windows(
        self, frames: Tensor, carried: State | None, fresh: Tensor | None, window: int
    ) -> tuple[Tensor, State]:
        first = frames[:, :, :1].expand(-1, -1, window, -1, -1)
        past = first if carried is None else carried[WINDOW_KEY]
        if past.shape != first.shape:
            raise ValueError(f"state: {WINDOW_KEY!r} is {list(past.shape)}, but these frames need {list(first.shape)}")
        if fresh is not None:
            past = torch.where(fresh.view(-1, 1, 1, 1, 1), first, past)
        joined = torch.cat([past, frames], dim=2)
        steps = range(1, frames.shape[2] + 1)
        scores = torch.stack([self.model(joined[:, :, step : step + window]) for step in steps], dim=2)
        return scores, {WINDOW_KEY: joined[:, :, -window:].contiguous()}

    def _check_mode(self) -> None:
        if any(module.training for module in self._modules):
            names = [name or "the model" for name, module in self.model.named_modules() if module.training]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"model: expected evaluation mode (call model.eval()), but {names[0]}{more} in training mode: dropout "
                "and batch statistics make a chunk differ from the same frames of a clip"
            )

    def _check_frames(self, frames: Tensor) -> None:
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor, got {type(frames).__name__}")
        if frames.dim() != 5 or frames.shape[2] < 1:
            raise ValueError(f"frames: expected [N,C,t,H,W] with t >= 1, got {list(frames.shape)}")
        weight = self._first_weight()
        if weight is None:
            return
        if frames.device != weight.device:
            raise ValueError(f"frames: expected on the model's device {weight.device}, got {frames.device}")
        if frames.dtype != weight.dtype and not torch.is_autocast_enabled(frames.device.type):
            raise ValueError(f"frames: expected the model's dtype {weight.dtype}, got {frames.dtype}")

    def _first_weight(self) -> Tensor | None:
        # As model.parameters() has them, which asks every module for its name; and anew: parameters may be replaced.
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    return parameter
        return None

    def _check_reset(self, reset: Tensor | None, frames: Tensor) -> Tensor | None:
        if reset is None:
            return None
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool or tuple(reset.shape) != (frames.shape[0],):
            got = f"{reset.dtype} {list(reset.shape)}" if isinstance(reset, Tensor) else type(reset).__name__
            raise ValueError(f"reset: expected a bool tensor [N] = [{frames.shape[0]}], got {got}")
        # On a GPU the question would stall the stream, and a traced program holds for any answer.
        if reset.device.type == "cpu" and not torch.compiler.is_compiling() and not reset.any():
            return None
        return reset.to(frames.device, non_blocking=True)


def state_to(
    state: Mapping[str, Tensor], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> State:
    """The state on another device, or with its hidden states in another dtype (16 bits halve it, at a loss).

    Streamers take hidden states in the state's own dtype (fp32; fp64 for fp64 models) or in the model's.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    return {
        key: value.to(device=device, dtype=dtype if value.is_floating_point() else None) for key, value in state.items()
    }


def detach_state(state: Mapping[str, Tensor]) -> State:
    """The state cut from the graph of gradients (truncated backpropagation through time)."""
    return {key: value.detach() for key, value in state.items()}


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """The size of the state in bytes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def save_state(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write the state to a safetensors file; an existing file is replaced at once or not at all."""
    from safetensors.torch import save

    tensors = {key: value.detach().contiguous().cpu() for key, value in state.items()}
    data = save(tensors, metadata={"format": _FILE_FORMAT})
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def load_state(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
    """Read a state written by :func:`save_state`.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file that ``save_state`` wrote, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = Path(path).read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} {not_safetensors(path, error)}") from error
    if header.get("__metadata__", {}).get("format") != _FILE_FORMAT or FRAMES_KEY not in tensors:
        raise ValueError(f"{path}: a safetensors file, but not the state of a stream")
    return state_to(tensors, device)
