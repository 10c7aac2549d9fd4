"""What each of three gloo processes does under ZeRO: freezes, saves for one process, and loads what one has saved."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fekernels as fe
from tests.distributed.optimizer_ranks import SWITCHES, gradient, network

CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LangevinAdam": (fe.LangevinAdam, SWITCHES),
    "SGLD": (fe.SGLD, {key: value for key, value in SWITCHES.items() if key != "eps"}),
}


def alone(name: str, **changes: Any) -> tuple[nn.Module, Any]:
    kind, switches = CHOICES[name]
    net = network()
    return net, kind(net.parameters(), **{**switches, **changes})


def of_ranks(name: str, **changes: Any) -> tuple[nn.Module, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    kind, switches = CHOICES[name]
    net = network()
    torch.manual_seed(100 + dist.get_rank())  # what each would draw is another's
    streams = fe.distributed.streams_of(kind, net.parameters())
    switches = {**switches, **changes}
    return net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=streams, **switches)


def go_on(net: nn.Module, optimizer: Any, first: int, count: int = 3) -> None:
    """By given gradients, the same on every rank."""
    for i in range(first, first + count):
        for p in net.parameters():
            p.grad = gradient(tuple(p.shape), i) + p.detach()
        optimizer.step()


def gathered(optimizer: Any) -> Any:
    """The checkpoint of rank 0, on every rank."""
    optimizer.consolidate_state_dict(0)
    box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return copy.deepcopy(box[0])


def same_weights(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def changes_its_number_of_ranks(name: str) -> None:
    net, zero = of_ranks(name)
    one, single = alone(name)
    go_on(net, zero, 0)
    go_on(one, single, 0)
    saved = gathered(zero)
    assert saved["param_groups"][0]["streams"] == single.param_groups[0]["streams"]
    resumed, loaded = alone(name, seed=99)
    resumed.load_state_dict(net.state_dict())
    loaded.load_state_dict(saved)
    back, others = of_ranks(name, seed=98)
    back.load_state_dict(one.state_dict())
    others.load_state_dict(copy.deepcopy(single.state_dict()))
    for each, optimizer in ((net, zero), (one, single), (resumed, loaded), (back, others)):
        go_on(each, optimizer, 3)
    assert all(same_weights(one, each) for each in (net, resumed, back))


def stays_frozen() -> None:
    """Also where the very next call is a checkpoint; and adapts again from where it was."""
    for steps in (0, 2):
        net, zero = of_ranks("LangevinAdam")
        one, single = alone("LangevinAdam")
        go_on(net, zero, 0)
        go_on(one, single, 0)
        zero.optim.freeze_preconditioner()
        single.freeze_preconditioner()
        go_on(net, zero, 3, steps)
        go_on(one, single, 3, steps)
        saved = gathered(zero)
        assert saved["param_groups"][0]["frozen"] is True
        resumed, loaded = of_ranks("LangevinAdam")
        resumed.load_state_dict(net.state_dict())
        loaded.load_state_dict(saved)
        for each, optimizer in ((net, zero), (one, single), (resumed, loaded)):
            go_on(each, optimizer, 5)
            inner = getattr(optimizer, "optim", optimizer)
            assert optimizer.param_groups[0]["frozen"] and inner.param_groups[0]["frozen"]
            inner.freeze_preconditioner(False)
            go_on(each, optimizer, 8)
        assert same_weights(one, net) and same_weights(one, resumed)


def loads_a_seed_that_one_rank_has_drawn() -> None:
    """As it is seeded alike again: that rank must not ask the others for their seed."""
    net, zero = of_ranks("SGLD", seed=None)
    go_on(net, zero, 0)
    saved = gathered(zero)
    resumed, loaded = of_ranks("SGLD", seed=None)
    resumed.load_state_dict(net.state_dict())
    loaded.load_state_dict(saved)
    go_on(net, zero, 3)
    go_on(resumed, loaded, 3)
    assert same_weights(net, resumed)


def loads_cold_without_streams() -> None:
    """Ranks have parts of different lengths, and rank 0's groups are every rank's."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    switches = {**SWITCHES, "temperature": 0.0}
    nets, zeros = [network(), network()], []
    for net in nets:
        zeros.append(ZeroRedundancyOptimizer(net.parameters(), optimizer_class=fe.LangevinAdam, **switches))
    go_on(nets[0], zeros[0], 0)
    saved = gathered(zeros[0])
    nets.append(network())
    alone = fe.LangevinAdam(nets[2].parameters(), **switches)
    for net, optimizer in ((nets[1], zeros[1]), (nets[2], alone)):
        net.load_state_dict(nets[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(saved))
    for net, optimizer in zip(nets, (*zeros, alone), strict=True):
        go_on(net, optimizer, 3)
    assert same_weights(nets[0], nets[1]) and same_weights(nets[0], nets[2])


def schedules_the_whole() -> str:
    _, zero = of_ranks("SGLD")
    fe.optim.CosineTemperature(zero, 10)
    try:
        fe.optim.CosineTemperature(zero.optim, 10)
    except ValueError as error:
        return str(error)
    return ""


def run() -> dict[str, Any]:
    for name in CHOICES:
        changes_its_number_of_ranks(name)
    stays_frozen()
    loads_a_seed_that_one_rank_has_drawn()
    loads_cold_without_streams()
    return {"schedule": schedules_the_whole()}
