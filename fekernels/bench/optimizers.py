"""The cases of ``python -m fekernels bench``: the contestants, what is compared with what, and the ratio to reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from fekernels._backends import native_op
from fekernels.bench.timing import Contestant
from fekernels.optim import SGLD, LangevinAdam

__all__ = ["ADAM", "COPY", "Group", "Row", "Sizes", "groups"]

ADAM = "Adam(fused=True)"
ADAM_WITH_NOISE = "Adam(fused=True) + randn_like + add_"
PLAIN_SGLD = "add_(g).add_(randn_like)"
COPY = "copy"

LR = 1e-3
TEMPERATURE = 1e-4
NOISE_SIZE = math.sqrt(2 * TEMPERATURE * LR)

# Bytes a parameter that no step can avoid to move: each tensor read and written once.
ADAM_BYTES, BF16_BYTES, SGLD_BYTES = 28, 14, 12


@dataclass(frozen=True)
class Sizes:
    """How many elements the cases have, and how long each group of cases is timed."""

    large: int = 25_600_000
    cached: int = 640_000
    tensors: int = 200
    small: tuple[int, ...] = (1_000, 10_000)
    rounds: int = 15
    seconds: float = 7.0
    turn_seconds: float = 0.01


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ours`` over ``peer``, both names of contestants of the group."""

    case: str
    peer: str
    ours: str
    reach: float | None  # None: no goal names this row
    bytes_per_element: int  # 0: memory is not the limit
    missing: str = ""  # why this row cannot be measured here


@dataclass(frozen=True)
class Group:
    """Contestants timed in the same rounds, and the rows that compare them."""

    elements: int
    contestants: list[Contestant]
    rows: list[Row]
    turn_seconds: float = 0.0
    copied: int = 0  # elements that the contestant COPY copies, if other than ``elements``
    rounds: int = 0  # where a contestant takes so long that it gets these and no more


def groups(sizes: Sizes) -> list[Callable[[], Group]]:
    """One maker a group: its tensors exist from the call on, so that no two groups need memory at a time."""
    return [
        partial(_large, sizes),
        partial(_cached, sizes),
        *(partial(_many, sizes, numel) for numel in sizes.small),
        partial(_sgld, sizes),
        partial(_bf16, sizes),
    ]


def values(count: int, numel: int, seed: int) -> list[Tensor]:
    """Standard normal tensors: never zeros, on which some machines are faster."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


def parameters(start: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Parameter]:
    """Parameters of their own with the gradients of all: the contestants read the same ones and write none."""
    params = [Parameter(tensor.clone()) for tensor in start]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def adam(params: list[Parameter]) -> list[Contestant]:
    """PyTorch's fused Adam, alone and with the noise that a user of it would add."""
    optimizer = torch.optim.Adam(params, lr=LR, fused=True)

    @torch.no_grad()
    def with_noise() -> None:
        optimizer.step()
        for param in params:
            param.add_(torch.randn_like(param), alpha=NOISE_SIZE)

    return [Contestant(ADAM, optimizer.step), Contestant(ADAM_WITH_NOISE, with_noise)]


def plain_sgld(params: list[Parameter]) -> Contestant:
    """SGLD as it is written without a fused step."""

    @torch.no_grad()
    def step() -> None:
        for param in params:
            assert param.grad is not None
            param.add_(param.grad, alpha=-LR).add_(torch.randn_like(param), alpha=NOISE_SIZE)

    return Contestant(PLAIN_SGLD, step)


def ours(
    optimizer: LangevinAdam, name: str, temperature: float, noise: str = "momentum", isa: str = ""
) -> Contestant:
    """One setting of an optimizer that several contestants share: no time depends on what the tensors hold."""
    group = optimizer.param_groups[0]

    def prepare() -> None:
        group.update(temperature=temperature, noise=noise)
        if isa:
            native_op("set_isa")(isa)

    def restore() -> None:
        native_op("set_isa")(current)

    current = native_op("isa")() if isa else ""
    return Contestant(name, optimizer.step, prepare, restore if isa else None)


def copy(elements: int, like: Tensor | None = None) -> Contestant:
    """A copy of one tensor onto another: the bandwidth that the other contestants of the group can be held to."""
    source = torch.randn(elements) if like is None else torch.randn(elements, device=like.device)
    target = torch.empty_like(source)
    return Contestant(COPY, partial(target.copy_, source))


def isa_missing(isa: str) -> str:
    """Why an instruction set cannot be chosen, or nothing."""
    before = native_op("isa")()
    try:
        native_op("set_isa")(isa)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    native_op("set_isa")(before)
    return ""


