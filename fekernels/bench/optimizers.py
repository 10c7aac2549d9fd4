"""The optimizers' cases: steps beside PyTorch's fused Adam and what its users write for noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from fekernels._runtime.backends import native_op
from fekernels._runtime.parts import is_sharded, local_tensor
from fekernels.bench import peers
from fekernels.bench.case import Case, Cost, Group, Row, Shape, product, short
from fekernels.bench.peers import ADAM, ADAM_FOREACH, ADAM_WITH_NOISE, LR, PLAIN_SGLD, PSGLD, TEMPERATURE
from fekernels.bench.timing import Contestant
from fekernels.optim import SGLD, LangevinAdam

__all__ = ["ADAM_COST", "CASES", "parameters", "share_moments", "values"]

COLD, HOT = "T = 0", "T > 0"
COLD_FROZEN, HOT_FROZEN = f"{COLD}, frozen", f"{HOT}, frozen"
COMPILED, COMPILED_FROZEN = "torch.compile", "torch.compile, frozen"
# Elements; fewer are the tests', where nothing is timed and torch.compile's code generator would take 20 s.
CODE_FROM = 10_000
NOISES = ("momentum", "preconditioned", "isotropic")
SINGLE, HALF = "LangevinAdam, float32, T = 0", "bfloat16"

# A parameter's share of a step: gradient, parameter and two moments read, the last three written; the root and the
# division of the preconditioner. The noise adds arithmetic and moves nothing.
ADAM_COST = Cost(28, {"root": 1})
HOT_COST = Cost(28, {"root": 1, "normal": 1})
# A preconditioner that stands still is not written.
COLD_FROZEN_COST, HOT_FROZEN_COST = Cost(24, {"root": 1}), Cost(24, {"root": 1, "normal": 1})
# Stochastic rounding of three tensors wants 16 random bits each.
HALF_COST = Cost(14, {"root": 1, "random word": 1.5})
SGLD_COST = Cost(12, {"normal": 1})


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


def _problem(shape: Shape) -> Callable[[], list[Parameter]]:
    """What makes the parameters of one contestant: [tensors, elements of each] that all begin alike."""
    count, numel = shape
    start, grads = values(count, numel, 0), values(count, numel, 1)
    return partial(parameters, start, grads)


def ours(
    optimizer: LangevinAdam,
    name: str,
    temperature: float,
    noise: str = "momentum",
    isa: str = "",
    frozen: bool = False,
) -> Contestant:
    """One setting of an optimizer that several contestants share: no time depends on what the tensors hold."""
    group = optimizer.param_groups[0]

    def prepare() -> None:
        group.update(temperature=temperature, noise=noise, frozen=frozen)
        if isa:
            native_op("set_isa")(isa)

    def restore() -> None:
        native_op("set_isa")(current)

    current = native_op("isa")() if isa else ""
    return Contestant(name, optimizer.step, prepare, restore if isa else None)


def share_moments(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimizers of the same parameters, or of their shards, keep their moments in the memory of the first one's.

    Tensors that no cache holds are up to half as fast again in some pages as in others, and where the pages lie is
    another matter in every process: contestants with tensors of their own would be compared by that.
    """
    first, *others = optimizers
    for optimizer in optimizers:
        optimizer.step()
    for other in others:
        for (param, state), kept in zip(other.state.items(), first.state.values(), strict=True):
            moments = {key: kept[key] for key in ("exp_avg", "exp_avg_sq")}
            if not is_sharded(param):
                moments = {key: local_tensor(moment) for key, moment in moments.items()}
            state.update(moments)


def isa_missing(isa: str) -> str:
    """Why an instruction set cannot be chosen, or nothing."""
    before = native_op("isa")()
    try:
        native_op("set_isa")(isa)
    except (RuntimeError, ValueError) as error:  # as torch's release translates it
        return str(error).splitlines()[0]
    native_op("set_isa")(before)
    return ""


