"""Which elements of a parameter a process holds, so that sharded noise equals the unsharded noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fekernels._runtime.parts import beginning_of, is_sharded, local_tensor
from fekernels._runtime.pointer_table import Row
from fekernels._runtime.ranks import exchange
from fekernels._runtime.torch_internals import split_factor

__all__ = [
    "Piece",
    "local_gradient",
    "of_local",
    "pieces",
    "placed_alike",
    "sharded_rows",
    "sum_over_shards",
]

Run = tuple[int, int]  # indices along one dimension of the whole: the first, and how many


def of_local(local: Tensor, param: Tensor) -> Tensor:
    """The DTensor that is placed as ``param`` and of which ``local`` lives here."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        local,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return made


def placed_alike(grad: Tensor, param: Tensor) -> bool:
    """Whether what lives here of a DTensor's gradient is the gradient of what lives here of the DTensor."""
    return not is_sharded(grad) or grad.placements == param.placements  # type: ignore[attr-defined]


def local_gradient(function: str, grad: Tensor, param: Tensor) -> Tensor:
    """Of the part of ``param`` that lives here.

    Tensor parallel may leave it partial sums, as those of a norm's weight under sequence parallel: they are brought to
    the parameter's placements first, which is a collective, and the same that torch.optim's operators make of it.
    """
    if not placed_alike(grad, param):
        _check_placements(function, param)
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local_tensor(grad)


def sum_over_shards(function: str, value: Tensor, param: Tensor) -> Tensor:
    """What the shards of ``param`` make together, of what its local part makes: the same on every rank."""
    if not is_sharded(param):
        return value
    import torch.distributed as dist

    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate():
            group = param.device_mesh.get_group(dim)  # type: ignore[attr-defined]
            exchange(function, dist.all_reduce, value, group=group)
    return value


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a local tensor.

    Attributes:
        box: (first, length) along each dimension of the local tensor.
        order: (offset, length, pitch): its element e, in logical order, is element offset + e // length * pitch +
            e % length of the whole.
    """

    box: tuple[Run, ...]
    order: tuple[int, int, int]

    def of(self, tensor: Tensor) -> Tensor:
        for dim, (first, length) in enumerate(self.box):
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, first, length)
        return tensor


def sharded_rows(function: str, param: Tensor, row: Row) -> list[Row]:
    """The rows for ``row``, which holds what lives here of ``param`` and its states: one, nearly always.

    Each row counts its own step: of several, all but the first count copies, for one step alone.

    Raises:
        ValueError: as ``pieces``.
    """
    if not is_sharded(param):
        begin, count = beginning_of(param), max(param.numel(), 1)
        return [replace(row, shard=(begin, count, count)) if begin else row]
    found = pieces(function, param)
    if len(found) == 1:
        return [replace(row, shard=found[0].order)]
    rows = []
    for i, piece in enumerate(found):
        operands: dict[str, Any] = {
            name: piece.of(tensor)
            for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor")
            if (tensor := getattr(row, name)) is not None
        }
        if i:
            operands["step"] = row.step.clone()
            operands["noise_unit"] = None if row.noise_unit is None else row.noise_unit.clone()
        rows.append(replace(row, shard=piece.order, **operands))
    return rows


def pieces(function: str, param: Tensor) -> list[Piece]:
    """The parts of what lives here of a DTensor whose elements are runs of one length, one pitch apart, in the whole.

    One, where dimensions are split that make such runs together: any one, dimension 0 beside another (FSDP over
    row-wise tensor parallel), the same one twice (FSDP over column-wise). Splits of more than these make several.

    Raises:
        ValueError: a placement that is no shard and no replica, a local part that is not as torch would split the
            whole, a process that is not on the mesh. There is no telling which elements it holds.
    """
    shape, local = tuple(param.shape), tuple(local_tensor(param).shape)
    held = _held(function, param)
    wanted = tuple(sum(length for _, length in runs) for runs in held)
    if wanted != local:
        raise ValueError(
            f"{function}: the local part of a DTensor parameter must have shape {wanted}, as {param.placements} "  # type: ignore[attr-defined]
            f"split {shape} over the mesh; got {local}"
        )
    if math.prod(local) == 0:
        return [Piece(tuple((0, size) for size in local), (0, 1, 1))]
    firsts = [[sum(length for _, length in runs[:i]) for i in range(len(runs))] for runs in held]
    found = []
    for chosen in itertools.product(*(range(len(runs)) for runs in held)):
        box = [(firsts[d][i], held[d][i][1]) for d, i in enumerate(chosen)]
        starts = [held[d][i][0] for d, i in enumerate(chosen)]
        found += _in_order(shape, box, starts)
    return found


def _check_placements(function: str, param: Tensor) -> None:
    for placement in param.placements:  # type: ignore[attr-defined]
        if not placement.is_replicate() and split_factor(placement) is None:
            raise ValueError(
                f"{function}: a DTensor parameter must be placed by Shard or Replicate; got {placement}"
            )


def _held(function: str, param: Tensor) -> list[list[Run]]:
    """The indices of the whole that live here, along each dimension: placements split it one after another."""
    _check_placements(function, param)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{function}: a DTensor parameter must be on a mesh that has this process")
    held = [[(0, size)] for size in param.shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        factor = split_factor(placement)
        assert factor is not None
        dim = placement.dim % len(held)
        mine = [
            _chunk(part, mesh.size(mesh_dim), coordinate[mesh_dim])
            for part in (_chunk(held[dim], factor, i) for i in range(factor))
        ]
        held[dim] = _merged(list(itertools.chain.from_iterable(mine)))
    return held


def _chunk(runs: Sequence[Run], count: int, index: int) -> list[Run]:
    """Chunk ``index`` of ``count``, as ``torch.chunk`` makes them: the last ones shorter, or empty."""
    size = -(-sum(length for _, length in runs) // count)
    begin, end, found, position = index * size, (index + 1) * size, [], 0
    for first, length in runs:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            found.append((first + low - position, high - low))
        position += length
    return found


def _merged(runs: Sequence[Run]) -> list[Run]:
    found: list[Run] = []
    for first, length in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((first, length))
    return found


def _in_order(shape: Sequence[int], box: list[Run], starts: Sequence[int]) -> list[Piece]:
    """A box of the local tensor, cut along dimensions until each part is runs of one length at one pitch."""
    pitches = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    # (elements, distance in the whole) of nested loops over the box, those that are one loop together merged.
    loops: list[tuple[int, int]] = []
    dims: list[list[int]] = []
    for d, (_, length) in enumerate(box):
        if length == 1:
            continue
        if loops and loops[-1][1] == length * pitches[d]:
            loops[-1] = (loops[-1][0] * length, pitches[d])
            dims[-1].append(d)
        else:
            loops.append((length, pitches[d]))
            dims.append([d])
    run = loops.pop()[0] if loops and loops[-1][1] == 1 else 1
    if len(loops) <= 1:
        offset = sum(start * pitch for start, pitch in zip(starts, pitches, strict=True))
        return [Piece(tuple(box), (offset, run, loops[0][1] if loops else run))]
    # Cut where it makes the fewest pieces; the innermost loop over runs may stay.
    cut = min(range(len(loops)), key=lambda i: loops[i][0])
    dim = min(dims[cut], key=lambda d: box[d][1])
    found = []
    for i in range(box[dim][1]):
        smaller, later = list(box), list(starts)
        smaller[dim], later[dim] = (box[dim][0] + i, 1), starts[dim] + i
        found += _in_order(shape, smaller, later)
    return found
