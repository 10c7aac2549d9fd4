"""Whose noise is whose: the seed that ranks agree on, and one warning of two optimizers with the same numbers."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels.optim import parameter_groups, shared_noise
from fekernels.stein import svgd
from tests.support.pairwise import pairwise
from tests.support.tensors import bits_equal

HOT = dict(temperature=0.5, eps=0.1)
HOT_OF = {fe.LangevinAdam: HOT, fe.SGLD: dict(temperature=0.5)}


def parameter(*shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones(shape)
    return p


@pytest.fixture
def ranks(monkeypatch):
    """As if this process were one of several, and rank 0 had drawn 77; counts the broadcasts."""
    calls = []
    for module in (parameter_groups, svgd):
        monkeypatch.setattr(module, "has_ranks", lambda: True)
        monkeypatch.setattr(module, "seed_of_rank_0", lambda seed: calls.append(seed) or 77)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_first_noise_is_rank_0s(backend, compiled, ranks):
    torch._dynamo.reset()
    p, q = parameter(5), parameter(5)
    optimizer = fe.LangevinAdam([p], **HOT, backend=backend)
    plain = fe.LangevinAdam([q], **HOT, seed=77, backend=backend)
    take = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
    for _ in range(2):
        take()
        plain.step()
    assert bits_equal(p, q) and len(ranks) == 1 and optimizer.param_groups[0]["seed"] == 77


def test_only_what_needs_the_seed_asks_for_it(ranks):
    cold = fe.LangevinAdam([parameter(5)])
    cold.step()
    given = fe.LangevinAdam([parameter(5)], **HOT, seed=3)
    given.step()
    loaded = fe.LangevinAdam([parameter(5)], **HOT)
    loaded.load_state_dict(given.state_dict())
    loaded.step()
    assert ranks == [] and loaded.param_groups[0]["seed"] == 3
    cold.param_groups[0]["temperature"] = 0.5
    cold.param_groups[0]["eps"] = 0.1
    for optimizer in (copy.deepcopy(cold), cold):  # a copy made before has yet to ask as well
        optimizer.step()
        optimizer.step()
    copy.deepcopy(cold).step()
    assert len(ranks) == 2
    rounding = fe.LangevinAdam([parameter(5).bfloat16().detach().requires_grad_()], stochastic_rounding=True)
    rounding.param_groups[0]["params"][0].grad = torch.ones(5, dtype=torch.bfloat16)
    rounding.step()
    assert len(ranks) == 3


def sampler(**options):
    particles = torch.arange(12.0).sin().view(6, 2)
    return fe.SVGD(None, particles, scores=torch.neg, **{"optimizer": "sgd", "lr": 0.1, **options})


DRAWING = {
    "independent": dict(noise="independent"),
    "kernel": dict(noise="kernel"),
    "groups": dict(kernel_batch=4),
}


@pytest.mark.parametrize("kind", DRAWING)
def test_svgds_first_draws_are_rank_0s(kind, ranks):
    drawn, given = sampler(**DRAWING[kind]), sampler(**DRAWING[kind], seed=77)
    first = drawn.seed
    for _ in range(2):
        drawn.step()
        given.step()
    assert ranks == [first] and drawn.seed == 77 and bits_equal(drawn.particles, given.particles)
    drawn.seed = 5
    drawn.step()
    assert len(ranks) == 1 and drawn.seed == 5


def test_svgd_asks_only_for_a_seed_that_it_draws_with_and_drew(ranks):
    given = sampler(noise="independent", seed=3)
    loaded, again = sampler(noise="independent"), sampler(noise="independent")
    loaded.load_state_dict(given.state_dict())
    again.load_state_dict(again.state_dict())  # rank 0's own, which the others load too
    for each in (given, loaded, again):
        each.step()
    assert loaded.seed == 3
    for options in ({}, dict(kernel_batch=6), dict(noise="kernel", temperature=0.0)):
        sampler(**options).step()
    assert ranks == []


def test_an_ensembles_noise_is_rank_0s(ranks):
    settings = dict(size=3, optimizer="sgd", lr=0.1, noise="independent")
    for seed, asked in ((3, 0), (None, 1)):
        ensemble = fe.SVGD.from_model(
            torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, seed=seed, **settings
        )
        ensemble.step(torch.ones(4, 2), torch.zeros(4, 1))
        assert len(ranks) == asked and ensemble.seed == (seed or 77)


@pytest.fixture
def nobody(monkeypatch):
    """No optimizers of other tests that are still about."""
    gc.collect()
    monkeypatch.setattr(shared_noise, "_optimizers", type(shared_noise._optimizers)())


def test_one_optimizer_a_parameter_with_one_seed_is_warned_of(nobody):
    first = fe.SGLD([parameter(3)], 0.1, seed=0)
    with pytest.warns(UserWarning, match="SGLD: another optimizer has seed 0 and stream 0 too"):
        second = fe.SGLD([parameter(4)], 0.1, seed=0)
    assert first.param_groups[0]["streams"] == second.param_groups[0]["streams"] == [0]


def test_nothing_is_said_of_noise_that_is_not_shared(nobody):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, q = parameter(3), parameter(4)
        kept = [
            fe.SGLD([p], 0.1, seed=0),
            fe.SGLD([q], 0.1, seed=1),
            fe.SGLD([("q", q)], 0.1, seed=0),
            fe.SGLD([parameter(3)], 0.1, seed=0),  # the same network again, to compare
            fe.LangevinAdam([parameter(5)], seed=0),  # cold
            fe.SGLD([parameter(6)], 0.1),
            fe.SGLD([q, parameter(2)], 0.1, seed=1),  # takes over from that of q alone
        ]
    assert kept


@pytest.mark.parametrize("make", [fe.LangevinAdam, fe.SGLD])
def test_a_compiled_step_takes_every_new_seed(make):
    torch._dynamo.reset()
    p, q = parameter(4), parameter(4)
    compiled, plain = make([p], lr=0.1, **HOT_OF[make], seed=1), make([q], lr=0.1, **HOT_OF[make], seed=1)
    take = torch.compile(compiled.step, backend="eager")
    for seed in (1, 77, 78, 79):
        for optimizer in (compiled, plain):
            optimizer.param_groups[0]["seed"] = seed
        take()
        plain.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [fe.LangevinAdam, fe.SGLD])
def test_a_loaded_seed_is_asked_of_nobody(make, ranks):
    """Rank 0 drew what the checkpoint holds, the others did not: only it would wait in a broadcast."""
    rank_0, other = make([parameter(5)], 0.1, **HOT_OF[make]), make([parameter(5)], 0.1, **HOT_OF[make])
    seed = rank_0.param_groups[0]["seed"]
    saved = rank_0.state_dict()
    for optimizer in (rank_0, other):
        optimizer.load_state_dict(saved)
        optimizer.step()
        optimizer.add_param_group({"params": [parameter(3)]})
        optimizer.step()
        assert [group["seed"] for group in optimizer.param_groups] == [seed, seed]
    assert ranks == []


def test_a_checkpoint_without_seeds_leaves_it_to_rank_0(ranks):
    adam = torch.optim.Adam([parameter(5)])
    adam.step()
    optimizer = fe.LangevinAdam([parameter(5)], **HOT)
    optimizer.load_state_dict(adam.state_dict())
    optimizer.step()
    assert len(ranks) == 1 and optimizer.param_groups[0]["seed"] == 77


NO_GRAPH_TAKES = {
    "64 bits": (
        2**63 + 5,
        r"ValueError: {}: seed must be in \[-2\^63, 2\^63\) in a compiled step; got 9223372036854775813",
    ),
    "numpy": (np.int64(3), "TypeError: {}: seed must be an int in a compiled step; got int64"),
}
REFUSED = pairwise(make=[fe.LangevinAdam, fe.SGLD], before=[(), (7, 8, 9)], what=list(NO_GRAPH_TAKES))


@pytest.mark.parametrize(REFUSED[0]._fields, REFUSED)
def test_a_seed_that_no_graph_takes_is_refused(make, before, what):
    seed, message = NO_GRAPH_TAKES[what]
    torch._dynamo.reset()
    p = parameter(4)
    optimizer = make([p], lr=0.1, **HOT_OF[make], seed=1)
    take = torch.compile(optimizer.step, backend="eager")
    for each in (1, *before):
        optimizer.param_groups[0]["seed"] = each
        take()
    held = p.detach().clone()
    optimizer.param_groups[0]["seed"] = seed
    # torch.compile wraps what is raised while it traces.
    with pytest.raises(Exception, match=message.format(make.__name__)), torch.enable_grad():
        take()
    assert bits_equal(p, held)
