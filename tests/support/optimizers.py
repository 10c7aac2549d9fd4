"""The table of the optimizers: shapes, layouts and options of a step, parameters in mid-training, and the calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue import optimizers
from tests.support.tensors import clone, lay_out

SEED = 0x1234_5678_9ABC_DEF0
NOISES = tuple(optimizers.NOISES)
DRAWS = {"bits": torch.int32, "uniform": torch.float32, "normal": torch.float32}


@dataclass(frozen=True)
class Case:
    """A shape, and how the parameter with its states and the gradient lie in memory."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    grad_layout: str = "same"

    def __str__(self) -> str:
        name = "x".join(map(str, self.shape)) or "scalar"
        name += f"-{self.layout}" if self.layout != "contiguous" else ""
        return name + (f"-grad_{self.grad_layout}" if self.grad_layout != "same" else "")


# Vector widths and blocks (64), chunks of a GPU block (4096), spans of a CPU thread (16384), each give or take one.
CASES = [
    Case((0,)),
    Case((1,)),
    Case((3,)),
    Case((63,)),
    Case((64,)),
    Case((65,)),
    Case((1000,)),
    Case((4097,)),
    Case((16385,)),
    Case(()),
    Case((33, 7)),
    Case((33, 7), "transposed"),
    Case((33, 7), "contiguous", "transposed"),
    Case((33, 7), "contiguous", "expanded"),
    Case((0, 5), "transposed"),
    Case((129,), "sliced"),
    Case((1000,), "misaligned"),
    Case((2, 5, 6, 7), "channels_last"),
    Case((2, 5, 6, 7), "channels_last", "contiguous"),
]


def noise_unit(lr: float, beta1: float) -> float:
    """q of the noise that a hot step puts into the momentum."""
    return lr * (1 + beta1) / (1 - beta1)


@dataclass
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
    seed: int = SEED
    anchor: bool = False
    t: int = 4  # of the step, counted from 1
    noise_unit: float = 0.0  # of the last step that moved, see noise_unit()
    grad_scale: float | None = None
    found_inf: float | None = None


OPTIONS = {
    "momentum": {},
    "momentum_first_step": dict(t=1),
    "momentum_late": dict(t=1000),
    "momentum_lr_changed": dict(noise_unit=noise_unit(0.08, 0.8)),
    "momentum_beta1_changed": dict(noise_unit=noise_unit(0.02, 0.95)),
    "momentum_unchanged": dict(noise_unit=noise_unit(0.02, 0.8)),
    "momentum_uncorrected": dict(bias_correction=False),
    "preconditioned": dict(noise="preconditioned"),
    "preconditioned_lr_changed": dict(noise="preconditioned", noise_unit=noise_unit(0.08, 0.8)),
    "isotropic": dict(noise="isotropic"),
    "cold": dict(temperature=0.0),
    "cold_after_hot": dict(temperature=0.0, noise_unit=noise_unit(0.08, 0.8)),
    "lr_zero": dict(lr=0.0, noise_unit=noise_unit(0.08, 0.8)),
    "amsgrad": dict(amsgrad=True),
    "maximize": dict(maximize=True, weight_decay=0.3),
    "weight_decay": dict(weight_decay=0.3),
    "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True),
    "prior": dict(prior_precision=2.0),
    "anchor": dict(prior_precision=2.0, anchor=True),
    "prior_bounds_step": dict(prior_precision=100.0, anchor=True),
    "grad_scale": dict(grad_scale=512.0),
    "betas_zero": dict(beta1=0.0, beta2=0.0),
    "everything": dict(
        amsgrad=True,
        maximize=True,
        weight_decay=0.2,
        decoupled_weight_decay=True,
        prior_precision=2.0,
        anchor=True,
        noise_unit=noise_unit(0.08, 0.8),
        grad_scale=512.0,
    ),
}

# Options, and the noise unit that a step with them leaves behind where 0.7 was before.
UNITS_AFTER = [
    ({}, noise_unit(0.02, 0.8)),
    (dict(beta1=0.5), noise_unit(0.02, 0.5)),
    (dict(lr=0.0), 0.7),
    (dict(temperature=0.0), 0.0),
    (dict(noise="isotropic"), 0.0),
]

