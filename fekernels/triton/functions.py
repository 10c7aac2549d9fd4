"""Elementary and special functions in float32: csrc/core/functions.h operation for operation, so with the same bits.

Errors and the origin of the coefficients are noted in it. A negative is a product with -1: older Tritons make 0 - x of
-x, which differs in the sign of 0. Results of several parts are tuples in the order of the C++ struct's members.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2 = tl.constexpr(0.693147182)
HALF_LOG_2PI = tl.constexpr(0.918938533)
LARGEST = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
TWO_TO_64 = tl.constexpr(18446744073709551616.0)


@triton.jit
def float_of(bits):
    """The float32 with these bits (int32 or uint32)."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x):
    """The bits of a float32, as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def absolute(x):
    return float_of(bits_of(x) & 0x7FFFFFFF)


@triton.jit
def inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """The coefficient of the highest power comes first. Two at a time: the chain of Horner's rule is twice as long."""
    x2 = x * x
    if len(COEFFICIENTS) % 2 == 0:
        value = tl.fma(x, COEFFICIENTS[0], COEFFICIENTS[1])
        for i in tl.static_range(2, len(COEFFICIENTS), 2):
            value = tl.fma(value, x2, tl.fma(x, COEFFICIENTS[i], COEFFICIENTS[i + 1]))
    else:
        value = tl.fma(x2, COEFFICIENTS[0], tl.fma(x, COEFFICIENTS[1], COEFFICIENTS[2]))
        for i in tl.static_range(3, len(COEFFICIENTS), 2):
            value = tl.fma(value, x2, tl.fma(x, COEFFICIENTS[i], COEFFICIENTS[i + 1]))
    return value


@triton.jit
def exp_parts(x):
    """(e^r, n) of x = n log 2 + r, |r| <= log(2) / 2."""
    shifted = tl.fma(x, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, -1.42860677e-06, tl.fma(n, -0.693145752, x))
    q = polynomial(r, (0.0013820136, 0.008368686, 0.041668274, 0.16666521, 0.49999994))
    return tl.fma(r * r, q, r) + 1.0, (bits_of(shifted) - 0x4B400000).to(tl.int32, bitcast=True)


@triton.jit
def power_of_two(n):
    """-126 <= n <= 127 (int32); 0 at n = -127."""
    return float_of((n + 127) << 23)


@triton.jit
def exponential(x):
    """e^x as a product of three: `times(a, exponential(x))` is right where e^x alone would leave the range."""
    above = tl.where(x < -176.0, -176.0, x)
    exp_r, n = exp_parts(tl.where(above > 176.0, 176.0, above))
    half = n >> 1
    return exp_r, power_of_two(half), power_of_two(n - half)


@triton.jit
def times(a, e):
    return a * e[0] * e[1] * e[2]


@triton.jit
def value_of(e):
    return e[0] * e[1] * e[2]


@triton.jit
def exp(x):
    return value_of(exponential(x))


@triton.jit
def exp_negative(x):
    """For x <= 0; below -87.33, where the result would be subnormal, 0."""
    exp_r, n = exp_parts(x)
    return tl.where(x < -87.33, 0.0, exp_r * power_of_two(n))


@triton.jit
def expm1_remainder_near_zero(d):
    """e^d - 1 - d for |d| < 1."""
    q = polynomial(
        d,
        (
            2.7630542e-06, 2.5325757e-05, 0.00019845687, 0.0013885936, 0.008333301,
            0.041666713, 0.16666667, 0.5,
        ),
    )  # fmt: skip
    return d * d * q


