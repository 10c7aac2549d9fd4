"""Which elements of the whole a process holds, on grids of processes; nothing is sent."""

from __future__ import annotations

import itertools

import pytest
import torch

import fekernels as fe
from fekernels.optim._shards import pieces
from tests.distributed import mesh_ranks as meshes
from tests.support.tensors import Frozen

GRID = (2, 2, 3)


@pytest.fixture
def on_rank():
    """Any rank of a grid of processes, of which there is this one alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank, shape=GRID):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        world = torch.Size(shape).numel()
        torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        return init_device_mesh("cpu", shape)

    yield start
    torch.distributed.destroy_process_group()


def dtensor(local, mesh, placements, shape):
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=stride)


def numbers_of(tensor):
    """The index in the whole of every element that lives here, as the kernels count."""
    found = torch.full(tensor.to_local().shape, -1)
    for piece in pieces("test", tensor):
        part = piece.of(found)
        offset, length, pitch = piece.order
        element = torch.arange(part.numel())
        part.copy_((offset + element // length * pitch + element % length).view(part.shape))
    return found


# Uneven everywhere, with parts that are empty; the third grid dimension splits what the others have split.
@pytest.mark.parametrize("shape", [(5,), (7, 6), (4, 5, 6), (3, 4, 5, 2), (1, 9), (13, 3)], ids=str)
def test_the_elements_held_on_a_grid(shape, on_rank):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    choices = [None, *range(len(shape))]
    most = 0
    for rank in (0, 5, 10):
        mesh = on_rank(rank)
        for split in itertools.product(choices, repeat=3):
            if split[0] is not None and len(set(split)) == 1:
                continue  # torch has no placement for three splits of one dimension from the right
            held = meshes.part(whole, GRID, split, rank)
            tensor = dtensor(held.float(), mesh, meshes.placements(mesh, split), shape)
            assert torch.equal(numbers_of(tensor), held), (rank, split)
            most = max(most, len(pieces("test", tensor)))
    assert most > 1 or len(shape) < 3


def test_splits_from_the_left(on_rank):
    """Shard after Shard of one dimension, as without FSDP2: the first of the mesh splits first."""
    from torch.distributed.tensor import Shard

    whole = torch.arange(11 * 3).view(11, 3)
    for rank in range(12):
        mesh = on_rank(rank)
        held = whole
        for size, here in zip(GRID, mesh.get_coordinate(), strict=True):
            parts = held.chunk(size)
            held = parts[here] if here < len(parts) else held[:0]
        tensor = dtensor(held.float(), mesh, [Shard(0)] * 3, whole.shape)
        assert torch.equal(numbers_of(tensor), held), rank


def test_what_cannot_be_told_raises(on_rank):
    from torch.distributed.tensor import Partial, Shard

    mesh = on_rank(0, (2, 2))
    for placements, local, message in (
        ((Shard(0), Partial()), (2, 4, 6), "must be placed by Shard or Replicate; got P"),
        ((Shard(0), Shard(1)), (3, 2, 6), r"must have shape \(2, 2, 6\), as .*; got \(3, 2, 6\)"),
    ):
        tensor = dtensor(torch.zeros(local), mesh, placements, (4, 4, 6))
        p = torch.nn.Parameter(tensor)
        optimizer = fe.LangevinAdam([p], seed=77)
        p.grad = tensor.clone()
        frozen = Frozen([p.to_local()])
        with pytest.raises(ValueError, match=f"LangevinAdam: .*a DTensor parameter {message}"):
            optimizer.step()
        assert frozen.unchanged()


@pytest.mark.filterwarnings("ignore")  # FullyShardedDataParallel's own, and of sampling without a prior
@pytest.mark.parametrize("original", [True, False])
def test_noise_on_flat_shards_raises(original, on_rank):
    """Those of two ranks would get the same numbers."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    on_rank(0, (2,))
    net = FullyShardedDataParallel(
        torch.nn.Linear(7, 5), use_orig_params=original, device_id=torch.device("cpu")
    )
    cold = fe.LangevinAdam(net.parameters(), seed=1)
    net(torch.ones(2, 7)).sum().backward()
    cold.step()
    cold.param_groups[0]["temperature"] = 1.0
    with pytest.raises(ValueError, match="LangevinAdam: params must be plain.* got shards of Fully"):
        cold.step()
    with pytest.raises(ValueError, match="SGLD: params must be plain.* got shards of Fully"):
        fe.SGLD(net.parameters(), lr=0.1, seed=2)


