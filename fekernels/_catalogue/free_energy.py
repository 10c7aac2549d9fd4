"""The likelihoods and reductions of the free energy: names, parameters, domains; position = code on every backend.

Checks, validation, reference, Triton, means and samples, benchmarks and tests read these; C++ has the same order at
``Likelihoods`` of ``csrc/formulas/likelihoods.h``, and a test holds one against the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

__all__ = [
    "CATEGORICAL",
    "CODES",
    "LIKELIHOODS",
    "MEAN",
    "NAMES",
    "NONE",
    "REDUCTIONS",
    "SUM",
    "Likelihood",
    "Parameter",
    "Support",
    "Target",
    "longest",
]

REDUCTIONS = ("none", "mean", "sum")
NONE, MEAN, SUM = range(3)


@dataclass(frozen=True, eq=False)
class Support:
    """Numbers from ``lowest`` to ``highest``, with these where they are finite; infinity is none of them.

    ``text`` is how a message names them. ``above``: without ``lowest``; ``whole``: without fractions; ``safe``: what
    stands in for a target that was not observed.
    """

    text: str
    lowest: float = -math.inf
    highest: float = math.inf
    above: bool = False
    whole: bool = False
    safe: int = 0


class Target(Enum):
    """The values that a target may have."""

    REAL = Support("real numbers")  # not looked at: an energy has a value, or a limit, at all of them
    UNIT = Support("values in [0, 1]", 0.0, 1.0)
    POSITIVE = Support("positive numbers", 0.0, above=True, safe=1)
    COUNTS = Support("whole counts >= 0", 0.0, whole=True)
    CLASSES = Support("classes", 0.0, whole=True)  # as many as the parameter's last axis has


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of a likelihood.

    ``not_negative``: its domain is [0, infinity], else the whole line; at both ends the energy has a limit.
    ``safe``: what stands in for it at an element that was not observed, with a finite energy.
    """

    name: str
    not_negative: bool = False
    safe: float = 0.0


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A likelihood with one number of parameters.

    ``name`` is the users', and that of the formulas in ``fekernels/reference``; ``term`` that of the kernel's formula,
    different where one name has several. With targets that are classes, they are the parameter's last axis;
    all others are elementwise.
    """

    name: str
    parameters: tuple[Parameter, ...]
    target: Target = Target.REAL
    variant: str = ""

    @property
    def term(self) -> str:
        return self.variant or self.name

    @property
    def classes(self) -> bool:
        return self.target is Target.CLASSES

    @property
    def safe(self) -> tuple[float, ...]:
        return tuple(parameter.safe for parameter in self.parameters)


LOCATION = Parameter("location")
LOGIT = Parameter("logit")
POSITIVE_MEAN = Parameter("mean", not_negative=True, safe=1.0)
INVERSE_DISPERSION = Parameter("inverse_dispersion", not_negative=True, safe=1.0)

LIKELIHOODS = (
    Likelihood("mse", (LOCATION,)),
    Likelihood("gaussian", (LOCATION,)),  # the variance is 1
    Likelihood("gaussian", (LOCATION, Parameter("log_variance")), variant="gaussian_learned"),
    Likelihood("bernoulli", (LOGIT,), Target.UNIT),
    Likelihood("continuous_bernoulli", (LOGIT,), Target.UNIT),
    Likelihood("categorical", (Parameter("logits"),), Target.CLASSES),
    Likelihood("laplace", (LOCATION, Parameter("log_scale"))),
    Likelihood(
        "student_t",
        (
            LOCATION,
            Parameter("log_squared_scale"),
            Parameter("degrees_of_freedom", not_negative=True, safe=1.0),
        ),
    ),
    Likelihood("poisson", (Parameter("log_rate"),), Target.COUNTS),
    Likelihood("negative_binomial", (POSITIVE_MEAN, INVERSE_DISPERSION), Target.COUNTS),
    Likelihood(
        "zero_inflated_negative_binomial",
        (POSITIVE_MEAN, INVERSE_DISPERSION, Parameter("gate_logit")),
        Target.COUNTS,
    ),
    Likelihood("gamma", (POSITIVE_MEAN, Parameter("shape", not_negative=True, safe=1.0)), Target.POSITIVE),
)
NAMES = tuple(dict.fromkeys(row.name for row in LIKELIHOODS))
# name -> {number of parameters: code}
CODES: dict[str, dict[int, int]] = {name: {} for name in NAMES}
for _code, _row in enumerate(LIKELIHOODS):
    CODES[_row.name][len(_row.parameters)] = _code
CATEGORICAL = CODES["categorical"][1]


def longest(name: str) -> Likelihood:
    """The likelihood of this name with all the parameters that it may have. KeyError where there is none such."""
    return LIKELIHOODS[CODES[name][max(CODES[name])]]
