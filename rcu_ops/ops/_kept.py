"""What is made of weights for inference and kept beside them, where making it at every call would take too long."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Kept:
    """Forms of one or more weights: made when needed, anew when the weights change; never saved nor copied.

    A change is another tensor, also one that took its place in memory, another dtype, or PyTorch's count of writes.
    Writes through ``.data``, and to tensors made under inference mode, are not counted: after them, :meth:`clear`.

    Args:
        most: forms kept at once, those last made. All are of the same state of the weights.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._forms: dict[tuple[Any, ...], tuple[Any, list[StorageWeakRef]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return type(self)(self._most)

    def __reduce__(self) -> tuple[type[Kept], tuple[int]]:
        return type(self), (self._most,)

    def clear(self) -> None:
        """Forget everything."""
        self._forms = {}

    def get(self, weights: tuple[Tensor | None, ...], form: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for these weights and this form."""
        state = tuple(map(_identity, weights))
        key = (state, form)
        forms = self._forms  # another thread may put others in their place at any moment
        if key not in forms:
            same = [k for k in forms if k[0] == state]
            # Before there is more: what is dropped may be as large as what is made.
            self._forms = forms = {k: forms[k] for k in same[max(0, len(same) - self._most + 1) :]}
            self._forms = forms = {
                **forms,
                key: (make(), [_reference(weight) for weight in weights if weight is not None]),
            }
        return forms[key][0]


def _reference(tensor: Tensor) -> StorageWeakRef:
    """While it is held, the weight's memory may be freed, but no other storage gets the number in :func:`_identity`."""
    return StorageWeakRef(tensor.untyped_storage())


def _identity(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device
