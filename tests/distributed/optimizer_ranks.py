"""What each of two gloo processes does: trains replicas and FSDP2, agrees on seeds, averages draws."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fekernels as fe

WORLD = 2
STEPS = 4
SWITCHES = dict(lr=0.05, temperature=0.5, eps=0.1, seed=11, prior_precision=0.2, anchor="init")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 7, generator=generator), torch.randn(12, 1, generator=generator)


def train(net: nn.Module, rows: slice) -> fe.LangevinAdam:
    """Real gradients of these rows of the batch."""
    optimizer = fe.LangevinAdam(net.parameters(), **SWITCHES)
    x, y = (t[rows] for t in batch())
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return optimizer


def gradient(shape: tuple[int, ...], i: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.7 + i).sin().view(shape)


def draw_apart(samples: int) -> fe.VariationalAdam:
    """Replicas with draws of their own, each with its own gradient there."""
    param = nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = fe.VariationalAdam([param], 0.05, 30.0, betas=(0.8, 0.9), seed=11, sync=True)
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            param.cosh().sum().backward()
    optimizer.step()
    return optimizer


def starts() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([0.5, -0.5]) + i) for i in range(4)]


def loss_on(rank: int, params: list[Tensor]) -> Tensor:
    """Each rank's has a parameter of its own, the first or the third; both have the second, none the last."""
    return 10 ** (1 + rank) * (params[2 * rank] - 3 * rank).square().sum() + params[1].cosh().sum()


def draw_with_experts(rank: int, infinite: bool) -> Tensor:
    """The parameters, [4, 2], after a step by losses that differ in what they use.

    Args:
        infinite: by GradScaler, which finds an infinity on rank 1 alone, and clipping makes it finite.
    """
    params = starts()
    optimizer = fe.VariationalAdam(params, 0.05, 30.0, betas=(0.8, 0.9), seed=11, sync=True)
    scaler = torch.amp.GradScaler("cpu", enabled=infinite)
    with optimizer.sampled_params(train=True):
        scaler.scale(loss_on(rank, params)).backward()
    if infinite:
        if rank == 1:
            params[2].grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(params, 5.0)
    scaler.step(optimizer)
    return torch.stack(params).detach()


