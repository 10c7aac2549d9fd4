"""The batched free energy by Triton: values and gradients from one read of the operands.

One launch for the energy, one for the KL, one for what both left to be summed. The contract and its truth are in
fekernels.reference.free_energy.free_energy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, MEAN, NONE
from fekernels.triton.free_energy import broadcasting as operands
from fekernels.triton.free_energy import categorical, kernels
from fekernels.triton.free_energy import operand_flags as codes
from fekernels.triton.launch import EXACT, on_device_of

TERMS = tuple(row.term for row in LIKELIHOODS)

# Elements of a tile, four or eight per thread: as many as fit in registers with enough programs to hide the latency.
TILE = dict.fromkeys((*TERMS, "normal_kl", "normal_prior_kl"), 512) | dict.fromkeys(
    ("mse", "gaussian", "gaussian_learned", "bernoulli", "laplace"), 1024
)
WARPS = 4
REGISTERS = {
    "zero_inflated_negative_binomial": 255
}  # left alone, ptxas spills for the sake of a third program
TILES_OF_SEGMENT = 4  # that a program goes through in a row
COLUMNS_OF_BLOCK = 128  # of a program that sums over rows
STEPS_OF_BLOCK = 8  # its tiles, one below the other, at least
PROGRAMS = 16384  # about as many leave a sum each; more would keep the one that adds those up
FINAL = {"BLOCK": 4096, "BLOCKS": 16, "COLUMNS": 128, "num_warps": 8}
FINAL_TILE = 1024


@dataclass
class Sums:
    """What a term's launch left for the last one. regions: of `sums`, one for the values, others for gradients."""

    code: int = 0
    grads: Sequence[Tensor | None] = ()
    sums: Tensor | None = None
    region: int = 0
    column_sums: Tensor | None = None
    segments: int = 0
    programs: int = 0
    blocks: int = 0
    columns: int = 0
    by_rows: bool = False
    by_scalars: bool = False
    column_operands: int = 0
    written: list[Tensor] = field(default_factory=list)  # gradients, in order

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.sums, self.region, self.column_sums, self.blocks * self.columns,
            self.segments, self.programs, self.blocks, self.columns,
        )  # fmt: skip


def power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(columns: int, tensors: Sequence[Tensor]) -> int:
    """The largest 1, 2, 4 or 8 elements that all rows can be cut into, each a piece on an aligned address."""
    most = 8 if any(t.element_size() == 2 for t in tensors) else 4  # 16 bytes of the narrowest
    found = math.gcd(columns, most, *(t.stride(0) for t in tensors if t.shape[0] > 1))
    while any(t.data_ptr() % min(found * t.element_size(), 16) for t in tensors):
        found //= 2
    return found


def shape_of(operand: Tensor, rows: int, columns: int) -> int:
    """How the operand broadcasts to [rows, columns]."""
    if operand.shape[0] == rows:
        full, one = codes.FULL.value, codes.ROW.value
    else:
        full, one = codes.COLUMN.value, codes.SCALAR.value
    return full if operand.shape[1] == columns else one


def gradients_of(inputs: Sequence[Tensor], needs: int, inplace: bool, make: Any) -> list[Tensor | None]:
    """A tensor for each gradient that is wanted."""
    return [
        (t if inplace and i == 0 else make(t.shape, dtype=t.dtype, device=t.device))
        if needs >> i & 1
        else None
        for i, t in enumerate(inputs)
    ]