@triton.jit
def half_expm1(d):
    """((e^d - 1) / 2, (e^d - 1 - d) / 2)."""
    near = expm1_remainder_near_zero(d) * 0.5
    far = times(tl.full(d.shape, 0.5, tl.float32), exponential(d)) - 0.5
    half = tl.where(d > LARGEST, LARGEST, d) * 0.5
    near_zero = absolute(d) < 1.0
    return tl.where(near_zero, half + near, far), tl.where(near_zero, near, far - half)


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1]."""
    p = polynomial(
        t,
        (
            0.0053654225, -0.0300683, 0.07920883, -0.13754188, 0.19153848, -0.24857217,
            0.3332133, -0.49999648,
        ),
    )  # fmt: skip
    return tl.fma(t * t, p, t)


@triton.jit
def logistic(x):
    """(sigmoid(x), sigmoid(-x), softplus(x))."""
    t = exp_negative(absolute(x) * -1.0)
    large = inverse(t + 1.0)
    small = t * large
    positive = x > 0.0
    softplus = tl.where(positive, x, 0.0) + log1p_unit(t)
    return tl.where(positive, large, small), tl.where(positive, small, large), softplus


@triton.jit
def negative_log(p, y):
    """(-log p, -log p - y) for p in (0, 1], y = 1 - p."""
    return negative_log_where(p, y, p <= 0.5)


@triton.jit
def negative_log_where(p, y, scaled):
    """The same where `scaled` is p <= 0.5, or where y is not to be looked at and p may be above 1."""
    bits = bits_of(p)
    n = (bits - 0x3F000001).to(tl.int32, bitcast=True) >> 23
    f = tl.where(scaled, 1.0 - float_of(bits - (n.to(tl.uint32, bitcast=True) << 23)), y)
    q = polynomial(
        f,
        (
            1.294697, -1.5030594, 1.0970887, -0.1730198, 0.22429298, 0.1943126, 0.25026745,
            0.33332908, 0.5,
        ),
    )  # fmt: skip
    tail = f * f * q
    value = tl.fma(n.to(tl.float32), -0.693147182, f + tail)
    return value, tl.where(scaled, value - y, tail)


@triton.jit
def log_parts(x, low):
    """(n, f, tail, lost): log(x + low) = n log 2 + f - tail, lost being what rounding took from f."""
    bits = bits_of(x)
    shifted = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    exponent = shifted.to(tl.uint32, bitcast=True) << 23
    two = (exponent * 0) + 0x40000000
    leading = float_of(bits - exponent) - 1.0
    scaled = (low * 0.5) * float_of(two - exponent)  # 2^(1 - n): n = 128 has no 2^-n
    f = leading + scaled
    q = polynomial(
        f,
        (
            0.07580942, -0.12705529, 0.13154551, -0.14208244, 0.16624007, -0.20001063,
            0.25000873, -0.3333333, 0.49999997,
        ),
    )  # fmt: skip
    n = (exponent.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    return n, f, f * f * q, scaled - (f - leading)


@triton.jit
def below(v, parts):
    """v - log(x + low) of `log_parts`, where v is near it."""
    n, f, tail, lost = parts
    difference = v - f
    back = difference - v
    low = (v - (difference - back)) - (f + back)
    high = tl.fma(n, -0.693145752, difference)
    return high + (tl.fma(n, -1.42860677e-06, low - lost) + tail)


@triton.jit
def log_value(parts):
    return tl.fma(parts[0], 0.693145752, tl.fma(parts[0], 1.42860677e-06, parts[1] - parts[2]))


@triton.jit
def log_positive(x):
    """For x > 0, normal, or infinity or NaN."""
    value = log_value(log_parts(x, tl.zeros_like(x)))
    return tl.where(x < INF, value, x)


@triton.jit
def log(x):
    """IEEE's for every x."""
    subnormal = x < 1.1754943508222875e-38  # 2^-126
    n, f, tail, lost = log_parts(tl.where(subnormal, x * 16777216.0, x), tl.zeros_like(x))
    value = log_value((tl.where(subnormal, n - 24.0, n), f, tail, lost))
    edge = tl.where(x == 0.0, -INF, tl.where(x < 0.0, float("nan"), x))
    return tl.where((x > 0.0) & (x < INF), value, edge)


@triton.jit
def log1p_parts(v, ratio):
    """`log_parts` of 1 + v, where the ratio 1 + v is given as well and better known for v below -3/4."""
    total = v + 1.0
    lost = tl.where(v > 1.0, 1.0 - (total - v), v - (total - 1.0))
    far = v < -0.75
    return log_parts(tl.where(far, ratio, total), tl.where(far, 0.0, lost))


@triton.jit
def stirling_lgamma(t):
    q = polynomial(
        t,
        (-0.00015859712, 0.00041221562, 0.00036679066, -0.0029123991, 2.1191578e-05, 0.08333225),
    )
    return t * q


@triton.jit
def stirling_digamma(t):
    q = polynomial(
        t,
        (
            0.0008632962, -0.003508227, 0.0049403505, -6.523505e-05, -0.0083500445,
            2.2636445e-06, 0.0833333,
        ),
    )  # fmt: skip
    return t * t * q


@triton.jit
def lgamma1p_unit(z):
    """lgamma(1 + z) for z in [0, 1]."""
    q = polynomial(
        z,
        (
            -0.00397641, 0.024160154, -0.06914408, 0.12976721, -0.19309828, 0.26732078,
            -0.40025285, 0.8224385, -0.577215,
        ),
    )  # fmt: skip
    return z * q


@triton.jit
def digamma1p_unit(z):
    """digamma(1 + z) for z in [0, 1]."""
    return polynomial(
        z,
        (
            0.02299398, -0.13841909, 0.3852506, -0.67926276, 0.8957928, -1.0076114, 1.0780616,
            -1.2017297, 1.6449239, -0.5772156,
        ),
    )  # fmt: skip
