"""A process that is killed, or never comes: what the others are told and when, and how they go on from a checkpoint."""

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fekernels as fe
from fekernels._runtime import ranks
from fekernels.posterior import run as posterior_run
from fekernels.posterior import shared_store, store
from tests.support import processes
from tests.support.tensors import bits_equal

WORLD, CHAINS = 3, 6
SAVED, LAST = 3, 8  # steps
LIMIT = 1.0  # seconds, of a group whose other rank does not come


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=generator)
    return [(x[i : i + 8], x[i : i + 8, :1].sin()) for i in (0, 8, 16)]


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


class Walk:
    """Chains that an optimizer moves, and what is saved of both."""

    def __init__(self, process_group):
        self.chains = fe.Chains(network(), CHAINS, jitter=0.1, vectorize=False, process_group=process_group)
        self.module = torch.nn.Module()
        for name, p in self.chains.named_parameters():
            self.module.register_parameter(name.replace(".", "_"), p)
        self.optimizer = fe.LangevinAdam(
            self.module.parameters(), lr=0.02, temperature=0.01, eps=0.1, seed=11
        )

    def go(self, begin, end):
        for step in range(begin, end):
            self.optimizer.zero_grad()
            self.chains.losses(loss, batches()[step % 3]).sum().backward()
            self.optimizer.step()
        return self

    def state(self):
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return self


def told(call):
    """The error, after how many seconds, and what warnings came before it."""
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as warned, pytest.raises(RuntimeError) as raised:
        warnings.simplefilter("always")
        call()
    return str(raised.value), time.monotonic() - begun, [str(w.message) for w in warned]


def sample(loss_fn, directory=None):
    with mock.patch.object(posterior_run, "TRAIN_STEPS", 20):
        return fe.sample_posterior(
            network(), loss_fn, batches(), data_size=24, prior_precision=1.0, chains=CHAINS, samples=4, burn_in=20,
            thinning=1, seed=1, progress=False, directory=directory,
        ).samples  # fmt: skip


def on_a_rank(folder):
    rank = dist.get_rank()
    walk = Walk(dist.group.WORLD).go(0, SAVED)
    dcp.save(walk.state(), checkpoint_id=f"{folder}/checkpoint")
    calls = 0

    def killed_on_the_way(model, batch):
        nonlocal calls
        calls += 1
        if rank == WORLD - 1 and calls == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    results = {"killed": told(lambda: sample(killed_on_the_way))}

    dist.destroy_process_group()
    model = network()
    early = fe.PosteriorSamples(model, directory=Path(folder, "early"), process_group=dist.group.WORLD)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=WORLD - 1)
    world = dist.group.WORLD
    walk = Walk(world).load(f"{folder}/checkpoint").go(SAVED, LAST)
    results["resumed"] = walk.chains.states()

    if rank == 0:
        early.collect()
    dist.barrier()
    if rank:
        results["a second writer"] = told(early.collect)
    fully_shard(model)
    with pytest.raises(ValueError) as raised:  # at once, on every rank
        early.update()
    results["sharded"] = str(raised.value)
    dist.barrier()

    shared_store.WAIT = ranks.PATIENCE = 0.5
    samples = fe.PosteriorSamples(network(), directory=Path(folder, "samples"), process_group=world)
    if rank:
        samples.collect()
        results["not collected"] = told(lambda: len(samples))
    dist.barrier()
    short, other = (dist.new_group() for _ in range(2))
    for group in (short, other):  # made by now, which on a busy machine may take longer
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT), group)
    for name, call in {
        "free_energy": lambda: fe.free_energy(*torch.zeros(4, 2, 2), process_group=short),
        "reparameterize": lambda: fe.reparameterize(
            *torch.zeros(2, 2, 2), seed=1, offset="rank", process_group=other
        ),
    }.items():
        if rank == 0:
            results[name] = told(call)
        dist.barrier()  # of the group that nothing has happened to, where the other has waited
    return results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    grace, processes.GRACE = processes.GRACE, 300.0
    yield processes.run_outcomes(on_a_rank, WORLD, str(tmp_path_factory.mktemp("failures")), timeout=400)
    processes.GRACE = grace


def test_one_was_killed_and_the_others_were_not(outcomes):
    assert [outcome.exitcode for outcome in outcomes] == [0, 0, -signal.SIGKILL], [
        o.failure for o in outcomes
    ]


def test_the_others_are_told_at_once_by_whom_and_what_to_do(outcomes):
    for outcome in outcomes[:-1]:
        message, seconds, _ = outcome.result["killed"]
        assert message.startswith("sample_posterior: the exchange with the other ranks failed (")
        assert "Start all ranks again from the last checkpoint" in message
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts" in message
        assert seconds < 300  # of a group whose own limit is 400


def test_fewer_ranks_go_on_from_the_checkpoint_by_the_identical_path(outcomes):
    whole = Walk(None).go(0, LAST).chains.states()
    resumed = [state for outcome in outcomes[:-1] for state in outcome.result["resumed"]]
    assert len(resumed) == CHAINS
    for got, want in zip(resumed, whole, strict=True):
        assert all(bits_equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("name", ["free_energy", "reparameterize"])
def test_who_never_comes_is_waited_for_as_long_as_the_group_says(name, outcomes):
    message, seconds, warned = outcomes[0].result[name]
    assert message.startswith(f"{name}: the exchange with the other ranks failed (")
    assert "does not make this call, which every rank of the group must" in message
    assert LIMIT * 0.9 < seconds
    if name == "reparameterize":  # the host waits there itself
        assert [
            w
            for w in warned
            if w.startswith("reparameterize: has waited 0.5 s for other ranks, which must all")
        ]


def test_samples_that_were_opened_before_there_was_a_group_say_so(outcomes):
    early = "was made before there was a process group, when torch.distributed.group.WORLD is None"
    message, _, _ = outcomes[1].result["a second writer"]
    assert "must have one writer" in message and message.endswith(early)
    for outcome in outcomes[:-1]:
        assert "not rank 0 alone. " in outcome.result["sharded"] and outcome.result["sharded"].endswith(early)


def test_samples_that_rank_0_did_not_keep_are_missed(outcomes):
    message, _, _ = outcomes[1].result["not collected"]
    assert message.startswith("PosteriorSamples: rank 0 must have written sample number 1 to ")


def killed_among_its_samples(folder, rank):
    """One rank has written two of its samples, the others as many as they come to."""
    write, count = store._save_sample, 0

    def killed(path, sample):
        nonlocal count
        if count == 2 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        write(path, sample)

    store._save_sample = killed
    sample(loss, folder)


def sampled_again(folder):
    return list(sample(loss, folder))


def test_a_run_with_a_rank_killed_among_its_files_is_started_again_in_its_directory(tmp_path):
    for rank in (0, 1):
        outcomes = processes.run_outcomes(killed_among_its_samples, 2, str(tmp_path), rank)
        assert outcomes[rank].exitcode == -signal.SIGKILL, outcomes[rank].failure
    assert len(list(tmp_path.glob("sample-*"))) > 1
    (whole,) = processes.run_processes(sampled_again, 1, None)
    for result in processes.run_processes(sampled_again, 2, str(tmp_path)):
        assert len(result) == len(whole) == 4 * CHAINS
        for got, want in zip(result, whole, strict=True):
            assert all(bits_equal(got[name], value) for name, value in want.items())
    assert len(list(tmp_path.iterdir())) == 4 * CHAINS + 1
