"""fekernels.distributed.cost: its bytes are those of real processes, and its sums are right by hand."""

from __future__ import annotations

import pytest
import torch

import fekernels as fe
from fekernels.distributed import cost
from tests.distributed import cost_ranks
from tests.support.processes import run_processes

CASES = [("ddp", 2, 8), ("ddp", 4, 8), ("fsdp", 1, 8), ("fsdp", 2, 8), ("fsdp", 4, 8), ("hsdp", 4, 2)]
PARTICLES = [
    (exchange, world, n, d)
    for exchange in ("all_gather", "ring")
    for world in (2, 4)
    for n, d in ((1000, 16), (2600, 6), (4000, 3))
]
NAMES = {"all-gather, forward": "allgather", "all-gather, backward": "allgather"}
NAMES |= {"reduce-scatter": "reduce_scatter", "all-reduce": "allreduce"}


def check_particles(case: tuple[str, int, int, int], results: list[dict[tuple[object, ...], object]]) -> None:
    """A ring sends sums of columns beside, float64, from rank to rank and then to all, and gathers the rows' norms."""
    exchange, world, n, d = case
    plan = cost.particles(n, d, world, exchange=exchange)
    matrix = 4 * n * d
    handed = []
    for rank in range(world):
        seen = results[rank][case]
        sends = seen.get("send", [])
        if exchange == "ring" and 8 * d in sends:
            sends.remove(8 * d)
        handed.append(sum(sends))
        gathered = [size for size in seen.get("allgather", []) if size >= matrix]
        assert gathered == ([matrix] * 2 if exchange == "all_gather" else []), case
        assert len(seen["alltoall"]) == (1 if exchange == "all_gather" else 3)
    assert max(handed) == plan.sent["handed on"], case
    if exchange == "all_gather":
        assert plan.sent["gathered"] == 2 * matrix * (world - 1) / world


def test_collectives_are_those_of_real_processes() -> None:
    results = run_processes(cost_ranks.run, 4, CASES, PARTICLES)
    for case in PARTICLES:
        check_particles(case, results)
    parameters = cost_ranks.LAYERS * cost_ranks.WIDTH**2
    for case in CASES:
        sharding, world, node = case
        plan = cost.training(
            parameters, world, sharding=sharding, layers=cost_ranks.LAYERS, gathered_bytes=4,
            hardware=cost.Hardware(node=node),
        )  # fmt: skip
        wanted: dict[str, float] = {}
        for name, (size, _) in plan.collectives.items():
            wanted[NAMES[name]] = wanted.get(NAMES[name], 0) + size
        for rank in range(world):
            training, own = results[rank][case]
            assert {name: sum(sizes) for name, sizes in training.items()} == wanted, case
            assert own == {}, "an optimizer sends nothing: its noise is made where it is used"


@pytest.mark.parametrize("name", cost.OPTIMIZERS)
def test_states_are_those_of_the_optimizers(name: str) -> None:
    given = {"prior_precision": 1.0, "anchor": "init"} if "anchor" in name else {}
    makers = {
        "Adam": torch.optim.Adam,
        "SGLD": lambda p: fe.SGLD(p, lr=0.1),
        "VariationalAdam": lambda p: fe.VariationalAdam(p, lr=0.1, ess=10),
    }
    make = makers.get(name, lambda p: fe.LangevinAdam(p, **given))
    kind, numel = cost.OPTIMIZERS[name], 1000
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16 if "bfloat16" in name else None))
    optimizer = make([param])
    param.grad = torch.ones_like(param)
    if name == "VariationalAdam":
        with optimizer.sampled_params(train=True):
            pass
    optimizer.step()
    states = [
        s for s in optimizer.state[param].values() if isinstance(s, torch.Tensor) and s.numel() == numel
    ]
    assert sum(s.numel() * s.element_size() for s in states) == kind.states * numel
    assert param.element_size() == kind.parameter


def test_bytes_seconds_and_memory_by_hand() -> None:
    machine = cost.Hardware(
        memory_bandwidth=1e3, matrix_flops=1e4, node=2, node_bandwidth=100.0, network_bandwidth=10.0,
        latency=0.0, attained=0.5,
    )  # fmt: skip
    plan = cost.training(1000, 4, sharding="hsdp", layers=10, tokens=1, hardware=machine)
    # Within nodes of 2: two gathers of 2,000 bytes and a reduce-scatter of 4,000, of which a half is sent each. Between
    # the two: 2,000 bytes of a shard's gradients, of which a half is sent twice.
    assert plan.sent == {
        "all-gather, forward": 1000, "all-gather, backward": 1000, "reduce-scatter": 2000, "all-reduce": 2000
    }  # fmt: skip
    assert plan.communication == 4000 / 100 + 2000 / 10
    assert plan.compute == 6000 / 5000 and plan.optimizer == 28 * 500 / 1e3
    assert plan.seconds == pytest.approx(plan.communication + plan.compute / 10 + plan.optimizer)
    assert plan.memory == {
        "parameters": 2000, "gradients": 2000, "optimizer states": 4000, "gathered layers": 800
    }  # fmt: skip
    alone = cost.training(1000, 1, sharding="ddp", tokens=1, hardware=machine)
    assert alone.sent == {} and alone.communication == 0 and sum(alone.memory.values()) == 16_000


