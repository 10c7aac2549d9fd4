"""``sgld_``: one step of stochastic gradient Langevin dynamics over lists of tensors, and over a pointer table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fekernels import _backends
from fekernels._table import FLAGS, PointerTable, Row
from fekernels.ops._library import define_in_place
from fekernels.ops._rows import check_lists, check_row, check_scalars, group_rows, shard_of

__all__ = ["SgldArguments", "step_tables"]


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


def _sgld_(
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
    for i, row in enumerate(rows):
        check_row("sgld_", f"params[{i}]", row)
    check_scalars(
        "sgld_", params[0].device, lr_tensor=lr_tensor, temperature_tensor=temperature_tensor,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    backend = _backends.choose(params[0].device.type, backend)
    args = SgldArguments(
        lr, lr_tensor, temperature, temperature_tensor, weight_decay, prior_precision, maximize, stochastic_rounding,
        seed, grad_scale, found_inf,
    )  # fmt: skip
    if backend == "reference":
        _backends.implementation("sgld_", backend)(
            params, grads, steps, anchors, streams, shards, lr, lr_tensor, temperature, temperature_tensor,
            weight_decay, prior_precision, maximize, stochastic_rounding, seed, grad_scale, found_inf,
        )  # fmt: skip
        return
    step_tables([PointerTable(part) for part in group_rows(rows)], args, backend)


define_in_place(
    "sgld_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, Tensor[] anchors, int[] streams, int[] shards, "
    "float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float weight_decay, "
    "float prior_precision, bool maximize, bool stochastic_rounding, int seed, Tensor? grad_scale, "
    "Tensor? found_inf, str? backend=None) -> ()",
    _sgld_,
)
