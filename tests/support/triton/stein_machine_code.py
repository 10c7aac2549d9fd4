"""Compiles the Triton Stein kernels for a GPU that need not be there, and reads the machine code."""

import functools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fekernels.triton.stein import direct, sq_dist_rank, svgd_direction, tiles
from fekernels.triton.stein import kernels as stein
from fekernels.triton.stein import strip_kernels as strips
from fekernels.triton.stein.strips import PAIRS, ROWS
from tests.support.triton.machine_code import Code

COUNTS = (
    "n", "d", "m", "padded", "per_split", "pitch", "width", "strip", "part", "parts", "first_row", "tile_count",
    "segment", "ranks", "blocks", "first_block",
)  # fmt: skip
MULTIPLES = ("padded", "per_split", "pitch", "width", "strip", "part")  # of 16, always
NUMBERS = ("beta", "c", "diagonal", "temperature", "base", "factor")
HALVES = ("x_high", "x_low", "v_high", "v_low")
WIDE = {"state": "*i64", "counts": "*i64", "totals": "*fp64"}


@functools.cache
def _build(
    kernel: Any, constants: tuple[tuple[str, Any], ...], capability: int, warps: int, stages: int
) -> Code:
    fixed = dict(constants)
    types = {}
    for p in kernel.params:
        kind = (
            "i32"
            if p.name in COUNTS
            else "fp32"
            if p.name in NUMBERS
            else "*fp16"
            if p.name in HALVES
            else "*fp32"
        )
        types[p.name] = "constexpr" if p.name in fixed else WIDE.get(p.name) or p.annotation_type or kind
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name in MULTIPLES]
    source = ASTSource(
        fn=kernel, signature=types, constexprs=fixed, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": warps, "num_stages": stages, **stein.OPTIONS}
    return Code(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def build(kernel: Any, capability: int, warps: int = 4, stages: int = 3, **constants: Any) -> Code:
    return _build(kernel, tuple(constants.items()), capability, warps, stages)


def tile(kernel: int, width: int, capability: int, split: bool = True, sums: str = "kg") -> Code:
    """The tile kernel in its own configuration. sums: of "k", "g" or both in one launch; rbf has no g of its own."""
    sum_g = "g" in sums and kernel != stein.RBF.value
    sum_k = "k" in sums
    m, n, warps, stages = svgd_direction.tile_configuration(capability in (90, 100), width, sum_k and sum_g)
    missing = ([] if split else ["x_low", "v_low"]) + ([] if kernel != stein.RBF.value else ["sums_x"])
    return build(
        tiles.tile_direction_kernel, capability, warps, KERNEL=kernel, SPLIT=split, SUM_K=sum_k, SUM_G=sum_g, D=width,
        M=m, N=n, STAGES=stages, FIRST=0, **dict.fromkeys(missing),
    )  # fmt: skip


def other(name: str, capability: int) -> Code:
    """One of the other kernels."""
    if name.startswith("direct"):
        d = int(name[6:])
        m, n = svgd_direction.DIRECT_TILE[d]
        return build(
            direct.direction_kernel, capability, svgd_direction.DIRECT_WARPS, KERNEL=0, D=d, M=m, N=n,
            STRETCH=svgd_direction.STRETCH, partial=None,
        )  # fmt: skip
    if name == "inner":
        depth = 32 if capability in (90, 100) else 16
        return build(strips.inner_kernel, capability, 4, 2, PRECISION="tf32x3", M=ROWS, N=ROWS, D=depth)
    if name == "product":
        return build(
            strips.product_kernel, capability, 4, 2, PRECISION="tf32x3", ADD=False, M=ROWS, N=32, D=64
        )
    if name == "quadratic":
        return build(strips.quadratic_kernel, capability, 4, 2, M=ROWS, N=32, D=64)
    if name == "pairs":
        mode = strips.BACKWARD.value
        return build(strips.pairs_kernel, capability, 8, KERNEL=1, MODE=mode, PRECISION="tf32x3", **PAIRS)
    assert name == "count"
    return build(sq_dist_rank.count_kernel, capability, M=64, N=64)
