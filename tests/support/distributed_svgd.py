"""What each process does in tests/distributed/test_svgd.py, and what one process alone does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fekernels as fe
from fekernels import distributed
from fekernels._runtime import backends
from fekernels.stein import _doubts
from tests.support.stein import KERNELS, Problem, Row

STEPS = 3


def bounds(n: int, world: int) -> list[int]:
    """Where each rank's rows begin: uneven, of few particles none on some ranks."""
    weights = [1 + (3 * rank + 1) % 4 for rank in range(world)]
    sums = [sum(weights[:rank]) for rank in range(world + 1)]
    return [n * part // sums[-1] for part in sums]


def held(n: int) -> slice:
    begins = bounds(n, dist.get_world_size())
    return slice(begins[dist.get_rank()], begins[dist.get_rank() + 1])


def directions(problems: list[tuple[Row, Problem, str, str, torch.dtype]]) -> list[Tensor]:
    """Of each (row, problem, bandwidth's kind, exchange, dtype) this rank's part of phi and the median."""
    results = []
    for row, problem, kind, exchange, dtype in problems:
        x, s = (t[0].to(dtype) for t in (problem.x, problem.s))
        own = held(len(x))
        h = "median" if kind == "median" else problem.h[0]
        results.append(
            distributed.svgd_direction(
                x[own], s[own], kernel=KERNELS[row.kernel], bandwidth=h, temperature=0.7, exchange=exchange
            )
        )
    return results


# Each pair has one median of all distances, the diagonal's among them, and one of those of pairs.
MEDIANS: tuple[tuple[str | bool, str | bool], ...] = (
    ("liu_wang", "pairs"),
    ("numpyro", "blackjax"),
    (True, False),
)


def medians_of(case: int, world: int) -> tuple[str | bool, str | bool]:
    """By convention or, as a bool, the bare median: two of the six, other ones for the other exchange and world.

    So all six meet every set of particles, every exchange and every world, in a third of the collectives.
    """
    return MEDIANS[(case // 2 + case % 2 + world) % len(MEDIANS)]


def medians(cases: list[tuple[Tensor, str]]) -> list[Tensor]:
    results = []
    for i, (x, exchange) in enumerate(cases):
        own = x[held(len(x))]
        for kind in medians_of(i, dist.get_world_size()):
            bare = isinstance(kind, bool)
            median = distributed.pairwise_sq_dist_median if bare else distributed.median_bandwidth
            results.append(median(own, kind, exchange=exchange))  # type: ignore[operator]
    return results


def scores_of(x: Tensor) -> Tensor:
    """Element by element, so that they have the same bits in any part of the particles."""
    return -x.sin() - 0.3 * x


def start(n: int = 70, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(7))


SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "matern32": {"kernel": "matern32", "optimizer": "adagrad", "bandwidth": lambda step: 1.0 + step},
    "noise": {"noise": "independent", "optimizer": "sgd", "lr": 0.1, "anneal": "tanh", "anneal_steps": 2},
    "imq": {"kernel": KERNELS["imq"], "bandwidth": 0.7, "temperature": 0.5},
    "groups": {"kernel_batch": 16, "bandwidth_scale": 1.5},
    "langevin": {"optimizer": lambda p: fe.LangevinAdam(p, lr=0.05, seed=3, temperature=0.5, eps=0.1)},
    "sgld": {"optimizer": lambda p: fe.SGLD(p, lr=0.05, seed=3)},
}


def run(sampler: fe.SVGD, steps: int = STEPS) -> dict[str, Tensor]:
    result = sampler.run(steps, every=2, progress=False)
    return {"discrepancy": result.discrepancy, "bandwidth": result.bandwidth, **whole(sampler)}


def whole(sampler: fe.SVGD) -> dict[str, Tensor]:
    state = sampler.state_dict()
    moments = state["optimizer"]["state"].get(0, {})
    return {
        "particles": state["particles"],
        **{f"state {key}": value for key, value in moments.items() if isinstance(value, Tensor)},
    }


def sampler(name: str, part: Callable[[Tensor], Tensor], **options: Any) -> fe.SVGD:
    own = part(start())
    # Seeds that nobody gave are rank 0's.
    return fe.SVGD(None, own, scores=scores_of, **{"seed": 5, **SAMPLERS[name], **options})


def networks() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)


def ensemble(size: int, **options: Any) -> fe.stein.SVGDEnsemble:
    return fe.SVGD.from_model(networks, nn.functional.mse_loss, size=size, chunk_size=1, seed=9, **options)


def trained(members: fe.stein.SVGDEnsemble) -> dict[str, Any]:
    for _ in range(STEPS):
        members.step(*batch())
    prediction = members.predict(batch()[0], activation=None)
    state = members.state_dict()
    return {
        "particles": state["particles"], "mean": prediction.mean, "variance": prediction.variance,
        "running": state["target"]["2.running_mean"],
    }  # fmt: skip


def flight(part: Callable[[Tensor], Tensor], **options: Any) -> list[str]:
    """What is said of particles that follow the scores of a loss: looks begin early, as a step of ranks takes long."""
    with mock.patch.object(_doubts, "FIRST", 8), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fe.SVGD(None, part(start(12, 2)), scores=lambda x: x, seed=5, **options).run(
            33, every=0, progress=False
        )
    return [str(each.message) for each in caught if each.category is UserWarning]


def failing(rank: int) -> dict[str, str]:
    """What ranks raise that one of them goes wrong in; each rank's messages."""
    group, last = dist.group.WORLD, dist.get_world_size() - 1
    told: dict[str, str] = {}

    def says(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    def poisoned(x: Tensor) -> Tensor:
        scores = scores_of(x)
        if rank == last:
            scores[-1, 2] = torch.nan
        return scores

    def broken(x: Tensor) -> Tensor:
        if rank == last:
            raise KeyError("no such thing")
        return scores_of(x)

    own = start()[held(70)]
    one = rank == last
    for name, function in (("nan", poisoned), ("raises", broken)):
        each = fe.SVGD(None, own, scores=function, process_group=group)
        before = each.particles.clone()
        says(name, each.step)
        assert torch.equal(each.particles, before) and each.iteration == 0
    whole = fe.SVGD(None, start(), scores=scores_of, optimizer=torch.optim.Adafactor)
    whole.step()
    for name, kind in (("by matrices", torch.optim.Adafactor), ("loads matrices", torch.optim.SGD)):
        each = fe.SVGD(
            None, own, scores=scores_of, process_group=group, optimizer=lambda p, kind=kind: kind(p, lr=0.1)
        )
        saved = whole.state_dict()
        says(
            name,
            each.step
            if name == "by matrices"
            else lambda each=each, saved=saved: each.load_state_dict(saved),
        )
        assert torch.equal(each.particles, own) and each.iteration == 0 and not each.optimizer.state
    says("d", lambda: fe.SVGD(None, own[:, : 4 if one else 5], scores=scores_of, process_group=group))
    says("dtype", lambda: fe.SVGD(None, own.double() if one else own, scores=scores_of, process_group=group))
    says("seed", lambda: fe.SVGD(None, own, scores=scores_of, process_group=group, seed=int(one)))
    says(
        "kernel",
        lambda: fe.SVGD(None, own, scores=scores_of, process_group=group, kernel="imq" if one else "rbf"),
    )
    says(
        "argument", lambda: fe.SVGD(None, own, scores=scores_of, process_group=group, lr="x" if one else 0.1)
    )
    says(
        "noise",
        lambda: fe.SVGD(None, own, scores=scores_of, process_group=group, noise="kernel", optimizer="sgd"),
    )
    says("lr", lambda: fe.SVGD(None, own, scores=scores_of, process_group=group, lr=0.2 if one else 0.1))
    faster = fe.SVGD(None, own, scores=scores_of, process_group=group)
    faster.optimizer.param_groups[0]["lr"] = 0.2 if one else 0.1
    says("rate", faster.step)
    state = faster.state_dict()
    state["particles"][0] += one
    says("state", lambda: faster.load_state_dict(state))
    schedule = fe.SVGD(None, own, scores=scores_of, process_group=group, bandwidth=lambda step: 1.0 + one)
    says("schedule", schedule.step)

    def of_data(x: Tensor, data: Any) -> Tensor:
        return scores_of(x) + data["x"].mean()

    rows = batch()[0]
    learns = fe.SVGD(None, own, scores=of_data, process_group=group)
    learns.step({"x": rows, "at": rank})
    learns.step({"x": rows.flip(0), "at": rank})
    rows[0, 0] += 1e-6 * one  # in place: what was read is read again
    says("batch", lambda: learns.step({"x": rows, "at": rank}))
    says("rows", lambda: learns.run(1, batches=[[{"x": rows[rank::3].numpy()}]], progress=False))
    assert learns.iteration == 2
    idle = fe.SVGD(None, own[: 0 if one else len(own)], scores=of_data, process_group=group)
    idle.step(*(() if one else ({"x": batch()[0]},)))  # that has no particles may have no data
    assert idle.iteration == 1
    says("direction", lambda: distributed.svgd_direction(own, own, temperature=1.0 - 0.5 * one))
    says("scores", lambda: distributed.svgd_direction(own, own[:, :3] if one else own))
    says("convention", lambda: distributed.median_bandwidth(own, "pairs" if one else "liu_wang"))
    says("exchange", lambda: distributed.median_bandwidth(own, exchange="tree"))
    return told


def everything(problems: Any, points: Any, saved: dict[str, Any] | None) -> dict[str, Any]:
    """One launch for a number of ranks: functions, samplers, ensembles, errors, and a state to go on from."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return _everything(problems, points, saved)


def _everything(problems: Any, points: Any, saved: dict[str, Any] | None) -> dict[str, Any]:
    group, rank = dist.group.WORLD, dist.get_rank()
    results: dict[str, Any] = {"directions": directions(problems), "medians": medians(points)}
    with backends.use_backend("reference"):
        results["reference"] = directions(problems[:2])

    def part(x: Tensor) -> Tensor:
        return x[held(len(x))]

    for name in SAMPLERS:
        for exchange in ("all_gather", "ring") if name == "plain" else ("auto",):
            made = sampler(name, part, process_group=group, exchange=exchange)
            results[f"{name} {exchange}"] = run(made)
    torch.manual_seed(100 + rank)
    results["seeds"] = [sampler("noise", part, process_group=group, seed=None).seed]
    results["flight"] = flight(part, process_group=group)
    results["ensemble"] = trained(ensemble(3, process_group=group))
    on_its_way = sampler("noise", part, process_group=group, anneal=None, anneal_steps=None)
    on_its_way.run(2, progress=False)
    results["saved"] = on_its_way.state_dict()
    if saved is not None:
        goes_on = sampler("noise", part, process_group=group, anneal=None, anneal_steps=None)
        goes_on.load_state_dict(saved)
        goes_on.run(2, progress=False)
        results["gone on"] = whole(goes_on)
    if dist.get_world_size() > 1:
        results["errors"] = failing(rank)
    return results
