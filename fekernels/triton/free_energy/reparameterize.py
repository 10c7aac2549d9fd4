"""z = mean + exp(logvar / 2) eps by Triton; contract and truth: fekernels.reference.free_energy.reparameterize.

The noise is made where it is used, in the backward pass again: it is never stored.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels.triton import functions as f
from fekernels.triton import numerics
from fekernels.triton.free_energy import broadcasting as operands
from fekernels.triton.launch import EXACT, on_device_of

BLOCK, WARPS = 512, 4


@triton.jit
def elements(program, skip, numel, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a program begins, its elements, and which exist. The first program's first `skip` lie before element 0.

    ALIGNED: skip is 0, and existing elements come in fours.
    """
    begin = program.to(tl.int64) * BLOCK - skip
    lane = tl.arange(0, BLOCK)
    element = begin + lane
    if ALIGNED:
        return begin, lane, lane // 4 < tl.minimum(numel - begin, BLOCK).to(tl.int32) // 4
    else:
        return begin, lane, (element >= 0) & (element < numel)


@triton.jit
def pointers(pointer, begin, lane, ALIGNED: tl.constexpr):
    """Addresses of a program's elements. ALIGNED promises what four of the narrowest need."""
    start = pointer + begin
    if ALIGNED:
        start = tl.multiple_of(start, 4 * pointer.dtype.element_ty.primitive_bitwidth // 8)
    return start + lane


@triton.jit
def deviation(logvar, begin, lane, valid, ALIGNED: tl.constexpr):
    """exp(logvar / 2)."""
    value = tl.load(pointers(logvar, begin, lane, ALIGNED), mask=valid, other=0)
    return f.exp(operands.widen(value) * 0.5)


@triton.jit(
    do_not_specialize=["numel", "first", "seed", "stream", "step", "skip"],
    do_not_specialize_on_alignment=["mean", "logvar", "out"],
)
def reparameterize_kernel(
    mean, logvar, out, numel: tl.int64, first: tl.int64, skip: tl.int32, seed: tl.int64, stream: tl.int64,
    step: tl.int64, PURPOSE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k] of sample k = program_id(1). first: the global index of the first program's first lane."""
    begin, lane, valid = elements(tl.program_id(0), skip, numel, BLOCK, ALIGNED)
    sample = tl.program_id(1)
    index = first + tl.program_id(0).to(tl.int64) * BLOCK
    eps = numerics.normals_from(
        index, BLOCK, tl.cast(seed, tl.int64), tl.cast(step, tl.uint32), tl.cast(stream + sample, tl.uint32),
        tl.full((), PURPOSE, tl.uint32), 4,
    )  # fmt: skip
    sd = deviation(logvar, begin, lane, valid, ALIGNED)
    center = operands.widen(tl.load(pointers(mean, begin, lane, ALIGNED), mask=valid, other=0))
    value = operands.narrow(tl.fma(sd, eps, center), out.dtype.element_ty)
    tl.store(pointers(out, sample.to(tl.int64) * numel + begin, lane, ALIGNED), value, mask=valid)


@triton.jit(
    do_not_specialize=["numel", "samples", "first", "seed", "stream", "step", "skip"],
    do_not_specialize_on_alignment=["grad", "logvar", "grad_mean", "grad_logvar"],
)
def reparameterize_backward_kernel(
    grad, logvar, grad_mean, grad_logvar, numel: tl.int64, samples: tl.int32, first: tl.int64, skip: tl.int32,
    seed: tl.int64, stream: tl.int64, step: tl.int64, PURPOSE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over samples, in their order, of the gradient and of its product with the noise."""
    begin, lane, valid = elements(tl.program_id(0), skip, numel, BLOCK, ALIGNED)
    index = first + tl.program_id(0).to(tl.int64) * BLOCK
    # The sum is its first value at first, also if that is -0: so it begins at -0, which `tl.full` would lose.
    of_mean = tl.zeros((BLOCK,), tl.float32) * -1.0
    along_eps = tl.zeros((BLOCK,), tl.float32)
    for sample in range(samples):
        eps = numerics.normals_from(
            index, BLOCK, tl.cast(seed, tl.int64), tl.cast(step, tl.uint32), tl.cast(stream + sample, tl.uint32),
            tl.full((), PURPOSE, tl.uint32), 4,
        )  # fmt: skip
        start = tl.cast(sample, tl.int64) * numel + begin
        slope = operands.widen(tl.load(pointers(grad, start, lane, ALIGNED), mask=valid, other=0))
        of_mean += slope
        along_eps = tl.fma(slope, eps, along_eps)
    along_eps = deviation(logvar, begin, lane, valid, ALIGNED) * 0.5 * along_eps
    value = operands.narrow(of_mean, grad_mean.dtype.element_ty)
    tl.store(pointers(grad_mean, begin, lane, ALIGNED), value, mask=valid)
    value = operands.narrow(along_eps, grad_logvar.dtype.element_ty)
    tl.store(pointers(grad_logvar, begin, lane, ALIGNED), value, mask=valid)


def aligned(tensors: list[Tensor], numel: int, skip: int) -> bool:
    """Whether every four elements from a counter block on are one aligned piece."""
    return skip == 0 and numel % 4 == 0 and all(t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors)


def reparameterize(
    mean: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int, samples: int
) -> Tensor:
    """z [samples, B, Z], as the function of this name in fekernels.reference.free_energy.reparameterize."""
    out = torch.empty((samples, *mean.shape), dtype=mean.dtype, device=mean.device)
    numel = mean.numel()
    if out.numel() == 0:
        return out
    first = offset * mean.shape[1]
    skip = first % 4
    with on_device_of(mean):
        reparameterize_kernel[(triton.cdiv(numel + skip, BLOCK), samples)](
            mean, logvar, out, numel, first - skip, skip, seed, stream, step, LATENT_SAMPLE,
            aligned([mean, logvar, out], numel, skip), BLOCK, num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return out


def reparameterize_backward(
    grad: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int
) -> list[Tensor]:
    """[d_mean, d_logvar] [B, Z], as the function of this name in fekernels.reference.free_energy.reparameterize."""
    samples, numel = grad.shape[0], logvar.numel()
    grad_mean = torch.empty(logvar.shape, dtype=grad.dtype, device=grad.device)
    grad_logvar = torch.empty_like(logvar)
    if numel == 0:
        return [grad_mean, grad_logvar]
    if samples == 0:
        return [grad_mean.zero_(), grad_logvar.zero_()]
    first = offset * logvar.shape[1]
    skip = first % 4
    with on_device_of(grad):
        reparameterize_backward_kernel[(triton.cdiv(numel + skip, BLOCK),)](
            grad, logvar, grad_mean, grad_logvar, numel, samples, first - skip, skip, seed, stream, step, LATENT_SAMPLE,
            aligned([grad, logvar, grad_mean, grad_logvar], numel, skip), BLOCK, num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return [grad_mean, grad_logvar]
