"""Optimizers on 1, 2, 3 and 4 processes: the noise, the bits and the checkpoints of one."""

from __future__ import annotations

import functools

import torch

import fekernels as fe
from tests.distributed import chain_ranks as chains
from tests.distributed import checkpoint_ranks as checkpoints
from tests.distributed import mesh_ranks as meshes
from tests.distributed import optimizer_ranks as replicas
from tests.distributed import zero_ranks as zero
from tests.support.processes import run_processes
from tests.support.tensors import UNIT, bits_equal


def of_four(folder):
    return {"meshes": meshes.run(), "checkpoints": checkpoints.save(folder), "chains": chains.of_ranks()}


def of_fewer(folder):
    return {"meshes": meshes.run(), "checkpoints": checkpoints.load(folder), "chains": chains.of_ranks()}


def of_three(folder):
    return of_fewer(folder) | {"zero": zero.run()}


def of_two(folder):
    return of_fewer(folder) | {"replicas": replicas.run()}


def check_joint_batch(kind, results):
    """The gradients' sums differ in rounding, and nothing else does: a dozen terms a step, of numbers near 1."""
    tolerance = 12 * replicas.STEPS * UNIT
    net = replicas.network()
    optimizer = replicas.train(net, slice(None))
    for (name, p), got in zip(net.named_parameters(), results[kind], strict=True):
        torch.testing.assert_close(got, p, rtol=tolerance, atol=tolerance)
        if kind == "fsdp":
            saved, state = results["fsdp_states"][name], optimizer.state[p]
            assert saved["step"].item() == replicas.STEPS
            torch.testing.assert_close(saved["exp_avg"], state["exp_avg"], rtol=tolerance, atol=tolerance)
            assert bits_equal(saved["anchor"], state["anchor"])


def check_draws_apart(samples, results):
    """Each rank's product of its own gradient and noise, averaged; the gradients' own average for the mean."""
    first, second = results[f"sync-{samples}"]
    assert bits_equal(first, second)
    start, std = torch.linspace(-1, 1, 9).double(), 1 / (30 * (1 + 1e-4)) ** 0.5
    g = product = torch.zeros(9, dtype=torch.float64)
    for rank in range(replicas.WORLD):
        for draw in range(1, samples + 1):
            seed = 11 + rank * 0x9E3779B97F4A7C15
            xi = fe.random.normal(9, seed=seed, stream=0, step=draw, purpose=2).double()
            slope = (start + std * xi).sinh()
            g, product = g + slope / replicas.WORLD / samples, product + slope * xi / replicas.WORLD / samples
    h_hat = product / std
    h = 1 + 0.1 * (h_hat - 1) + 0.005 * (h_hat - 1) ** 2 / (1 + 1e-4)
    mean = start - 0.05 * (1 + 1e-4) * (g + 1e-4 * start) / (h + 1e-4)
    torch.testing.assert_close(first.double(), torch.stack([mean, h]), rtol=1e-5, atol=1e-6)


def check_experts(results):
    """A parameter that one rank alone has used is stepped on both, by half of that rank's gradient."""
    first, second = results["experts, infinite False"]
    assert bits_equal(first, second)
    start, std = torch.stack(replicas.starts()).detach().double(), 1 / (30 * (1 + 1e-4)) ** 0.5
    g, h_hat = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    for rank in range(replicas.WORLD):
        seed = 11 + rank * 0x9E3779B97F4A7C15
        xi = torch.stack(
            [fe.random.normal(2, seed=seed, stream=i, step=1, purpose=2) for i in range(4)]
        ).double()
        drawn = (start + std * xi).requires_grad_()
        replicas.loss_on(rank, drawn).backward()
        g, h_hat = g + drawn.grad / replicas.WORLD, h_hat + drawn.grad * xi / std / replicas.WORLD
    h = 1 + 0.1 * (h_hat - 1) + 0.005 * (h_hat - 1) ** 2 / (1 + 1e-4)
    mean = start - 0.05 * (1 + 1e-4) * (g + 1e-4 * start) / (h + 1e-4)
    mean[3] = start[3]
    torch.testing.assert_close(first.double(), mean, rtol=1e-5, atol=1e-6)
    for got in results["experts, infinite True"]:  # one rank's skipped step is every rank's
        assert bits_equal(got, start.float())


