"""What each gloo process does with chains that are split over all of them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fekernels as fe
from fekernels.diagnostics.gradient_noise import noise_ratio_here

CHAINS, STEPS = 4, 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, generator=generator), torch.randn(7, 2, generator=generator)


def loss_fn(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(rows[0]), rows[1])


def run(process_group: Any, vectorize: bool = False) -> dict[str, Any]:
    """Chains of this rank: their numbers, all their draws, and what the diagnostics say of those of all ranks."""
    chains = fe.Chains(
        network(), CHAINS, jitter=0.3, vectorize=vectorize, seed=5, process_group=process_group
    )
    optimizer = fe.LangevinAdam(
        chains.parameters(), lr=0.05, temperature=0.1, eps=0.1, prior_precision=0.1, seed=2
    )
    if process_group is not None:
        with pytest.raises(ValueError, match="ControlVariate: model must be chains of one process"):
            fe.ControlVariate(chains, loss_fn, [batch()])
    draws, losses = [], []
    for i in range(STEPS):
        optimizer.zero_grad()
        with torch.profiler.profile() if i == 1 else contextlib.nullcontext() as seen:
            each = chains.losses(loss_fn, batch())
            each.sum().backward()
            optimizer.step()
        if seen is not None:
            called = {event.key for event in seen.key_averages()}
            assert "aten::tanh" in called or chains.n == 0
            assert not [name for name in called if "c10d" in name or "gloo" in name]
        losses.append(each.detach())
        states = [torch.cat([t.flatten() for t in state.values()]) for state in chains.states()]
        draws.append(torch.stack(states) if states else torch.zeros(0, 32))
    own = torch.stack(draws, 1)
    assert chains(batch()[0]).shape == (chains.n, 7, 2)
    assert (chains.total, len(chains)) == (CHAINS, len(chains.numbers))
    statistics = fe.diagnostics.chain_statistics(own, process_group=process_group)
    assert fe.diagnostics.split_rhat(own.double(), process_group=process_group).shape == (32,)
    tail = fe.diagnostics.effective_sample_size(own, "tail", process_group=process_group)
    few = fe.diagnostics.split_rhat(own[:, :, 0], process_group=process_group)  # fewer weights than ranks
    return {
        "numbers": list(chains.numbers),
        "losses": torch.stack(losses, 1),
        "draws": own,
        "statistics": [*statistics, tail, few],
    }


def unlike() -> None:
    """What ranks were not given alike raises on all of them."""
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    given: dict[str, list[Any]] = {
        "n": [4 + k for k in range(ranks)],
        "seed": list(range(ranks)),
        "jitter": [0.1] + [0.2] * (ranks - 1),
    }
    for name, of_ranks in given.items():
        told = f"Chains: {name} must be the same on every rank; got {of_ranks[0]} on rank 0 and {of_ranks[1]} on rank 1"
        with pytest.raises(ValueError, match=told):
            fe.Chains(network(), **{"n": 4, name: of_ranks[rank], "process_group": dist.group.WORLD})
    tensors = {"0.weight": torch.full((5, 3), 0.1 + rank)}
    with pytest.raises(ValueError, match="Chains: jitter must be the same on every rank"):
        fe.Chains(network(), 4, jitter=tensors, process_group=dist.group.WORLD)
    model = network()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6 * (rank == ranks - 1)
    told = rf"Chains: model \(.*weights.*\) must be the same on every rank; got another on rank {ranks - 1} than on 0"
    with pytest.raises(ValueError, match=told):
        fe.Chains(model, 4, process_group=dist.group.WORLD)


def own_rows() -> None:
    """Batches of one rank alone raise on all, at the first call that is given one to learn from."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, y = batch()
    own = x[rank::ranks], y[rank::ranks]
    chains = fe.Chains(network(), 2 * ranks, process_group=dist.group.WORLD)
    with torch.no_grad():
        chains.losses(loss_fn, own)  # each rank may look at what it likes
    chains.losses(loss_fn, [own] * chains.n, each=True)
    told = r"Chains.losses: batch \(of all the data.*\) must be the same on every rank; got another on rank 1 than on 0"
    with pytest.raises(ValueError, match=told):
        chains.losses(loss_fn, own)
    chains = fe.Chains(network(), 1, process_group=dist.group.WORLD)
    chains.losses(loss_fn, batch() if chains.n else None)  # a rank without chains needs no data
    shuffled = fe.Chains(network(), 2 * ranks, process_group=dist.group.WORLD)
    shuffled.losses(loss_fn, (x.roll(rank, 0), y.roll(rank, 0)))  # all of them, in whatever order


