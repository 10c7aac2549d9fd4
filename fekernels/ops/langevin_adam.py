"""``langevin_adam_``: one step of Langevin-Adam over lists of tensors, and the same over a pointer table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fekernels import _backends
from fekernels._checks import number
from fekernels._table import FLAGS, NOISES, PointerTable, Row
from fekernels.ops._library import define_in_place
from fekernels.ops._rows import check_lists, check_scalars, group_rows, readable_rows, shard_of, some
from fekernels.reference.langevin_adam import step_numbers

__all__ = ["LangevinAdamArguments", "step_lists", "step_tables"]


@dataclass(slots=True)
class LangevinAdamArguments:
    """What one step of a parameter group needs besides its tensors; the names are those of ``fe.LangevinAdam``."""

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    prior_precision: float
    noise: str
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    bias_correction: bool
    stochastic_rounding: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None
    beta1_tensor: Tensor | None = None  # for the operator, which reads it; kernels take numbers
    beta2_tensor: Tensor | None = None

    def flags(self) -> int:
        """The switches as the kernels' bit set."""
        return (
            FLAGS["amsgrad"] * self.amsgrad
            | FLAGS["maximize"] * self.maximize
            | FLAGS["decoupled_weight_decay"] * self.decoupled_weight_decay
            | FLAGS["bias_correction"] * self.bias_correction
            | FLAGS["stochastic_rounding"] * self.stochastic_rounding
        )


def step_tables(tables: list[PointerTable], args: LangevinAdamArguments, backend: str) -> None:
    """One kernel call a table: one table a group, or on a GPU one for each set of dtypes in it."""
    kernel = _backends.implementation("langevin_adam_", backend)
    for table in tables:
        kernel(
            table.table,
            table.layouts,
            table.chunks,
            table.scratch,
            args.lr,
            args.lr_tensor,
            args.temperature,
            args.temperature_tensor,
            args.beta1,
            args.beta2,
            args.eps,
            args.weight_decay,
            args.prior_precision,
            NOISES[args.noise],
            args.flags(),
            args.seed,
            args.grad_scale,
            args.found_inf,
            dtypes=table.dtypes,
        )


def _beta(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"langevin_adam_: {name} must have one element; got shape {tuple(tensor.shape)}")
    return number("langevin_adam_", name, tensor.item(), below=1.0)


def step_lists(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    noise_units: list[Tensor],
    anchors: list[Tensor],
    streams: list[int],
    shards: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    prior_precision: float,
    noise: str,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    bias_correction: bool,
    stochastic_rounding: bool,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None = None,
    beta1_tensor: Tensor | None = None,
    beta2_tensor: Tensor | None = None,
) -> None:
    """The operator ``langevin_adam_``. What kernels cannot read by its address, the reference steps by operators."""
    if not params:
        return
    beta1 = beta1 if beta1_tensor is None else _beta("beta1_tensor", beta1_tensor)
    beta2 = beta2 if beta2_tensor is None else _beta("beta2_tensor", beta2_tensor)
    if noise not in NOISES:
        raise ValueError(f"langevin_adam_: noise must be one of {', '.join(NOISES)}; got {noise!r}")
    check_lists(
        "langevin_adam_",
        params,
        {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps},
        {"max_exp_avg_sqs": max_exp_avg_sqs, "noise_units": noise_units, "anchors": anchors},
        streams,
        shards,
    )
    if amsgrad and not max_exp_avg_sqs:
        raise ValueError(
            "langevin_adam_: max_exp_avg_sqs must hold a tensor a parameter with amsgrad=True; got none"
        )
    rows = [
        Row(
            param=params[i],
            grad=grads[i],
            step=steps[i],
            stream=streams[i],
            exp_avg=exp_avgs[i],
            exp_avg_sq=exp_avg_sqs[i],
            max_exp_avg_sq=max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
            anchor=anchors[i] if anchors else None,
            shard=shard_of(shards, i),
            noise_unit=noise_units[i] if noise_units else None,
        )
        for i in range(len(params))
    ]
    fitted = readable_rows("langevin_adam_", rows)
    plain = [row for row in fitted if row is not None]
    others = [i for i, row in enumerate(fitted) if row is None]
    grads = [grad if row is None else row.grad for row, grad in zip(fitted, grads, strict=True)]
    check_scalars(
        "langevin_adam_", params[0].device, lr_tensor=lr_tensor, temperature_tensor=temperature_tensor,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    if params[0].device.type != "cpu":  # a GPU's kernels read them as float32
        grad_scale = None if grad_scale is None else grad_scale.float()
        found_inf = None if found_inf is None else found_inf.float()
    backend = _backends.choose(params[0].device.type, backend)
    if backend == "reference":
        others = list(range(len(rows)))
    elif plain and others:
        step_numbers(steps)  # nothing must move if one of them has come to its end
    if others:
        lists = (
            some(values, others)
            for values in (
                params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, noise_units, anchors, streams,
            )
        )  # fmt: skip
        _backends.implementation("langevin_adam_", "reference")(
            *lists, some(shards, others, 3), lr, lr_tensor, temperature, temperature_tensor, beta1, beta2, eps,
            weight_decay, prior_precision, noise, amsgrad, maximize, decoupled_weight_decay, bias_correction,
            stochastic_rounding, seed, grad_scale, found_inf,
        )  # fmt: skip
    if backend == "reference" or not plain:
        return
    args = LangevinAdamArguments(
        lr, lr_tensor, temperature, temperature_tensor, beta1, beta2, eps, weight_decay, prior_precision,
        noise, amsgrad, maximize, decoupled_weight_decay, bias_correction, stochastic_rounding, seed, grad_scale,
        found_inf,
    )  # fmt: skip
    step_tables([PointerTable(part) for part in group_rows(plain)], args, backend)


define_in_place(
    "langevin_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] noise_units, Tensor[] anchors, int[] streams, "
    "int[] shards, float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float beta1, "
    "float beta2, float eps, float weight_decay, float prior_precision, str noise, bool amsgrad, bool maximize, "
    "bool decoupled_weight_decay, bool bias_correction, bool stochastic_rounding, int seed, Tensor? grad_scale, "
    "Tensor? found_inf, str? backend=None, Tensor? beta1_tensor=None, Tensor? beta2_tensor=None) -> ()",
    step_lists,
)
