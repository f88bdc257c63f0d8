"""Streamer: chunks equal the clip; state is explicit; what cannot stream is refused by name."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from rcu_ops import Streamer, fuse_for_inference, streaming
from rcu_ops.models import VideoResNet, create_model
from rcu_ops.nn import FeatureGate, FrameConv3d, RecurrentConv3d, RunningMean, active_slot
from rcu_ops.streaming import (
    FRAMES_KEY,
    SIZE_KEY,
    State,
    detach_state,
    load_state,
    register_per_frame,
    save_state,
    state_bytes,
    state_to,
)
from tests.networks import CAUSAL_MODELS, assert_same, calibrated, eager_frame_scores, small_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def stream(streamer: Streamer, clip: Tensor, chunks: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Scores of the whole clip, run in chunks of the given lengths."""
    assert sum(chunks) == clip.shape[2]
    scores = []
    for frames in clip.split(chunks, dim=2):
        part, state = streamer(frames, state)
        scores.append(part)
    assert state is not None
    return torch.cat(scores, dim=2), state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_any_chunks_equal_the_clip(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype=dtype)
    clip = torch.randn(2, 3, 6, 32, 32).to(dtype)
    exact = copy.deepcopy(model).double().frame_scores(clip.double())
    with torch.no_grad():
        whole = model.frame_scores(clip)
        for chunks in ([1] * 6, [4, 2]):
            scores, state = stream(Streamer(model), clip, chunks)
            assert_same(scores, exact, whole)
            assert scores.dtype == dtype
    assert state[FRAMES_KEY].tolist() == [6, 6]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(value.dtype == expected for key, value in state.items() if key not in (FRAMES_KEY, SIZE_KEY))