def one_noise() -> None:
    """A chain a rank, of which the last two got the same noise: told on every rank, by their numbers among all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(min(rank, ranks - 2))
    draws = torch.randn(1, 60, 7, generator=generator).cumsum(1) + rank
    with pytest.warns(UserWarning, match=f"split_rhat: chains {ranks - 2} and {ranks - 1} move together"):
        fe.diagnostics.split_rhat(draws, process_group=dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.diagnostics.split_rhat(draws[: rank < ranks - 1], process_group=dist.group.WORLD)


def on_a_mesh_in_descending_order() -> None:
    """A chain has the start and the noise of its number, wherever the mesh has its rank."""
    ranks = dist.get_world_size()
    mesh = DeviceMesh("cpu", list(range(ranks))[::-1])
    own, whole = (
        fe.Chains(network(), ranks + 1, jitter=0.3, vectorize=False, process_group=group)
        for group in (mesh, None)
    )
    for chains in (own, whole):
        optimizer = fe.SGLD(chains.parameters(), lr=0.05, temperature=0.1, seed=2)
        for _ in range(3):
            optimizer.zero_grad()
            chains.losses(loss_fn, batch()).sum().backward()
            optimizer.step()
    wanted = whole.states()[own.numbers.start : own.numbers.stop]
    for got, want in zip(own.states(), wanted, strict=True):
        assert all(torch.equal(got[name], value) for name, value in want.items())


def noise_ratio() -> None:
    """Of the weights of all ranks, on every rank; and of those here, by who asks alone."""
    group = dist.group.WORLD
    own, whole = (
        fe.Chains(network(), CHAINS, jitter=0.3, vectorize=False, process_group=g) for g in (group, None)
    )
    of_each = []
    for chains in (own, whole):
        optimizer = fe.LangevinAdam(chains.parameters(), lr=0.05, temperature=0.1, seed=2)
        optimizer.zero_grad()
        chains.losses(loss_fn, batch()).sum().backward()
        optimizer.step()
        of_each.append(optimizer)
    levels = (0.0, 0.05, 0.5, 0.95, 1.0)
    got, wanted = (fe.diagnostics.gradient_noise_ratio(optimizer) for optimizer in of_each)
    assert got.ratios.sort().values.equal(wanted.ratios.sort().values)
    assert got.quantiles(levels) == wanted.quantiles(levels)
    if dist.get_rank() == 0:
        assert len(noise_ratio_here(of_each[0]).ratios) == own.n * len(wanted.ratios) // CHAINS


def without_chains() -> int:
    """A rank that has none collects like the others."""
    chains = fe.Chains(network(), 1, process_group=dist.group.WORLD)
    samples = fe.PosteriorSamples(network(), chains=chains.n)
    for state in chains.states():
        samples.collect(state)
    if not chains.n:
        for call, told in (
            (samples.collect, "collect: chains must be at least 1 to keep a sample; got 0"),
            (samples.diagnostics, "samples must hold 4 draws"),
            (lambda: samples.predict(batch()[0]), "samples must hold at least one; got none"),
        ):
            with pytest.raises(ValueError, match=told):
                call()
    return len(samples)


def of_ranks() -> dict[str, Any]:
    unlike()
    own_rows()
    one_noise()
    on_a_mesh_in_descending_order()
    noise_ratio()
    assert without_chains() == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        own, told = torch.zeros(1, 5, 3), r"got \(chains, draws, weights\) \(1, 5, 3\), \(1, 4, 3\)"
    else:
        own, told = torch.zeros(1, 4, 3), "one number of draws"
    with pytest.raises(ValueError, match=told):
        fe.diagnostics.split_rhat(own, process_group=dist.group.WORLD)
    return {"one by one": run(dist.group.WORLD), "at once": run(dist.group.WORLD, vectorize=True)}
