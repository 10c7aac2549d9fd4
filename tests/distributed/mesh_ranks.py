"""What each gloo process does on one- and two-dimensional meshes: the same training sharded in every way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fekernels as fe
from fekernels.optim._checkpoint import LIKE_THE_PARAMETER
from tests.distributed.optimizer_ranks import gradient

STEPS = 10
ROWS = 12  # of the batch: a multiple of every number of processes

SHAPES = {"a": (5, 7), "b": (5,), "c": (1, 5), "d": (1,), "e": (3, 4, 6)}
# The mesh, and the dimension that is split along each of its dimensions; FSDP2 splits after tensor parallel does.
MESHES: dict[int, dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]]] = {
    2: {"fsdp": ((2,), (0,)), "rows": ((2,), (1,)), "replicas": ((2,), (None,))},
    3: {"fsdp": ((3,), (0,)), "rows": ((3,), (1,))},
    4: {
        "fsdp": ((4,), (0,)),
        "hsdp": ((2, 2), (None, 0)),
        "fsdp x columns": ((2, 2), (0, 0)),
        "fsdp x rows": ((2, 2), (0, 1)),
        "rows x rows": ((2, 2), (1, 1)),
        "inner x inner": ((2, 2), (1, 2)),
    },
}
CHOICES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LangevinAdam": (
        fe.LangevinAdam,
        dict(lr=0.05, temperature=0.5, eps=0.1, prior_precision=0.2, anchor="init", stochastic_rounding=True),
    ),
    "LangevinAdam, reference": (
        fe.LangevinAdam,
        dict(
            lr=0.05, temperature=0.5, eps=0.1, noise="preconditioned", betas=(0.0, 0.9), backend="reference"
        ),
    ),
    "SGLD": (
        fe.SGLD,
        dict(lr=0.005, temperature=0.05, prior_precision=0.2, anchor="init", stochastic_rounding=True),
    ),
    "VariationalAdam": (fe.VariationalAdam, dict(lr=0.05, ess=30.0, betas=(0.8, 0.9))),
    "VariationalAdam, reparam": (
        fe.VariationalAdam,
        dict(lr=0.05, ess=30.0, betas=(0.8, 0.9), estimator="reparam"),
    ),
}


def values() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def given(key: str, i: int) -> Tensor:
    """The gradient of a parameter at step i."""
    return dtyped(key, gradient(SHAPES[key], i))


def step_through(name: str, params: dict[str, Tensor], grads: Callable[[str, int], Tensor]) -> Any:
    """``STEPS`` steps by given gradients: what differs between shardings then is the optimizer itself."""
    kind, switches = CHOICES[name]
    optimizer = kind(list(params.items()), seed=11, **switches)
    for i in range(STEPS):
        for sample in range(1 + i % 2):  # draws, where there are any
            if kind is not fe.VariationalAdam:
                for key, p in params.items():
                    p.grad = grads(key, i)
                break
            with optimizer.sampled_params(train=True):
                for (
                    key,
                    p,
                ) in params.items():  # of the draw, as those of a loss are: by the noise of each element
                    p.grad = grads(key, i + sample).clone()
                    local(p.grad).add_(local(p))
        if name == "LangevinAdam":
            optimizer.freeze_preconditioner(6 <= i < 8)  # and then lets go
        optimizer.step()
    return optimizer


def numbers(optimizer: Any, p: Tensor) -> list[Tensor]:
    """What this process holds of a parameter and its states."""
    state = optimizer.state[p]
    return [local(p).clone(), *(local(state[key]) for key in sorted(state) if key in LIKE_THE_PARAMETER)]


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()  # type: ignore[operator]


def part(tensor: Tensor, shape: tuple[int, ...], split: tuple[int | None, ...], rank: int) -> Tensor:
    """What ``rank`` of a mesh is to hold, by the order in which tensor parallel and FSDP2 split: the last first."""
    coordinates = []
    for size in reversed(shape):
        coordinates.insert(0, rank % size)
        rank //= size
    for here, size, dim in reversed(list(zip(coordinates, shape, split, strict=True))):
        if dim is not None:
            parts = tensor.chunk(size, dim)
            tensor = parts[here] if here < len(parts) else tensor.narrow(dim, 0, 0)
    return tensor.contiguous()


def held_in(split: tuple[int | None, ...]) -> list[str]:
    """The parameters that have the dimensions that are split."""
    return [key for key, shape in SHAPES.items() if len(shape) > max(dim or 0 for dim in split)]


def placements(mesh: Any, split: tuple[int | None, ...]) -> list[Any]:
    """As FSDP2 over tensor parallel has them: the last dimension of the mesh splits first."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    found: list[Any] = []
    for i, dim in enumerate(split):
        before = [mesh.size(j) for j in range(i + 1, len(split)) if split[j] == dim]
        if dim is None:
            found.append(Replicate())
        else:
            found.append(_StridedShard(dim, split_factor=before[0]) if before else Shard(dim))
    return found


def chosen(where: str) -> list[str]:
    """The reference is slow, and differs from the others where a parameter is several runs, or several rows."""
    return [name for name in CHOICES if "reference" not in name or where in ("rows", "inner x inner")]


