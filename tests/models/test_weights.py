"""load_weights: files and URLs, own and 2D weights, and nothing dropped in silence."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rcu_ops.models import VideoResNet, create_model, load_weights
from rcu_ops.nn import RecurrentConv3d
from tests.networks import small_model


def resnet_2d(block: str = "basic", width: int = 4, classes: int = 5) -> dict[str, Tensor]:
    """A state dict with torchvision's ResNet names and random values, sized like the small video networks."""
    model = VideoResNet(block, (1, 1, 1, 1), "2d", classes, width=width)
    weights = {}
    for name, value in model.state_dict().items():
        value = torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        if value.dim() == 5:
            value = value.squeeze(2)
        name = name.replace("stem.conv", "conv1").replace("stem.bn", "bn1").replace("head.conv", "fc")
        weights[name] = value.flatten(1) if name == "fc.weight" else value
    return weights


def scores_2d(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """torchvision's basic-block ResNet without the stem pool, in evaluation mode, on [N,3,H,W]."""

    def norm(name: str, x: Tensor) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in names))

    x = F.relu(norm("bn1", F.conv2d(image, weights["conv1.weight"], stride=2, padding=3)))
    for stage in range(1, 5):
        name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        y = F.relu(norm(f"{name}.bn1", F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)))
        y = norm(f"{name}.bn2", F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1))
        if f"{name}.downsample.0.weight" in weights:
            x = norm(f"{name}.downsample.1", F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride))
        x = F.relu(y + x)
    return F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def tiny(conv: str, **options: object) -> VideoResNet:
    return VideoResNet("basic", (1, 1, 1, 1), conv, 5, width=4, **options).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_files(suffix: str, tmp_path: Path) -> None:
    model = small_model("rcn_resnet18")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    other = create_model("rcn_resnet18", num_classes=64, width=4).eval()
    report = load_weights(other, path, hashlib.sha256(path.read_bytes()).hexdigest())
    clip = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other(clip), model(clip))
    assert set(report.loaded) == set(model.state_dict())
    assert (report.kept, report.skipped) == ([], [])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_files(wrapper: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    weights = {f"module.{name}": value + 1 for name, value in model.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3}, tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"))
    assert torch.equal(model.weight, weights["module.weight"])


@pytest.mark.parametrize("hidden_init", ["identity", "random"])
@pytest.mark.parametrize("imagenet", [True, False])
def test_the_four_initialisations_of_table_5(imagenet: bool, hidden_init: str, tmp_path: Path) -> None:
    model = tiny("rcn", hidden_init=hidden_init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if imagenet:
        weights = resnet_2d()
        torch.save(weights, tmp_path / "resnet.pth")
        report = load_weights(model, tmp_path / "resnet.pth")
        assert sorted(report.kept) == sorted(name for name in before if name.endswith("weight_hh"))
        assert torch.equal(model.stem.conv.weight_xh.squeeze(2), weights["conv1.weight"])
        assert torch.equal(model.head.conv.weight.flatten(1), weights["fc.weight"])
    else:
        deviation = model.layer4[0].conv2.weight_xh.std().item()
        assert abs(deviation / (2 / (9 * 32)) ** 0.5 - 1) < 0.1
    for name, value in model.state_dict().items():
        if name.endswith("weight_hh"):
            assert torch.equal(value, before[name])
            assert torch.equal(value, torch.eye(len(value))) == (hidden_init == "identity")


@pytest.mark.parametrize("conv", ["rcn", "2d", "i3d"])
def test_2d_weights_give_the_2d_network_on_still_frames(conv: str, tmp_path: Path) -> None:
    weights = {name: value.double() if value.is_floating_point() else value for name, value in resnet_2d().items()}
    torch.save(weights, tmp_path / "resnet.pth")
    model = tiny(conv).double()
    load_weights(model, tmp_path / "resnet.pth")
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if conv == "i3d":
        # Inflated taps sum to the 2D weight wherever the clip does not end: give it room on both sides of its middle.
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                module.padding = (0, *module.padding[1:])
                module.padding_mode = "zeros"
        clip = image.unsqueeze(2).expand(-1, -1, 3, -1, -1)
        conv3d, inflated = model.stem.conv, torch.nn.functional.conv2d(image, weights["conv1.weight"], None, 2, 3)
        torch.testing.assert_close(conv3d(clip).squeeze(2), inflated)
        assert model.layer1[0].conv1.weight.shape[2] == 3
        torch.testing.assert_close(model.layer1[0].conv1.weight.sum(2), weights["layer1.0.conv1.weight"])
    else:
        torch.testing.assert_close(model(image.unsqueeze(2)), scores_2d(weights, image))


def test_inflated_network_equals_the_2d_one_on_static_clips(tmp_path: Path) -> None:
    """With temporal padding that repeats the frame, a still clip looks still to every layer."""
    weights = {name: value.double() if value.is_floating_point() else value for name, value in resnet_2d().items()}
    torch.save(weights, tmp_path / "resnet.pth")
    model = tiny("i3d").double()
    load_weights(model, tmp_path / "resnet.pth")

    class StillPadding(nn.Module):
        def __init__(self, conv: nn.Conv3d) -> None:
            super().__init__()
            self.conv = conv
            self.frames = conv.padding[0]
            conv.padding = (0, *conv.padding[1:])

        def forward(self, x: Tensor) -> Tensor:
            first, last = x[:, :, :1], x[:, :, -1:]
            return self.conv(torch.cat([first] * self.frames + [x] + [last] * self.frames, dim=2))

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            model.set_submodule(name, StillPadding(module))
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    clip = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    scores = model.frame_scores(clip)
    expected = scores_2d(weights, image)
    for t in range(scores.shape[2]):
        torch.testing.assert_close(scores[:, :, t], expected)


def test_bottlenecks_take_2d_weights(tmp_path: Path) -> None:
    torch.save(resnet_2d("bottleneck"), tmp_path / "resnet.pth")
    model = VideoResNet("bottleneck", (1, 1, 1, 1), "rcn", 5, width=4)
    report = load_weights(model, tmp_path / "resnet.pth")
    assert set(report.kept) == {
        f"{name}.weight_hh" for name, module in model.named_modules() if isinstance(module, RecurrentConv3d)
    }


def test_full_size_networks_have_torchvisions_names(tmp_path: Path) -> None:
    """The names a torchvision resnet18 file has, at its real sizes."""
    with torch.device("meta"):
        names = set(create_model("rcn_resnet18", num_classes=1000).state_dict())
    expected = {"stem.conv.weight_xh", "stem.bn.weight", "layer1.0.conv1.weight_xh", "layer2.0.downsample.0.weight",
                "layer2.0.downsample.1.running_mean", "layer4.1.bn2.num_batches_tracked", "head.conv.bias"}  # fmt: skip
    assert expected <= names


def test_old_files_without_step_counters(tmp_path: Path) -> None:
    weights = {name: value for name, value in resnet_2d().items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "resnet.pth")
    report = load_weights(tiny("2d"), tmp_path / "resnet.pth")
    assert report.kept
    assert all(name.endswith("num_batches_tracked") for name in report.kept)


def test_mismatches_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    model = tiny("rcn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = resnet_2d(classes=7)
    weights["extra.weight"] = torch.zeros(2)
    del weights["layer3.0.bn2.bias"]
    weights["layer2.0.conv1.weight"] = torch.zeros(8, 4, 5, 5)
    torch.save(weights, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(model, tmp_path / "resnet.pth")
    lines = {line.strip() for line in str(error.value).splitlines()}
    assert {
        "missing: layer3.0.bn2.bias",
        "unexpected: extra.weight",
        "shape: layer2.0.conv1.weight_xh expected [8, 4, 1, 3, 3], got [8, 4, 1, 5, 5]",
        "shape: head.conv.weight expected [5, 32, 1, 1, 1], got [7, 32, 1, 1, 1]",
        "shape: head.conv.bias expected [5], got [7]",
    } <= lines
    assert "skip_head=True" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_skip_head(tmp_path: Path) -> None:
    model = tiny("rcn")
    head = model.head.conv.weight.clone()
    torch.save(resnet_2d(classes=7), tmp_path / "resnet.pth")
    report = load_weights(model, tmp_path / "resnet.pth", skip_head=True)
    assert report.skipped == ["head.conv.bias", "head.conv.weight"]
    assert {"head.conv.bias", "head.conv.weight"} <= set(report.kept)
    both = load_weights(model, tmp_path / "resnet.pth", skip_head=True, allow_missing=("head.", "stem.conv.weight_hh"))
    assert both == report  # every name once
    assert torch.equal(model.head.conv.weight, head)
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="skip_head"):
        load_weights(nn.Linear(2, 3), tmp_path / "linear.pth", skip_head=True)


def test_allow_missing(tmp_path: Path) -> None:
    torch.save(resnet_2d(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.gate\.fc\.weight"):
        load_weights(tiny("rcn", gating=True), tmp_path / "resnet.pth")
    allowed = tuple(f"layer{stage}.0.gate." for stage in range(1, 5))
    report = load_weights(tiny("rcn", gating=True), tmp_path / "resnet.pth", allow_missing=allowed)
    assert "layer1.0.gate.fc.weight" in report.kept


def test_networks_that_cannot_take_2d_weights(tmp_path: Path) -> None:
    torch.save(resnet_2d(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"\(2\+1\)D"):
        load_weights(tiny("r2plus1d"), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="not Linear"):
        load_weights(nn.Linear(2, 2), tmp_path / "resnet.pth")


def test_other_channels_in_one_layer_alone(tmp_path: Path) -> None:
    def two(channels: int) -> nn.Module:
        return nn.ModuleList([nn.Conv3d(channels, 2, 1), nn.Conv3d(channels, 4, 1)])

    torch.save(two(3).state_dict(), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"cross_modality: expected one layer .*, got 0\.weight, 1\.weight"):
        load_weights(two(20), tmp_path / "two.pth", cross_modality=True)
    load_weights(two(3), tmp_path / "two.pth", cross_modality=True)


def test_bad_files(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(model, tmp_path / "nothing.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=rf"{name} is not a readable"):
            load_weights(model, tmp_path / name)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    whole, tensors = ((tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("pth", "safetensors"))
    garbled = tensors[:8] + b"{" + tensors[9:].replace(b'"dtype"', b'"dtyp!"')
    for name, content, reason in (
        ("video.mp4", b"\0\0\0\x20ftypisom", "neither torch.save nor safetensors wrote it"),
        ("empty.pth", b"", "it is empty"),
        ("empty.safetensors", b"", "it is empty"),
        ("text.safetensors", b"<html>no such page</html>", "safetensors did not write it"),
        ("length.safetensors", tensors[:5], "it is cut off"),
        ("header.safetensors", tensors[:40], "it is cut off"),
        ("tensors.safetensors", tensors[:-1], "it is cut off"),
        ("garbled.safetensors", garbled, "Error while deserializing header: "),
        ("cut.pth", whole[: len(whole) // 2], "it is cut off, or a zip archive"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"source: .*{name} is not a readable .*: {reason}"):
            load_weights(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(model, tmp_path / "list.pth")
    torch.save(nn.Linear(2, 3), tmp_path / "pickled.pth")  # arbitrary code: refused by weights_only
    with pytest.raises(ValueError, match="not a readable file of weights: it holds other objects than tensors"):
        load_weights(model, tmp_path / "pickled.pth")
    torch.save(model.state_dict(), tmp_path / "good.pth")
    with pytest.raises(ValueError, match="sha256: expected 0000"):
        load_weights(model, tmp_path / "good.pth", sha256="0" * 64)
    with pytest.raises(ValueError, match="hexadecimal"):
        load_weights(model, tmp_path / "good.pth", sha256="xyz")


class CountingHandler(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012 (reset by the fixture)

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a local server of tmp_path/www, with an empty cache of torch.hub."""
    (tmp_path / "www").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    CountingHandler.requests.clear()
    handler = functools.partial(CountingHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_are_checked_and_cached(server: str, tmp_path: Path) -> None:
    path = tmp_path / "www" / "weights.pth"
    source = nn.Linear(2, 3)
    torch.save(source.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for _ in range(2):
        model = nn.Linear(2, 3)
        load_weights(model, f"{server}/weights.pth", sha256=digest)
        assert torch.equal(model.weight, source.weight)
    assert CountingHandler.requests == ["/weights.pth"]
    (cached,) = (tmp_path / "cache" / "hub" / "checkpoints").iterdir()
    assert cached.name.endswith("-weights.pth")
    cached.write_bytes(b"damaged")
    load_weights(model, f"{server}/weights.pth", sha256=digest)
    assert len(CountingHandler.requests) == 2
    load_weights(model, f"{server}/weights.pth")  # without a digest: another entry of the cache
    load_weights(model, f"{server}/weights.pth")
    assert len(CountingHandler.requests) == 3


def test_wrong_digest_of_a_url(server: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "www" / "weights.pth")
    with pytest.raises(ValueError, match="sha256: expected 00000000"):
        load_weights(nn.Linear(2, 3), f"{server}/weights.pth", sha256="0" * 64)
    assert not list((tmp_path / "cache").rglob("*weights.pth"))


def test_urls_that_fail(server: str) -> None:
    with pytest.raises(OSError, match=r"could not download http://127\.0\.0\.1.*404"):
        load_weights(nn.Linear(2, 3), f"{server}/nothing.pth")


def test_file_urls(tmp_path: Path, server: str) -> None:
    path = tmp_path / "weights.safetensors"
    source = nn.Linear(2, 3)
    save_file(source.state_dict(), path)
    model = nn.Linear(2, 3)
    load_weights(model, path.as_uri())
    assert torch.equal(model.weight, source.weight)