def run_term(
    term: str,
    inputs: Sequence[Tensor],
    rows: int,
    columns: int,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    upstream: Tensor | None,
    scale: float,
    needs: int,
    per_row: bool,
    inplace: bool,
) -> Sums:
    """Launches one term. The last launch has still to add up what it left."""
    if rows * columns == 0:
        grads = gradients_of(inputs, needs, inplace, torch.zeros)
        return Sums(written=[g for g in grads if g is not None])
    grads = gradients_of(inputs, needs, inplace, torch.empty)
    result = Sums(columns=columns, grads=grads, written=[g for g in grads if g is not None])
    shapes = [shape_of(t, rows, columns) for t in inputs]
    regions = 1
    for i, shape in enumerate(shapes):
        code = shape
        if grads[i] is not None:
            code |= codes.WANTED.value
            if shape == codes.COLUMN.value:
                code |= result.column_operands * codes.REGION.value
                result.column_operands += 1
            elif shape != codes.FULL.value:
                code |= regions * codes.REGION.value
                regions += 1
                result.by_rows |= shape == codes.ROW.value
                result.by_scalars |= shape == codes.SCALAR.value
        result.code |= code << 8 * i

    # A row's sums depend on the tiling, and that on nothing but the number of columns and the operands' shapes.
    tile = TILE[term]
    if result.column_operands:
        tile_columns = min(max(power_of_two(columns), 4), COLUMNS_OF_BLOCK)
        segment = tile_columns
    else:
        tile_columns = min(max(power_of_two(columns), 4), tile)
        segment = tile_columns * TILES_OF_SEGMENT
    tile_rows = tile // tile_columns
    result.segments = triton.cdiv(columns, segment)
    steps = 1
    if result.column_operands:
        steps = min(max(triton.cdiv(rows, tile_rows * 512), STEPS_OF_BLOCK), 8 * STEPS_OF_BLOCK)
    elif not per_row:
        steps = min(triton.cdiv(triton.cdiv(rows, tile_rows) * result.segments, PROGRAMS), 64)
    result.blocks = triton.cdiv(rows, tile_rows * steps)
    result.programs = result.blocks * result.segments
    result.region = rows * result.segments if per_row or result.by_rows else result.programs
    device = inputs[0].device
    result.sums = torch.empty(regions * result.region, dtype=torch.float64, device=device)
    if result.column_operands:
        size = result.column_operands * result.blocks * columns
        result.column_sums = torch.empty(size, dtype=torch.float32, device=device)

    full = [
        t
        for t, shape in zip((*inputs, *grads), (*shapes, *shapes), strict=True)
        if t is not None and shape == 0
    ]
    full += [t for t in (target, mask) if t is not None]
    align = alignment(columns, full)
    pitches = [
        t.stride(0) // align if shape == 0 else t.stride(0) for t, shape in zip(inputs, shapes, strict=True)
    ]
    missing = 4 - len(inputs)
    kernels.terms_kernel[(result.programs,)](
        *inputs, *(None,) * missing, *pitches, *(0,) * missing,
        target, 0 if target is None else target.stride(0) // align,
        None if mask is None else mask.view(torch.uint8), 0 if mask is None else mask.stride(0) // align,
        weight, upstream, *grads, *(None,) * missing,
        result.sums, result.region, result.column_sums, result.blocks * columns,
        rows, columns, result.segments, steps, scale,
        term, len(inputs), result.code, per_row, tile_rows, tile_columns, segment, align,
        num_warps=WARPS, maxnreg=REGISTERS.get(term), **EXACT,
    )  # fmt: skip
    return result


