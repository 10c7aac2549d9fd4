"""What every fuzz test draws: a backend with its instruction set, a layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

import fekernels as fe
from tests.support.implementations import ISAS, Place, instruction_set
from tests.support.tensors import lay_out

Result = TypeVar("Result")

BACKENDS = st.sampled_from(("reference", *(f"cpp-{isa}" for isa in ISAS)))
LAYOUTS = st.sampled_from(("contiguous", "transposed", "sliced", "misaligned"))


def on(backend: str, call: Callable[[], Result]) -> Result:
    """call() on one of BACKENDS; where this machine lacks it, the example counts for nothing."""
    name, _, isa = backend.partition("-")
    if Place(name, "cpu").obstacle() is not None:
        reject()
    with fe.use_backend(name):
        if not isa:
            return call()
        try:
            with instruction_set(isa):
                return call()
        except pytest.skip.Exception:
            reject()


def laid_out(values: Tensor, layout: str) -> Tensor:
    """As `cases.lay_out`, also where there are too few dimensions for the layout."""
    if values.dim() == 0 or (layout == "transposed" and values.dim() < 2):
        return values.contiguous()
    return lay_out(values, layout)
