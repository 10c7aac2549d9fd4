"""Tensors that are a part of a whole whose other elements live elsewhere: DTensors, and plain ones that say so."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fekernels._runtime.torch_internals import gathering_groups, is_flat_shard, reshard

__all__ = ["begin_at", "beginning_of", "check_unsharded", "drop_copies", "is_sharded", "local_tensor"]

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


def check_unsharded(function: str, model: nn.Module, parallel: bool = False) -> None:
    """ValueError of a network that FSDP shards, which is no part of a program that copies it or calls it with others'
    weights.

    Args:
        parallel: whether DTensors that FSDP knows nothing of, those of tensor parallel, are taken.
    """
    part = next((n for n, p in model.named_parameters() if is_sharded(p) or is_flat_shard(p)), None)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if part is None or (parallel and not _has_module(model, getattr(fsdp, "FSDPModule", ()))):
        return
    raise ValueError(
        f"{function}: model must be the unsharded one, all of it on every rank; got one whose parameter {part!r} is "
        "sharded, as fully_shard does. Give a copy that was not sharded; the weights of a sharded one go into it by "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True))"
    )


def _has_module(model: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())