def _large(shape: Shape) -> Group:
    """Every noise, a second instruction set, and all peers, on one tensor that no cache holds."""
    params = _problem(shape)()
    fused, foreach = peers.adam(params), peers.adam(params, foreach=True)
    optimizer = LangevinAdam(params, lr=LR, seed=1)
    share_moments([optimizer, fused, foreach])
    contestants = [
        Contestant(ADAM, fused.step),
        peers.with_noise(fused, params),
        Contestant(ADAM_FOREACH, foreach.step),
        peers.psgld(params),
        ours(optimizer, COLD, 0.0),
        *(ours(optimizer, f"{HOT}, {noise}", TEMPERATURE, noise) for noise in NOISES),
    ]
    missing = {}
    why = isa_missing("avx2")
    for name, temperature in ((COLD, 0.0), (HOT, TEMPERATURE)):
        if why:
            missing[f"avx2, {name}"] = why
        else:
            contestants.append(ours(optimizer, f"avx2, {name}", temperature, isa="avx2"))
    return Group(contestants, missing)


def _cold_and_hot(shape: Shape) -> Group:
    params = _problem(shape)()
    adam, optimizer = peers.adam(params), LangevinAdam(params, lr=LR, seed=1)
    share_moments([optimizer, adam])
    return Group([Contestant(ADAM, adam.step), ours(optimizer, COLD, 0.0), ours(optimizer, HOT, TEMPERATURE)])


