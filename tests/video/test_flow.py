"""Optical flow: a known motion, eight bits, stacks, and a run that goes on where it was stopped."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rcu_ops.cli import main
from rcu_ops.video import VideoError
from rcu_ops.video import flow as flow_module
from rcu_ops.video.flow import FlowPart, compute_flow, dequantize, flow_stacks, mirror, quantize
from rcu_ops.video.sample import segment_positions
from tests.video.clips import write_clip

MOTION = (3, -2)  # pixels per frame, x and y


@pytest.fixture
def moving(tmp_path: Path) -> Path:
    """Six frames of a smooth texture that moves by MOTION."""
    generator = np.random.default_rng(0)
    rough = torch.from_numpy(generator.uniform(0, 255, (1, 1, 30, 40)).astype(np.float32))
    texture = torch.nn.functional.interpolate(rough, scale_factor=6, mode="bicubic")[0, 0].clamp(0, 255).byte().numpy()
    images = []
    for t in range(6):
        y, x = 40 - MOTION[1] * t, 40 - MOTION[0] * t
        images.append(np.repeat(texture[y : y + 96, x : x + 128, None], 3, axis=2))
    return write_clip(
        tmp_path / "moving.mkv", 6, images=images, height=96, width=128, codec="ffv1", pixel_format="bgr0"
    )


def test_quantisation() -> None:
    flow = np.linspace(-25, 25, 1001, dtype=np.float32)
    stored = quantize(flow)
    assert stored.dtype == np.uint8
    assert np.abs(dequantize(stored) - np.clip(flow, -20, 20)).max() <= 20 / 255 * 1.0001
    assert (stored.min(), stored.max()) == (0, 255)
    np.testing.assert_array_equal(quantize(dequantize(np.arange(256, dtype=np.uint8))), np.arange(256))


def test_stacks_and_mirror() -> None:
    fields = np.random.default_rng(0).integers(0, 256, (25, 2, 4, 5), dtype=np.uint8)
    starts = segment_positions(25, 3, snippet=10)[0]
    stacks = flow_stacks(fields, starts)
    assert stacks.shape == (20, 3, 4, 5)
    for t, start in enumerate(starts.tolist()):
        expected = dequantize(fields[start : start + 10]).reshape(20, 4, 5) / 20
        np.testing.assert_allclose(stacks[:, t].numpy(), expected, atol=1e-6)
    late = flow_stacks(fields, torch.tensor([24]))
    assert all(torch.equal(late[2 * i : 2 * i + 2], late[:2]) for i in range(10))
    mirrored = mirror(stacks)
    assert torch.equal(mirrored[0::2], -stacks[0::2].flip(-1))
    assert torch.equal(mirrored[1::2], stacks[1::2].flip(-1))
    with pytest.raises(ValueError, match="starts: expected numbers from 0 to 24"):
        flow_stacks(fields, torch.tensor([25]))
    with pytest.raises(ValueError, match="fields"):
        flow_stacks(fields[:, :1], torch.tensor([0]))


def test_a_known_motion(moving: Path) -> None:
    pytest.importorskip("cv2")
    fields = list(compute_flow(str(moving), scale=96))
    assert len(fields) == 5
    for field in fields:
        assert field.shape == (2, 96, 128)
        found = np.median(dequantize(field)[:, 16:-16, 16:-16], axis=(1, 2))
        np.testing.assert_allclose(found, MOTION, atol=0.3)
    assert all(
        np.array_equal(a, b) for a, b in zip(compute_flow(str(moving), scale=96, skip=2), fields[2:], strict=True)
    )


def test_command_goes_on(moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    whole, stopped = tmp_path / "new" / "folder" / "whole.npy", tmp_path / "stopped.npy"
    assert main(["flow", str(moving), "--out", str(whole), "--scale", "64"]) == 0
    expected = np.load(whole)
    assert expected.shape == (5, 2, 64, 85)
    part = FlowPart(tmp_path / ".stopped-64-20.part", moving)
    for field in expected[:2]:
        part.append(field)
    part.close()
    with (tmp_path / ".stopped-64-20.part").open("ab") as file:
        file.write(b"torn")
    asked = []
    compute = flow_module.compute_flow
    monkeypatch.setattr(flow_module, "compute_flow", lambda *a, **k: asked.append(k["skip"]) or compute(*a, **k))
    assert main(["flow", str(moving), "--out", str(stopped), "--scale", "64"]) == 0
    assert asked == [2]
    np.testing.assert_array_equal(np.load(stopped), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moving.mkv", "new", "stopped.npy"]


def test_command_does_not_go_on_with_another_video(
    moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cv2")
    path = tmp_path / ".f-64-20.part"
    FlowPart(path, moving).append(np.zeros((2, 64, 85), np.uint8))
    before = path.read_bytes()
    other = write_clip(tmp_path / "other.mkv", 6, height=96, width=128)
    command = ["--out", str(tmp_path / "f.npy"), "--scale", "64"]
    assert main(["flow", str(other), *command]) == 2
    error = capsys.readouterr().err
    assert "holds the flow of another video" in error and error.count("\n") == 1
    assert path.read_bytes() == before and not (tmp_path / "f.npy").exists()
    renamed = moving.rename(tmp_path / "renamed.mkv")  # the same video still
    assert main(["flow", str(renamed), *command]) == 0
    assert not np.load(tmp_path / "f.npy")[0].any()
    path.write_bytes(b"something else, longer than the header of a part is")
    assert main(["flow", str(renamed), *command, "--overwrite"]) == 2
    assert "not a flow under way" in capsys.readouterr().err


def test_two_runs_do_not_mix(moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("fcntl")
    path = tmp_path / ".f-64-20.part"
    command = ["flow", str(moving), "--out", str(tmp_path / "f.npy"), "--scale", "64"]
    late = FlowPart(path, moving)  # neither had begun when it looked
    with contextlib.closing(FlowPart(path, moving)) as part:
        part.append(np.zeros((2, 64, 85), np.uint8))
        before = path.read_bytes()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "another run is computing this flow" in error and error.count("\n") == 1
        for _ in range(2):
            with pytest.raises(VideoError, match="another run"):
                late.append(np.ones((2, 64, 85), np.uint8))
            assert path.read_bytes() == before
            part.close()  # the second time it has the lock, and finds what was written meanwhile
    late.close()
    assert main(command) == 0
    assert not np.load(tmp_path / "f.npy")[0].any() and not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.npz"], "--out: expected a name that ends with .npy"),
        (["--scale", "8"], "--scale: expected at least 16"),
        (["--bound", "0"], "--bound: expected a number above 0"),
        (["--out", "/dev/null/x.npy"], "--out: /dev/null cannot be made: "),
    ],
)
def test_bad_options(options: list[str], message: str, moving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flow", str(moving), "--out", str(moving.with_name("f.npy")), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    out = ["--out", str(tmp_path / "f.npy")]
    assert main(["flow", str(tmp_path / "none.mp4"), *out]) == 2
    assert main(["flow", str(write_clip(tmp_path / "one.mp4", 1)), *out]) == 2
    assert "one frame has no flow" in capsys.readouterr().err
    (tmp_path / "f.npy").write_bytes(b"")
    assert main(["flow", str(tmp_path / "one.mp4"), *out]) == 2
    assert "is there already" in capsys.readouterr().err
