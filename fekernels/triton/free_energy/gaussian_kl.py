"""The terms of Gaussian KL divergences, operation for operation as in csrc/formulas/gaussian_kl.h."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import functions as f


@triton.jit
def normal_kl(m, v):
    """KL(N(m, e^v) || N(0, 1))."""
    value, remainder = f.half_expm1(v)
    return tl.fma(m * 0.5, m, remainder), m, value


@triton.jit
def normal_prior_kl(m, v, p, w):
    """KL(N(m, e^v) || N(p, e^w))."""
    d = v - w
    back = d - v
    low = tl.where(f.absolute(d) < f.INF, (v - (d - back)) - (w + back), 0.0)
    value, remainder = f.half_expm1(d)
    root = f.exponential(w * -0.5)
    scaled = f.times(m - p, root)
    half_scaled = scaled * 0.5
    bounded = tl.where(value > 3e38, 3e38, value)
    growth = tl.fma(low, bounded + 0.5, value)
    e = tl.fma(half_scaled, scaled, tl.fma(low, bounded, remainder))
    slope = f.times(scaled, root)
    return e, slope, growth, slope * -1.0, tl.fma(half_scaled * -1.0, scaled, growth * -1.0)
