"""The table of the optimizers' steps: shapes and places in memory, dtypes, options.

STEPS is what the contract tests step, with interpreted Triton and the CUDA sources compiled for the CPU among them, and
the checks of a GPU. Nothing here is a fixture: `python -m benchmarks.gpu_check` imports it where no tests run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from fekernels._catalogue import optimizers
from fekernels._runtime import pointer_table
from fekernels.ops.optimizers import (
    langevin_adam,
    sgld,
    variational_accumulate,
    variational_adam,
    variational_draw,
)
from tests.support.pairwise import pairwise

SEED = 0x1234_5678_9ABC_DEF0
NOISES = tuple(optimizers.NOISES)
LANGEVIN = ("langevin_adam_", "sgld_")
OPERATIONS = {
    op.OPERATION.name: op.OPERATION
    for op in (langevin_adam, sgld, variational_draw, variational_accumulate, variational_adam)
}
VARIATIONAL = tuple(name for name in OPERATIONS if name not in LANGEVIN)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


# Shapes and places in memory.


@dataclass(frozen=True)
class Case:
    """A shape, how the parameter, its states and the gradient lie in memory, and (offset, run, pitch) of a shard."""

    shape: tuple[int, ...]
    layout: str = "contiguous"  # of the anchor as well
    grad_layout: str = "same"
    state_layout: str = "same"
    shard: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        name = "x".join(map(str, self.shape)) or "scalar"
        name += f"-{self.layout}" if self.layout != "contiguous" else ""
        name += f"-grad_{self.grad_layout}" if self.grad_layout != "same" else ""
        name += f"-states_{self.state_layout}" if self.state_layout != "same" else ""
        return name + ("-shard_{}_{}_{}".format(*self.shard) if self.shard else "")


# Short of, at and beyond what a GPU thread takes at once (4 or 8), a vector (16) and a block of noise (64); every kind
# of layout; shards that begin at such a place, beside one, across a carry of the counter, and as columns of a matrix.
CASES = [
    Case((0,)),
    Case(()),
    Case((7,)),
    Case((63,)),
    Case((64,)),
    Case((65,)),
    Case((33, 3), "transposed"),
    Case((0, 5), "transposed"),
    Case((33, 3), "contiguous", "transposed"),
    Case((33, 3), "contiguous", "expanded"),
    Case((129,), "sliced"),
    Case((131,), "misaligned"),
    Case((3, 5, 7), "padded", "permuted", "contiguous"),
    Case((2, 5, 3, 4), "channels_last", "contiguous"),
    Case((116,), shard=(12, 116, 116)),  # begins in the middle of eight
    Case((101,), shard=(2**34 - 5, 101, 101)),
    Case((8, 12), shard=(48, 12, 96)),
    Case((7, 13), "transposed", shard=(13, 13, 70)),
]
# More than a buffer of the CPU kernels (512) or a GPU block's turn (1024): beginning and end in order and out of it.
LONG_CASES = [
    Case((531,), "misaligned"),
    Case((1160,), shard=(2**34 - 16, 1160, 1160)),
    Case((31, 17), "transposed"),
]


class Dtypes(NamedTuple):
    """Of parameter, gradient, states and anchor."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    anchor: torch.dtype

    def __str__(self) -> str:
        return "-".join(str(dtype).removeprefix("torch.") for dtype in self)


# Parameter and states: what GPUs have kernels for. The CPU's take every dtype for everything.
GPU_DTYPES = [(param, state) for param, states in pointer_table.GPU_STATES.items() for state in states]
# With how the result is rounded: stochastically where there is something to round to bfloat16.
ROUNDED_DTYPES = [(*pair, False) for pair in GPU_DTYPES] + [(*p, True) for p in GPU_DTYPES if BF16 in p]


# Of the variational operations: a 16-bit parameter is the rounding of a mean in float32.
VARIATIONAL_DTYPES = [(F32, F32), (F64, F64), (BF16, F32), (F16, F32)]


def state_dtype(op: str, param: torch.dtype) -> torch.dtype:
    """One that every backend has with this parameter."""
    return dict(VARIATIONAL_DTYPES)[param] if op in VARIATIONAL else param


# Options.