def check_overflow(by_rank):
    """One rank's overflow is every rank's skipped step, and its scale no other's; powers of two, so to the bit."""
    for estimator in ("natural", "reparam"):
        (first, half), (second, whole) = (results[f"overflow, {estimator}, False"] for results in by_rank)
        assert (half, whole) == (2.0, 4.0)
        wanted, scale = by_rank[0][f"overflow, {estimator}, True"]
        assert scale == 2.0 and bool(wanted.isfinite().all())
        assert bits_equal(first, wanted) and bits_equal(second, wanted), estimator


def check_uneven(by_rank):
    for rank, results in enumerate(by_rank):
        for counts, told in zip(((1, 2), (0, 1)), results["uneven"], strict=True):
            assert (
                f"got {counts[rank]} training contexts on this rank since the last step, and from {counts[0]} to "
                f"{counts[1]} on all"
            ) in told


def check_undecided(by_rank):
    """A seed that nobody gave and that made no noise is none in a checkpoint, and the ranks agree on one later."""
    first, second = (results["undecided"] for results in by_rank)
    torch.manual_seed(200)
    drawn = int(torch.randint(0, (1 << 63) - 1, ()))  # rank 0's, when it goes on
    for name, (weights, saved, seeds) in first.items():
        assert bits_equal(weights, second[name][0]), name
        if name == "agreed":  # what made noise is the checkpoint's
            assert saved[0] not in (None, drawn) and saved == seeds == second[name][2]
            continue
        assert saved == second[name][1] and saved[0] is None and seeds == second[name][2]
        assert seeds[0] == drawn and saved[1:] == seeds[1:] == [3] * len(saved[1:]), name


def check_seeds(results):
    drawn = results["rank 0's"]
    for name in ("ddp", "ddp, hot later", "fsdp"):
        weights, seeds = results[name]
        assert bits_equal(*weights), name
        assert [s.tolist() for s in seeds] == [[drawn, 3]] * 2, name
    for name in ("svgd", "svgd, groups"):
        particles, seeds = results[name]
        assert bits_equal(*particles) and [int(s) for s in seeds] == [drawn] * 2, name


def check_anchors(results):
    """Built before wrapping, an optimizer has the anchors of rank 0; without wrapping each rank has its own."""
    starts = []
    for rank in range(replicas.WORLD):
        torch.manual_seed(rank)
        starts.append(torch.cat([p.detach().flatten() for p in torch.nn.Linear(7, 1).parameters()]))
    first, second = results["anchored, wrapped True"]
    for (weights, anchor, saved), (others, *_) in ((first, second), (second, first)):
        assert bits_equal(weights, others) and bits_equal(anchor, starts[0]) and bits_equal(saved, starts[0])
    (weights, _, saved), (_, anchor, _) = results["anchored, wrapped False"]
    assert bits_equal(saved, starts[0]) and bits_equal(weights, starts[0]) and bits_equal(anchor, starts[1])


@functools.cache
def stepped_alone(name):
    params = {key: torch.nn.Parameter(meshes.dtyped(key, value)) for key, value in meshes.values().items()}
    optimizer = meshes.step_through(name, params, meshes.given)
    return optimizer, {key: meshes.numbers(optimizer, p) for key, p in params.items()}


@functools.cache
def trained_alone(name):
    net = meshes.Network()
    meshes.train(name, net, slice(None))
    return {key: p.detach() for key, p in net.named_parameters()}


@functools.cache
def gone_on_alone(name):
    training = checkpoints.Training(name, 11)
    training.train(0, checkpoints.FIRST + checkpoints.SECOND)
    return training.weights()


