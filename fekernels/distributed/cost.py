"""What a step costs on many devices: bytes sent, arithmetic, memory and, by the data sheets, seconds.

A model to plan with. Its bytes are exact: they are what collectives of real processes are seen to take
(tests/distributed/test_cost.py). Its seconds follow from a `Hardware`, whose numbers are vendors', and are measured
nowhere. Noise is in none of the formulas of communication: it is made where it is used, from counters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fekernels._checks import integer, number, one_of

__all__ = [
    "EXCHANGES",
    "H200",
    "OPTIMIZERS",
    "SHARDINGS",
    "Hardware",
    "OptimizerBytes",
    "ParticleCost",
    "TrainingCost",
    "particles",
    "samples_on_disk",
    "training",
]


@dataclass(frozen=True)
class Hardware:
    """A device and its links. The defaults are an NVIDIA H200 in nodes of eight with a 400 Gb/s adapter a GPU.

    Attributes:
        memory: bytes.
        memory_bandwidth: bytes a second.
        matrix_flops: a second, of the training's matrix products, dense bfloat16.
        float32_flops: a second, of products at float32's accuracy: a third of dense TF32, which takes three of them.
        node: devices in a node.
        node_bandwidth: bytes a second that a device sends within a node: half of the data sheet's both ways.
        network_bandwidth: bytes a second that one adapter sends to another node.
        latency: seconds of one message, an assumption.
        attained: share of ``matrix_flops`` and ``float32_flops`` that programs reach, an assumption.
        adapters: of a node, all of which its devices' collectives use at once; None is one a device.

    Collectives go as NCCL's do: in as many rings as a node has adapters, each of a share of the bytes, which visits all
    devices of a node and leaves it by an adapter of its own. What a device sends around one ring of all bytes therefore
    leaves a node through all adapters together, while it passes within: the slower of both counts. An all-reduce takes
    rings or double binary trees (twice the bytes whatever the ranks; a chain within a node, a tree over nodes),
    whichever is faster; all others are rings.

    Sources: NVIDIA H200 data sheet (141 GB, 4.8 TB/s, BFLOAT16 1,979 and TF32 989 teraflops with sparsity, half of each
    without, NVLink 900 GB/s); NVIDIA DGX H200 data sheet (8 GPUs, ConnectX-7 of 400 Gb/s for each); Jeaugey 2019,
    "Massively scale your deep learning training with NCCL 2.4" (rings, double binary trees).
    """

    memory: float = 141e9
    memory_bandwidth: float = 4.8e12
    matrix_flops: float = 989e12
    float32_flops: float = 494e12 / 3
    node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    latency: float = 1e-5
    attained: float = 0.4
    adapters: int | None = None

    @property
    def _node_network(self) -> float:
        """Bytes a second that leave a node."""
        return self.network_bandwidth * (self.node if self.adapters is None else self.adapters)

    def link(self, ranks: int, apart: bool = False) -> float:
        """Bytes a second around rings of ranks, by what a device sends; ``apart``: one of them a node.

        Of ranks that are one a node, each node's other devices have rings of their own at the same time.
        """
        if apart:
            return self._node_network / self.node
        if ranks <= self.node:
            return self.node_bandwidth
        return self._node_network if self.node == 1 else min(self.node_bandwidth, self._node_network)

    def neighbours(self, ranks: int) -> float:
        """Bytes a second from a rank to both of its neighbours, of which one may be in another node."""
        if ranks <= self.node:
            return self.node_bandwidth
        own = self._node_network / self.node
        return own if self.node == 1 else min(self.node_bandwidth, 2 * own)

    def seconds(
        self, collective: str, size: float, ranks: int, messages: int = 1, apart: bool = False
    ) -> float:
        """Of ``collective`` over ranks, of tensors of so many bytes altogether, so many of them."""
        link, rounds = self.link(ranks, apart), _rounds(collective)
        ring = rounds * (ranks - 1) * (size / ranks / link + messages * self.latency)
        if collective != "all-reduce":
            return ring
        within = 1 if apart else min(ranks, self.node)
        depth = within - 1 + math.ceil(math.log2(math.ceil(ranks / within)))
        return min(ring, rounds * (size / link + messages * depth * self.latency))


H200 = Hardware()


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes a parameter: of itself, of its states, and moved through memory by a step."""

    parameter: int
    states: int
    moved: int