def noise_unit(lr: float, beta1: float) -> float:
    """q of the noise that a hot step puts into the momentum."""
    return lr * (1 + beta1) / (1 - beta1)


@dataclass(frozen=True)
class Options:
    """What a step needs besides its tensors; the defaults use every term that has no switch."""

    lr: float = 0.02
    temperature: float = 0.3
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-3
    weight_decay: float = 0.0
    prior_precision: float = 0.0
    noise: str = "momentum"
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False
    bias_correction: bool = True
    stochastic_rounding: bool = False
    frozen: bool = False
    seed: int = SEED
    anchor: bool = False
    t: int = 9  # of the step, counted from 1: where the series of the first steps has a dozen terms
    noise_unit: float = 0.0  # of the last step that moved, see noise_unit()
    grad_scale: float | None = None
    found_inf: float | None = None
    # Of the variational operations alone. Their weight_decay must keep h + weight_decay above 0 where h is 0.
    prior_decay: float = 0.3
    ess: float = 40.0
    deviations: float = 0.0
    clip_radius: float = math.inf
    lr_scale: float = 1.3
    samples: float = 0.0

    def steps_after(self, op: str) -> int:
        """What the row's step is then, from t - 1 on."""
        return self.t - (op == "variational_accumulate_")

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(f"{name}={value}" for name, value in changed.items())


LR_CHANGED, BETA1_CHANGED = noise_unit(0.08, 0.8), noise_unit(0.02, 0.95)
# The values of the factors of STEPS, by a name each.
NOISE = {
    "momentum": {},
    "momentum, lr changed": dict(noise_unit=LR_CHANGED),
    "momentum, beta1 changed": dict(noise_unit=BETA1_CHANGED),
    "preconditioned": dict(noise="preconditioned"),
    "isotropic": dict(noise="isotropic"),
    "cold": dict(temperature=0.0),
    "cold after hot": dict(temperature=0.0, noise_unit=LR_CHANGED),
}
PLAIN_NOISE = ("momentum", "preconditioned", "isotropic", "cold")  # without a term that only some steps have
PRIOR = {
    "none": {},
    "around 0": dict(prior_precision=2.0),
    "bounds the step": dict(prior_precision=100.0, anchor=True),
    **{
        f"anchor in {d}".replace("torch.", ""): dict(prior_precision=2.0, anchor=True)
        for d in (F32, F64, BF16, F16)
    },
}
DECAY = {
    "none": {},
    "coupled": dict(weight_decay=0.3),
    "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True),
}
EVERYTHING = Options(
    amsgrad=True, maximize=True, weight_decay=0.2, decoupled_weight_decay=True, prior_precision=2.0, anchor=True,
    noise_unit=LR_CHANGED, grad_scale=512.0,
)  # fmt: skip

# Options at the ends of their range, where a term is nothing or a power of a beta is.
EXTREMES = {
    "the first step": dict(t=1),
    "the second step": dict(t=2),
    "lr is 0": dict(lr=0.0, noise_unit=LR_CHANGED),
    "lr is 0 and noise beside the momentum": dict(lr=0.0, noise="isotropic"),
    "betas are 0": dict(beta1=0.0, beta2=0.0),
    "the unit is the same": dict(noise_unit=noise_unit(0.02, 0.8)),
    "the unit is another placement's": dict(noise="preconditioned", noise_unit=LR_CHANGED),
    "uncorrected and late": dict(bias_correction=False, t=1000),
    "frozen from the first step on": dict(frozen=True, t=1),
    "frozen with its maximum": dict(frozen=True, amsgrad=True),
}

# Options, and the noise unit that a step with them leaves behind where 0.7 was before.
UNITS_AFTER = [
    ({}, noise_unit(0.02, 0.8)),
    (dict(beta1=0.5), noise_unit(0.02, 0.5)),
    (dict(lr=0.0), 0.7),
    (dict(temperature=0.0), 0.0),
    (dict(noise="isotropic"), 0.0),
]