def run_categorical(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    upstream: Tensor | None,
    scale: float,
    needs: int,
    per_row: bool,
    inplace: bool,
) -> Sums:
    """`run_term` for logits [B, P, K]."""
    rows, positions, classes = logits.shape
    if logits.numel() == 0:
        grads = gradients_of([logits], needs, inplace, torch.zeros)
        return Sums(written=[g for g in grads if g is not None])
    grads = gradients_of([logits], needs, inplace, torch.empty)
    result = Sums(segments=positions, written=[g for g in grads if g is not None])
    tile_columns = min(max(power_of_two(classes), 4), 4096)
    tile_rows = max(1024 // tile_columns, 1)
    result.programs = triton.cdiv(rows * positions, tile_rows)
    result.sums = torch.empty(
        rows * positions if per_row else result.programs, dtype=torch.float64, device=logits.device
    )
    flat = [t.view(-1, classes) for t in (logits, grads[0]) if t is not None]
    categorical.categorical_kernel[(result.programs,)](
        logits, target.contiguous(), None if mask is None else mask.contiguous().view(torch.uint8), weight, upstream,
        grads[0], result.sums, rows * positions, positions, classes, scale,
        per_row, classes <= tile_columns, tile_rows, tile_columns, alignment(classes, flat),
        num_warps=WARPS if tile_columns <= 1024 else 2 * WARPS, **EXACT,
    )  # fmt: skip
    return result


def free_energy(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    upstream: list[Tensor],
    likelihood: int,
    reduction: int,
    beta: float,
    needs: int,
    inplace: bool,
    latent_mask: Tensor | None = None,
) -> list[Tensor]:
    """[free_energy, energy, kl, *gradients], as the function of this name in fekernels.reference.free_energy."""
    first = latent[0] if target is None else target
    rows = first.shape[0]
    per_row = reduction == NONE
    scale = 1.0 / rows if reduction == MEAN and rows > 0 else 1.0
    energy_upstream, kl_upstream = upstream or (None, None)
    with on_device_of(first):
        energy, kl = Sums(), Sums()
        if target is not None and likelihood == CATEGORICAL:
            energy = run_categorical(
                params[0], target, mask, weight, energy_upstream, scale, needs, per_row, inplace
            )
        elif target is not None:
            energy = run_term(
                TERMS[likelihood], params, rows, target.shape[1], target, mask, weight, energy_upstream, scale,
                needs, per_row, inplace,
            )  # fmt: skip
        if latent:
            kl = run_term(
                "normal_kl" if len(latent) == 2 else "normal_prior_kl", latent, rows, latent[0].shape[1], None,
                latent_mask, weight, kl_upstream, scale, needs >> len(params), per_row, False,
            )  # fmt: skip

        shape = (rows,) if per_row else ()
        values = [torch.empty(shape, dtype=torch.float32, device=first.device) for _ in range(3)]
        segments = min(power_of_two(max(energy.segments, kl.segments)), 64)
        by_rows = per_row or energy.by_rows or kl.by_rows
        row_tiles = triton.cdiv(rows, FINAL_TILE // segments) if by_rows else 0
        totals = not per_row or energy.by_scalars or kl.by_scalars
        tiles = sum(
            term.column_operands * triton.cdiv(term.columns, FINAL["COLUMNS"]) for term in (energy, kl)
        )
        programs = row_tiles + totals + tiles
        if programs:
            kernels.finalize_kernel[(programs,)](
                *values, weight, energy_upstream, kl_upstream, *energy.arguments(), *kl.arguments(),
                *energy.grads, *(None,) * (3 - len(energy.grads)), *kl.grads, *(None,) * (4 - len(kl.grads)),
                rows, row_tiles, scale, beta, float(rows) if reduction == MEAN else 1.0,
                energy.code, kl.code, per_row, totals, FINAL_TILE // segments, segments, **FINAL, **EXACT,
            )  # fmt: skip
    return [*values, *energy.written, *kl.written]


@triton.jit(
    do_not_specialize=["count0", "count1", "count2", "count3"],
    do_not_specialize_on_alignment=["tensor0", "tensor1", "tensor2", "tensor3", "factor"],
)
def scale_kernel(
    tensor0, tensor1, tensor2, tensor3, count0: tl.int64, count1: tl.int64, count2: tl.int64, count3: tl.int64, factor,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tensor program_id(1) *= factor[0], unless that is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        tensors = (tensor0, tensor1, tensor2, tensor3)
        counts = (count0, count1, count2, count3)
        for i in tl.static_range(4):
            if tensors[i] is not None:
                if tl.program_id(1) == i:
                    start = tl.program_id(0).to(tl.int64) * BLOCK
                    for at in range(start, counts[i], tl.num_programs(0) * BLOCK):
                        index = at + tl.arange(0, BLOCK)
                        valid = index < counts[i]
                        base = tensors[i] + at
                        if ALIGNED:
                            base = tl.multiple_of(base, 16)
                            valid = index // 8 < tl.cdiv(counts[i], 8)
                        pointers = base + tl.arange(0, BLOCK)
                        value = operands.widen(tl.load(pointers, mask=valid, other=0)) * by
                        tl.store(pointers, operands.narrow(value, tensors[i].dtype.element_ty), mask=valid)


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies contiguous tensors in place by a one-element tensor; a factor of 1 costs a launch and no traffic."""
    todo = [t for t in tensors if t.numel()]
    for begin in range(0, len(todo), 4):
        group = todo[begin : begin + 4]
        aligned = all(t.data_ptr() % 16 == 0 and t.numel() % 8 == 0 for t in group)
        missing = 4 - len(group)
        programs = min(triton.cdiv(max(t.numel() for t in group), 1024), 2048)
        with on_device_of(factor):
            scale_kernel[(programs, len(group))](
                *group, *(None,) * missing, *(t.numel() for t in group), *(0,) * missing, factor, aligned, 1024,
                num_warps=4, **EXACT,
            )  # fmt: skip
