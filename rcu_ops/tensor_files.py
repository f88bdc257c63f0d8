"""Files of named tensors: reading weights, and what is wrong with a file that cannot be read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Named tensors of a weights file: ``.safetensors``, or a ``torch.save`` file holding a state dict.

    A state dict nested under ``state_dict`` or ``model`` is unwrapped, and so are the names that a
    ``DataParallel`` wrapper gave. Nothing but tensors is unpickled.

    Raises:
        ValueError: the file cannot be read, or is no state dict; in one line that begins with the path.
        OSError: there is no such file, or it may not be read.
    """
    import torch

    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} {not_safetensors(path, error)}") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors have no common base
        raise ValueError(f"{path} is not a readable file of weights: {_what_it_is(path, error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (a dict of names and tensors)")
    names = {name: str(name) for name in content}
    if names and all(name.startswith("module.") for name in names.values()):  # saved from a DataParallel wrapper
        names = {key: name[len("module.") :] for key, name in names.items()}
    return {names[key]: tensor for key, tensor in content.items()}


def not_safetensors(path: str | os.PathLike[str], error: Exception) -> str:
    """``is not a readable safetensors file: `` and why, for the error that the safetensors library raised.

    Such a file is the length of its header (8 bytes), the header (JSON), and the tensors' bytes.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        why = "it is empty"
    elif start[8:] not in (b"", b"{"):
        why = "safetensors did not write it"
    elif int.from_bytes(start[:8], "little") + 8 > path.stat().st_size or "not fully covered" in str(error):
        why = "it is cut off"
    else:
        why = " ".join(str(error).split())
    return f"is not a readable safetensors file: {why}"


def _what_it_is(path: Path, error: Exception) -> str:
    """Why ``torch.load`` refused a file, from what it begins with: PyTorch's own words are about its arguments."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "it is empty"
    if start == b"PK\x03\x04" and not isinstance(error, pickle.UnpicklingError):
        return "it is cut off, or a zip archive that torch.save did not write"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it holds other objects than tensors; save the state dict alone"
    return "neither torch.save nor safetensors wrote it"
