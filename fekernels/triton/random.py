"""Counter-based noise by Triton; the contract and its truth are in fekernels.reference.random."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.launch import EXACT, on_device_of

BITS, UNIFORM, NORMAL = 0, 1, 2

# Two counter blocks per thread: enough independent chains to hide the latency of ten rounds of multiplications.
BLOCK, WARPS = 1024, 4


@triton.jit(
    do_not_specialize=["numel", "seed", "stream", "step", "offset", "purpose"],
    do_not_specialize_on_alignment=["out"],
)
def fill_kernel(
    out,
    numel: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    step: tl.int64,
    offset: tl.int64,
    purpose: tl.int64,
    DRAW: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = element offset + i. ALIGNED: offset is a multiple of 4 and the address of `out` one of 16."""
    # Programs begin at a counter block, so with an odd offset the first few elements fall before `out` begins.
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    skip = offset & 3
    index = begin + (offset - skip)
    seed = tl.cast(seed, tl.int64)
    step = tl.cast(step, tl.uint32)
    stream = tl.cast(stream, tl.uint32)
    purpose = tl.cast(purpose, tl.uint32)
    if DRAW == 2:
        values = numerics.normals_from(index, BLOCK, seed, step, stream, purpose, 4)
    else:
        words = numerics.words_from(index, BLOCK, seed, step, stream, purpose, 4)
        if DRAW == 1:
            values = numerics.uniform(words)
        else:
            values = words.to(tl.int32, bitcast=True)

    lane = tl.arange(0, BLOCK)
    if ALIGNED:
        start = tl.multiple_of(out + begin, 16) + lane
        if begin + BLOCK <= numel:
            tl.store(start, values)
        else:
            tl.store(start, values, mask=begin + lane < numel)
    else:
        element = begin - skip + lane
        tl.store(out + element, values, mask=(element >= 0) & (element < numel))


def _fill(draw: int, out: torch.Tensor, *key: Any) -> None:
    seed, stream, step, offset, purpose = key
    numel = out.numel()
    if numel == 0:
        return
    skip = offset % 4
    aligned = skip == 0 and out.data_ptr() % 16 == 0
    with on_device_of(out):
        fill_kernel[(triton.cdiv(numel + skip, BLOCK),)](
            out, numel, seed, stream, step, offset, purpose, draw, aligned, BLOCK, num_warps=WARPS, **EXACT
        )


def philox_bits(out: torch.Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fills `out` (int32, contiguous) with the raw words of elements offset, offset + 1, ... of the draw."""
    _fill(BITS, out, seed, stream, step, offset, purpose)


def philox_uniform(out: torch.Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fills `out` (float32, contiguous) with uniforms in (0, 1]."""
    _fill(UNIFORM, out, seed, stream, step, offset, purpose)


def philox_normal(out: torch.Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fills `out` (float32, contiguous) with standard normals."""
    _fill(NORMAL, out, seed, stream, step, offset, purpose)
