"""``langevin_adam_``: one step of Langevin-Adam over lists of tensors, and the same over a pointer table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fekernels import _backends
from fekernels._table import FLAGS, NOISES, PointerTable, Row
from fekernels.ops._library import define_in_place
from fekernels.ops._rows import check_lists, check_row, check_scalars, group_rows, shard_of

__all__ = ["LangevinAdamArguments", "step_tables"]


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


def _langevin_adam_(
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
) -> None:
    if not params:
        return
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
    for i, row in enumerate(rows):
        check_row("langevin_adam_", f"params[{i}]", row)
    check_scalars(
        "langevin_adam_", params[0].device, lr_tensor=lr_tensor, temperature_tensor=temperature_tensor,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    backend = _backends.choose(params[0].device.type, backend)
    if backend == "reference":
        _backends.implementation("langevin_adam_", backend)(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, noise_units, anchors, streams, shards,
            lr, lr_tensor, temperature, temperature_tensor, beta1, beta2, eps, weight_decay, prior_precision, noise,
            amsgrad, maximize, decoupled_weight_decay, bias_correction, stochastic_rounding, seed, grad_scale,
            found_inf,
        )  # fmt: skip
        return
    args = LangevinAdamArguments(
        lr, lr_tensor, temperature, temperature_tensor, beta1, beta2, eps, weight_decay, prior_precision,
        noise, amsgrad, maximize, decoupled_weight_decay, bias_correction, stochastic_rounding, seed, grad_scale,
        found_inf,
    )  # fmt: skip
    step_tables([PointerTable(part) for part in group_rows(rows)], args, backend)


define_in_place(
    "langevin_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] noise_units, Tensor[] anchors, int[] streams, "
    "int[] shards, float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float beta1, "
    "float beta2, float eps, float weight_decay, float prior_precision, str noise, bool amsgrad, bool maximize, "
    "bool decoupled_weight_decay, bool bias_correction, bool stochastic_rounding, int seed, Tensor? grad_scale, "
    "Tensor? found_inf, str? backend=None) -> ()",
    _langevin_adam_,
)