# As docs/langevin_adam.md and docs/variational_adam.md have them.
OPTIMIZERS: Mapping[str, OptimizerBytes] = {
    "Adam": OptimizerBytes(4, 8, 28),
    "LangevinAdam": OptimizerBytes(4, 8, 28),
    "LangevinAdam, anchor": OptimizerBytes(4, 12, 32),
    "LangevinAdam, frozen": OptimizerBytes(4, 8, 24),
    "LangevinAdam, bfloat16": OptimizerBytes(2, 4, 14),
    "SGLD": OptimizerBytes(4, 0, 12),
    "VariationalAdam": OptimizerBytes(4, 12, 16 + 8 + 28),
}
SHARDINGS = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class TrainingCost:
    """Of one training step, on each device.

    Attributes:
        sent: bytes that a device sends, by collective, if each goes around a ring.
        collectives: bytes of the whole tensors that the collectives are of, and ranks of each, by the same names.
        flops: of forward and backward pass.
        memory: bytes held, by what they hold. Activations are the model's own, and not among them.
        compute, communication, optimizer: seconds that each takes by itself.
        seconds: of the step: communication hides behind arithmetic but for a layer's, the optimizer behind nothing.
    """

    sent: dict[str, float]
    collectives: dict[str, tuple[float, int]]
    flops: float
    memory: dict[str, float]
    compute: float
    communication: float
    optimizer: float
    seconds: float