def on_meshes(results: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    for where, (shape, split) in MESHES[dist.get_world_size()].items():
        mesh = init_device_mesh("cpu", shape)
        wanted = placements(mesh, split)

        def place(
            tensor: Tensor, shape: Any = shape, split: Any = split, args: Any = (mesh, wanted)
        ) -> Tensor:
            mine = part(tensor, shape, split, dist.get_rank())
            return DTensor.from_local(mine, *args, shape=tensor.shape, stride=tensor.stride())

        grads = functools.cache(
            lambda key, i, place=place: place(given(key, i))
        )  # shared: a DTensor takes 0.3 ms
        for name in chosen(where):
            start = values()
            params = {key: nn.Parameter(place(dtyped(key, start[key]))) for key in held_in(split)}
            optimizer = step_through(name, params, grads)
            results[f"{where}, {name}"] = {key: numbers(optimizer, p) for key, p in params.items()}
            if isinstance(optimizer, fe.VariationalAdam):
                results[f"{where}, {name}, kl"] = optimizer.kl()


def partial_later(results: dict[str, Any]) -> None:
    """Gradients of a replica that come whole, and then as sums over the ranks, which are in one of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(DTensor.from_local(values()["b"], mesh, [Replicate()]))
    optimizer = fe.SGLD([p], lr=0.05, seed=11)
    for i, placement in enumerate((Replicate(), Replicate(), Partial(), Partial(), Replicate())):
        grad = given("b", i)
        mine = torch.zeros_like(grad) if placement.is_partial() and dist.get_rank() else grad
        p.grad = DTensor.from_local(mine, mesh, [placement])
        optimizer.step()
    results["partial later"] = local(p)


def dtyped(key: str, value: Tensor) -> Tensor:
    return value.bfloat16() if key == "e" else value.clone()


# Networks, by the gradients of a loss.


class Network(nn.Module):
    """In float64, so that the order of a sum's terms is no matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(6),
            nn.Linear(6, 12),
            nn.Linear(12, 6),
            nn.Linear(6, 1),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(self.up(self.norm(x)).tanh()))
        return out


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(ROWS, n, generator=generator).double() for n in (6, 1))  # type: ignore[return-value]


# Where a network is trained by which optimizers, by the number of processes.
NETWORKS = {
    2: {},
    3: {
        "fsdp": ("LangevinAdam", "VariationalAdam"),
        "tp": ("LangevinAdam",),
        "zero": ("LangevinAdam", "SGLD"),
    },
    4: {"hsdp": ("LangevinAdam",), "fsdp x tp": ("LangevinAdam", "SGLD", "VariationalAdam")},
}


def train(name: str, net: nn.Module, rows: slice, make: Callable[..., Any] | None = None) -> Any:
    kind, switches = CHOICES[name]
    optimizer = (make or kind)(list(net.parameters()), seed=11, **switches)
    x, y = (t[rows] for t in batch())
    for _ in range(STEPS):
        optimizer.zero_grad()
        if kind is fe.VariationalAdam:
            with optimizer.sampled_params(train=True):
                (net(x) - y).square().mean().backward()
        else:
            (net(x) - y).square().mean().backward()
        optimizer.step()
    return optimizer


def networks(results: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    rank, world = dist.get_rank(), dist.get_world_size()

    def rows(index: int, count: int) -> slice:
        return slice(index * ROWS // count, (index + 1) * ROWS // count)

    for where, names in NETWORKS[world].items():
        for name in names:
            net: Any = Network()
            wrapped, mine, make = net, rows(rank, world), None
            if where == "zero":
                wrapped = DistributedDataParallel(net)
            elif where == "fsdp":
                fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
            elif where == "hsdp":
                fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
            else:
                shape = (2, 2) if where == "fsdp x tp" else (1, world)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
                plan = {
                    "norm": SequenceParallel(sequence_dim=0),
                    "up": ColwiseParallel(input_layouts=Shard(0)),
                    "down": RowwiseParallel(),
                }
                parallelize_module(net, mesh["tp"], plan)
                whole_rows = PrepareModuleInput(
                    input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),), use_local_output=False
                )
                parallelize_module(net, mesh["tp"], whole_rows)
                if where != "tp":
                    fully_shard(net, mesh=mesh["dp"])
                mine = rows(mesh["dp"].get_local_rank(), shape[0])
            if where == "zero":
                kind = fe.distributed.streams_of(CHOICES[name][0], net.parameters())
                make = functools.partial(ZeroRedundancyOptimizer, optimizer_class=kind)
            train(name, wrapped, mine, make)
            results[f"network, {where}, {name}"] = {
                key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for key, p in net.named_parameters()
            }


def zero_resumes() -> None:
    """From what rank 0 gathers of all ranks' states, with the streams of its own part in it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    def start() -> tuple[nn.Module, Any]:
        net = Network()
        kind = fe.distributed.streams_of(fe.LangevinAdam, net.parameters())
        switches = CHOICES["LangevinAdam"][1]
        return net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind, seed=11, **switches)

    def go_on(net: nn.Module, optimizer: Any) -> None:
        wrapped, (x, y) = DistributedDataParallel(net), batch()
        for _ in range(3):
            optimizer.zero_grad()
            (wrapped(x) - y).square().mean().backward()
            optimizer.step()

    net, optimizer = start()
    go_on(net, optimizer)
    optimizer.consolidate_state_dict(0)
    box = [optimizer.state_dict() if dist.get_rank() == 0 else None, net.state_dict()]
    dist.broadcast_object_list(box)
    box = copy.deepcopy(box)
    resumed, other = start()
    resumed.load_state_dict(box[1])
    other.load_state_dict(box[0])
    go_on(net, optimizer)
    go_on(resumed, other)
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def run() -> dict[str, Any]:
    results: dict[str, Any] = {}
    on_meshes(results)
    networks(results)
    if dist.get_world_size() == 3:
        partial_later(results)
        zero_resumes()
    return results