def _dead(shape: Shape) -> Group:
    """A network half of whose units are dead: what their gradients, 0 for long, leave of the first moments."""
    count, numel = shape
    start, grads = values(count, numel, 0), values(count, numel, 1)
    for grad in grads:
        grad[: numel // 2] = 0
    # Moments of their own: ours would make 0 of the peer's.
    adam, own = peers.adam(parameters(start, grads)), LangevinAdam(parameters(start, grads), lr=LR, seed=1)
    for optimizer in (adam, own):
        optimizer.step()
        for state in optimizer.state.values():
            # 0.9 of 4 units of the last place, rounded, is 4 of them.
            state["exp_avg"][: numel // 2] = 4 * torch.finfo(torch.float32).smallest_normal * 2**-23
    return Group([Contestant(ADAM, adam.step), ours(own, COLD, 0.0)])


def _frozen(shape: Shape) -> Group:
    """Beside the same in code that torch.compile makes, of the same tensors: what not to write one of them saves."""
    params = _problem(shape)()
    optimizer = LangevinAdam(params, lr=LR, seed=1)
    contestants = [
        ours(optimizer, COLD, 0.0),  # first: the others need a second moment
        ours(optimizer, COLD_FROZEN, 0.0, frozen=True),
        ours(optimizer, HOT, TEMPERATURE),
        ours(optimizer, HOT_FROZEN, TEMPERATURE, frozen=True),
    ]
    optimizer.step()
    state, missing = optimizer.state[params[0]], {}
    param, grad = params[0], params[0].grad
    assert grad is not None
    compiler = "eager" if product(shape) < CODE_FROM else "inductor"
    for name, frozen in ((COMPILED, False), (COMPILED_FROZEN, True)):
        step = peers.compiled_adam(frozen, compiler)
        run = partial(step, param.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
        try:
            run()
        except Exception as error:  # without a C++ compiler, and whatever else torch.compile may raise
            missing[name] = f"torch.compile: {str(error).strip().splitlines()[0]}"
            continue
        contestants.append(Contestant(name, run))
    return Group(contestants, missing)


def _sgld(shape: Shape) -> Group:
    params = _problem(shape)()
    optimizer = SGLD(params, lr=LR, temperature=TEMPERATURE, seed=1)
    return Group([peers.plain_sgld(params), Contestant("SGLD", optimizer.step)])


def _half(shape: Shape) -> Group:
    count, numel = shape
    start, grads = values(count, numel, 0), values(count, numel, 1)
    single = LangevinAdam(parameters(start, grads), lr=LR, seed=1)
    half_params = parameters([t.bfloat16() for t in start], [t.bfloat16() for t in grads])
    half = LangevinAdam(half_params, lr=LR, seed=1, stochastic_rounding=True)
    return Group([ours(single, SINGLE, 0.0), ours(half, HALF, 0.0)])


def _one(what: str, shape: Shape) -> str:
    return what.format(short(product(shape)))


def _many(shape: Shape) -> str:
    return f"{shape[0]:,} tensors of {shape[1]:,}"


def _costs(each: Mapping[str, Cost], shape: Shape) -> dict[str, Cost]:
    return {name: cost * product(shape) for name, cost in each.items()}


def _case(
    name: str,
    label: Callable[[Shape], str],
    shapes: tuple[Shape, Shape, Shape],
    build: Callable[[Shape], Group],
    rows: tuple[Row, ...],
    costs: Mapping[str, Cost],
    cached: bool = False,
) -> Case:
    """``costs``: a parameter's, of each contestant of ours."""
    cost = partial(_costs, costs)
    return Case(f"optimizers/{name}", label, shapes, build, rows, product, cost, cached=cached, seconds=7.0)


def _beside_adam(
    name: str,
    label: Callable[[Shape], str],
    shapes: tuple[Shape, Shape, Shape],
    cold: float | None,
    hot: float | None,
) -> Case:
    rows = (Row(COLD, ADAM, cold, COLD), Row(HOT, ADAM, hot, HOT))
    return _case(name, label, shapes, _cold_and_hot, rows, {COLD: ADAM_COST, HOT: HOT_COST}, cached=True)


LARGE: tuple[Shape, Shape, Shape] = ((1, 25_600_000), (1, 2_560_000), (1, 4096))

CASES = (
    _case(
        "large",
        partial(_one, "{} float32"),
        LARGE,
        _large,
        (
            Row(COLD, ADAM, 0.72, COLD),
            *(Row(f"{HOT}, {noise}", ADAM, 1.05, f"{HOT}, {noise}") for noise in NOISES),
            Row(f"{HOT}, momentum", ADAM_WITH_NOISE, 0.13, f"{HOT}, momentum"),
            Row(f"avx2, {COLD}", ADAM, 0.75, f"avx2, {COLD}"),
            Row(f"avx2, {HOT}", ADAM, 2.2, f"avx2, {HOT}"),
            Row(COLD, ADAM_FOREACH, None, COLD),
            Row(f"{HOT}, preconditioned", PSGLD, None, f"{HOT}, preconditioned"),
        ),
        {
            **{name: ADAM_COST for name in (COLD, f"avx2, {COLD}")},
            # The fill of normals chooses its instruction set by itself: no floor for another one.
            f"avx2, {HOT}": ADAM_COST,
            **{f"{HOT}, {noise}": HOT_COST for noise in NOISES},
        },
    ),
    _beside_adam(
        "in_cache", partial(_one, "{} float32 in cache"), ((1, 640_000), (1, 64_000), (1, 512)), 0.5, 1.8
    ),
    _beside_adam("many_of_1000", _many, ((200, 1_000), (50, 1_000), (2, 16)), 0.2, 0.3),
    _beside_adam("many_of_10000", _many, ((200, 10_000), (50, 10_000), (2, 300)), 0.45, 0.65),
    _beside_adam("many_of_100", _many, ((1_000, 100), (250, 100), (5, 7)), 0.2, None),
    _case(
        "dead_units",
        partial(_one, "{} float32 in cache, half dead"),
        ((1, 640_000), (1, 64_000), (1, 512)),
        _dead,
        (Row(COLD, ADAM, None, COLD),),
        {COLD: ADAM_COST},
        cached=True,
    ),
    _case(
        "frozen",
        partial(_one, "LangevinAdam {} float32"),
        LARGE,
        _frozen,
        (
            Row(COLD_FROZEN, COLD, None, COLD_FROZEN),
            Row(HOT_FROZEN, HOT, 0.92, HOT_FROZEN, access=(COMPILED_FROZEN, COMPILED)),
            Row(COMPILED_FROZEN, COMPILED, None, COMPILED_FROZEN),
        ),
        {
            **{COLD: ADAM_COST, HOT: HOT_COST, HOT_FROZEN: HOT_FROZEN_COST},
            **{name: COLD_FROZEN_COST for name in (COLD_FROZEN, COMPILED_FROZEN)},
        },
    ),
    _case(
        "sgld",
        partial(_one, "SGLD {} float32"),
        LARGE,
        _sgld,
        (Row("SGLD", PLAIN_SGLD, 0.11),),
        {"SGLD": SGLD_COST},
    ),
    _case(
        "bfloat16",
        partial(_one, "{} bfloat16"),
        LARGE,
        _half,
        (Row(HALF, SINGLE, 0.75, f"stochastic rounding, {COLD}"),),
        {HALF: HALF_COST},
    ),
)
