"""Sharded and data-parallel training with fe.LangevinAdam: the noise and the bits of one process."""

import pytest
import torch

import fekernels as fe
from fekernels.optim._shards import shard_geometry
from tests.support import distributed_worker as worker
from tests.support.tensors import UNIT, Frozen, bits_equal


def check_joint_batch(kind, results):
    """The gradients' sums differ in rounding, and nothing else does: a dozen terms a step, of numbers near 1."""
    tolerance = 12 * worker.STEPS * UNIT
    net = worker.network()
    optimizer = worker.train(net, slice(None))
    for (name, p), got in zip(net.named_parameters(), results[kind], strict=True):
        torch.testing.assert_close(got, p, rtol=tolerance, atol=tolerance)
        if kind == "fsdp":
            saved, state = results["fsdp_states"][name], optimizer.state[p]
            assert saved["step"].item() == worker.STEPS
            torch.testing.assert_close(saved["exp_avg"], state["exp_avg"], rtol=tolerance, atol=tolerance)
            assert bits_equal(saved["anchor"], state["anchor"])


def check_bits_of_whole(placement, backend, results):
    gathered = results[f"{placement}-{backend}"]
    whole = {name: value.requires_grad_() for name, value in worker.parameters().items() if name in gathered}
    whole["c.weight"] = whole["c.weight"].detach().bfloat16().requires_grad_()
    optimizer = worker.step_through(
        whole, lambda g, p: g.to(p.dtype), stochastic_rounding=True, backend=backend
    )
    assert len(gathered) == (3 if placement == "shard1" else 5)
    for name, p in whole.items():
        wanted = (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
        assert all(bits_equal(got, want) for got, want in zip(gathered[name], wanted, strict=True)), name


def check_draws(placement, estimator, results):
    gathered = results[f"{placement}-{estimator}"]
    whole = {name: value.requires_grad_() for name, value in worker.parameters().items() if name in gathered}
    optimizer = worker.draw_through(whole, lambda g, p: g, estimator=estimator)
    for name, p in whole.items():
        state = optimizer.state[p]
        wanted = [p, *(state[key] for key in sorted(state) if key not in ("step", "draws"))]
        assert len(wanted) == (4 if estimator == "natural" else 8)
        keys = ["param", *(key for key in sorted(state) if key not in ("step", "draws"))]
        for key, got, want in zip(keys, gathered[name], wanted, strict=True):
            assert bits_equal(got, want), f"{placement}, {estimator}: {key} of {name}"
    torch.testing.assert_close(results[f"{placement}-{estimator}-kl"], optimizer.kl(), rtol=1e-6, atol=0)


def check_draws_apart(samples, results):
    """Each rank's product of its own gradient and noise, averaged; the gradients' own average for the mean."""
    first, second = results[f"sync-{samples}"]
    assert bits_equal(first, second)
    start, std = torch.linspace(-1, 1, 9).double(), 1 / (30 * (1 + 1e-4)) ** 0.5
    g = product = torch.zeros(9, dtype=torch.float64)
    for rank in range(worker.WORLD):
        for draw in range(1, samples + 1):
            seed = 11 + rank * 0x9E3779B97F4A7C15
            xi = fe.random.normal(9, seed=seed, stream=0, step=draw, purpose=2).double()
            slope = (start + std * xi).sinh()
            g, product = g + slope / worker.WORLD / samples, product + slope * xi / worker.WORLD / samples
    h_hat = product / std
    h = 1 + 0.1 * (h_hat - 1) + 0.005 * (h_hat - 1) ** 2 / (1 + 1e-4)
    mean = start - 0.05 * (1 + 1e-4) * (g + 1e-4 * start) / (h + 1e-4)
    torch.testing.assert_close(first.double(), torch.stack([mean, h]), rtol=1e-5, atol=1e-6)


def check_seeds(results):
    drawn = results["rank 0's"]
    for name in ("ddp", "ddp, hot later", "fsdp"):
        weights, seeds = results[name]
        assert bits_equal(*weights), name
        assert [s.tolist() for s in seeds] == [[drawn, 3]] * 2, name
    for name in ("svgd", "svgd, groups"):
        particles, seeds = results[name]
        assert bits_equal(*particles) and [int(s) for s in seeds] == [drawn] * 2, name


def test_two_processes_are_one(tmp_path):
    # In one test, so that they start once.
    torch.multiprocessing.spawn(worker.main, (str(tmp_path),), nprocs=worker.WORLD)
    results = torch.load(tmp_path / "results.pt")
    check_seeds(results["seeds"])
    for kind in ("ddp", "fsdp"):
        check_joint_batch(kind, results)
    for placement in ("shard0", "shard1", "replicate"):
        for backend in ("auto", "reference"):
            check_bits_of_whole(placement, backend, results)
        for estimator in ("natural", "reparam"):
            check_draws(placement, estimator, results)
    for samples in (1, 2):
        check_draws_apart(samples, results)


@pytest.fixture
def four_processes():
    """Which part of a DTensor each of four processes would hold; nothing is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def on_rank(rank):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        return init_device_mesh("cpu", (2, 2))

    yield on_rank
    torch.distributed.destroy_process_group()


def elements_held(geometry, numel):
    offset, run, pitch = geometry
    local = torch.arange(numel)
    return offset + local // run * pitch + local % run


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (1, 3), (4, 1, 6), (3, 5, 7), (2, 2, 2, 3)], ids=str)
def test_shard_geometry_on_a_grid_of_processes(shape, four_processes):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    last = len(shape) - 1
    pairs = [
        (Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Shard(last)), (Shard(0), Shard(1)),
        (Shard(1), Shard(0)), (Replicate(), Replicate()),
    ]  # fmt: skip
    for rank in range(4):
        mesh = four_processes(rank)
        for placements in pairs:
            held = numbers
            for coordinate, placement in zip((rank // 2, rank % 2), placements, strict=True):
                if isinstance(placement, Shard):
                    parts = held.chunk(2, placement.dim)
                    whole = (
                        parts[0].narrow(placement.dim, 0, 0)
                        if coordinate >= len(parts)
                        else parts[coordinate]
                    )
                    held = whole
            strides = torch.empty(shape).stride()
            local = held.float().clone()
            tensor = DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=strides)
            geometry = shard_geometry("test", tensor)
            assert torch.equal(elements_held(geometry, held.numel()), held.flatten()), (rank, placements)


def test_shards_that_are_no_even_runs_raise(four_processes):
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = four_processes(0)
    for placements, local, message in (
        ((Shard(1), Shard(2)), (4, 2, 3), "may be split along one dimension, and along dimension 0"),
        ((Shard(0), Partial()), (2, 4, 6), "must be placed by Shard or Replicate; got P"),
    ):
        tensor = DTensor.from_local(
            torch.zeros(local), mesh, placements, shape=torch.Size((4, 4, 6)), stride=(24, 6, 1)
        )
        p = torch.nn.Parameter(tensor)
        optimizer = fe.LangevinAdam([p], seed=77)
        p.grad = tensor.clone()
        frozen = Frozen([p.to_local()])
        with pytest.raises(ValueError, match=f"LangevinAdam: a DTensor parameter {message}"):
            optimizer.step()
        assert frozen.unchanged()
