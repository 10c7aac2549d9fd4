"""Chains over real processes, and one directory of samples that all of them read: the bits of one process."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fekernels as fe
from fekernels.posterior import run as run_module
from fekernels.posterior.arguments import data_of
from tests.support.processes import run_processes
from tests.support.tensors import bits_equal

WORLD = 3
CHAINS, SAMPLES = 4, 4
POINTS = 48
DIFFERENT = {
    "data_size": (40, 41, 42), "seed": (1, 2, 3), "lr": (0.01, None, None), "freeze": (True, False, True),
    "directory": (None, "/there", None),
}  # fmt: skip
UNLIKE = {
    "thinning": (1, 2, 2), "seed": (0, 1, 2), "burn_in": (0, 1, 0), "max_samples": (None, 2, 2), "chains": (2, 1, 0),
    "policy": ("fifo", "reservoir", "fifo"), "directory": ("/here", "/there", "/here"),
}  # fmt: skip


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def batches():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(POINTS, 3, generator=generator)
    y = x[:, :1].sin() + 0.1 * torch.randn(POINTS, 1, generator=generator)
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, POINTS, 16)]


class MadeAnew:
    """Data that are others in every pass, as random crops of images are."""

    def __iter__(self):
        return iter([(torch.randn(16, 3), torch.randn(16, 1)) for _ in range(3)])


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean() * 5


def sampled(model, **options):
    run_module.TRAIN_STEPS = 20
    options = dict(seed=3, data_size=POINTS, control_variates=True) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fe.sample_posterior(
            model, loss, options.pop("loader", batches()), prior_precision=1.0, chains=CHAINS, samples=SAMPLES,
            burn_in=20, thinning=2, progress=False, **options,
        )  # fmt: skip
        mean = run.samples.predict(batches()[0][0], activation=None).mean
    report = run.report
    numbers = report.rhat_max, report.ess_min, report.rhat_loss, report.noise_ratio, report.variance_inflation
    settings = {name: value for name, value in report.settings.items() if name != "ranks"}
    return {
        "samples": list(run.samples), "trace": report.trace, "losses": report.losses, "mean": mean,
        "numbers": numbers, "settings": settings, "warnings": report.warnings,
    }  # fmt: skip


def trained(samples, model, steps=(1, 2, 3, 4, 5)):
    """What a loop under DDP does: replicas take the same steps, and each tells its samples of every one."""
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = fe.LangevinAdam(wrapped.parameters(), lr=0.05, temperature=1e-3, eps=0.1, seed=7)
    for _ in steps:
        optimizer.zero_grad()
        loss(wrapped, batches()[0]).backward()
        optimizer.step()
        samples.update()


def predicted(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return samples.predict(batches()[1][0], activation=None).mean


def on_a_rank(folder):
    world, rank = dist.group.WORLD, dist.get_rank()
    model = network(rank)
    torch.manual_seed(100 + rank)
    results = {"chains": sampled(model, seed=None)}  # weights and seed are rank 0's
    chains = Path(folder, "chains")
    results["on disk"] = sampled(network(), directory=chains, seed=results["chains"]["settings"]["seed"])
    with pytest.raises(
        ValueError, match="directory must hold no samples but .* got .* with 16 that have another seed"
    ):
        sampled(network(), directory=chains)
    results["again"] = sampled(network(), directory=chains, seed=results["chains"]["settings"]["seed"])
    assert len(list(chains.iterdir())) == 1 + CHAINS * SAMPLES
    results["of chains"] = fe.PosteriorSamples(network(), directory=chains, process_group=world).chains

    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    sampler = torch.utils.data.distributed.DistributedSampler(data)
    with pytest.raises(ValueError, match="all the data on every rank: .* got one with a DistributedSampler"):
        sampled(network(), loader=torch.utils.data.DataLoader(data, 16, sampler=sampler))
    for name, of_ranks in DIFFERENT.items():
        told = f"sample_posterior: {name} must be the same on every rank; got {of_ranks[0]!r} on rank 0 and"
        with pytest.raises(ValueError, match=f"{told} {of_ranks[1]!r} on rank 1"):
            sampled(network(), **{name: of_ranks[rank]})
    with pytest.raises(ValueError, match="of points of loader must be .*; got 16 on rank 0 and 32 on rank 1"):
        sampled(network(), loader=batches()[: rank + 1])
    with pytest.raises(ValueError, match="what loader gives .* must be .*; got another on rank 2 than on 0"):
        sampled(network(), loader=[(x + (rank == 2) * (x == x.max()) * 1e-6, y) for x, y in batches()])
    with pytest.raises(ValueError, match="must hold a batch" if rank == 1 else "rank 1 could not read it"):
        sampled(network(), loader=batches() if rank != 1 else [])
    own_order = torch.Generator().manual_seed(rank)
    shuffled = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=own_order)
    assert data_of(shuffled, POINTS, 0, world).points == POINTS
    others = torch.utils.data.TensorDataset(data.tensors[0] + rank, data.tensors[1])
    with pytest.raises(ValueError, match="got another on rank 1 than on 0"):
        data_of(torch.utils.data.DataLoader(others, 16, shuffle=True), POINTS, 0, world)
    assert data_of(MadeAnew(), POINTS, 0, world).points == POINTS

    for name, of_ranks in UNLIKE.items():
        told = f"PosteriorSamples: {name} must be the same on every rank; got {of_ranks[0]!r} on rank 0 and"
        with pytest.raises(ValueError, match=f"{told} {of_ranks[1]!r} on rank 1"):
            fe.PosteriorSamples(network(), **{name: of_ranks[rank], "process_group": world})

    shared = Path(folder, "shared")
    model = network()
    samples = fe.PosteriorSamples(model, burn_in=1, thinning=2, directory=shared, process_group=world)
    trained(samples, model)
    results["shared"] = len(samples), samples.calls, predicted(samples)
    dist.barrier()
    again = fe.PosteriorSamples(network(), burn_in=1, thinning=2, directory=shared, process_group=world)
    trained(again, model, (6, 7))
    results["resumed"] = len(again), again.calls, predicted(again)
    dist.barrier()
    results["files"] = sorted(os.listdir(shared))

    apart = Path(folder, "apart")
    own = fe.PosteriorSamples(network(), directory=apart)
    dist.barrier()
    if rank == 0:
        own.collect()
    dist.barrier()
    if rank == 1:
        with pytest.raises(
            RuntimeError, match="must have one writer; another process or object has written to it"
        ):
            own.collect()
    results["kept"] = len(fe.PosteriorSamples(network(), directory=apart, process_group=world))

    sharded = fully_shard(network())
    alone = fe.PosteriorSamples(sharded, burn_in=100)
    told = "process_group must be given for a model that is sharded over ranks, .* got None and '0.weight' in shards"
    for call in (alone.update, alone.collect) if rank == 0 else ():  # who would wait for the others
        with pytest.raises(ValueError, match=told) as raised:
            call()
        assert "made before" not in str(raised.value)
    of_fsdp = fe.PosteriorSamples(sharded, directory=Path(folder, "fsdp"), process_group=world)
    of_fsdp.collect()
    with pytest.raises(
        ValueError, match="must not be sharded to predict, .* got a DTensor parameter '0.weight'"
    ):
        predicted(of_fsdp)
    whole = fe.PosteriorSamples(network(9), directory=Path(folder, "fsdp"), process_group=world)
    results["fsdp"] = whole[0]
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_processes(on_a_rank, WORLD, str(tmp_path_factory.mktemp("samples")), timeout=300)


@pytest.fixture(scope="module")
def one():
    steps = run_module.TRAIN_STEPS
    torch.manual_seed(100)
    seed = int(torch.randint(0, (1 << 63) - 1, ()))  # what rank 0 draws
    yield sampled(network(), seed=seed)
    run_module.TRAIN_STEPS = steps


def same(got, want):
    assert len(got["samples"]) == CHAINS * SAMPLES
    for its, wanted in zip(got["samples"], want["samples"], strict=True):
        assert all(bits_equal(its[name], value) for name, value in wanted.items())
    for name in ("trace", "losses", "mean"):
        assert bits_equal(got[name], want[name]), name
    assert got["numbers"] == want["numbers"] and got["settings"] == want["settings"]


def test_chains_over_ranks_are_those_of_one_process(found, one):
    for its in found:
        same(its["chains"], one)
        same(its["on disk"], one)
        same(its["again"], one)
        assert its["of chains"] == CHAINS
        assert its["chains"]["warnings"][0].startswith("1 of 3 ranks had nothing to do")
        assert its["chains"]["warnings"][1:] == one["warnings"]


def test_one_rank_writes_and_all_predict(found, tmp_path):
    model = network()
    samples = fe.PosteriorSamples(model, burn_in=1, thinning=2, directory=tmp_path)
    trained(samples, model)
    for its in found:
        count, calls, mean = its["shared"]
        assert (count, calls) == (2, 5)
        torch.testing.assert_close(mean, predicted(samples))
        assert bits_equal(mean, found[0]["shared"][2])
    again = fe.PosteriorSamples(network(), burn_in=1, thinning=2, directory=tmp_path)
    trained(again, model, (6, 7))
    for its in found:
        assert its["resumed"][:2] == (3, 7)
        torch.testing.assert_close(its["resumed"][2], predicted(again))
        assert its["files"] == ["index.json", *(f"sample-{i:08d}.safetensors" for i in range(3))]


def test_nothing_is_overwritten_by_a_second_writer(found):
    assert [its["kept"] for its in found] == [1] * WORLD


def test_samples_of_sharded_weights_are_whole(found):
    for its in found:
        assert all(bits_equal(its["fsdp"][name], value) for name, value in network().state_dict().items())


def test_torchrun_without_a_group_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(
        UserWarning, match="torchrun started 4 processes, and each now samples everything for itself"
    ):
        with pytest.raises(TypeError, match="model must be"):
            fe.sample_posterior(None, loss, batches(), data_size=POINTS, prior_precision=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a trainer initialises the group after these are made
        samples, late = (fe.PosteriorSamples(network(), directory=tmp_path / name) for name in "ab")
        fe.PosteriorSamples(network()).collect()
    with pytest.warns(
        UserWarning, match="PosteriorSamples: torchrun started 4 processes that know nothing of"
    ):
        samples.collect()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples.collect()
            late.collect()
    finally:
        dist.destroy_process_group()
