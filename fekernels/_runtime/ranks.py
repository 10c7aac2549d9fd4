"""One of several processes: seeds that nobody gave, which group an argument names, what ranks tell each other."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "chunk_of_rank",
    "draw_seed",
    "exchange",
    "gathered_numbers",
    "group_of",
    "has_ranks",
    "is_first",
    "max_over_ranks",
    "numbers_device",
    "processes_without_group",
    "offset_of_rank",
    "restarted",
    "seed_of_rank_0",
    "sum_over_ranks",
]


PATIENCE = 60.0  # seconds for the other ranks to come, until a warning says that they have not


def draw_seed() -> int:
    """63 bits from torch's default generator."""
    return int(torch.randint(0, (1 << 63) - 1, (), device="cpu"))


def has_ranks() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first(group: Any) -> bool:
    """Whether this process is the one of ``group`` that speaks for all, as it is without a group."""
    return group is None or dist.get_rank(group) == 0


def processes_without_group() -> int:
    """How many processes torchrun started, where they are several and none has initialised a group; else 0."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return 0
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return count if count > 1 else 0


def restarted() -> bool:
    """Whether torchrun has started these processes again after one has failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def group_of(function: str, process_group: Any) -> Any:
    """The ``ProcessGroup`` of an argument ``process_group``: itself, that of a one-dimensional DeviceMesh, or None.

    ``torch.distributed.group.WORLD`` is None where no group is initialised, so that a script runs alone too.

    Raises:
        TypeError: anything else. ValueError: a mesh of more dimensions, or a group that this rank is not of.
    """
    if process_group is None:
        return None
    if dist.is_available():
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{function}: process_group must be one that this rank is a member of; got NON_GROUP_MEMBER"
            )
        if isinstance(process_group, dist.ProcessGroup):
            return process_group
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(process_group, DeviceMesh):
            if process_group.ndim != 1:
                raise ValueError(
                    f"{function}: process_group must be a DeviceMesh of one dimension, such as mesh['dp']; got "
                    f"{process_group.ndim} dimensions"
                )
            return process_group.get_group()
    raise TypeError(
        f"{function}: process_group must be a ProcessGroup, such as torch.distributed.group.WORLD, a DeviceMesh of one "
        f"dimension or None; got {type(process_group).__name__}"
    )


def chunk_of_rank(count: int, group: Any) -> range:
    """Which of ``count`` are this rank's, as ``torch.chunk`` splits them and DTensors are sharded; None is all."""
    if group is None:
        return range(count)
    most = -(-count // dist.get_world_size(group))
    first = min(dist.get_rank(group) * most, count)
    return range(first, min(first + most, count))


def exchange(function: str, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``collective(*args, **options)``, whose failure names the caller and says what to do.

    Nothing here waits longer than the group: a rank that ended is seen at once by gloo, one that hangs or makes another
    call after the timeout that the group was initialised with.

    Raises:
        RuntimeError: from the group's own.
    """
    try:
        return collective(*args, **options)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        if "No backend type" in told:  # no rank's end but a tensor on a device that the group does not serve
            raise
        raise RuntimeError(
            f"{function}: the exchange with the other ranks failed ({told}). A rank has ended, hangs, or does not make "
            "this call, which every rank of the group must. How long it is waited for is timeout= of "
            "torch.distributed.init_process_group. Start all ranks again from the last checkpoint, as "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts does; without the variable new ranks of "
            "torch 2.13 mostly look for the old ones and fail"
        ) from error


def numbers_device(group: Any = None) -> torch.device:
    """Where numbers that ranks tell each other must lie: on the CPU where the group serves it, else on its device."""
    config = dist.get_backend_config(group)
    kinds = [entry.split(":")[0] for entry in config.split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def seed_of_rank_0(seed: int) -> int:
    """Rank 0's ``seed``, on every rank of the default process group.

    A collective: every rank calls it. Ranks are often seeded apart, so that they see different data, and replicas whose
    noise differs drift apart without a word.
    """
    box = torch.tensor([seed], dtype=torch.int64, device=numbers_device())
    exchange("the seed of rank 0 (seed=None)", dist.broadcast, box, src=0)
    return int(box.item())


def gathered_numbers(function: str, numbers: list[int] | list[float], group: Any) -> list[list[Any]]:
    """The numbers of every rank, by rank: all integers or all floats, as many on each. A collective."""
    dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
    own = torch.tensor(numbers, dtype=dtype, device=numbers_device(group))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    exchange(function, _gather_with_patience, function, parts, own, group)
    return [part.tolist() for part in parts]


def _gather_with_patience(function: str, parts: list[Tensor], own: Tensor, group: Any) -> None:
    """An all-gather that says what it waits for, long before the group's timeout: some rank calls alone."""
    work = dist.all_gather(parts, own, group=group, async_op=True)
    begun, told = time.monotonic(), False
    while work is not None and not work.is_completed():
        waited = time.monotonic() - begun
        if waited > PATIENCE and not told:
            told = True
            warnings.warn(
                f"{function}: has waited {PATIENCE:g} s for other ranks, which must all make this call. "
                "process_group=None, where it is an argument, leaves them out",
                stacklevel=4,
            )
        time.sleep(min(waited / 8, 0.05))
    if work is not None:
        work.wait()


def offset_of_rank(function: str, rows: int, group: Any = None) -> int:
    """How many of a batch's rows lie on the ranks before this one. A collective."""
    sizes = gathered_numbers(function, [rows], group)
    return sum(size for (size,) in sizes[: dist.get_rank(group)])


def max_over_ranks(function: str, tensor: Tensor, group: Any) -> Tensor:
    """The largest of every element over the ranks, without a gradient. A collective."""
    largest = tensor.detach().clone(memory_format=torch.contiguous_format)
    exchange(function, dist.all_reduce, largest, op=dist.ReduceOp.MAX, group=group)
    return largest


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: str, group: Any) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        exchange(function, dist.all_reduce, total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.ranks, None, None


def sum_over_ranks(function: str, tensor: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of ``tensor``, of one shape on all, the same on all. A collective.

    Every rank goes on with the sum in the same way, so its gradient is that of as many equal losses as there are ranks:
    what comes from above, times the ranks. That each knows for itself, so backward is no collective; it is what the
    all-reduce of the gradients would give, and what DDP and FSDP, which average over ranks, turn into the gradient of
    one loss.
    """
    result: Tensor = _SumOverRanks.apply(tensor, function, group)
    return result