@pytest.mark.parametrize("update", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stream_against_plain_pytorch(dtype: torch.dtype, update: str) -> None:
    name = "rcn_resnet18" if update == "sum" else "rcn_resnet18_random"
    model = small_model(name, dtype=dtype)
    clip = torch.randn(2, 3, 4, 32, 32).to(dtype)
    exact = eager_frame_scores(copy.deepcopy(model).double(), clip.double())
    with torch.no_grad():
        eager = eager_frame_scores(model, clip)
        for form in (model, fuse_for_inference(model)):
            assert_same(stream(Streamer(form), clip, [1, 1, 2])[0], exact, eager)


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_causal(name: str) -> None:
    model = small_model(name)
    clip = torch.randn(1, 3, 5, 32, 32)
    changed = clip.clone()
    changed[:, :, 3:] = torch.nan
    with torch.no_grad():
        assert torch.equal(model.frame_scores(changed)[:, :, :3], model.frame_scores(clip)[:, :, :3])


def test_state_is_explicit() -> None:
    model = small_model("rcn_resnet18", dtype=torch.float64)
    streamer = Streamer(model)
    clip = torch.randn(2, 3, 6, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        _, state = streamer(clip[:, :, :3])
        before = {key: value.clone() for key, value in state.items()}
        one, _ = streamer(clip[:, :, 3:], state)
        streamer(torch.randn_like(clip))  # another stream in between
        again, _ = streamer(clip[:, :, 3:], state)
    assert torch.equal(one, again)
    assert all(torch.equal(before[key], state[key]) for key in before)
    recurrent = [name for name, module in model.named_modules() if isinstance(module, RecurrentConv3d)]
    assert set(state) == {*recurrent, FRAMES_KEY, SIZE_KEY}
    expected = 2 * 8 + sum(8 * state[name].numel() for name in recurrent)
    assert state_bytes(state) == expected


@pytest.mark.parametrize("name", ["rcn_resnet18", "rcn_resnet18_mean_gated"])
def test_reset_starts_samples_anew(name: str) -> None:
    model = small_model(name, dtype=torch.float64)
    streamer = Streamer(model)
    first, second = torch.randn(2, 3, 3, 3, 32, 32, dtype=torch.float64)
    reset = torch.tensor([True, False, True])
    with torch.no_grad():
        _, state = streamer(first)
        for key, value in state.items():
            if key not in (FRAMES_KEY, SIZE_KEY):
                value[0] = torch.nan
        scores, state = streamer(second, state, reset=reset)
        anew = model.frame_scores(second)
        continued = model.frame_scores(torch.cat([first, second], 2))[:, :, 3:]
    torch.testing.assert_close(scores[[0, 2]], anew[[0, 2]])
    torch.testing.assert_close(scores[1], continued[1])
    assert state[FRAMES_KEY].tolist() == [3, 6, 3]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", ["rcn_resnet18", "rcn_resnet18_mean_gated"])
def test_reset_samples_have_finite_gradients(name: str) -> None:
    model = small_model(name, dtype=torch.float64)
    streamer = Streamer(model)
    clip = torch.randn(2, 3, 2, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        _, state = streamer(clip)
        for key, value in state.items():
            if key not in (FRAMES_KEY, SIZE_KEY):
                value[0] = torch.nan
    scores, _ = streamer(clip, state, reset=torch.tensor([True, False]))
    scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_reset_of_nothing_and_of_a_new_stream() -> None:
    model = small_model("rcn_resnet18")
    streamer = Streamer(model)
    clip = torch.randn(2, 3, 2, 32, 32)
    with torch.no_grad():
        whole = model.frame_scores(clip)
        start, state = streamer(clip[:, :, :1], None, reset=torch.tensor([True, False]))
        rest, _ = streamer(clip[:, :, 1:], state, reset=torch.zeros(2, dtype=torch.bool))
    assert torch.equal(start, whole[:, :, :1])
    torch.testing.assert_close(rest, whole[:, :, 1:])


def test_gradients_through_time() -> None:
    model = small_model("rcn_resnet18", dtype=torch.float64)
    streamer = Streamer(model)
    clip = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)

    def gradients(scores: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(scores[:, :, -1].square().sum(), list(model.parameters())))

    whole = gradients(model.frame_scores(clip))
    chunked = gradients(stream(streamer, clip, [1, 2, 1])[0])
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b)

    _, state = streamer(clip[:, :, :2])
    cut = detach_state(state)
    assert not any(value.requires_grad for value in cut.values())
    truncated = gradients(streamer(clip[:, :, 2:], cut)[0])
    assert not all(torch.allclose(a, b) for a, b in zip(whole, truncated, strict=True))


class ClipMean(nn.Module):
    """The running mean of [N,C,T,1,1]."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = RunningMean()

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x.flatten(2))


@pytest.mark.parametrize(
    "layer", [RecurrentConv3d(4, 4, 3, padding=1), nn.Sequential(nn.AdaptiveAvgPool3d((None, 1, 1)), ClipMean())]
)
def test_checkpoints_in_a_stream_raise(layer: nn.Module) -> None:
    """Recomputed in the backward pass, outside of the stream, a layer would begin with this chunk."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Conv3d(3, 4, 1), layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, self.first(x), use_reentrant=False)

    stream = Streamer(Checkpointed().eval())
    x = torch.randn(2, 3, 4, 5, 5)
    y, state = stream(x)
    y.sum().backward()  # of a stream's first chunk nothing is before
    y, _ = stream(x, streaming.detach_state(state))
    with pytest.raises(CheckpointError):
        y.sum().backward()


def test_a_layer_called_twice_has_two_states() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = RecurrentConv3d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice().double().eval()
    clip = torch.randn(1, 3, 5, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        scores, state = stream(Streamer(model), clip, [2, 1, 2])
        torch.testing.assert_close(scores, model(clip))
    assert set(state) == {"layer", "layer#1", FRAMES_KEY, SIZE_KEY}


def test_a_model_that_is_one_layer() -> None:
    model = RecurrentConv3d(3, 2, 3).double().eval()
    clip = torch.randn(1, 3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(stream(Streamer(model), clip, [1, 2])[0], model(clip))


class RunningSum(nn.Module):
    """A user's own recurrent layer."""

    carries_state = True

    def forward(self, x: Tensor) -> Tensor:
        slot = active_slot(self)
        shape = (x.shape[0], x.shape[1], *x.shape[3:])
        start = None if slot is None else slot.read(x, shape, "total")
        y = x.cumsum(2) if start is None else x.cumsum(2) + start.unsqueeze(2)
        if slot is not None:
            slot.write(y[:, :, -1], "total")
        return y


def test_own_recurrent_layers() -> None:
    model = nn.Sequential(RunningSum(), nn.ReLU()).eval()
    clip = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    scores, state = stream(Streamer(model), clip, [2, 3])
    torch.testing.assert_close(scores, model(clip))
    assert set(state) == {"0:total", FRAMES_KEY, SIZE_KEY}


@pytest.mark.parametrize("kind", [torch.device("cpu"), torch.bfloat16])
def test_state_to(kind: torch.device | torch.dtype) -> None:
    model = small_model("rcn_resnet18", dtype=torch.bfloat16)
    streamer = Streamer(model)
    clip = torch.randn(1, 3, 2, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        _, state = streamer(clip)
        moved = state_to(state, kind) if isinstance(kind, torch.device) else state_to(state, dtype=kind)
        assert moved[FRAMES_KEY].dtype == torch.int64
        scores, state = streamer(clip, moved)
    assert scores.isfinite().all()
    if kind == torch.bfloat16:
        assert 2 * state_bytes({**moved, FRAMES_KEY: torch.empty(0)}) == state_bytes(
            {**state, FRAMES_KEY: torch.empty(0)}
        )
    with pytest.raises(ValueError, match="dtype"):
        state_to(state, dtype=torch.int32)


def test_save_and_load(tmp_path) -> None:
    model = small_model("rcn_resnet18")
    streamer = Streamer(model)
    clip = torch.randn(2, 3, 4, 32, 32)
    path = tmp_path / "state.safetensors"
    path.write_text("something old")
    with torch.no_grad():
        _, state = streamer(clip[:, :, :2])
        expected, _ = streamer(clip[:, :, 2:], state)
        save_state(state, path)
        scores, _ = streamer(clip[:, :, 2:], load_state(path))
    torch.testing.assert_close(scores, expected)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_state(path, "meta")[FRAMES_KEY].is_meta


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    save_state({FRAMES_KEY: torch.tensor([3])}, path)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state({FRAMES_KEY: torch.tensor([4])}, path)
    monkeypatch.undo()
    assert load_state(path)[FRAMES_KEY].tolist() == [3]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"garbage that is no header", "safetensors did not write it"),
        (b"\x10\0\0\0\0\0\0\0{}      ", "it is cut off"),
    ],
)
def test_damaged_state_files(content: bytes, why: str, tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"state\.safetensors is not a readable safetensors file: {why}"):
        load_state(path)


def test_other_safetensors_files(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_state({"layer": torch.ones(2)}, tmp_path / "layer.safetensors")  # our mark, but no count of frames
    for name in ("weights", "layer"):
        with pytest.raises(ValueError, match="not the state of a stream"):
            load_state(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nothing")


def test_threads_and_nesting_do_not_mix() -> None:
    """One streamer in several threads, and a streamer inside another's forward."""
    model = small_model("rcn_resnet18", dtype=torch.float64)
    streamer = Streamer(model)
    clips = torch.randn(4, 1, 3, 6, 32, 32, dtype=torch.float64)
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            results[index] = stream(streamer, clips[index], [1] * 6)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index in range(4):
            torch.testing.assert_close(results[index], model.frame_scores(clips[index]))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [Streamer(RecurrentConv3d(3, 3, 1).double().eval())]
            self.layer = RecurrentConv3d(3, 3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.inner[0](x)
            return self.layer(x) + 0 * y

    outer = Outer().eval()
    clip = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(stream(Streamer(outer), clip, [1, 3])[0], outer.layer(clip))


def test_an_error_ends_the_pass() -> None:
    layer = RecurrentConv3d(3, 3, 1).eval()
    streamer = Streamer(layer)
    with pytest.raises(ValueError, match="C = 3"):
        streamer(torch.randn(1, 4, 2, 4, 4))
    assert active_slot(layer) is None


@pytest.mark.parametrize("fused", [False, True])
def test_compiled(fused: bool) -> None:
    model = calibrated(VideoResNet("basic", (1, 1, 1, 1), width=4, num_classes=3)).double()
    form = fuse_for_inference(model) if fused else model
    torch.compiler.reset()
    streamer = Streamer(form).compile(backend="aot_eager", fullgraph=True)
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        scores, _ = stream(streamer, clip, [1, 1, 1])
        torch.testing.assert_close(scores, model.frame_scores(clip))


def test_names_do_not_depend_on_wrappers() -> None:
    model = small_model("rcn_resnet18")
    clip = torch.randn(1, 3, 1, 32, 32)
    with torch.no_grad():
        _, plain = Streamer(model)(clip)
        _, wrapped = Streamer(torch.compile(model, backend="eager"))(clip)
    assert plain.keys() == wrapped.keys()


@pytest.mark.parametrize("options", [{"srtg_gate": False}, {"srtg_window": 2}], ids=str)
def test_temporal_gates_in_other_dtypes(options: dict[str, object]) -> None:
    """Autocast's LSTM gives 16 bits back for 32, and states may be kept in the model's 16 bits."""
    model = create_model("rcn_resnet18", num_classes=8, width=4, srtg="final", **options).eval()
    clip = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, state = stream(Streamer(model), clip, [1, 1, 1])
        assert scores.shape == (1, 8, 3)
        assert {value.dtype for key, value in state.items() if ".srtg." in key} == {torch.float32}
    model, clip = model.bfloat16(), clip.bfloat16()
    with torch.no_grad():
        _, state = stream(Streamer(model), clip, [1, 1, 1])
        for dtype in (torch.float32, torch.bfloat16):
            assert Streamer(model)(clip, state_to(state, dtype=dtype))[0].shape == (1, 8, 3)


def test_autocast() -> None:
    model = small_model("rcn_resnet18")
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model.frame_scores(clip)
        scores, state = stream(Streamer(model), clip, [1, 3])
    exact = copy.deepcopy(model).double().frame_scores(clip.double())
    assert_same(scores, exact, whole)
    assert scores.dtype == torch.bfloat16
    assert state["stem.conv"].dtype == torch.float32


def test_meta() -> None:
    model = small_model("rcn_resnet50").to("meta")
    scores, state = Streamer(model)(torch.empty(2, 3, 1, 32, 32, device="meta"))
    assert scores.shape == (2, 64, 1)
    assert state["stem.conv"].shape == (2, 4, 16, 16)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["i3d_resnet18", "i3d_resnet18_dense", "r2plus1d_resnet18"])
def test_models_that_see_the_future(name: str) -> None:
    with pytest.raises(ValueError, match=r"stem\.conv.*: sees 3 frames at once") as error:
        Streamer(create_model(name, width=4).eval())
    convolutions = [
        name
        for name, module in create_model(name, width=4).named_modules()
        if isinstance(module, nn.Conv3d) and (module.kernel_size[0] > 1 or module.stride[0] > 1)
    ]
    assert all(f"\n  {name}: " in str(error.value) for name in convolutions)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv3d(3, 3, (1, 3, 3), (2, 1, 1)), "temporal stride 2"),
        (nn.Conv3d(3, 3, 1, padding=(1, 0, 0)), "temporal padding 1"),
        (nn.MaxPool3d(2), "temporal kernel 2"),
        (nn.MaxPool3d((1, 2, 2), (2, 2, 2)), "temporal stride 2"),
        (nn.AvgPool3d((3, 1, 1)), "temporal kernel 3"),
        (nn.AdaptiveAvgPool3d(1), "pools over time"),
        (nn.AdaptiveMaxPool3d((1, None, None)), "pools over time"),
        (nn.ConvTranspose3d(3, 3, 3), "temporal kernel 3"),
        (nn.InstanceNorm3d(3), "normalises over time"),
        (nn.GroupNorm(1, 3), "normalises over time"),
        (nn.BatchNorm3d(3, track_running_stats=False), "statistics of the chunk"),
        (nn.Conv1d(3, 3, 3), "may be time"),
        (nn.Flatten(), "flattens time"),
        (nn.LSTM(3, 3), "not carried"),
        (nn.GRU(3, 3, bidirectional=True), "reads the future"),
        (nn.MultiheadAttention(4, 1), "attends"),
        (FeatureGate(3, causal=False), "pools over time"),
        (nn.LayerNorm(3), "LayerNorm is not known"),
        (RunningSum.__base__(), "Module is not known"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_cannot_stream_are_named(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"inner": layer})).eval()
    with pytest.raises(ValueError, match=rf"1\.inner: .*{reason}"):
        Streamer(model)


def test_layers_that_can_stream() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(4), nn.SiLU(), nn.MaxPool3d((1, 2, 2)),
        FrameConv3d(4, 4, 1), nn.Dropout3d(), nn.AvgPool3d((1, 2, 1)), nn.AdaptiveAvgPool3d((None, 1, 1)),
        nn.Flatten(3),
    )  # fmt: skip
    model = model.eval()
    clip = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(stream(Streamer(model), clip, [1, 3])[0], model(clip))


