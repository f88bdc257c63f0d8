"""Loading of weights: own files, and 2D ImageNet ResNets into RCN and I3D networks (sections 4.5, 4.6)."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from rcu_ops.models.resnet import Conv2Plus1d, VideoResNet
from rcu_ops.tensor_files import read_state_dict


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        loaded: names of the parameters and buffers that were set.
        kept: names that a 2D network cannot have (recurrent weights, non-local blocks, step counters of batch
            normalisation) or that were allowed to be missing: they keep their values.
        skipped: names in the file that were left out because of ``skip_head``.
    """

    loaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    sha256: str | None = None,
    *,
    skip_head: bool = False,
    cross_modality: bool = False,
    allow_missing: tuple[str, ...] = (),
) -> LoadReport:
    """Load a file of weights into ``model``. Either everything fits, or nothing is changed and the error lists it all.

    Files of torchvision's 2D ResNets (keys ``conv1.weight``, ``layer1.0.conv1.weight``, ``fc.weight``) are recognised
    by their four-dimensional ``conv1.weight`` and mapped onto a :class:`VideoResNet` of the same depth: d x d becomes
    1xdxd in RCN and 2D networks, whose recurrent weights keep their initialisation, and is inflated (repeated n times
    in time, divided by n) in I3D networks. (2+1)D networks have other numbers of planes and cannot take them.

    With ``skip_head`` files of ``tsn_`` networks initialise a ``relational_two_branch``: its trunk and local branch.
    The Relational LSTM, the other branch and the classifier keep their initialisation.

    Args:
        model: any module; for 2D weights a VideoResNet.
        source: a path or an http(s), file or ftp URL of a ``.safetensors`` file or a ``torch.save``d state dict (read
            with ``weights_only=True``), possibly within ``{"state_dict": …}``. Downloads are kept in
            ``torch.hub.get_dir()/checkpoints``.
        sha256: the file's digest in hexadecimal digits (all 64, or at least the first 8), checked before anything is
            read.
        skip_head: leave the classifier as it is, for another number of classes.
        cross_modality: take a first convolution with another number of input channels (RGB for ten flow fields): its
            weights are averaged over them and repeated.
        allow_missing: names (or prefixes, ending with a dot) of the model that the file need not have.

    Raises:
        FileNotFoundError: no such file. OSError: the download failed. ValueError: wrong digest, not a file of weights,
            or weights that do not fit: missing, unexpected and misshapen ones are all listed by name.
    """
    path = fetch_weights(source, sha256)
    try:
        weights = read_state_dict(path)
    except ValueError as error:
        raise ValueError(f"source: {error}") from error
    expected = model.state_dict()
    kept: list[str] = []
    if _is_2d_resnet(weights):
        weights = _from_2d(model, weights, expected, source)
        kept = [
            name
            for name in expected
            if name not in weights and (name.endswith((".weight_hh", ".num_batches_tracked")) or ".relation." in name)
        ]
    elif skip_head and "bn.weight" in weights and any(name.startswith(("local.", "relational.")) for name in expected):
        weights, kept = _from_segment_network(weights, expected)
    kept += [
        name
        for name in expected
        if name not in weights
        and name not in kept
        and any(name == allowed or (allowed.endswith(".") and name.startswith(allowed)) for allowed in allow_missing)
    ]
    skipped: list[str] = [name for name in weights if name.startswith(_UNUSED)]
    if skip_head:
        head = [name for name in weights if name.startswith("head.")]
        if not head and not any(name.startswith("head.") for name in expected):
            raise ValueError("skip_head: neither the model nor the file has a head (names that start with 'head.')")
        skipped += head
        kept += [name for name in expected if name.startswith("head.") and name not in kept]
    fits = {name: tensor for name, tensor in weights.items() if name not in skipped}
    if cross_modality:
        fits = _other_channels(fits, expected)

    problems = [f"missing: {name}" for name in expected if name not in fits and name not in kept]
    problems += [f"unexpected: {name}" for name in fits if name not in expected]
    problems += [
        f"shape: {name} expected {list(expected[name].shape)}, got {list(tensor.shape)}"
        for name, tensor in fits.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        hint = ""
        if any(problem.startswith("shape: head.") for problem in problems):
            hint = "\n(skip_head=True leaves the classifier of another number of classes out)"
        raise ValueError(f"source: {source} does not fit the model:\n  " + "\n  ".join(problems) + hint)
    with torch.no_grad():
        for name, tensor in fits.items():
            expected[name].copy_(tensor)
    skipped = sorted(name.removeprefix(_UNUSED) for name in skipped)
    return LoadReport(loaded=sorted(fits), kept=sorted(kept), skipped=skipped)


def _from_segment_network(
    weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a ``tsn_`` network by the names of a two-branch one, and the names that stay as they are.

    The shared trunk and the local branch are the segment network's; the Relational LSTM and the other branch are new.
    """
    shared = {name.split(".")[2] for name in expected if name.startswith("trunk.layer4.")}
    local = any(name.startswith("local.") for name in expected)
    renamed: dict[str, Tensor] = {}
    for given, tensor in weights.items():
        name, parts = given, given.split(".")
        if parts[:2] == ["trunk", "layer4"] and parts[2] not in shared:
            name = ".".join(["local", "units", str(int(parts[2]) - len(shared)), *parts[3:]])
        elif parts[0] == "bn":
            name = f"local.{name}"
        renamed[name if local or not name.startswith("local.") else _UNUSED + given] = tensor
    return renamed, [name for name in expected if name.startswith(("lstm.", "relational."))]


_UNUSED = "unused."


def _other_channels(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` with the one convolution that has another number of input channels: their mean, for each of them."""
    first = [
        name
        for name, weight in weights.items()
        if name in expected
        and weight.dim() == expected[name].dim() == 5
        and weight.shape[1] != expected[name].shape[1]
        and weight[:, :1].shape == expected[name][:, :1].shape
    ]
    if len(first) > 1:
        raise ValueError(f"cross_modality: expected one layer with other input channels, got {', '.join(first)}")
    adapted = {name: weights[name].mean(1, keepdim=True).expand(expected[name].shape) for name in first}
    return {**weights, **adapted}


def fetch_weights(source: str | os.PathLike[str], sha256: str | None = None) -> Path:
    """The file of ``source`` and ``sha256`` as :func:`load_weights` takes them and raises for; URLs from the cache."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256: expected 8 to 64 hexadecimal digits, got {sha256!r}")
    digest = None if sha256 is None else sha256.lower()
    text = os.fspath(source)
    address = urlparse(text)
    if address.scheme not in ("http", "https", "ftp", "file"):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"source: there is no file {text}")
        if digest is not None and (actual := _sha256(path)) != digest and not actual.startswith(digest):
            raise ValueError(f"sha256: expected {digest}, but {text} has {actual}")
        return path
    # Different files can share a base name, so the digest (or that of the address) is part of the cached one.
    mark = (digest or hashlib.sha256(text.encode()).hexdigest())[:16]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{mark}-{Path(address.path).name or 'weights'}"
    if path.is_file() and (digest is None or _sha256(path).startswith(digest)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(text, str(path), hash_prefix=digest, progress=True)
    except RuntimeError as error:  # torch.hub's name for a wrong digest
        raise ValueError(f"sha256: expected {digest}, but {text} is another file ({error})") from error
    except OSError as error:
        raise OSError(f"source: could not download {text}: {error}") from error
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_2d_resnet(weights: dict[str, Tensor]) -> bool:
    first = weights.get("conv1.weight")
    return first is not None and first.dim() == 4


def _from_2d(
    model: nn.Module, weights: dict[str, Tensor], expected: dict[str, Tensor], source: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """torchvision's 2D ResNet as a state dict of ``model``: names and dimensions changed, nothing dropped."""
    if not isinstance(model, VideoResNet):
        raise ValueError(
            f"source: {source} holds a 2D ResNet, which only a VideoResNet can take, not {type(model).__name__}"
        )
    if any(isinstance(module, Conv2Plus1d) for module in model.modules()):
        raise ValueError(
            f"source: {source} holds a 2D ResNet, which a (2+1)D network cannot take: its convolutions have other "
            "numbers of planes (section 4.5)"
        )
    mapped: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = re.sub(r"^conv1\.", "stem.conv.", key)
        name = re.sub(r"^bn1\.", "stem.bn.", name)
        name = re.sub(r"^fc\.", "head.conv.", name)
        if name.endswith(".weight") and name not in expected and f"{name}_xh" in expected:
            name += "_xh"
        target = expected.get(name)
        if target is not None and target.dim() == 5:
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            if tensor.dim() == 4:
                n = target.shape[2]
                tensor = (tensor / n).unsqueeze(2).expand(-1, -1, n, -1, -1)
        mapped[name] = tensor
    return mapped