def test_all_adapters_of_a_node_send_at_once() -> None:
    """By hand, of 2 x 2 devices: 4,000 bytes of gradients, of which 3/4 go around twice."""
    shared = {"node": 2, "latency": 0.0, "matrix_flops": 1e4, "network_bandwidth": 10.0}

    def sending(**machine: float) -> float:
        hardware = cost.Hardware(**{**shared, **machine})  # type: ignore[arg-type]
        return cost.training(1000, 4, sharding="ddp", layers=1, tokens=1, hardware=hardware).communication

    assert sending(node_bandwidth=100.0) == 6000 / 20
    assert sending(node_bandwidth=100.0, adapters=1) == 6000 / 10
    assert sending(node_bandwidth=15.0) == 6000 / 15, "the slower of both, which go on at the same time"
    # Rings make six messages one after the other, trees two within and two between nodes, but of all bytes twice.
    assert sending(node_bandwidth=100.0, latency=1.0) == 6000 / 20 + 6
    assert sending(node_bandwidth=100.0, latency=60.0) == 8000 / 20 + 4 * 60
    hybrid = cost.training(
        1000,
        4,
        sharding="hsdp",
        tokens=1,
        layers=1,
        hardware=cost.Hardware(**shared, adapters=1, node_bandwidth=1e9),  # type: ignore[arg-type]
    )
    assert hybrid.communication == pytest.approx(2000 / 5), "two devices' rings share an adapter"


def test_a_node_of_eight_adapters() -> None:
    """7B on 64 H200: what leaves a node is 55 GB through 400 GB/s, .14 s, and the messages of trees, 6 ms."""
    plan = cost.training(7e9, 64, sharding="ddp")
    assert plan.communication == pytest.approx(2 * 28e9 / 400e9 + 32 * 2 * (7 + 3) * 1e-5)
    gathered = cost.particles(1_000_000, 64, 64)
    assert gathered.communication == pytest.approx(504e6 / 400e9 + 63e-5)


def test_what_stays_constant() -> None:
    plans = [cost.training(7e9, devices, sharding="hsdp") for devices in (64, 1024)]
    assert plans[0].memory == plans[1].memory
    assert sum(plans[1].sent.values()) < 1.02 * sum(plans[0].sent.values())
    few, many = (cost.training(7e9, devices, sharding="fsdp") for devices in (64, 1024))
    assert many.optimizer == few.optimizer / 16


def test_particles_by_hand() -> None:
    machine = cost.Hardware(float32_flops=1e6, attained=1.0, node=1, network_bandwidth=1e4, latency=0.5)
    rows = cost.particles(1000, 10, 4, hardware=machine)
    assert rows.sent == {"gathered": 60_000} and rows.held == 80_000
    assert rows.flops == 1e7 and rows.compute == 10 and rows.communication == 6 + 3 * 0.5
    assert rows.seconds == 17.5
    alone = cost.particles(1000, 10, 1, hardware=machine)
    assert alone.sent == {} and alone.communication == 0 and alone.seconds == 40


def test_the_ring_sends_more_and_holds_less() -> None:
    n, d, world = 20_000, 64, 8
    gather, ring = (cost.particles(n, d, world, exchange=exchange) for exchange in ("all_gather", "ring"))
    matrix = 4 * n * d
    assert gather.flops == ring.flops == 3 * n * n * d / world
    # Of 79 groups of 256 particles each rank hands on two in each round but the last; their 78 are 19,968 particles.
    assert gather.sent["handed on"] == pytest.approx(2 * matrix * (1 + 17 / d), rel=0.01)
    assert ring.sent["handed on"] == pytest.approx(2 * matrix * (4 + 18 / d), rel=0.01)
    # Ten of the groups lie at a rank's five tables, and two come.
    assert gather.held == 6 * matrix and ring.held == pytest.approx((2 / world + 4 * 12 / 79) * matrix)
    slow = cost.Hardware(node_bandwidth=1e9, network_bandwidth=1e9, latency=0.0)
    even = 11 * world * slow.float32_flops * slow.attained / slow.network_bandwidth
    for n, ahead in ((int(even / 10), False), (int(even), True)):
        gather, ring = (
            cost.particles(n, d, world, exchange=exchange, hardware=slow)
            for exchange in ("all_gather", "ring")
        )
        assert (ring.seconds < gather.seconds) == ahead


def test_samples_on_disk() -> None:
    assert cost.samples_on_disk(7e9, 30, parameter_bytes=2) == 420e9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.training(0, 8), "cost.training: parameters must be"),
        (lambda: cost.training(1e9, 0), "cost.training: devices must be"),
        (lambda: cost.training(1e9, 8, sharding="zero"), "cost.training: sharding must be"),
        (lambda: cost.training(1e9, 8, optimizer="Lion"), "cost.training: optimizer must be"),
        (lambda: cost.training(1e9, 12, sharding="hsdp"), "must fill whole nodes of 8 with 'hsdp'; got 12"),
        (lambda: cost.particles(10, 2, 2, exchange="tree"), "cost.particles: exchange must be"),
        (lambda: cost.samples_on_disk(1e9, -1), "cost.samples_on_disk: samples must be"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
