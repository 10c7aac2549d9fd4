"""Runs the Triton kernels interpreted, on CPU tensors, in a process of its own.

The choice between compiling and interpreting is made when a kernel is defined, so TRITON_INTERPRET=1 must be set before
anything imports triton: `interpreter()` starts a process where it is. Tensors travel as bytes of `torch.save`, which
keeps their strides and their distance from an aligned address.
"""

import io
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fekernels._runtime.pointer_table import PointerTable
from tests.support import optimizer_rows
from tests.support.optimizers import Options
from tests.support.triton.fast_interpreter import quicken
from tests.support.triton.free_energy_worker import (  # noqa: F401
    free_energy,
    free_energy_and_arguments,
    reparameterize,
    reparameterize_backward,
    scale_,
)
from tests.support.triton.stein_worker import (  # noqa: F401
    kernel_stein_discrepancy,
    patched,
    sq_dist_rank,
    svgd_direction,
    svgd_direction_backward,
    svgd_direction_rows,
)


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _call(name: str, arguments: bytes) -> bytes:
    return _pack(globals()[name](*_unpack(arguments)))


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Yields `run(name, *arguments)`, which calls the function of this module in the interpreting process."""
    pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    try:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # only while the process starts
            assert _unpack(pool.submit(_call, "interpreting", _pack(())).result())
        yield lambda name, *arguments: _unpack(pool.submit(_call, name, _pack(arguments)).result())
    finally:
        pool.shutdown(cancel_futures=True)


def interpreting() -> bool:
    """Whether kernels run interpreted. Called first: it repairs what is to run them, makes it stricter and faster."""
    from triton import knobs
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        # Triton 3.6 converts an array of one element by int(), which NumPy 2.4 refuses. Later ones do as here.
        tensor.__index__ = lambda self: self.handle.data.item()

    def promise(handle: Any, key: str, values: Any) -> None:
        assert key != "tt.divisibility" or not (handle.data % values[0]).any(), (
            "a kernel promised an alignment in vain"
        )

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    replace_names, modules = interpreter._patch_lang, set()

    def once(function: Any) -> SimpleNamespace:
        """Names stay replaced: to do so at every call, those inside of kernels too, took half of all time."""
        if id(function.__globals__) not in modules:
            replace_names(function)
            modules.add(id(function.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
    interpreter._patch_lang_tensor = patch
    if not fuses():  # before 3.9 a product and a sum, each rounded, which no GPU does
        interpreter.InterpreterBuilder.create_fma = fma
    interpreter.TensorHandle.set_attr = promise
    quicken()
    return bool(knobs.runtime.interpret)


def _fma(x: Any, y: Any, z: Any) -> Any:
    """x y + z of NumPy arrays, rounded once.

    A product of float32 is exact in float64; the sum is made round-to-odd by the error of its TwoSum, after which the
    rounding to float32 is the only one that counts.
    """
    import numpy as np

    if z.dtype == np.float64:
        return np.vectorize(_fma_of_one, otypes=[np.float64])(x, y, z)
    if z.dtype != np.float32:
        return x * y + z
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        odd = ((bits + ((error.view(np.int64) ^ bits) < 0) * np.int64(-1)) | 1).view(np.float64)
        return np.where((error < 0) | (error > 0), odd, total).astype(np.float32)


def _fma_of_one(x: float, y: float, z: float) -> float:
    """In float64, whose products have no wider type to be exact in."""
    plain = x * y + z
    if not math.isfinite(plain):
        return plain
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    return float(exact) if exact else plain


def fuses() -> bool:
    """Whether the interpreter rounds an fma once, so that its bits are those of a GPU."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    x, y, z = (
        TensorHandle(torch.tensor([v]).numpy(), tl.float32)
        for v in (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11)
    )
    return bool(interpreter_builder.create_fma(x, y, z).data == 2.0**-24)


def fill(kind: str, out: torch.Tensor, *key: int) -> torch.Tensor:
    """`out`, filled by fekernels.triton.random."""
    from fekernels.triton import random

    getattr(random, f"philox_{kind}")(out, *key)
    return out


def variational_kl(*arguments: Any) -> torch.Tensor:
    """The operator of fekernels.triton.optimizers."""
    from fekernels.triton.optimizers import variational_kl

    return variational_kl.variational_kl(*arguments)


def step(
    op: str,
    rows: list[optimizer_rows.Row],
    options: Options,
    changes: dict[str, Any],
    part: bool = True,
) -> list[optimizer_rows.Row]:
    """``StepKernel.run``: the rows after one step, a launch for each set of dtypes, or a single one unless ``part``."""
    tables = optimizer_rows.tables_of(op, rows, options)
    if not part:
        tables = [PointerTable([row.pointers(op, options) for row in rows])]
    settings = optimizer_rows.settings_of(op, rows, options, **changes)
    optimizer_rows.OPERATIONS[op].step_tables(tables, settings, "triton")
    assert not any(int(table.scratch) for table in tables), "the count of finished programs was not reset"
    return rows
