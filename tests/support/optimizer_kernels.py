"""Every implementation of the optimizers' steps behind one call, and what each of them must give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.formulas import FORMULAS, assert_close_to_formula
from tests.support.implementations import CPU_IMPLEMENTATIONS, Place
from tests.support.optimizer_rows import Row, call, row_of
from tests.support.optimizers import Options, Step
from tests.support.tensors import bits_equal, clone, whole


@dataclass(frozen=True)
class StepKernel:
    """An implementation. ``run`` is called as it is and returns the stepped rows, copies, on the CPU.

    ``exact``: it promises the C++ kernels' bits. (Interpreted Triton has a GPU's only where its fma rounds once.)
    """

    name: str
    run: Callable[..., list[Row]]
    exact: bool = True

    def __call__(self, op: str, rows: list[Row], options: Options, **changes: Any) -> list[Row]:
        return self.run(op, rows, options, changes)

    def one(self, op: str, row: Row, options: Options, **changes: Any) -> Row:
        (stepped,) = self(op, [row], options, **changes)
        return stepped

    @property
    def takes_every_dtype(self) -> bool:
        return self.name in CPU_IMPLEMENTATIONS


def backend_kernel(place: Place, name: str | None = None) -> StepKernel:
    """The list operator of a backend, on its device."""

    def run(op: str, rows: list[Row], options: Options, changes: dict[str, Any]) -> list[Row]:
        there = [row.clone(place.device) for row in rows]
        moved = {key: v.to(place.device) if isinstance(v, torch.Tensor) else v for key, v in changes.items()}
        call(op, there, options, place.backend, **moved)
        return [row.clone("cpu") for row in there]

    return StepKernel(name or str(place), run, exact=place.backend != "reference")


@functools.cache
def expected(step: Step, backend: str) -> Row:
    """What a step must give to the bit: that of the CPU's ``backend``, from plain memory, close to the formula."""
    row = row_of(step).plain()
    before = row.clone()
    call(step.op, [row], step.options, backend)
    assert_is_the_formula(step, before, row)
    return row


def assert_is_the_formula(step: Step, before: Row, after: Row) -> None:
    """Within the bound of ``assert_close_to_formula``."""
    formula = FORMULAS[step.op]
    compute_dtype = torch.float64 if step.dtypes.param == torch.float64 else torch.float32
    exact, eager = formula(before, step.options), formula(before, step.options, compute_dtype)
    for name, value in exact.items():
        if step.options.frozen and name in ("exp_avg_sq", "max_exp_avg_sq"):
            assert bits_equal(getattr(after, name), getattr(before, name)), f"{step}: {name} has moved"
            continue
        if name == "max_exp_avg_sq" and step.options.amsgrad:  # the maximum of what is stored
            value = torch.maximum(value, after.exp_avg_sq.double())
        stochastic = step.options.stochastic_rounding
        assert_close_to_formula(getattr(after, name), value, eager[name], f"{step}: {name}", stochastic)
    assert after.step.item() == step.options.steps_after(step.op)


def assert_steps(kernel: StepKernel, step: Step, after: Row | None = None) -> None:
    """The step gives what it must, wherever its tensors lie, and writes nowhere else."""
    before = row_of(step)
    after = after or kernel.one(step.op, before, step.options)
    if kernel.exact or kernel.name.startswith("reference"):
        want = expected(step, "cpp" if kernel.exact else "reference")
    else:
        assert_is_the_formula(step, before, after)
        want = after
    for name, tensor in before.tensors().items():
        memory, got = clone(tensor), getattr(after, name)
        if name in Row.WRITTEN:
            memory.copy_(getattr(want, name))
        assert got.stride() == tensor.stride()
        if not bits_equal(whole(memory), whole(got)):
            assert bits_equal(memory, got), f"{step}: {name} is {got}, must be {memory}"
            raise AssertionError(f"{step}: written beside {name}")
