"""Compiles the Triton kernels of the free energy for a GPU that need not be there, and reads the machine code."""

import functools
from typing import Any

from fekernels._catalogue.free_energy import LIKELIHOODS
from fekernels.triton.free_energy import categorical, free_energy, kernels, reparameterize
from fekernels.triton.free_energy import operand_flags as codes
from tests.support.triton.machine_code import Code, machine_code

TYPES = {"sums": "*fp64", "mask": "*u8", "target": "*fp32"}
PARAMS = {row.term: len(row.parameters) for row in LIKELIHOODS if not row.classes} | {
    "normal_kl": 2,
    "normal_prior_kl": 4,
}


def build(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int = 4,
    most: int | None = None,
) -> Code:
    """The kernel compiled; what is in neither `types` nor `constants` has the type that it is annotated with."""
    of = {p.name: types.get(p.name) or p.annotation_type or TYPES.get(p.name, "*fp32") for p in kernel.params}
    return machine_code(kernel, of, constants, capability, warps, most)


@functools.cache
def term(
    name: str, capability: int, shapes: tuple[int, ...] = (0, 0, 0, 0), dtype: str = "*fp32", columns: int = 0
) -> Code:
    """A term with all its gradients, its rows long and aligned unless `columns` says how many of them a tile has."""
    count = PARAMS[name]
    by_columns = codes.COLUMN.value in shapes[:count]
    columns = columns or (free_energy.COLUMNS_OF_BLOCK if by_columns else free_energy.TILE[name])
    code, regions = 0, 1
    for i, shape in enumerate(shapes[:count]):
        region = regions if shape >= codes.ROW.value else 0
        regions += shape >= codes.ROW.value
        code |= (shape | codes.WANTED.value | region * codes.REGION.value) << 8 * i
    constants: dict[str, Any] = dict(
        TERM=name, COUNT=count, OPERANDS=code, PER_ROW=False, ROWS=free_energy.TILE[name] // columns, COLUMNS=columns,
        SEGMENT=columns * (1 if by_columns else free_energy.TILES_OF_SEGMENT), ALIGN=4 if dtype == "*fp32" else 8,
        mask=None, weight=None, upstream=None,
    )  # fmt: skip
    constants |= {f"{kind}{i}": None for kind in ("param", "grad") for i in range(count, 4)}
    if not by_columns:
        constants["column_sums"] = None
    if "kl" in name:
        constants["target"] = None
    types = {f"{kind}{i}": dtype for kind in ("param", "grad") for i in range(count)} | {"target": dtype}
    return build(kernels.terms_kernel, types, constants, capability, most=free_energy.REGISTERS.get(name))


@functools.cache
def other(name: str, capability: int) -> Code:
    """One of the kernels that are not terms."""
    if name == "finalize":
        column = codes.WANTED.value | codes.COLUMN.value
        row = codes.WANTED.value | codes.ROW.value | codes.REGION.value
        scalar = codes.WANTED.value | codes.SCALAR.value | 2 * codes.REGION.value
        final = dict(free_energy.FINAL)
        warps = final.pop("num_warps")
        constants = dict(
            ENERGY=column | row << 8 | scalar << 16, KL=0, PER_ROW=False, TOTALS=True, ROWS=free_energy.FINAL_TILE,
            SEGMENTS=1, weight=None, energy_upstream=None, kl_upstream=None, kl_column_sums=None,
            grad3=None, grad4=None, grad5=None, grad6=None, **final,
        )  # fmt: skip
        types = {"energy_sums": "*fp64", "kl_sums": "*fp64"}
        return build(kernels.finalize_kernel, types, constants, capability, warps)
    if name == "categorical":
        constants = dict(
            PER_ROW=False, ONE_TILE=True, ROWS=1, COLUMNS=1024, ALIGN=4, mask=None, weight=None, upstream=None
        )
        return build(categorical.categorical_kernel, {"target": "*i64"}, constants, capability)
    if name == "scale":
        constants = dict(ALIGNED=True, BLOCK=1024, **{f"tensor{i}": None for i in (1, 2, 3)})
        return build(free_energy.scale_kernel, {}, constants, capability)
    kernel = getattr(reparameterize, f"{name}_kernel")
    constants = dict(PURPOSE=reparameterize.LATENT_SAMPLE, ALIGNED=True, BLOCK=reparameterize.BLOCK)
    return build(kernel, {}, constants, capability, reparameterize.WARPS)
