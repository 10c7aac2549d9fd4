"""The KL of a mean-field Gaussian to the prior, by Triton.

csrc/formulas/variational_kl.h operation for operation; the formula is in fekernels.reference.optimizers.variational_kl.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from fekernels.triton import functions, numerics
from fekernels.triton.launch import EXACT, on_device_of

BLOCK, WARPS = 4096, 8  # elements whose sums are one pair of doubles


@triton.jit(
    do_not_specialize=["numel"],
    do_not_specialize_on_alignment=["mean", "spread", "sums"],
)
def kl_kernel(
    mean, spread, sums, numel: tl.int64, root_prior_precision, prior_precision, weight_decay, heat,
    DEVIATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[b] of block b's elements: twice the KL, and log r."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < numel
    m = tl.load(mean + at, mask=real, other=0.0)
    s = tl.load(spread + at, mask=real, other=1.0)
    if DEVIATIONS:
        root = s * root_prior_precision
        excess = tl.fma(root, root, tl.zeros_like(root) - 1.0)
        ratio = root * root
    else:
        inverse = numerics.divide(tl.zeros_like(s) + 1.0, s + weight_decay)
        excess = (heat - s) * inverse
        ratio = inverse * (weight_decay + heat)
    value, narrow = functions.negative_log(ratio, excess * -1.0)
    wide = functions.below(excess, functions.log1p_parts(excess, ratio))
    remainder = tl.where(ratio <= 1.0, narrow, wide)
    twice_kl = tl.fma(m * prior_precision, m, remainder)
    log_ratio = excess - remainder
    tl.store(sums + 2 * block, tl.sum(tl.where(real, twice_kl, 0.0).to(tl.float64)))
    tl.store(sums + 2 * block + 1, tl.sum(tl.where(real, log_ratio, 0.0).to(tl.float64)))


def variational_kl(
    mean: torch.Tensor,
    spread: torch.Tensor,
    ess: float,
    weight_decay: float,
    temperature: float,
    deviations: bool,
) -> torch.Tensor:
    """The operator of the same name in fekernels.ops.optimizers: contiguous float32."""
    numel = mean.numel()
    sums = torch.zeros(max(triton.cdiv(numel, BLOCK), 1), 2, dtype=torch.float64, device=mean.device)
    precision = ess * weight_decay
    if numel:
        with on_device_of(mean):
            kl_kernel[(len(sums),)](
                mean, spread, sums, numel, precision**0.5, precision, weight_decay, (temperature - 1) * weight_decay,
                deviations, BLOCK, num_warps=WARPS, **EXACT,
            )  # fmt: skip
    return sums.sum(0) * sums.new_tensor([0.5, 1.0])