@dataclass(frozen=True)
class Step:
    """One step of one parameter."""

    op: str
    case: Case
    dtypes: Dtypes
    options: Options
    step_dtype: torch.dtype = F32
    repeats: bool = field(default=False, compare=False)  # options and dtypes that another case has as well

    def __str__(self) -> str:
        return f"{self.op} of {self.case}, {self.dtypes}, {self.options}"

    @property
    def on_gpus(self) -> bool:
        """Whether GPUs have a kernel for these dtypes; SGLD has no states."""
        if self.op in VARIATIONAL:
            return self.dtypes.grad == self.dtypes.param and self.dtypes[::2] in VARIATIONAL_DTYPES
        state = self.dtypes.state if self.op == "langevin_adam_" else self.dtypes.param
        return self.dtypes.grad == self.dtypes.param and (self.dtypes.param, state) in GPU_DTYPES


def _dtypes(param: torch.dtype, state: torch.dtype, prior: str = "none") -> Dtypes:
    anchor = getattr(torch, prior.removeprefix("anchor in ")) if prior.startswith("anchor in ") else param
    return Dtypes(param, param, state, anchor)


# The factors of an operation's options, and rows of them with every pair of values.
_SHARED: dict[str, Sequence[Any]] = dict(
    grad_scale=(None, 512.0), step_dtype=(F32, F64), maximize=(False, True)
)
VARIANTS: dict[str, list[Any]] = {
    "langevin_adam_": pairwise(
        dtypes=ROUNDED_DTYPES, noise=list(NOISE), prior=list(PRIOR), decay=list(DECAY), t=(9, 1000),
        amsgrad=(False, True), bias_correction=(False, True), frozen=(False, True), **_SHARED,
    ),
    "sgld_": pairwise(
        dtypes=[row for row in ROUNDED_DTYPES if row[0] == row[1]], noise=("momentum", "cold"),
        prior=[prior for prior in PRIOR if "bounds" not in prior], decay=("none", "coupled"), t=(9, 1000), **_SHARED,
    ),
}  # fmt: skip
# Those of a variational operation: options by name, dtypes of parameter and states.
DRAWS = {
    "curvature": {},
    "deviations": dict(deviations=1.0),
    "cold": dict(temperature=0.0),
    "no decay of its own": dict(prior_decay=0.0625, ess=3.0),
}
SUMS = {"first": {}, "further": dict(samples=1.0)}
VARIATIONAL_STEPS = {
    "one draw": {},
    "clipped": dict(clip_radius=0.2),
    "scaled": dict(grad_scale=512.0),
    "cold": dict(temperature=0.0),
    "sums": dict(samples=3.0),
    "cold sums, scaled": dict(samples=2.0, temperature=0.0, grad_scale=512.0),
    "late": dict(t=1000, beta1=0.99),
    "betas are 0": dict(beta1=0.0, beta2=0.0, t=1),
    "lr is 0": dict(lr=0.0),
}
OPTIONS = {
    "variational_draw_": DRAWS,
    "variational_accumulate_": SUMS,
    "variational_adam_": VARIATIONAL_STEPS,
}


def variational_step(
    op: str, case: Case, dtypes: Dtypes, options: str, step_dtype: torch.dtype = F32
) -> Step:
    # The draw's number is no product of anything.
    return Step(op, case, dtypes, Options(**{"noise_unit": 37.0, **OPTIONS[op][options]}), step_dtype)


def _sums_of_16_bits(op: str, param: torch.dtype, options: str) -> bool:
    """What there is not: then the mean is stepped in the parameter's place."""
    return op == "variational_adam_" and param in (BF16, F16) and "sums" in options


def _variational_steps() -> Iterator[Step]:
    for op, options in OPTIONS.items():
        seen: set[Any] = set()
        for row in pairwise(
            case=[*CASES, *LONG_CASES],
            dtypes=VARIATIONAL_DTYPES,
            options=list(options),
            step_dtype=(F32, F64),
        ):
            param, state = row.dtypes
            if _sums_of_16_bits(op, param, row.options):
                continue
            step = variational_step(op, row.case, _dtypes(param, state), row.options, row.step_dtype)
            yield replace(step, repeats=row.case in seen and (row.dtypes, row.options) in seen)
            seen.update((row.case, (row.dtypes, row.options)))


def step_of(op: str, case: Case, variant: Any) -> Step:
    """The step of a row of VARIANTS."""
    values = variant._asdict()
    param, state, rounding = values.pop("dtypes")
    prior, step_dtype = values.pop("prior"), values.pop("step_dtype")
    options = NOISE[values.pop("noise")] | PRIOR[prior] | DECAY[values.pop("decay")] | values
    return Step(
        op, case, _dtypes(param, state, prior), Options(**options, stochastic_rounding=rounding), step_dtype
    )