def test_streams_of_takes_optimizers_of_its_parameters():
    first, second, other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    for params, streams in (
        ([first, second], [1]),
        ([{"params": [first]}, {"params": [second]}], [1]),
        ([("a", first), ("b", second)], fe.LangevinAdam([("b", second)], seed=1).param_groups[0]["streams"]),
    ):
        kind = fe.distributed.streams_of(fe.LangevinAdam, params)
        optimizer = kind([second], seed=1)
        assert optimizer.param_groups[0]["streams"] == streams
        optimizer.param_groups[0]["streams"] = [0, 1]  # as ZeRO's checkpoint brings them
        optimizer.step()
        assert optimizer.param_groups[0]["streams"] == streams
    with pytest.raises(
        ValueError, match=r"LangevinAdam: params\[0\] must be one of those given to streams_of"
    ):
        kind([other], seed=2)
    with pytest.raises(TypeError, match="streams_of: optimizer_class must be an optimizer of fekernels"):
        fe.distributed.streams_of(torch.optim.Adam, [first])
    with pytest.raises(TypeError, match="streams_of: params must hold tensors.*got int"):
        fe.distributed.streams_of(fe.SGLD, [3])


@pytest.mark.parametrize("rank", [0, 1])
def test_zero_without_streams_of_is_refused_where_there_is_noise(on_rank, rank):
    """Each rank's optimizer would count streams from 0, so that parameters of different ranks had the same noise."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    on_rank(rank, (2,))
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for kind in (fe.LangevinAdam, fe.SGLD):
        name = kind.__name__
        message = rf"{name}: optimizer_class must be fe.distributed.streams_of\(fe.{name}, params\) for Zero"
        switches = {"lr": 0.1, "temperature": 1.0, "prior_precision": 1.0, "seed": 1}
        with pytest.raises(ValueError, match=message):
            ZeroRedundancyOptimizer(params, optimizer_class=kind, **switches)
        cold = ZeroRedundancyOptimizer(params, optimizer_class=kind, **{**switches, "temperature": 0.0})
        for p in params:
            p.grad = torch.ones_like(p)
        cold.step()
        cold.param_groups[0]["temperature"] = 1.0
        with pytest.raises(ValueError, match=message):
            cold.step()
        streams = fe.distributed.streams_of(kind, params)
        zero = ZeroRedundancyOptimizer(params, optimizer_class=streams, **switches)
        zero.step()
        mine = zero.optim.param_groups[0]
        assert all(params[stream] is p for stream, p in zip(mine["streams"], mine["params"], strict=True))
        kind(params, **switches).step()  # of all, beside it
    alone = torch.distributed.new_group([rank])
    ZeroRedundancyOptimizer(params, optimizer_class=fe.SGLD, process_group=alone, lr=0.1, seed=2).step()


def test_zero_is_refused_for_a_gaussian_of_all_weights(on_rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    on_rank(1, (2,))
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for kind in (fe.VariationalAdam, fe.distributed.streams_of(fe.VariationalAdam, params)):
        with pytest.raises(
            ValueError, match="VariationalAdam: params must be all that are drawn; got the part of"
        ):
            ZeroRedundancyOptimizer(params, optimizer_class=kind, lr=0.1, ess=10.0, seed=1)
