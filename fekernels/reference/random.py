"""Philox4x32-10 noise in plain PyTorch, bit for bit that of the compiled kernels.

Float32 ``fma`` and ``sqrt`` are made through float64 and rounded once, so that no instruction set of the machine, and
no misrounded vector ``sqrt``, shows in the result.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normals", "philox_bits", "philox_normal", "philox_uniform", "words"]

MASK = 0xFFFFFFFF
CHUNK = 1 << 20  # elements at a time: the int64 and float64 temporaries stay small whatever is asked for


def words(
    count: int, seed: int, stream: int, step: int, offset: int, purpose: int, device: torch.device
) -> Tensor:
    """Words ``offset .. offset + count - 1`` of a draw, as int64 [count] in 0 .. 2^32 - 1."""
    block = torch.arange(offset // 4, (offset + count + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = block & MASK, (block >> 32) | (purpose << 16)
    c2, c3 = torch.full_like(block, step), torch.full_like(block, stream)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps at 2^64, which keeps every bit that is used
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()[offset % 4 :][:count]


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` of float32, rounded once: the float64 sum is rounded to odd, so that no rounding counts twice."""
    product = a.double() * (b.double() if isinstance(b, Tensor) else _float32(b))
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, _float32(c))
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    toward_zero = bits - ((error.view(torch.int64) ^ bits) < 0).long()
    inexact = (error < 0) | (error > 0)
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float64).float()


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def uniforms(word: Tensor) -> Tensor:
    """float32 in (0, 1]: ``fma(float32(word), 2^-32, 2^-33)``."""
    return fma(word.double().float(), 2.0**-32, 2.0**-33)


def minus_two_log(x: Tensor) -> Tensor:
    """-2 log of float32 in (0, 1]: x = 2^e (1 + f), and -2 log(1 + f) = -2 f + f^2 (1 + f P(f)), P minimax."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    poly = torch.full_like(f, -0.17835739254951477)
    for coefficient in (
        0.2870040237903595,
        -0.29753923416137695,
        0.3313126862049103,
        -0.3993079662322998,
        0.5000349283218384,
        -0.6666771769523621,
    ):
        poly = fma(poly, f, coefficient)
    two_log = fma(exponent.float(), 1.3862943649291992, f + f)
    return fma(fma(poly, f, 1.0), f * f, -two_log)


def sincos(word: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi word / 2^32: the quadrant from the top bits, minimax polynomials on [-pi/4, pi/4)."""
    rotated = (word + 0x20000000) & MASK
    x = ((rotated & 0x3FFFFFFF) - 0x20000000).double().float() * _float32(1.46291807926716e-9)
    x2 = x * x
    s = fma(
        fma(torch.full_like(x, -0.0001951729936990887), x2, 0.008332177996635437), x2, -0.16666655242443085
    )
    s = fma(s * x2, x, x)
    c = fma(
        fma(torch.full_like(x, -0.0013591854367405176), x2, 0.041655778884887695), x2, -0.4999988377094269
    )
    c = fma(c, x2, 1.0)
    quadrant = rotated >> 30
    odd = (quadrant & 1).bool()
    sine, cosine = torch.where(odd, c, s), torch.where(odd, s, c)
    return (
        torch.where(quadrant >= 2, -sine, sine),
        torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine),
    )


def normals(
    count: int, seed: int, stream: int, step: int, offset: int, purpose: int, device: torch.device
) -> Tensor:
    """Standard normals ``offset .. offset + count - 1`` of a draw, float32 [count]."""
    first, last = offset // 4 * 4, (offset + count + 3) // 4 * 4
    quads = words(last - first, seed, stream, step, first, purpose, device).view(-1, 2, 2)
    radius = minus_two_log(uniforms(quads[..., 0])).double().sqrt().float()
    sine, cosine = sincos(quads[..., 1])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten()[offset - first :][:count]


def philox_bits(out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fill ``out`` (int32, contiguous) with raw words."""
    flat = out.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        part = flat[at : at + CHUNK]
        drawn = words(part.numel(), seed, stream, step, offset + at, purpose, out.device)
        part.copy_(((drawn << 32) >> 32).int())


def philox_uniform(out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fill ``out`` (float32, contiguous) with uniforms in (0, 1]."""
    flat = out.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        part = flat[at : at + CHUNK]
        part.copy_(uniforms(words(part.numel(), seed, stream, step, offset + at, purpose, out.device)))


def philox_normal(out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
    """Fill ``out`` (float32, contiguous) with standard normals."""
    flat = out.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        part = flat[at : at + CHUNK]
        part.copy_(normals(part.numel(), seed, stream, step, offset + at, purpose, out.device))