def overflow(rank: int, estimator: str, everywhere: bool) -> tuple[Tensor, float]:
    """The parameters after steps of which the second overflows, on rank 0 alone or on both; and the scale then."""
    params = starts()[:2]
    groups = [{"params": [p]} for p in params]
    optimizer = fe.VariationalAdam(
        groups, 0.05, 30.0, betas=(0.8, 0.9), seed=11, sync=True, estimator=estimator
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(5):
        for draw in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                infinite = i == 1 and draw == 1 and (everywhere or rank == 0)
                # In one group of parameters of two, which are skipped together.
                losses = [(p - rank).cosh().sum() for p in params]
                scaler.scale(losses[0] * (math.inf if infinite else 1) + losses[1]).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(params).detach(), scaler.get_scale()


def uneven(rank: int) -> list[str]:
    """What ranks are told that make different numbers of draws, and whether they can go on with as many."""
    told = []
    for counts in ((1, 2), (0, 1)):
        param = nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = fe.VariationalAdam([param], 0.05, 30.0, seed=11, sync=True)

        def draw(times: int, param: Tensor = param, optimizer: fe.VariationalAdam = optimizer) -> None:
            for _ in range(times):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    param.cosh().sum().backward()

        draw(counts[rank])
        before = param.detach().clone()
        try:
            optimizer.step()
        except RuntimeError as error:
            told.append(str(error))
        assert torch.equal(param, before)
        draw(max(counts) - counts[rank])
        optimizer.step()
        both = [torch.empty_like(param) for _ in range(WORLD)]
        dist.all_gather(both, param.detach())
        assert torch.equal(*both) and not torch.equal(param, before)
    return told


def drifts(rank: int, mesh: Any) -> dict[str, Any]:
    """Optimizers that draw their own seed, on ranks that are seeded apart: do the replicas stay one?"""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    results: dict[str, Any] = {}
    for name, temperature in (("ddp", 0.5), ("ddp, hot later", 0.0), ("fsdp", 0.5), ("one rank alone", 0.0)):
        net = network()
        if name == "fsdp":
            fully_shard(net, mesh=mesh)
        torch.manual_seed(100 + rank)
        if name == "one rank alone" and rank:  # what trains cold is no collective
            continue
        wrapped = DistributedDataParallel(net) if name.startswith("ddp") else net
        optimizer = fe.LangevinAdam(
            [{"params": net[0].parameters()}, {"params": net[2].parameters(), "seed": 3}],
            **{**SWITCHES, "seed": None, "temperature": temperature},
        )
        x, y = batch()
        for i in range(3):
            if name == "ddp, hot later" and i == 1:
                for group in optimizer.param_groups:
                    group["temperature"] = 0.5
            optimizer.zero_grad()
            (wrapped(x) - y).square().mean().backward()
            optimizer.step()
        own = [p.full_tensor() if name == "fsdp" else p for p in net.parameters()]  # type: ignore[operator]
        flat = torch.cat([p.detach().flatten() for p in own])
        seeds = torch.tensor([group["seed"] for group in optimizer.param_groups])
        if name != "one rank alone":
            both, all_seeds = ([torch.empty_like(t) for _ in range(WORLD)] for t in (flat, seeds))
            dist.all_gather(both, flat)
            dist.all_gather(all_seeds, seeds)
            results[name] = (both, all_seeds)
    for name, options in (("svgd", {"noise": "independent"}), ("svgd, groups", {"kernel_batch": 4})):
        torch.manual_seed(100 + rank)
        particles = torch.arange(12.0).sin().view(6, 2)
        sampler = fe.SVGD(None, particles, scores=torch.neg, optimizer="sgd", lr=0.1, **options)  # type: ignore[arg-type]
        for _ in range(2):
            sampler.step()
        seeds = torch.tensor(sampler.seed)
        both, all_seeds = ([torch.empty_like(t) for _ in range(WORLD)] for t in (sampler.particles, seeds))
        dist.all_gather(both, sampler.particles)
        dist.all_gather(all_seeds, seeds)
        results[name] = (both, all_seeds)
    torch.manual_seed(100)
    results["rank 0's"] = int(torch.randint(0, (1 << 63) - 1, ()))
    return results


def anchored(rank: int, wrapped: bool) -> list[Tensor]:
    """Weights, anchors and the anchors saved before the first step, of ranks that begin apart.

    Args:
        wrapped: after the optimizer is built; else models of their own, of which rank 1's alone is trained.
    """
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(rank)
    net: nn.Module = nn.Linear(7, 1)
    optimizer = fe.LangevinAdam(net.parameters(), **SWITCHES)
    params = optimizer.param_groups[0]["params"]
    model = DistributedDataParallel(net) if wrapped else net
    saved = [state["anchor"] for state in optimizer.state_dict()["state"].values()]
    x, y = batch()
    for _ in range(STEPS if wrapped or rank else 0):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    kept = [optimizer.state[p]["anchor"] for p in params if p in optimizer.state]
    return [
        torch.cat([t.detach().flatten() for t in each]) if each else torch.zeros(0)
        for each in (params, kept, saved)
    ]


def undecided(rank: int) -> dict[str, list[Any]]:
    """Replicas that go on from checkpoints of each rank's own, saved before the first noise: weights and seeds."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found: dict[str, list[Any]] = {}
    for name, kind in (
        ("LangevinAdam", fe.LangevinAdam),
        ("SGLD", fe.SGLD),
        ("VariationalAdam", fe.VariationalAdam),
        ("ZeRO", fe.LangevinAdam),
        ("agreed", fe.LangevinAdam),
    ):
        saved: Any = None
        for start in (100, 200):
            params = starts()
            torch.manual_seed(start + rank)
            options: dict[str, Any] = {"lr": 0.01}
            if kind is fe.VariationalAdam:
                optimizer: Any = kind(params, ess=30.0, **options)
            elif name == "ZeRO":
                made = fe.distributed.streams_of(kind, params)
                optimizer = ZeroRedundancyOptimizer(params, optimizer_class=made, temperature=0.0, **options)
            else:
                groups = [{"params": params[:2]}, {"params": params[2:], "seed": 3}]
                optimizer = kind(groups, temperature=0.0, **options)
            if saved is not None:
                optimizer.load_state_dict(saved)
            hot = saved is not None or name == "agreed"
            for _ in range(2):
                if kind is fe.VariationalAdam and not hot:
                    break
                for group in optimizer.param_groups:
                    group["temperature"] = 0.1 if hot else 0.0
                if kind is fe.VariationalAdam:
                    with optimizer.sampled_params(train=True):
                        sum(p.cosh().sum() for p in params).backward()  # type: ignore[union-attr]
                for p in params:
                    p.grad = p.detach().clone()
                optimizer.step()
            if saved is None:
                if name == "ZeRO":
                    optimizer.consolidate_state_dict(0)
                    box = [optimizer.state_dict() if rank == 0 else None]
                    dist.broadcast_object_list(box)
                    saved = box[0]
                else:
                    saved = optimizer.state_dict()
                seeds = [group["seed"] for group in saved["param_groups"]]
        found[name] = [torch.stack(params).detach(), seeds, [g["seed"] for g in optimizer.param_groups]]
    saved = None
    for start in (100, 200):
        torch.manual_seed(start + rank)
        sampler = fe.SVGD(
            None, torch.ones(3, 2), scores=torch.neg, optimizer="sgd", lr=0.1, noise="independent"
        )
        if saved is not None:
            sampler.load_state_dict(saved)
            sampler.step()
        saved = saved or sampler.state_dict()
    found["SVGD"] = [sampler.particles, [saved["seed"]], [sampler.seed]]
    return found


def run() -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    results: dict[str, Any] = {}
    rank = dist.get_rank()
    rows = slice(rank * 6, rank * 6 + 6)
    mesh = init_device_mesh("cpu", (WORLD,))

    net = network()
    train(DistributedDataParallel(net), rows)
    results["ddp"] = [p.detach() for p in net.parameters()]

    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = train(net, rows)
    results["fsdp"] = [p.full_tensor().detach() for p in net.parameters()]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Rank 0's.
    results["fsdp_states"] = get_optimizer_state_dict(net, optimizer, options=options).get("state")

    results["seeds"] = drifts(rank, mesh)
    for wrapped in (True, False):
        every: list[Any] = [None] * WORLD
        dist.all_gather_object(every, anchored(rank, wrapped))
        results[f"anchored, wrapped {wrapped}"] = every

    for samples in (1, 2):
        optimizer = draw_apart(samples)
        (p,) = optimizer.param_groups[0]["params"]
        mine = torch.stack([p.detach(), optimizer.state[p]["hessian"]])
        both = [torch.empty_like(mine) for _ in range(WORLD)]
        dist.all_gather(both, mine)
        results[f"sync-{samples}"] = both
    for infinite in (False, True):
        mine = draw_with_experts(rank, infinite)
        both = [torch.empty_like(mine) for _ in range(WORLD)]
        dist.all_gather(both, mine)
        results[f"experts, infinite {infinite}"] = both
    for estimator in ("natural", "reparam"):
        for everywhere in (False, True):
            results[f"overflow, {estimator}, {everywhere}"] = overflow(rank, estimator, everywhere)
    results["uneven"] = uneven(rank)
    results["undecided"] = undecided(rank)
    return results
