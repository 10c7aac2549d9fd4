"""What concerns the CUDA steps alone: launches that are replayed in any order of blocks, and dtypes without a kernel.

That the CUDA sources, run on the CPU, give what all others give is in contract/test_optimizers.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.support.cuda_on_cpu import INVALID_VALUE, SUCCESS, Kernels
from tests.support.optimizer_rows import OPERATIONS, call, make_row, settings_of, tables_of
from tests.support.optimizers import (
    BF16,
    F16,
    F32,
    F64,
    GPU_DTYPES,
    VARIATIONAL,
    VARIATIONAL_DTYPES,
    Case,
    Options,
)
from tests.support.tensors import Frozen, bits_equal

CASES = [
    Case((5003,)),
    Case((37, 29), "transposed"),
    Case((0,)),
    Case(()),
    Case((515,), shard=(12, 515, 515)),
]
REPLAYS = 3


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def in_both_orders(request: pytest.FixtureRequest, cuda_steps: Kernels):
    cuda_steps.run_backwards(request.param)
    yield cuda_steps
    cuda_steps.run_backwards(False)


@pytest.mark.parametrize("many", [False, True], ids=["long rows", "300 rows"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_launches_can_be_replayed_in_any_order_of_threads_and_blocks(in_both_orders, native, op, many):
    cases = [Case((n % 9,)) for n in range(300)] if many else CASES
    options = Options()
    rows = [make_row(case, options, stream=i) for i, case in enumerate(cases)]
    expected = [row.clone() for row in rows]
    (table,) = tables_of(op, rows, options)
    for _ in range(REPLAYS):
        assert in_both_orders.step(op, table, settings_of(op, rows, options)) == SUCCESS
        assert table.scratch.item() == 0
        call(op, expected, options, "cpp")
    for row, want in zip(rows, expected, strict=True):
        assert row.step.item() == options.t - 1 + REPLAYS * (options.steps_after(op) - options.t + 1)
        assert all(bits_equal(tensor, getattr(want, name)) for name, tensor in row.tensors().items())


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "variational_draw_"])
def test_found_inf_skips_everything_in_any_order(in_both_orders, op):
    options = Options(noise_unit=0.5, found_inf=1.0)
    rows = [make_row(case, options) for case in CASES[:2]]
    frozen = Frozen([tensor for row in rows for tensor in row.tensors().values()])
    (table,) = tables_of(op, rows, options)
    assert in_both_orders.step(op, table, settings_of(op, rows, options)) == SUCCESS
    assert frozen.unchanged() and table.scratch.item() == 0


def test_there_are_kernels_for_the_dtypes_that_a_table_on_a_gpu_may_have(cuda_steps):
    every = (F32, F64, BF16, F16)
    found = {(p, s) for p, s in product(every, every) if cuda_steps.supports("langevin_adam", p, p, s)}
    assert found == set(GPU_DTYPES)
    assert all(cuda_steps.supports("sgld", dtype, dtype) for dtype in every)
    for op in VARIATIONAL:
        found = {
            (p, s) for p, s in product(every, every) if cuda_steps.supports(op.removesuffix("_"), p, p, s)
        }
        assert found == set(VARIATIONAL_DTYPES)


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        ("langevin_adam_", (F32, F32, F64)),
        ("langevin_adam_", (F64, F64, F32)),
        ("langevin_adam_", (BF16, BF16, F16)),
        ("langevin_adam_", (F32, BF16, F32)),
        ("sgld_", (F32, BF16)),
    ],
)
def test_other_dtypes_are_refused_with_nothing_launched(cuda_steps, op, dtypes):
    assert not cuda_steps.supports(op.removesuffix("_"), *dtypes)
    row = make_row(Case((65,)), Options())
    frozen = Frozen(list(row.tensors().values()))
    (table,) = tables_of(op, [row], Options())
    table.dtypes = sum({F32: 0, F64: 1, BF16: 2, F16: 3}[dtype] << 8 * i for i, dtype in enumerate(dtypes))
    assert cuda_steps.step(op, table, settings_of(op, [row], Options())) == INVALID_VALUE
    assert frozen.unchanged()


def test_the_largest_draw_loops_over_its_blocks(cuda_steps):
    count, key = 2048 * 1024 + 77, (5, 17, 0, 4)
    drawn = torch.empty(count, dtype=torch.int32)
    assert cuda_steps.philox("bits", drawn, count, 7, *key) == SUCCESS
    end = torch.empty(4000, dtype=torch.int32)
    assert cuda_steps.philox("bits", end, 4000, 7, 5, 17, count - 4000, 4) == SUCCESS
    assert torch.equal(drawn[-4000:], end)