def check_meshes(world, by_rank):
    """Every rank holds its part of what one process has, to the bit, states included."""
    for name in meshes.CHOICES:
        optimizer, wanted = stepped_alone(name)
        for where, (shape, split) in meshes.MESHES[world].items():
            if name not in meshes.chosen(where):
                continue
            for rank, results in enumerate(by_rank):
                held = results[f"{where}, {name}"]
                assert list(held) == meshes.held_in(split)
                for key, tensors in held.items():
                    for i, (got, want) in enumerate(zip(tensors, wanted[key], strict=True)):
                        mine = meshes.part(want, shape, split, rank)
                        assert bits_equal(got, mine), f"rank {rank} of {where}: {name}, tensor {i} of {key}"
            if isinstance(optimizer, fe.VariationalAdam) and len(held) == len(wanted):
                for results in by_rank:  # a sum over shards, in another order
                    torch.testing.assert_close(
                        results[f"{where}, {name}, kl"], optimizer.kl(), rtol=1e-6, atol=0
                    )


def check_partial(by_rank):
    """Sums over ranks are those of one process, whether the gradients before them were sums or not."""
    p = torch.nn.Parameter(meshes.values()["b"])
    optimizer = fe.SGLD([p], lr=0.05, seed=11)
    for i in range(5):
        p.grad = meshes.given("b", i)
        optimizer.step()
    assert all(bits_equal(results["partial later"], p) for results in by_rank)


def check_networks(world, by_rank):
    """In float64 what the sums of the gradients differ by is nothing beside noise that would be another's."""
    for where, names in meshes.NETWORKS[world].items():
        for name in names:
            for rank, results in enumerate(by_rank):
                trained = results[f"network, {where}, {name}"]
                for key, p in trained_alone(name).items():
                    torch.testing.assert_close(
                        trained[key],
                        p,
                        rtol=1e-9,
                        atol=1e-9,
                        msg=lambda told, at=(rank, where, name, key): f"{at}: {told}",
                    )


def check_checkpoints(by_rank):
    """Saved by four, loaded by fewer, and gone on with: all of it the bits of one process that never stopped."""
    for name, flatten in checkpoints.CASES:
        wanted = gone_on_alone(name)
        for rank, results in enumerate(by_rank):
            got = results[f"{name}-{flatten}"]
            assert got.keys() == wanted.keys()
            for key, tensor in wanted.items():
                assert bits_equal(got[key], tensor), f"{name}, flattened {flatten}, rank {rank}: {key}"


@functools.cache
def chains_alone():
    return chains.run(None)


def check_chains(world, by_rank):
    """The chains of all ranks, in their order, are those of one process, and so is what the diagnostics say."""
    numbers = [results["one by one"]["numbers"] for results in by_rank]
    assert numbers == {4: [[0], [1], [2], [3]], 3: [[0, 1], [2, 3], []], 2: [[0, 1], [2, 3]]}[world]
    alone = chains_alone()
    for key in ("draws", "losses"):
        assert bits_equal(torch.cat([results["one by one"][key] for results in by_rank]), alone[key]), key
    for results in by_rank:
        for got, want in zip(results["one by one"]["statistics"], alone["statistics"], strict=True):
            assert bits_equal(got, want)
    together = torch.cat([results["at once"]["draws"] for results in by_rank])
    torch.testing.assert_close(
        together, alone["draws"], rtol=1e-4, atol=1e-5
    )  # products of matrices side by side


def test_several_processes_are_one(tmp_path):
    # In one test, so that they start once for each number of processes. Four save what the others load.
    folder = str(tmp_path)
    for world, function in ((4, of_four), (3, of_three), (2, of_two)):
        by_rank = run_processes(function, world, folder)
        check_checkpoints([results["checkpoints"] for results in by_rank])
        check_meshes(world, [results["meshes"] for results in by_rank])
        if world == 3:
            check_partial([results["meshes"] for results in by_rank])
            told = by_rank[0]["zero"]["schedule"]
            assert told.startswith("CosineTemperature: optimizer must be the ZeroRedundancyOptimizer itself")
        check_chains(world, [results["chains"] for results in by_rank])
        check_networks(world, [results["meshes"] for results in by_rank])
    check_checkpoints([checkpoints.load(folder)])
    results = by_rank[0]["replicas"]
    check_seeds(results["seeds"])
    check_anchors(results)
    for kind in ("ddp", "fsdp"):
        check_joint_batch(kind, results)
    for samples in (1, 2):
        check_draws_apart(samples, results)
    check_experts(results)
    of_both = [its["replicas"] for its in by_rank]
    check_overflow(of_both)
    check_uneven(of_both)
    check_undecided(of_both)
