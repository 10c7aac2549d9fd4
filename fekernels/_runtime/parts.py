"""Plain tensors that are a part of a whole whose other elements live elsewhere: where in it they begin."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["begin_at", "beginning_of"]

_beginnings: WeakIdKeyDictionary = WeakIdKeyDictionary()


def begin_at(tensor: Tensor, element: int) -> None:
    """Let the elements of ``tensor`` have the noise of those of the whole from ``element`` on."""
    _beginnings[tensor] = element


def beginning_of(tensor: Tensor) -> int:
    """Which element of the whole is the first of ``tensor``: 0, where nobody has said."""
    element: int = _beginnings.get(tensor, 0)
    return element
