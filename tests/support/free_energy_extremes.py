"""What every implementation of the free energy gives at the ends of its parameters' ranges: one table.

A row is (target, parameters) with the value and the gradients in the parameters behind; `None` for an entry that has no
limit. A row without them has finite operands, and mpmath says what is right.
"""

from __future__ import annotations

import math

from tests.support import oracle

INF, NAN = math.inf, math.nan
TINY = 3.7e-44  # softplus(-100) in float32, a subnormal number

Row = tuple[float, tuple[float, ...], tuple[float | None, ...] | None]


def limit(name: str, target: float, *params: float, more: tuple[float, ...] = ()) -> tuple[float, ...]:
    """Value and gradients of another likelihood, and ``more`` gradients of parameters that it lacks."""
    exact = oracle.exact(name, target, *params)
    return (float(exact.value), *map(float, exact.gradients), *more)


def nan(count: int) -> tuple[float, ...]:
    return (NAN,) * (1 + count)


def poisson(target: float, mu: float) -> tuple[float, ...]:
    """The limit of a negative binomial for th -> infinity."""
    value, _ = limit("poisson", target, math.log(mu))
    return value, 1 - target / mu, 0.0


GAUSSIAN: list[Row] = [
    (0.0, (1.0, -INF), (INF, INF, -INF)),
    (0.0, (-1.0, -INF), (INF, -INF, -INF)),
    (0.0, (0.0, -INF), (-INF, 0.0, 0.5)),
    (0.0, (1.0, INF), (INF, 0.0, 0.5)),
    (0.0, (INF, 0.0), (INF, INF, -INF)),
    (INF, (0.0, 0.0), (INF, -INF, -INF)),
    (0.0, (1e-20, -87.0), None),
    (0.0, (1e-3, -200.0), None),
    (0.0, (1.0, 200.0), None),
]
LAPLACE: list[Row] = [
    (0.0, (1.0, -INF), (INF, INF, -INF)),
    (0.0, (0.0, -INF), (-INF, 0.0, 1.0)),
    (0.0, (1.0, INF), (INF, 0.0, 1.0)),
    (0.0, (INF, 0.0), (INF, 1.0, -INF)),
    (0.0, (1e-20, -87.0), None),
    (0.0, (1.0, -200.0), None),
]
# 0 times infinity, a target of 1 at a logit of infinity, is NaN, as it is to PyTorch.
BERNOULLI: list[Row] = [
    (0.0, (INF,), (INF, 1.0)),
    (0.5, (INF,), (INF, 0.5)),
    (1.0, (INF,), (NAN, 0.0)),
    (1.0, (-INF,), (INF, -1.0)),
    (0.0, (-INF,), (NAN, 0.0)),
    (0.0, (1e-40,), None),
    (1.0, (1e30,), None),
    (1.0, (1.2e38,), None),
    (0.0, (-3e38,), None),
    (0.3, (2e37,), None),
]
STUDENT: list[Row] = [
    (0.0, (1e-3, -200.0, 3.0), None),
    (0.0, (1e-3, -200.0, 1e30), None),
    (0.0, (1e10, -80.0, 0.01), None),
    (0.0, (1.0, -200.0, 1e-30), None),
    (0.0, (-1e-38, -400.0, 3.0), None),
    (0.0, (1.0, -INF, 3.0), (INF, 4.0, -1.5, INF)),
    (0.0, (0.0, -INF, 3.0), (-INF, 0.0, 0.5, limit("student_t", 0.0, 0.0, 0.0, 3.0)[3])),
    (0.0, (1.0, INF, 3.0), (INF, 0.0, 0.5, limit("student_t", 0.0, 0.0, 0.0, 3.0)[3])),
    (0.0, (INF, 0.0, 3.0), (INF, 0.0, -1.5, INF)),
    (0.0, (1.5, 0.3, INF), limit("gaussian", 0.0, 1.5, 0.3, more=(0.0,))),
    (2.0, (0.5, -1.0, INF), limit("gaussian", 2.0, 0.5, -1.0, more=(0.0,))),
    # (r - x)^2 e^-s is beyond 2^126: where nu is infinite, not a question of which is larger.
    (0.0, (1e19, 0.0, INF), limit("gaussian", 0.0, 1e19, 0.0, more=(0.0,))),
    (0.0, (-1.5, -86.0, INF), limit("gaussian", 0.0, -1.5, -86.0, more=(0.0,))),
    (0.0, (-3.0, -87.0, INF), limit("gaussian", 0.0, -3.0, -87.0, more=(0.0,))),
    (1.0, (NAN, 0.0, INF), nan(3)),
    (1.0, (0.0, NAN, INF), nan(3)),
    (0.0, (7e33, 39.1, 3.7e37), None),
    (0.0, (1.5, 0.3, 1e38), limit("gaussian", 0.0, 1.5, 0.3, more=(0.0,))),
    (0.0, (1.0, 0.0, 0.0), (INF, 1.0, 0.0, -INF)),
    (0.0, (0.0, 0.0, 0.0), (INF, 0.0, 0.5, -INF)),
    (0.0, (1.0, 0.0, 1e-40), None),
    (0.0, (0.0, 0.0, 1e-40), None),
    (0.0, (1.0, 0.0, TINY), None),
    *((x, (1.0, 0.0, nu), nan(3)) for x in (0.0, 1.0) for nu in (-1.0, -1e-30, -1e-40, -5.0, -INF)),
]
POISSON: list[Row] = [
    (0.0, (INF,), (INF, INF)),
    (0.0, (-INF,), (0.0, 0.0)),
    (2.0, (INF,), (INF, INF)),
    (2.0, (-INF,), (INF, -2.0)),
    (0.5, (INF,), (INF, INF)),
    (0.5, (-INF,), (INF, -0.5)),
    (3.0, (1e-40,), None),
    (3e31, (1e8,), None),
    (1e37, (1e31,), None),
    (1e30, (60.0,), None),
    (3e38, (88.5,), None),
    *((x, (0.5,), nan(1)) for x in (-1.0, -0.5, -1e-30, INF, -INF)),
]
NEGATIVE_BINOMIAL: list[Row] = [
    (0.0, (INF, 1.0), (INF, 0.0, INF)),
    (0.5, (INF, 1.0), (INF, 0.0, INF)),
    (3.0, (INF, 1.0), (INF, 0.0, INF)),
    (0.0, (INF, 1e-30), (INF, 0.0, INF)),
    (0.0, (2.0, INF), poisson(0.0, 2.0)),
    (0.5, (2.0, INF), poisson(0.5, 2.0)),
    (3.0, (2.0, INF), poisson(3.0, 2.0)),
    (3e5, (2e5, INF), poisson(3e5, 2e5)),
    (2.0, (1e-35, INF), poisson(2.0, 1e-35)),
    (3.0, (0.0, INF), (INF, -INF, 0.0)),
    (0.0, (0.0, INF), (0.0, 1.0, 0.0)),
    (0.0, (0.0, 1.0), (0.0, 1.0, 0.0)),
    (2.0, (0.0, 1.0), (INF, -INF, 0.5)),
    (0.0, (1.0, 0.0), (0.0, 0.0, INF)),
    (2.0, (1.0, 0.0), (INF, 0.0, -INF)),
    (0.0, (0.0, 0.0), (0.0, None, None)),
    (2.0, (0.0, 0.0), (INF, None, -INF)),
    *(
        (x, params, None)
        for x in (0.0, 0.5, 1.0, 2.0, 70000.0, 1e7)
        for params in (
            (TINY, TINY), (1e-38, 1e-38), (1e-38, 1e-20), (1e-35, 1e-33), (1.0, TINY), (TINY, 1.0), (1e10, 1e-38),
            (1e-38, 1e10), (1e-25, 1e-30), (1e-30, 1e-10), (1e-18, 1e-19), (1e-18, 1e19), (1e19, 1e-18),
        )
    ),
    (0.0, (1e38, 3e38), None),
    (0.0, (3e38, 1e-10), None),
    (0.0, (1e28, 1e-37), None),
    (0.0, (2.7e35, 1.7e-42), None),
    (0.0, (4e-21, 8e32), None),
    (0.0, (INF, 0.0), (NAN, None, None)),
    *((x, params, None) for x in (1e18, 1e20, 1e25, 1e29) for params in ((1.0, 1.0), (3.0, 1e4))),
    *(
        (x, params, nan(2))
        for x in (0.0, 0.5, 2.0)
        for params in (
            (-1e-3, 1.0), (-0.5, 1.0), (-3.0, 1.0), (1.0, -0.5), (1.0, -1.5), (-1.0, -1.0), (-1e-40, 1.0),
            (1.0, -1e-40), (0.0, -1.0), (-1.0, 0.0), (-1.0, INF), (INF, -1.0), (-INF, 1.0), (1.0, -INF),
        )
    ),
    *((x, (1.0, 1.0), nan(2)) for x in (-1.0, -0.5, -1e-30, INF, -INF)),
]  # fmt: skip
ZERO_INFLATED: list[Row] = [
    (0.0, (1.0, 1.0, INF), (0.0, 0.0, 0.0, 0.0)),
    (0.0, (1.0, 1.0, -INF), limit("negative_binomial", 0.0, 1.0, 1.0, more=(0.0,))),
    (2.0, (1.0, 1.0, -INF), limit("negative_binomial", 2.0, 1.0, 1.0, more=(0.0,))),
    (2.0, (1.0, 1.0, INF), (INF, *limit("negative_binomial", 2.0, 1.0, 1.0)[1:], 1.0)),
    (0.0, (INF, 1.0, 0.0), (math.log(2.0), 0.0, 0.0, -0.5)),
    (2.0, (INF, 1.0, 0.0), (INF, 0.0, INF, 0.5)),
    (2.0, (2.0, INF, -INF), (*poisson(2.0, 2.0), 0.0)),
    (0.0, (1e28, 1e-37, 0.5), None),
    (0.0, (4e-21, 8e32, 0.0), None),
    (1e30, (1.0, 1.0, 0.5), None),
    (0.0, (1e-38, 1e-38, 0.5), None),
    (2.0, (1e-38, 1e-38, 0.5), None),
    *((x, params, nan(3)) for x in (0.0, 2.0) for params in ((-0.5, 1.0, 0.5), (1.0, -0.5, 0.5))),
    *((x, (1.0, 1.0, 0.5), nan(3)) for x in (-1.0, INF)),
]
GAMMA: list[Row] = [
    (3.0, (0.0, 2.0), (INF, -INF, INF)),
    (3.0, (-0.0, 2.0), (INF, -INF, INF)),
    (3.0, (INF, 2.0), (INF, 0.0, INF)),
    (1e-40, (INF, 0.5), (INF, 0.0, INF)),
    (3.0, (2.0, 0.0), (INF, 0.0, -INF)),
    (3.0, (2.0, -0.0), (INF, 0.0, -INF)),
    (2.0, (2.0, INF), (-INF, 0.0, 0.0)),
    (3.0, (2.0, INF), (INF, -INF, 0.5 - math.log(1.5))),
    (1.0, (2.0, INF), (INF, INF, math.log(2.0) - 0.5)),
    (3.0, (2.0, 1e38), None),
    (3.0, (3.0, 3e38), None),
    (2.0, (INF, INF), (INF, 0.0, INF)),
    # The limits for a target that tends to 0: of the exponential's density 1 / mu, of others 0 or infinity.
    (0.0, (2.0, 1.0), (math.log(2.0), 0.5, INF)),
    (0.0, (2.0, 3.0), (INF, 1.5, INF)),
    (0.0, (2.0, 0.5), (-INF, 0.25, INF)),
    (0.0, (2.0, INF), (INF, INF, INF)),
    (0.0, (0.0, 1.0), (NAN, None, None)),
    *(
        (x, params, None)
        for x in (1e-44, 1e-38, 1e-20, 1e-3, 1.0, 70000.0, 1e20, 3e38)
        for params in (
            (1.0, 1.0), (1.0, 1.5), (1.0, 0.5), (TINY, 1.0), (1e-38, 2.0), (1e-20, 1e-10), (1e-3, 1e4), (1e20, 1e-20),
            (1e20, 1.0), (3e38, 1.0), (3e38, 1e-3), (1.0, 1e-38), (1.0, 1e10), (70000.0, 1e20), (1e-38, 1e38),
        )
        if x < 3e38 * min(1.0, params[0])  # x / mu in float32's range
    ),
    (1.0, (1.0, TINY), None),
    *(
        (x, params, nan(2))
        for x in (0.0, 1e-40, 2.0)
        for params in (
            (-1e-3, 1.0), (1.0, -0.5), (-1.0, -1.0), (-1e-40, 1.0), (1.0, -1e-40), (0.0, -1.0), (-1.0, 0.0),
            (-1.0, INF), (INF, -1.0), (-INF, 1.0), (1.0, -INF), (INF, NAN), (NAN, INF), (NAN, 0.0), (0.0, NAN),
        )
    ),
    *(
        (x, params, nan(2))
        for x in (-1.0, -1e-40, INF, -INF, NAN)
        for params in ((1.0, 1.0), (INF, 1.0), (1.0, INF), (1.0, 0.0))
    ),
]  # fmt: skip
NORMAL_KL: list[Row] = [
    (0.0, (0.0, -INF), (INF, 0.0, -0.5)),
    (0.0, (0.0, INF), (INF, 0.0, INF)),
    (0.0, (INF, 0.0), (INF, INF, 0.0)),
    (0.0, (-INF, 0.0), (INF, -INF, 0.0)),
    (0.0, (1e-40, 1e-40), None),
]
NORMAL_PRIOR_KL: list[Row] = [
    (0.0, (0.0, -INF, 0.0, 0.0), (INF, 0.0, -0.5, 0.0, 0.5)),
    (0.0, (0.0, INF, 0.0, 0.0), (INF, 0.0, INF, 0.0, -INF)),
    (0.0, (1.0, 0.0, 0.0, INF), (INF, 0.0, -0.5, 0.0, 0.5)),
    (0.0, (1.0, 0.0, 0.0, -INF), (INF, INF, INF, -INF, -INF)),
    (0.0, (0.0, 0.0, 0.0, -INF), (INF, 0.0, INF, 0.0, -INF)),
    (0.0, (INF, 0.0, 0.0, 0.0), (INF, INF, 0.0, -INF, -INF)),
    (0.0, (1e-40, 1e-40, 0.0, 1e-40), None),
]
EXTREMES: dict[str, list[Row]] = {
    "mse": [(0.0, (INF,), (INF, INF)), (1.0, (1e30,), (INF, 2e30)), (INF, (INF,), (NAN, NAN))],
    "gaussian": [(0.0, (-INF,), (INF, -INF)), (1.0, (1e30,), (INF, 1e30))],
    "gaussian_learned": GAUSSIAN,
    "bernoulli": BERNOULLI,
    "continuous_bernoulli": BERNOULLI,
    "laplace": LAPLACE,
    "student_t": STUDENT,
    "poisson": POISSON,
    "negative_binomial": NEGATIVE_BINOMIAL,
    "zero_inflated_negative_binomial": ZERO_INFLATED,
    "gamma": GAMMA,
    "normal_kl": NORMAL_KL,
    "normal_prior_kl": NORMAL_PRIOR_KL,
}
