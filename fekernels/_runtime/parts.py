"""Tensors that are a part of a whole whose other elements live elsewhere: DTensors, and plain ones that say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fekernels._runtime.torch_internals import gathering_groups, reshard

__all__ = ["begin_at", "beginning_of", "drop_copies", "is_sharded", "local_tensor"]

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


def drop_copies(params: Sequence[Tensor]) -> bool:
    """Let the next forward pass read ``params`` as they were written now, not a copy that was made of them before.

    FSDP2 keeps weights that it has gathered, and autocast those that it has cast, for as long as its region is open.

    Returns:
        Whether it could: False of DTensors where this torch does not tell what FSDP2 has gathered.
    """
    torch.clear_autocast_cache()
    groups = gathering_groups(params)
    if groups is None:
        return not any(map(is_sharded, params))
    for group in groups:
        reshard(group)
    return True