def training(
    parameters: float,
    devices: int,
    *,
    sharding: str = "fsdp",
    optimizer: str = "LangevinAdam",
    layers: int = 32,
    tokens: float = 8192,
    gathered_bytes: float = 2,
    reduced_bytes: float = 4,
    hardware: Hardware = H200,
) -> TrainingCost:
    """One step of a transformer on ``devices`` devices.

    With N parameters, G of them a device group that shards (all devices, or a node's for "hsdp"), a ring sends

    * "ddp": an all-reduce of the gradients, 2 (P - 1) / P of their bytes;
    * "fsdp" (FSDP2, resharding after the forward pass): two all-gathers of the parameters, (G - 1) / G of their bytes
      each, and a reduce-scatter of the gradients, as much of theirs;
    * "hsdp": the same within a node, and an all-reduce between nodes of the gradients of a shard.

    Args:
        parameters: how many.
        devices: how many.
        sharding: "ddp", "fsdp" or "hsdp".
        optimizer: a key of ``OPTIMIZERS``.
        layers: equal units that FSDP2 gathers; two are whole at once.
        tokens: of a device and step: 6 flops a parameter and token, forward and backward (Kaplan et al. 2020).
        gathered_bytes: a parameter as it is gathered, FSDP2's ``param_dtype``: bfloat16.
        reduced_bytes: a gradient as it is summed, FSDP2's ``reduce_dtype``: float32. DDP's too.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    function = "cost.training"
    count = number(function, "parameters", parameters, above=0.0)
    world = integer(function, "devices", devices, 1)
    one_of(function, "sharding", sharding, SHARDINGS)
    one_of(function, "optimizer", optimizer, tuple(OPTIMIZERS))
    kind = OPTIMIZERS[optimizer]
    shard = {"ddp": 1, "fsdp": world, "hsdp": min(world, hardware.node)}[sharding]
    if sharding == "hsdp" and world % shard:
        raise ValueError(
            f"{function}: devices must fill whole nodes of {hardware.node} with 'hsdp'; got {world}"
        )
    replicas = world // shard
    weights, gradients = count * gathered_bytes, count * reduced_bytes
    collectives: dict[str, tuple[float, int]] = {}
    if shard > 1:
        collectives["all-gather, forward"] = weights, shard
        collectives["all-gather, backward"] = weights, shard
        collectives["reduce-scatter"] = gradients, shard
    if replicas > 1:
        collectives["all-reduce"] = gradients / shard, replicas
    sent = {name: _rounds(name) * size * (ranks - 1) / ranks for name, (size, ranks) in collectives.items()}
    seconds = {
        name: hardware.seconds(name, size, ranks, layers, apart=shard > 1 and name == "all-reduce")
        for name, (size, ranks) in collectives.items()
    }
    flops = 6 * count * tokens
    compute = flops / (hardware.matrix_flops * hardware.attained)
    communication = sum(seconds.values())
    step = kind.moved * count / shard / hardware.memory_bandwidth
    # Of each pass one layer's collective has nothing to hide behind.
    exposed = max(communication - compute, 0.0) + min(communication, compute) / layers
    memory = {
        "parameters": kind.parameter * count / shard,
        "gradients": kind.parameter * count / shard,
        "optimizer states": kind.states * count / shard,
    }
    if sharding == "ddp" and world > 1:
        memory["buckets of gradients"] = reduced_bytes * count
    if shard > 1:
        memory["gathered layers"] = (2 * gathered_bytes + reduced_bytes) * count / layers
    return TrainingCost(
        sent, collectives, flops, memory, compute, communication, step, compute + exposed + step
    )


def _rounds(collective: str) -> int:
    """How often a ring sends (ranks - 1) / ranks of a tensor: an all-reduce is a reduce-scatter and an all-gather."""
    return 2 if collective == "all-reduce" else 1


@dataclass(frozen=True)
class ParticleCost:
    """Of one Stein direction, on each device.

    Attributes:
        sent: bytes by the busiest device: "gathered" as a ring sends them, before anything is computed; "handed on" to
            neighbours, meanwhile; "totals" afterwards.
        held: bytes of particles, scores and what is made of them.
        flops: of inner products and weighted sums.
        compute, communication: seconds that each takes by itself.
        seconds: of the direction.
    """

    sent: dict[str, float]
    held: float
    flops: float
    compute: float
    communication: float
    seconds: float


EXCHANGES = ("rows", "all_gather", "ring")


def particles(
    n: int, d: int, devices: int, *, exchange: str = "rows", hardware: Hardware = H200
) -> ParticleCost:
    """The Stein direction of n float32 particles in d dimensions, n / P of them on each of P devices.

    Of M = 4 n d bytes, a matrix of all particles, a device

    * by "rows", a GPU's way, gathers particles and scores, 2 M (P - 1) / P, and computes the directions of its own
      particles, 4 n^2 d / P flops;
    * by "all_gather", a CPU's, gathers as much, and computes each pair once, for both, 3 n^2 d / P flops, in the order
      of one process. For that it hands sums on to its neighbours over the rounds of a tournament,
      about 2 M (1 + 17 / d), while it computes others. M / P of totals go home;
    * by "ring", a CPU's, hands on particles and scores beside the sums, about 2 M (4 + 17 / d). Before, they go to
      where the tournament begins, 2 M / P. It holds 6 M / P, not 6 M, and up to 2 M / P that are on their way.

    The ring sends more, always. It takes less time where arithmetic hides what is handed on, from n of about 11 P F / B
    on at F flops and B bytes a second: "all_gather" then still waits for what it gathers.

    What is handed on is counted by the tournament itself, for particles that take one (not n <= 512 with d >= 2,048)
    and the kernel "rbf". The C++ kernels must be there to say how long a record is.

    Args:
        n, d, devices: how many.
        exchange: "rows", "all_gather" or "ring".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    function = "cost.particles"
    n, d = integer(function, "n", n, 1), integer(function, "d", d, 1)
    world = integer(function, "devices", devices, 1)
    one_of(function, "exchange", exchange, EXCHANGES)
    matrix, others = 4.0 * n * d, (world - 1) / world
    sent = {} if world == 1 else {"gathered": 2 * matrix * others}
    held, flops = 2 * matrix, 4.0 * n * n * d / world
    if exchange != "rows":
        held, flops = 6 * matrix, 3.0 * n * n * d / world
        if world > 1:
            sent["handed on"], share = _tournament(n, d, world, exchange == "ring")
            if exchange == "ring":
                held = 2 * matrix / world + 4 * matrix * share
            sent["totals"] = matrix / world
            if exchange == "ring":
                sent["gathered"] = 2 * matrix / world
    compute = flops / (hardware.float32_flops * hardware.attained)
    # Particles that go to one other rank each, and totals, leave a node by their device's own adapter.
    own = hardware.link(world, apart=world > hardware.node)
    gathering = own if exchange == "ring" else hardware.link(world)
    ahead = (
        sent.get("gathered", 0.0) / gathering + sent.get("totals", 0.0) / own + (world - 1) * hardware.latency
    )
    meanwhile = sent.get("handed on", 0.0) / hardware.neighbours(world)
    return ParticleCost(sent, held, flops, compute, ahead + meanwhile, ahead + max(compute, meanwhile))


def _tournament(n: int, d: int, world: int, rings: bool) -> tuple[float, float]:
    """Bytes that the busiest rank hands on, records of sums or of all; and the most of the records that one holds."""
    from fekernels.distributed._records import SMALL, WIDE, layout, tournament

    found = layout(n, d, 0, False)
    if found.algorithm in (SMALL, WIDE):
        return 0.0, 1 / world
    games = tournament(n, found, world, rings)
    handed, most = games.busiest()
    record = 4 * found.group * (found.sums + (found.fixed if rings else 0))
    return float(record * handed), most / games.groups


def samples_on_disk(parameters: float, samples: int, *, parameter_bytes: float = 4) -> float:
    """Bytes of a `PosteriorSamples` directory, on any number of devices: every sample is written once."""
    function = "cost.samples_on_disk"
    count = number(function, "parameters", parameters, above=0.0)
    return count * parameter_bytes * integer(function, "samples", samples, 0)
