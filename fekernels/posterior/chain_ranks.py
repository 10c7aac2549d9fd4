"""Chains over the ranks of a process group: whose are which, and what all of them know of all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.ranks import chunk_of_rank, exchange, gathered_numbers, numbers_device

__all__ = ["ChainRanks"]


class ChainRanks:
    """``count`` chains in order over the ranks, as ``torch.chunk`` and DTensor's Shard(0) split them.

    What one process computes of the stacked tensors of all chains, each rank computes of the same gathered ones, so
    that all decide the same, and what one process would.

    Args:
        owner: whose collectives these are, for messages.
        group: None is this process alone.
    """

    def __init__(self, owner: str, count: int, group: Any) -> None:
        self.owner, self.count, self.group = owner, count, group
        self.rank, self.ranks = 0, 1
        self._mesh: Any = None
        if group is not None:
            import torch.distributed as dist

            self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._each = -(-count // self.ranks)
        mine = chunk_of_rank(count, group)
        self.mine = slice(mine.start, mine.stop)

    @property
    def own(self) -> int:
        """How many chains are this rank's; none, where there are more ranks than chains."""
        return self.mine.stop - self.mine.start

    @property
    def idle(self) -> int:
        """How many ranks have no chain."""
        return self.ranks - -(-self.count // self._each)

    def gather(self, own: Tensor) -> Tensor:
        """[chains, ...] of all ranks from [own, ...] of this one. A collective."""
        if self.group is None:
            return own
        import torch.distributed as dist

        padded = own.new_zeros((self._each, *own.shape[1:]), device=self._place(own))
        padded[: self.own] = own
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        exchange(self.owner, dist.all_gather, parts, padded, group=self.group)
        return torch.cat(parts)[: self.count].to(own.device)

    def row(self, own: Tensor, chain: int) -> Tensor:
        """The row of one chain, on every rank, of [own, ...] stacked tensors. A collective."""
        if self.group is None:
            return own[chain].clone()
        import torch.distributed as dist

        holder = chain // self._each
        box = own.new_empty(own.shape[1:], device=self._place(own))
        if holder == self.rank:
            box.copy_(own[chain - self.mine.start])
        exchange(self.owner, dist.broadcast, box, group_src=holder, group=self.group)
        return box.to(own.device)

    def _place(self, tensor: Tensor) -> torch.device:
        """Where the group takes what is on this tensor's device."""
        return numbers_device(self.group) if tensor.is_cpu else tensor.device

    def total(self, own: int) -> int:
        """The sum over the ranks."""
        if self.group is None:
            return own
        return sum(each for (each,) in gathered_numbers(self.owner, [own], self.group))

    def of_rank_0(self, model: nn.Module) -> nn.Module:
        """A copy of the network with the weights and buffers of rank 0's, as DDP starts; alone, the network itself."""
        if self.group is None:
            return model
        import torch.distributed as dist

        model = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                box = tensor.detach().to(self._place(tensor), copy=True)
                exchange(self.owner, dist.broadcast, box, group_src=0, group=self.group)
                tensor.copy_(box)
        return model

    def as_part(self, own: Tensor) -> Tensor:
        """[own, ...] as the DTensor [chains, ...] that it is a part of, in the same memory: what an optimizer steps.

        An element's noise comes from its index among all chains.
        """
        if self.group is None:
            return own
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, own.device.type)
        shape = torch.Size((self.count, *own.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        part: Tensor = DTensor.from_local(
            own.detach(), self._mesh, [Shard(0)], run_check=False, shape=shape, stride=strides
        )
        return part
