"""Which elements of a parameter a process holds, so that sharded noise equals the unsharded noise."""

from __future__ import annotations

import math

from torch import Tensor

from fekernels._runtime.torch_internals import local_shape_and_offset

__all__ = ["is_sharded", "local_tensor", "shard_geometry", "sum_over_shards"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor (FSDP2, tensor parallel)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives here; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_over_shards(value: Tensor, param: Tensor) -> Tensor:
    """What the shards of ``param`` make together, of what its local part makes: the same on every rank."""
    if not is_sharded(param):
        return value
    import torch.distributed as dist
    from torch.distributed.tensor import Shard

    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if isinstance(placement, Shard):
            dist.all_reduce(value, group=param.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    return value


def shard_geometry(function: str, param: Tensor) -> tuple[int, int, int] | None:
    """(offset, length, pitch) of the local part, whose element e is element offset + e // length * pitch + e % length.

    None for a tensor that is not a DTensor. A dimension may be split over the mesh, and dimension 0 beside it
    (FSDP over tensor parallel); then the local elements come in pieces of one length, ``pitch`` apart.

    Raises:
        ValueError: a placement that is not Shard or Replicate, or splits that do not make such pieces.
    """
    if not is_sharded(param):
        return None
    from torch.distributed.tensor import Replicate, Shard

    for placement in param.placements:  # type: ignore[attr-defined]
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"{function}: a DTensor parameter must be placed by Shard or Replicate; got {placement}"
            )
    shape = tuple(param.shape)
    local, start = local_shape_and_offset(param)
    numel = math.prod(local)
    split = [d for d in range(len(shape)) if local[d] != shape[d]]
    if not split or numel == 0:
        return (0, max(numel, 1), max(numel, 1))
    inner = split[-1]
    if any(d not in (0, inner) for d in split) or (
        len(split) == 2 and math.prod(shape[1:inner]) != math.prod(local[1:inner])
    ):
        raise ValueError(
            f"{function}: a DTensor parameter may be split along one dimension, and along dimension 0; "
            f"got placements {param.placements}"  # type: ignore[attr-defined]
        )
    below = math.prod(shape[inner + 1 :])
    offset = sum(start[d] * math.prod(shape[d + 1 :]) for d in split)
    return (offset, local[inner] * below, shape[inner] * below)