SGLD_OPTIONS = {
    "plain": {},
    "cold": dict(temperature=0.0),
    "lr_zero": dict(lr=0.0),
    "maximize": dict(maximize=True, weight_decay=0.3),
    "weight_decay": dict(weight_decay=0.3),
    "anchor": dict(prior_precision=2.0, anchor=True),
    "prior": dict(prior_precision=2.0),
    "grad_scale": dict(grad_scale=512.0),
}


@dataclass
class Row:
    """One parameter with everything a step reads or writes."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    anchor: Tensor
    step: Tensor
    stream: int
    shard: tuple[int, int, int] | None = None
    noise_unit: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    WRITTEN = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "noise_unit")

    def clone(self, device: str | None = None) -> Row:
        """A copy with the same strides."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        copies = {name: clone(t).to(device or t.device) for name, t in tensors.items()}
        return Row(**copies, stream=self.stream, shard=self.shard)


def make_row(
    case: Case,
    options: Options,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    stream: int = 7,
    seed: int = 0,
) -> Row:
    """A parameter in mid-training, drawn from ``seed``; the values are of the size that the options' lr moves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, of: torch.dtype, layout: str) -> Tensor:
        values = torch.randn(case.shape, generator=generator, dtype=torch.float64) * scale
        return lay_out(values.to(of), layout)

    state = state_dtype or dtype
    scale = options.grad_scale or 1.0
    grad_layout = case.layout if case.grad_layout == "same" else case.grad_layout
    second = lay_out(normal(0.4, torch.float64, "contiguous").square().to(state), case.layout)
    return Row(
        param=normal(1.0, dtype, case.layout),
        grad=normal(0.4 * scale, grad_dtype or dtype, grad_layout),
        exp_avg=normal(0.2, state, case.layout),
        exp_avg_sq=second,
        max_exp_avg_sq=lay_out(
            (second * (1.5 - torch.rand(case.shape, generator=generator))).to(state), case.layout
        ),
        anchor=normal(1.0, dtype, case.layout),
        step=torch.tensor(float(options.t - 1)),
        stream=stream,
        noise_unit=torch.tensor(options.noise_unit, dtype=torch.float64),
    )


def _scalar(value: float | None, like: Tensor) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float32, device=like.device)


def _step_arguments(rows: list[Row], options: Options, backend: str | None) -> dict[str, Any]:
    """What every step takes."""
    o = options
    lists = {
        name: [getattr(row, name) for row in rows] for name in ("param", "grad", "step", "anchor", "stream")
    }
    return dict(
        params=lists["param"],
        grads=lists["grad"],
        steps=lists["step"],
        anchors=lists["anchor"] if o.anchor else [],
        streams=lists["stream"],
        shards=[n for row in rows for n in row.shard] if rows[0].shard else [],
        lr=o.lr,
        lr_tensor=None,
        temperature=o.temperature,
        temperature_tensor=None,
        weight_decay=o.weight_decay,
        prior_precision=o.prior_precision,
        maximize=o.maximize,
        stochastic_rounding=o.stochastic_rounding,
        seed=o.seed,
        grad_scale=_scalar(o.grad_scale, rows[0].param),
        found_inf=_scalar(o.found_inf, rows[0].param),
        backend=backend,
    )


def call_langevin_adam(rows: list[Row], options: Options, backend: str | None = None, **changes: Any) -> None:
    """One call of the list operator."""
    o = options
    arguments = _step_arguments(rows, o, backend) | dict(
        beta1_tensor=None,
        beta2_tensor=None,
        exp_avgs=[row.exp_avg for row in rows],
        exp_avg_sqs=[row.exp_avg_sq for row in rows],
        max_exp_avg_sqs=[row.max_exp_avg_sq for row in rows] if o.amsgrad else [],
        noise_units=[row.noise_unit for row in rows],
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        noise=o.noise,
        amsgrad=o.amsgrad,
        decoupled_weight_decay=o.decoupled_weight_decay,
        bias_correction=o.bias_correction,
    )
    torch.ops.fekernels.langevin_adam_(**{**arguments, **changes})


def call_sgld(rows: list[Row], options: Options, backend: str | None = None, **changes: Any) -> None:
    """One call of the list operator."""
    torch.ops.fekernels.sgld_(**{**_step_arguments(rows, options, backend), **changes})
