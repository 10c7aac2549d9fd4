"""Device functions for noise and rounding: csrc/core/{philox,normal,bf16}.h operation for operation.

The bits agree with the C++ and CUDA kernels because every operation is an IEEE +, -, *, fma, division or square root
with one rounding, or on integers; each fma is written out. Launch with `enable_fp_fusion=False`, or the compiler would
make more of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def square_root(x):
    """Correctly rounded, float32 and float64 (`tl.sqrt` is approximate in float32, `tl.sqrt_rn` has no float64)."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded, float32 and float64."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def flushed(average, ABOVE: tl.constexpr):
    """`flushed` of csrc/formulas/step.h: 0 below 2^ABOVE times the smallest normal number."""
    if average.dtype == tl.float64:
        smallest = tl.full((), 2.2250738585072014e-308 * 2.0**ABOVE, tl.float64)
        return tl.where((average < smallest) & (average > smallest * -1.0), 0.0, average)
    else:
        exponent = average.to(tl.int32, bitcast=True) & (~(ABOVE << 23) & 0x7F800000)
        return tl.where(exponent == 0, 0.0, average)


@triton.jit
def integer_power(base, exponent):
    """base^exponent (float64, uint32) by repeated squaring."""
    result = tl.full((), 1.0, tl.float64)
    while exponent != 0:
        if exponent & 1 != 0:
            result *= base
        base *= base
        exponent = exponent >> 1
    return result


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011). c0, c1: uint32 tensors; the others uint32 of their shape or scalars."""
    for _ in tl.static_range(10):
        # One widening multiplication each; `tl.umulhi` and a product would be two.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def noise_words(counter, seed, step, stream, purpose):
    """The four words of each counter block (int64 tensor, below 2^48). seed: int64; the others uint32 scalars."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32) | (purpose << 16)
    zero = low ^ low
    return philox(low, high, zero + step, zero + stream, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def alternate(x, y):
    """x[0], y[0], x[1], ...: two [N] tensors as one [2 N]."""
    return tl.reshape(tl.join(x, y), (2 * x.shape[0],))


@triton.jit
def interleave(x, y, z, w):
    """x[0], y[0], z[0], w[0], x[1], ...: four [N] tensors as one [4 N]."""
    return tl.reshape(tl.join(tl.join(x, z), tl.join(y, w)), (4 * x.shape[0],))


@triton.jit
def pick(index, x, y, z, w):
    """Word `index` % 4 of each element's four."""
    return tl.where(index & 2 != 0, tl.where(index & 1 != 0, w, z), tl.where(index & 1 != 0, y, x))


@triton.jit
def uniform(word):
    """(0, 1], from a uint32."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def minus_two_log(x):
    """-2 log x of a positive normal float32."""
    bits = x.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    f = (bits - (exponent.to(tl.uint32, bitcast=True) << 23)).to(tl.float32, bitcast=True) - 1.0
    poly = tl.fma(f, -0.17835739254951477, 0.2870040237903595)
    poly = tl.fma(poly, f, -0.29753923416137695)
    poly = tl.fma(poly, f, 0.3313126862049103)
    poly = tl.fma(poly, f, -0.3993079662322998)
    poly = tl.fma(poly, f, 0.5000349283218384)
    poly = tl.fma(poly, f, -0.6666771769523621)
    two_log = tl.fma(exponent.to(tl.float32), 1.3862943649291992, f + f)
    return tl.fma(tl.fma(poly, f, 1.0), f * f, two_log * -1.0)


@triton.jit
def sincos_of_word(word):
    """sin and cos of 2 pi word / 2^32."""
    rotated = word + 0x20000000
    x = ((rotated & 0x3FFFFFFF) - 0x20000000).to(tl.int32, bitcast=True).to(tl.float32) * 1.46291807926716e-9
    x2 = x * x
    s = tl.fma(x2, -0.0001951729936990887, 0.008332177996635437)
    s = tl.fma(s, x2, -0.16666655242443085)
    s = tl.fma(s * x2, x, x)
    c = tl.fma(x2, -0.0013591854367405176, 0.041655778884887695)
    c = tl.fma(c, x2, -0.4999988377094269)
    c = tl.fma(c, x2, 1.0)
    s_bits = s.to(tl.uint32, bitcast=True)
    c_bits = c.to(tl.uint32, bitcast=True)
    odd = rotated & 0x40000000 != 0
    sine = tl.where(odd, c_bits, s_bits) ^ (rotated & 0x80000000)
    cosine = tl.where(odd, s_bits, c_bits) ^ ((rotated + 0x40000000) & 0x80000000)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(a, b):
    """Two independent normals from two words (Box & Muller 1958)."""
    radius = tl.sqrt_rn(minus_two_log(uniform(a)))
    sine, cosine = sincos_of_word(b)
    return radius * cosine, radius * sine


@triton.jit
def words_from(index, COUNT: tl.constexpr, seed, step, stream, purpose, GROUP: tl.constexpr):
    """Words of elements index .. index + COUNT - 1, in order; index (int64 scalar) is a multiple of 4.

    GROUP (4 or 8): elements that a thread should hold in a row. 8 draws even and odd counters apart, as otherwise the
    compiler moves every word through shared memory to bring two counters' words to one thread.
    """
    counter = index >> 2
    if GROUP == 8:
        counter += 2 * tl.arange(0, COUNT // 8)
        x0, y0, z0, w0 = noise_words(counter, seed, step, stream, purpose)
        x1, y1, z1, w1 = noise_words(counter + 1, seed, step, stream, purpose)
        return interleave(alternate(x0, x1), alternate(y0, y1), alternate(z0, z1), alternate(w0, w1))
    else:
        x, y, z, w = noise_words(counter + tl.arange(0, COUNT // 4), seed, step, stream, purpose)
        return interleave(x, y, z, w)


@triton.jit
def words_at(index, seed, step, stream, purpose):
    """Word of each element of `index` (int64 tensor): four times the work of `words_from`."""
    x, y, z, w = noise_words(index >> 2, seed, step, stream, purpose)
    return pick(index, x, y, z, w)


@triton.jit
def counter_normals(counter, seed, step, stream, purpose):
    """The four normals of each counter block."""
    x, y, z, w = noise_words(counter, seed, step, stream, purpose)
    first, second = box_muller(x, y)
    third, fourth = box_muller(z, w)
    return first, second, third, fourth


@triton.jit
def normals_from(index, COUNT: tl.constexpr, seed, step, stream, purpose, GROUP: tl.constexpr):
    """As `words_from`, standard normal float32."""
    counter = index >> 2
    if GROUP == 8:
        counter += 2 * tl.arange(0, COUNT // 8)
        x0, y0, z0, w0 = counter_normals(counter, seed, step, stream, purpose)
        x1, y1, z1, w1 = counter_normals(counter + 1, seed, step, stream, purpose)
        return interleave(alternate(x0, x1), alternate(y0, y1), alternate(z0, z1), alternate(w0, w1))
    else:
        x, y, z, w = counter_normals(counter + tl.arange(0, COUNT // 4), seed, step, stream, purpose)
        return interleave(x, y, z, w)


@triton.jit
def normals_at(index, seed, step, stream, purpose):
    """As `words_at`, standard normal float32."""
    x, y, z, w = noise_words(index >> 2, seed, step, stream, purpose)
    upper = index & 2 != 0
    first, second = box_muller(tl.where(upper, z, x), tl.where(upper, w, y))
    return tl.where(index & 1 != 0, second, first)


@triton.jit
def halves_from(index, COUNT: tl.constexpr, seed, step, stream, purpose):
    """Elements index .. index + COUNT - 1 of the sequence of 16-bit halves of the words; index is a multiple of 8."""
    x, y, z, w = noise_words((index >> 3) + tl.arange(0, COUNT // 8), seed, step, stream, purpose)
    low = interleave(x & 0xFFFF, y & 0xFFFF, z & 0xFFFF, w & 0xFFFF)
    high = interleave(x >> 16, y >> 16, z >> 16, w >> 16)
    return alternate(low, high)


@triton.jit
def halves_at(index, seed, step, stream, purpose):
    """Half of each element of `index` (int64 tensor)."""
    word = words_at(index >> 1, seed, step, stream, purpose)
    return tl.where(index & 1 != 0, word >> 16, word & 0xFFFF)


@triton.jit
def bf16_to_float(h):
    """From bits (uint16). By integers, as Triton's interpreter gets bfloat16 arithmetic wrong."""
    return (h.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_truncate(bits, added):
    """The upper 16 bits of `bits + added`; infinities stay, NaNs stay quiet NaNs."""
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.where(magnitude >= 0x7F800000, bits, bits + added) >> 16
    return tl.where(magnitude > 0x7F800000, rounded | 0x40, rounded).to(tl.uint16)


@triton.jit
def float_to_bf16(x):
    """Bits of the nearest bfloat16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    return bf16_truncate(bits, ((bits >> 16) & 1) + 0x7FFF)


@triton.jit
def float_to_bf16_stochastic(x, sixteen_bits):
    """Bits of a neighbouring bfloat16, so that the mean is x; sixteen_bits: uint32 below 2^16."""
    return bf16_truncate(x.to(tl.uint32, bitcast=True), sixteen_bits)


@triton.jit
def fp16_to_float(h):
    """From bits (uint16)."""
    shifted = (h.to(tl.uint32) & 0x7FFF) << 13
    scaled = (shifted.to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0).to(
        tl.uint32, bitcast=True
    )
    magnitude = tl.where(shifted >= 0x0F800000, scaled | 0x7F800000, scaled)
    return (magnitude | ((h.to(tl.uint32) & 0x8000) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def float_to_fp16(x):
    """Bits of the nearest float16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    small = (magnitude.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    finite = tl.where(magnitude < 0x38800000, small, normal)
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    return (tl.where(magnitude >= 0x477FF000, special, finite) | ((bits >> 16) & 0x8000)).to(tl.uint16)
