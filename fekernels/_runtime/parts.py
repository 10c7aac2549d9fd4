"""Tensors that are a part of a whole whose other elements live elsewhere: DTensors, and plain ones that say so."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["begin_at", "beginning_of", "is_sharded", "local_tensor"]

_beginnings: WeakIdKeyDictionary = WeakIdKeyDictionary()


def begin_at(tensor: Tensor, element: int) -> None:
    """Let the elements of ``tensor`` have the noise of those of the whole from ``element`` on."""
    _beginnings[tensor] = element


def beginning_of(tensor: Tensor) -> int:
    """Which element of the whole is the first of ``tensor``: 0, where nobody has said."""
    element: int = _beginnings.get(tensor, 0)
    return element


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor (FSDP2, tensor parallel)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives here; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