def test_registering_layers() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class OwnForward(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(2, keepdim=True)

    with pytest.raises(ValueError, match=r"0: Scale is not known.*\n.*1: OwnForward is not known"):
        Streamer(nn.Sequential(Scale(), OwnForward()).eval())
    assert register_per_frame(Scale) is Scale
    Streamer(nn.Sequential(Scale()).eval())
    with pytest.raises(TypeError, match="module_type"):
        register_per_frame(Scale())
    with pytest.raises(TypeError, match="module_type"):
        register_per_frame(int)


def test_training_mode() -> None:
    model = create_model("rcn_resnet18", width=4)
    with pytest.raises(ValueError, match="evaluation mode"):
        Streamer(model)
    streamer = Streamer(model.eval())
    model.layer2.train()
    with pytest.raises(ValueError, match=r"layer2 and \d+ more in training mode"):
        streamer(torch.randn(1, 3, 1, 32, 32))


def test_wrong_frames() -> None:
    streamer = Streamer(create_model("rcn_resnet18", width=4).eval())
    with pytest.raises(TypeError, match="frames"):
        streamer([1, 2])
    with pytest.raises(ValueError, match="t >= 1"):
        streamer(torch.randn(1, 3, 0, 32, 32))
    with pytest.raises(ValueError, match="t >= 1"):
        streamer(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"dtype torch.float32, got torch.uint8"):
        streamer(torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="device cpu, got meta"):
        streamer(torch.empty(1, 3, 1, 32, 32, device="meta"))


def test_wrong_states() -> None:
    model = create_model("rcn_resnet18", width=4).eval()
    streamer = Streamer(model)
    frames = torch.randn(2, 3, 1, 32, 32)
    with torch.no_grad():
        _, state = streamer(frames)
        with pytest.raises(ValueError, match="holds 2 streams"):
            streamer(torch.randn(3, 3, 1, 32, 32), state)
        with pytest.raises(ValueError, match=r"expected \[32, 32\] as those of the state, got \[31, 32\]"):
            streamer(torch.randn(2, 3, 1, 31, 32), state)  # every layer's maps are of the same size as with 32
        with pytest.raises(ValueError, match=r"'stem\.conv' is \[2, 4, 8, 16\], but .* need \[2, 4, 16, 16\]"):
            streamer(frames, {**state, "stem.conv": state["stem.conv"][:, :, :8]})
        with pytest.raises(ValueError, match=r"'stem\.conv' is torch\.float64"):
            streamer(frames, state_to(state, dtype=torch.float64))
        with pytest.raises(ValueError, match="is on meta"):
            streamer(frames, {**state, "stem.conv": state["stem.conv"].to("meta")})
        for missing in (FRAMES_KEY, SIZE_KEY):
            with pytest.raises(ValueError, match=f"no entry '{missing}'"):
                streamer(frames, {key: value for key, value in state.items() if key != missing})
        with pytest.raises(ValueError, match=r"'layer1\.0\.conv1'.*got none"):
            streamer(frames, {key: value for key, value in state.items() if key != "layer1.0.conv1"})
        with pytest.raises(ValueError, match=r"entries that this model does not: other$"):
            streamer(frames, {**state, "other": torch.zeros(2)})


@pytest.mark.parametrize("reset", [torch.tensor([1, 0]), torch.tensor([True]), [True, False]])
def test_wrong_resets(reset: object) -> None:
    streamer = Streamer(create_model("rcn_resnet18", width=4).eval())
    frames = torch.randn(2, 3, 1, 32, 32)
    with torch.no_grad():
        for state in (None, streamer(frames)[1]):
            with pytest.raises(ValueError, match="reset"):
                streamer(frames, state, reset=reset)


def test_models_without_time_in_their_output() -> None:
    class ClipScores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = RecurrentConv3d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean((2, 3, 4))

    with pytest.raises(ValueError, match="frame_scores"):
        Streamer(ClipScores().eval())(torch.randn(1, 3, 2, 8, 8))


def test_models_changed_after_the_streamer_was_made() -> None:
    model = nn.Sequential(RecurrentConv3d(3, 3, 1)).eval()
    streamer = Streamer(model)
    model[0] = RecurrentConv3d(3, 3, 1).eval()
    with pytest.raises(ValueError, match="make a new Streamer"):
        streamer(torch.randn(1, 3, 1, 4, 4))


def test_wrong_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model"):
        Streamer("rcn_resnet18")


def test_public_names() -> None:
    assert all(hasattr(streaming, name) for name in streaming.__all__)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rcn_resnet18", "rcn_resnet18_mean_gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype=dtype).cuda()
    clip = torch.randn(2, 3, 6, 32, 32, device="cuda").to(dtype)
    exact = copy.deepcopy(model).double().frame_scores(clip.double())
    with torch.no_grad():
        whole = model.frame_scores(clip)
        streamer = Streamer(fuse_for_inference(model), graph=True)
        scores, state = stream(streamer, clip, [1] * 6)
        assert_same(scores, exact, whole)
        kept = {key: value.clone() for key, value in state.items()}
        anew, _ = streamer(clip[:, :, :1], state, reset=torch.tensor([True, True], device="cuda"))
        assert_same(anew, exact[:, :, :1], whole[:, :, :1])
        assert all(torch.equal(kept[key], state[key]) for key in kept)
        assert "without" not in streamer.graph_report()