def short(count: int) -> str:
    """25600000 as 25.6M."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return str(count)


def _large(sizes: Sizes) -> Group:
    size = f"{short(sizes.large)} float32"
    grads = values(1, sizes.large, 1)
    start = values(1, sizes.large, 0)
    optimizer = LangevinAdam(parameters(start, grads), lr=LR, seed=1)
    contestants = [
        copy(sizes.large),
        *adam(parameters(start, grads)),
        ours(optimizer, "T = 0", 0.0),
        *(
            ours(optimizer, f"T > 0, {n}", TEMPERATURE, n)
            for n in ("momentum", "preconditioned", "isotropic")
        ),
    ]
    rows = [
        Row(f"{size}, T = 0", ADAM, "T = 0", 0.72, ADAM_BYTES),
        *(
            Row(f"{size}, T > 0, {n}", ADAM, f"T > 0, {n}", 1.05, ADAM_BYTES)
            for n in ("momentum", "preconditioned", "isotropic")
        ),
        Row(f"{size}, T > 0, momentum", ADAM_WITH_NOISE, "T > 0, momentum", 0.13, ADAM_BYTES),
    ]
    missing = isa_missing("avx2")
    for name, temperature, reach in (("T = 0", 0.0, 0.75), ("T > 0", TEMPERATURE, 2.2)):
        rows.append(Row(f"{size}, avx2, {name}", ADAM, f"avx2, {name}", reach, ADAM_BYTES, missing))
        if not missing:
            contestants.append(ours(optimizer, f"avx2, {name}", temperature, isa="avx2"))
    return Group(sizes.large, contestants, rows)


def _cached(sizes: Sizes) -> Group:
    return _against_adam(
        f"{short(sizes.cached)} float32 in cache", 1, sizes.cached, (0.5, 1.8), sizes.turn_seconds
    )


def _many(sizes: Sizes, numel: int) -> Group:
    # The tables of the package's goals name these two sizes; others are held to the goals of the next smaller one.
    reach = (0.35, 0.5) if numel < 10_000 else (0.5, 0.7)
    return _against_adam(
        f"{sizes.tensors} tensors of {numel:,}", sizes.tensors, numel, reach, sizes.turn_seconds
    )


def _against_adam(
    case: str, count: int, numel: int, reach: tuple[float, float], turn_seconds: float
) -> Group:
    grads = values(count, numel, 1)
    start = values(count, numel, 0)
    optimizer = LangevinAdam(parameters(start, grads), lr=LR, seed=1)
    contestants = [
        adam(parameters(start, grads))[0],
        ours(optimizer, "T = 0", 0.0),
        ours(optimizer, "T > 0", TEMPERATURE),
    ]
    rows = [
        Row(f"{case}, {name}", ADAM, name, goal, ADAM_BYTES)
        for name, goal in zip(("T = 0", "T > 0"), reach, strict=True)
    ]
    return Group(count * numel, contestants, rows, turn_seconds)


def _sgld(sizes: Sizes) -> Group:
    grads = values(1, sizes.large, 1)
    start = values(1, sizes.large, 0)
    optimizer = SGLD(parameters(start, grads), lr=LR, temperature=TEMPERATURE, seed=1)
    contestants = [
        copy(sizes.large),
        plain_sgld(parameters(start, grads)),
        Contestant("SGLD", optimizer.step),
    ]
    row = Row(f"SGLD {short(sizes.large)} float32", PLAIN_SGLD, "SGLD", 0.11, SGLD_BYTES)
    return Group(sizes.large, contestants, [row])


def _bf16(sizes: Sizes) -> Group:
    grads = values(1, sizes.large, 1)
    start = values(1, sizes.large, 0)
    single = LangevinAdam(parameters(start, grads), lr=LR, seed=1)
    half_grads = [grad.bfloat16() for grad in grads]
    half_start = [tensor.bfloat16() for tensor in start]
    half = LangevinAdam(parameters(half_start, half_grads), lr=LR, seed=1, stochastic_rounding=True)
    peer = "LangevinAdam, float32, T = 0"
    contestants = [
        copy(sizes.large),
        ours(single, peer, 0.0),
        ours(half, "bfloat16", 0.0),
    ]
    row = Row(
        f"{short(sizes.large)} bfloat16, stochastic rounding, T = 0", peer, "bfloat16", 0.75, BF16_BYTES
    )
    return Group(sizes.large, contestants, [row])
