"""The optimizers' operations, and what their steps are told by number: dtypes, where the noise enters, switches.

Checks, settings, pointer tables and Triton read these; C++ has the same in ``csrc/formulas/optimizers.def``,
``csrc/core/pointer_table.h`` and ``csrc/formulas/langevin_adam.h``, and a test holds one against the other.
"""

from __future__ import annotations

__all__ = ["ABOVE_OF_MOMENTUM", "DTYPES", "FLAGS", "NOISES", "NO_NOISE", "OPERATIONS"]

# Each an operator of this name and a `_`, in files of this name.
OPERATIONS = ("langevin_adam", "sgld", "variational_accumulate", "variational_adam", "variational_draw")

DTYPES = ("float32", "float64", "bfloat16", "float16")  # in the order of their codes

NOISES = {"momentum": 0, "preconditioned": 1, "isotropic": 2}
NO_NOISE = 3  # of a cold step, whatever the noise

FLAGS = {
    "amsgrad": 1,
    "maximize": 2,
    "decoupled_weight_decay": 4,
    "bias_correction": 8,
    "stochastic_rounding": 16,
    "frozen": 32,
}

# exp_avg is 0 below 2^31 times the smallest normal number: 2^-95 in float32, 2^-991 in float64.
ABOVE_OF_MOMENTUM = 31