def _completed(own: list[Any], rows: list[Any]) -> list[Any]:
    """`own` and few of the rows, with every value of every factor."""
    chosen, missing = list(own), {cell for row in own + rows for cell in enumerate(row)}
    missing.difference_update(*map(enumerate, own))
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing.intersection(enumerate(row)))))
        missing.difference_update(enumerate(chosen[-1]))
    return chosen


def _gpu_steps() -> Iterator[Step]:
    for op, rows in VARIANTS.items():
        # Each case has every value of every factor, each another part of the rows, together all of them.
        begins = [i * len(rows) // len(CASES) for i in range(len(CASES) + 1)]
        for case, begin, end in zip(CASES, begins, begins[1:], strict=False):
            own = rows[begin:end]
            for i, row in enumerate(_completed(own, rows[end:] + rows[:begin])):
                yield replace(step_of(op, case, row), repeats=i >= len(own))
        # The loops for steps without any of the rarer terms, each instance of which is another function.
        dtypes, noises = {row.dtypes for row in rows}, {row.noise for row in rows}
        plain = [noise for noise in PLAIN_NOISE if noise in noises]
        frozen = (False, True) if op == "langevin_adam_" else (False,)
        # On the CPU bfloat16 in order stays in registers under two of them, and goes through a buffer out of order; and
        # a v that stands still makes another instance.
        kept = [
            (case, d, noise, still)
            for d in ROUNDED_DTYPES
            if d[:2] == (BF16, BF16)
            for case in (LONG_CASES[0], LONG_CASES[-1])
            for noise in ("momentum", "cold")
            for still in frozen
        ]
        kept += [(LONG_CASES[0], (F32, F32, False), noise, still) for noise in plain for still in frozen]
        for row in pairwise(
            *kept,
            case=LONG_CASES,
            dtypes=[d for d in ROUNDED_DTYPES if d in dtypes],
            noise=plain,
            frozen=frozen,
        ):
            param, state, rounding = row.dtypes
            options = Options(**NOISE[row.noise], stochastic_rounding=rounding, frozen=row.frozen)
            yield Step(op, row.case, _dtypes(param, state), options)
        for case in LONG_CASES:
            yield Step(op, case, _dtypes(F32, F32), EVERYTHING)
    for changes in EXTREMES.values():
        for dtype in (F32, F64, BF16):
            yield Step("langevin_adam_", Case((70,)), _dtypes(dtype, dtype), Options(**changes))
    yield Step("sgld_", Case((70,)), _dtypes(F32, F32), Options(lr=0.0))


def _cpu_steps() -> Iterator[Step]:
    """Dtypes that no GPU has kernels for."""
    every = (F32, F64, BF16, F16)
    for op in LANGEVIN:
        for row in pairwise(
            case=(Case((70,)), Case((13, 7), "contiguous", "transposed"), Case((300,), "misaligned")),
            param=every, grad=every, state=every, anchor=every, noise=PLAIN_NOISE, rounding=(False, True),
            amsgrad=(False, True), prior=("bounds the step", "none"), frozen=(False, True),
        ):  # fmt: skip
            own = NOISE[row.noise] | dict(frozen=row.frozen) if op == "langevin_adam_" else {}
            options = Options(
                **own, **PRIOR[row.prior], amsgrad=row.amsgrad, stochastic_rounding=row.rounding
            )
            step = Step(op, row.case, Dtypes(row.param, row.grad, row.state, row.anchor), options)
            if not step.on_gpus:
                yield step

    for op in ("variational_accumulate_", "variational_adam_"):
        for row in pairwise(
            case=(Case((70,)), Case((13, 7), "contiguous", "transposed")),
            dtypes=VARIATIONAL_DTYPES, grad=every, options=list(OPTIONS[op]),
        ):  # fmt: skip
            param, state = row.dtypes
            step = variational_step(op, row.case, Dtypes(param, row.grad, state, row.grad), row.options)
            if not step.on_gpus:
                yield step


STEPS: list[Step] = [*_gpu_steps(), *_variational_steps(), *_cpu_steps()]
