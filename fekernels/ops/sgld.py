"""``sgld_``: one step of stochastic gradient Langevin dynamics over lists of tensors, and over a pointer table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fekernels import _backends
from fekernels._table import FLAGS, PointerTable, Row
from fekernels.ops._library import define_in_place
from fekernels.ops._rows import check_lists, check_scalars, group_rows, readable_rows, shard_of, some
from fekernels.reference.langevin_adam import step_numbers

__all__ = ["SgldArguments", "step_lists", "step_tables"]


@dataclass(slots=True)
class SgldArguments:
    """What one step of a parameter group needs besides its tensors; the names are those of ``fe.SGLD``."""

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    weight_decay: float
    prior_precision: float
    maximize: bool
    stochastic_rounding: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def flags(self) -> int:
        """The switches as the kernels' bit set."""
        return FLAGS["maximize"] * self.maximize | FLAGS["stochastic_rounding"] * self.stochastic_rounding


def step_tables(tables: list[PointerTable], args: SgldArguments, backend: str) -> None:
    """One kernel call a table: one table a group, or on a GPU one for each set of dtypes in it."""
    kernel = _backends.implementation("sgld_", backend)
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
            args.weight_decay,
            args.prior_precision,
            args.flags(),
            args.seed,
            args.grad_scale,
            args.found_inf,
            dtypes=table.dtypes,
        )


def step_lists(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor],
    streams: list[int],
    shards: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    weight_decay: float,
    prior_precision: float,
    maximize: bool,
    stochastic_rounding: bool,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None = None,
) -> None:
    """The operator ``sgld_``. What kernels cannot read by its address, the reference steps by operators."""
    if not params:
        return
    check_lists("sgld_", params, {"grads": grads, "steps": steps}, {"anchors": anchors}, streams, shards)
    rows = [
        Row(
            param=params[i],
            grad=grads[i],
            step=steps[i],
            stream=streams[i],
            anchor=anchors[i] if anchors else None,
            shard=shard_of(shards, i),
        )
        for i in range(len(params))
    ]
    fitted = readable_rows("sgld_", rows)
    plain = [row for row in fitted if row is not None]
    others = [i for i, row in enumerate(fitted) if row is None]
    grads = [grad if row is None else row.grad for row, grad in zip(fitted, grads, strict=True)]
    check_scalars(
        "sgld_", params[0].device, lr_tensor=lr_tensor, temperature_tensor=temperature_tensor,
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
        lists = (some(values, others) for values in (params, grads, steps, anchors, streams))
        _backends.implementation("sgld_", "reference")(
            *lists, some(shards, others, 3), lr, lr_tensor, temperature, temperature_tensor, weight_decay,
            prior_precision, maximize, stochastic_rounding, seed, grad_scale, found_inf,
        )  # fmt: skip
    if backend == "reference" or not plain:
        return
    args = SgldArguments(
        lr, lr_tensor, temperature, temperature_tensor, weight_decay, prior_precision, maximize, stochastic_rounding,
        seed, grad_scale, found_inf,
    )  # fmt: skip
    step_tables([PointerTable(part) for part in group_rows(plain)], args, backend)


define_in_place(
    "sgld_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, Tensor[] anchors, int[] streams, int[] shards, "
    "float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float weight_decay, "
    "float prior_precision, bool maximize, bool stochastic_rounding, int seed, Tensor? grad_scale, "
    "Tensor? found_inf, str? backend=None) -> ()",
    step_lists,
)
