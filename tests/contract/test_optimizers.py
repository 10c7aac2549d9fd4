"""Every implementation of the optimizers' steps, over the table of tests/support/optimizers.py.

What holds: the formula in float64 within the dtype's bound; the C++ kernels' bits, wherever the tensors lie in memory,
whatever else is in the call, and on any number of threads; nothing is written beside the tensors.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.implementations import CPU_IMPLEMENTATIONS, instruction_set, threads
from tests.support.optimizer_kernels import assert_steps, expected
from tests.support.optimizer_rows import OPERATIONS, Row, call, make_row, row_of
from tests.support.optimizers import (
    BF16,
    CASES,
    EVERYTHING,
    F16,
    F32,
    F64,
    LANGEVIN,
    LONG_CASES,
    NOISES,
    OPTIONS,
    STEPS,
    UNITS_AFTER,
    VARIANTS,
    VARIATIONAL,
    VARIATIONAL_DTYPES,
    Case,
    Dtypes,
    Options,
    Step,
    noise_unit,
    state_dtype,
    step_of,
)
from tests.support.pairwise import pairwise
from tests.support.tensors import bits_equal, guarded, lay_out

ON_GPUS = [step for step in STEPS if step.on_gpus]
GROUPS = {f"{op}-{case}": [s for s in ON_GPUS if (s.op, s.case) == (op, case)]
          for op in OPERATIONS for case in (*CASES, *LONG_CASES, Case((70,)))
          if op in LANGEVIN or case != Case((70,))}  # fmt: skip
# A placement of the noise is another function; SGLD has one.
OP_AND_NOISE = [("sgld_", "momentum"), *(("langevin_adam_", noise) for noise in NOISES)]


def plain_step(op, case, dtype, options, **changes):
    return Step(op, case, Dtypes(dtype, dtype, dtype, dtype), options, **changes)


def same(a, b, names=Row.WRITTEN):
    return all(bits_equal(getattr(a, name), getattr(b, name)) for name in names)


def same_values(a, b):
    """Bits, but for which NaN it is."""
    return all(
        torch.equal(x.isnan(), y.isnan()) and bits_equal(x.nan_to_num(0, 1, 2), y.nan_to_num(0, 1, 2))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in Row.WRITTEN)
    )


@pytest.mark.parametrize("op", VARIATIONAL)
def test_the_table_has_every_variational_option_in_every_dtype(op):
    found = {(step.dtypes, step.options) for step in ON_GPUS if step.op == op}
    # Sums of 16-bit parameters are none.
    missing = 2 * sum("sums" in name for name in OPTIONS[op]) if op == "variational_adam_" else 0
    assert len(found) == len(OPTIONS[op]) * len(VARIATIONAL_DTYPES) - missing


@pytest.mark.parametrize("op", LANGEVIN)
def test_the_table_has_every_option_with_every_case(op):
    variants = VARIANTS[op]
    for case in CASES:
        steps = GROUPS[f"{op}-{case}"]
        found = [variant for variant in variants if step_of(op, case, variant) in steps]
        assert all(
            len({row[i] for row in found}) == len({row[i] for row in variants})
            for i in range(len(variants[0]))
        )
    assert all(any(step_of(op, case, variant) in ON_GPUS for case in CASES) for variant in variants)


@pytest.mark.parametrize("group", GROUPS)
def test_steps_are_the_formula_and_give_the_cpp_kernels_bits(group, step_kernel):
    # An interpreted step takes a tenth of a second: each set of options once, though with every case some of them.
    interpreted = step_kernel.name == "triton_interpreted"
    steps = [step for step in GROUPS[group] if not (interpreted and step.repeats)]
    assert steps
    for step in steps:
        assert_steps(step_kernel, step)


@pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if op != "variational_draw_"]
)  # which takes no gradient
@pytest.mark.parametrize("step_kernel", CPU_IMPLEMENTATIONS, indirect=True)
def test_on_a_cpu_every_tensor_may_have_a_dtype_of_its_own(op, step_kernel):
    steps = [step for step in STEPS if step.op == op and not step.on_gpus]
    assert len(steps) > 10
    for step in steps:
        assert_steps(step_kernel, step)


@pytest.mark.parametrize("operand", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor"])
def test_one_operand_off_an_aligned_address(operand, step_kernel):
    step = plain_step("langevin_adam_", Case((64,)), F32, EVERYTHING)
    row = row_of(step)
    setattr(row, operand, guarded(lay_out(getattr(row, operand), "misaligned")))
    assert same(
        step_kernel.one(step.op, row, step.options),
        step_kernel.one(step.op, row_of(step).plain(), step.options),
    )


@pytest.mark.parametrize("factor", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype, factor, step_kernel):
    # Decay by the factor and nothing else: halves of subnormals and three quarters of odd numbers are ties.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    if step_kernel.name == "triton_interpreted":  # slow: of each exponent some
        numbers = numbers[::61]
    options = Options(lr=1.0, temperature=0.0, eps=1.0, weight_decay=1 - factor, decoupled_weight_decay=True)
    row = make_row(Case(numbers.shape), options, dtype)
    row.param = numbers.clone()
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        getattr(row, name).zero_()
    got, want = step_kernel.one("langevin_adam_", row, options).param, (numbers.float() * factor).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


# Rows of a call.


@pytest.mark.parametrize("op", OPERATIONS)
def test_one_call_over_many_rows_is_a_call_for_each(op, step_kernel):
    # Two of each dtype, full chunks of a GPU block (4096) and parts of one, steps and streams that differ.
    options = Options(amsgrad=True, stochastic_rounding=True)
    cases = [
        (Case((4100,)), F32),
        (Case((33, 7), "transposed"), BF16),
        (Case((0,)), F32),
        (Case((4096,)), BF16),
    ]
    cases += [(Case((63,)), F64), (Case((129,), "sliced"), F16), (Case((1,)), F64), (Case(()), F16)]
    rows = []
    for i, (case, dtype) in enumerate(cases):
        stream = (0, 3, 2**32 - 1, 2**31 + 1)[i % 4]
        row = make_row(
            case, replace(options, t=1 + 3 * i), dtype, state_dtype=state_dtype(op, dtype), stream=stream
        )
        row.step, row.noise_unit = row.step.double() if i % 2 else row.step, torch.tensor(0.2 * i, dtype=F64)
        rows.append(row)
    for got, row in zip(step_kernel(op, rows, options), rows, strict=True):
        call(op, [row], options, "cpp" if step_kernel.exact else "reference")
        assert same(got, row) or not step_kernel.exact and step_kernel.name != "reference", (
            f"{row.param.shape}"
        )


@pytest.mark.parametrize("op", OPERATIONS)
def test_more_rows_than_are_counted_at_once(op, step_kernel):
    options, streams = Options(), range(300)
    kinds = [make_row(Case((count,)), options) for count in (0, 1)]
    rows = [replace(kinds[i % 60 == 59].clone(), stream=i) for i in streams]
    stepped = step_kernel(op, rows, options)
    assert [row.step.item() for row in stepped] == [options.steps_after(op)] * 300
    moved = "exp_avg_sq" if op == "variational_accumulate_" else "param"
    assert len({getattr(row, moved).item() - getattr(before, moved).item()
                for row, before in zip(stepped, rows, strict=True)
                if row.param.numel()}) == 5  # fmt: skip
    if op == "langevin_adam_":
        assert {row.noise_unit.item() for row in stepped} == {noise_unit(options.lr, options.beta1)}


@pytest.mark.parametrize("op", OPERATIONS)
def test_nothing_but_empty_tensors_is_still_a_step(op, step_kernel):
    rows = [make_row(Case((0,)), Options()), make_row(Case((2, 0)), Options())]
    assert [row.step.item() for row in step_kernel(op, rows, Options())] == [Options().steps_after(op)] * 2


def split(row, sizes, dim):
    """Shards of a parameter along one dimension, with what tells each which elements it holds."""
    shape = row.param.shape
    below = shape[dim + 1 :].numel()
    shards, begin = [], 0
    for size in sizes:
        parts = {name: t.narrow(dim, begin, size).clone(memory_format=torch.contiguous_format)
                 for name, t in row.tensors().items() if t.shape == shape}  # fmt: skip
        where = (begin * below, max(size * below, 1), shape[dim] * below)
        shards.append(replace(row.clone(), **parts, shard=where))
        begin += size
    return shards


SPLITS = {
    "with an empty one": ((200,), [3, 0, 100, 97], 0),
    "of rows": ((33, 7), [16, 17], 0),
    "of columns": ((33, 7), [3, 4], 1),
    "of a middle dimension": ((4, 60, 3), [13, 47], 1),
}
SPLIT_ROWS = pairwise(op=list(OPERATIONS), shards=list(SPLITS), dtype=(F32, BF16))


@pytest.mark.parametrize(SPLIT_ROWS[0]._fields, SPLIT_ROWS)
def test_shards_get_the_bits_of_the_whole(op, shards, dtype, step_kernel):
    shape, sizes, dim = SPLITS[shards]
    options = Options(amsgrad=True, stochastic_rounding=True)
    whole = make_row(Case(shape), options, dtype, state_dtype=state_dtype(op, dtype))
    parts = step_kernel(op, split(whole, sizes, dim), options)
    whole = step_kernel.one(op, whole, options)
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert bits_equal(torch.cat([getattr(s, name) for s in parts], dim), getattr(whole, name)), name


# 40,001 elements are more than the 32,768 that a second thread needs, and three spans.
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_threads_and_instruction_sets_give_the_same_bits(op, dtype, isa):
    for options, count in (
        (EVERYTHING, 1),
        (Options(), 2),
        (EVERYTHING, 2),
        (Options(noise="preconditioned"), 1),
        (Options(noise="isotropic"), 1),
    )[: 2 if op in VARIATIONAL else None]:  # these have one placement of the noise
        step = plain_step(op, Case((40001,)), dtype, replace(options, stochastic_rounding=True))
        got, want = row_of(step), row_of(step)
        with threads(count):
            call(op, [got], step.options, "cpp")
        with threads(1), instruction_set("avx2" if isa != "avx2" else "baseline"):
            call(op, [want], step.options, "cpp")
        assert same(got, want), str(step)


# A preconditioner that stands still.


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_frozen_maximum_is_all_that_is_read(layout, step_kernel):
    options = Options(frozen=True, amsgrad=True)
    rows = [make_row(Case((65, 3), layout), options) for _ in range(2)]
    rows[0].exp_avg_sq.fill_(math.nan)
    without, with_it = (step_kernel.one("langevin_adam_", row, options) for row in rows)
    assert same(without, with_it, ("param", "exp_avg", "max_exp_avg_sq"))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_a_gradient_without_bound_leaves_frozen_moments_alone(stochastic, step_kernel):
    for dtype in (F32, F64, BF16):
        options = Options(frozen=True, stochastic_rounding=stochastic)
        row = make_row(Case((1000,)), options, dtype)
        row.grad[5], row.grad[600] = math.nan, math.inf
        after = step_kernel.one("langevin_adam_", row, options)
        assert bits_equal(after.exp_avg_sq, row.exp_avg_sq)
        assert after.param.isnan().nonzero().flatten().tolist() == [5]
        assert after.param[600] == -math.inf


# Scalars.


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "variational_draw_"])
def test_found_inf_changes_nothing(op, step_kernel):
    moved = ["exp_avg" if op == "variational_accumulate_" else "param"]
    for found in (1.0, math.nan, 0.0):
        options = Options(found_inf=found, grad_scale=2.0, noise_unit=0.7)
        row = make_row(Case((65,)), options)
        after = step_kernel.one(op, row, options)
        assert same(row, after) is same(row, after, moved) is (found != 0)


@pytest.mark.parametrize(("changes", "unit"), UNITS_AFTER)
def test_the_noise_unit_is_that_of_the_last_step_that_moved(changes, unit, step_kernel):
    options = Options(**{"noise_unit": 0.7, **changes})
    rows = [make_row(Case(shape), options) for shape in ((3,), (0,), (5,))]
    assert [row.noise_unit.item() for row in step_kernel("langevin_adam_", rows, options)] == [unit] * 3


def test_without_noise_units_none_are_kept_and_nothing_is_rescaled(step_kernel):
    options = Options(noise_unit=0.7)
    row, other = make_row(Case((65,)), options), make_row(Case((65,)), Options())
    row.noise_unit = None
    row, other = (step_kernel.one("langevin_adam_", each, options) for each in (row, other))
    assert same(row, other, ("param", "exp_avg", "exp_avg_sq"))


def test_each_parameter_has_its_own_noise_unit(step_kernel):
    options = [
        Options(noise_unit=u)
        for u in (0.0, *(noise_unit(*of) for of in ((0.02, 0.8), (0.08, 0.8), (0.02, 0.95))))
    ]
    steps = [plain_step("langevin_adam_", Case((65,)), F32, each) for each in options]
    stepped = step_kernel("langevin_adam_", [row_of(step) for step in steps], Options())
    for step, row in zip(steps, stepped, strict=True):
        want = expected(step, "cpp" if step_kernel.exact else "reference")
        torch.testing.assert_close(row.exp_avg, want.exp_avg, rtol=1e-6 * (not step_kernel.exact), atol=0)
        assert row.noise_unit.item() == noise_unit(0.02, 0.8)


@pytest.mark.parametrize("of", [F32, F64], ids=str)
@pytest.mark.parametrize(("op", "noise"), OP_AND_NOISE)
def test_tensor_lr_and_temperature_replace_the_floats(op, noise, of, step_kernel):
    options = Options(lr=2.0**-5, temperature=0.375, noise=noise, noise_unit=0.75)  # exact in float32
    row = make_row(Case((65,)), options)
    tensors = {
        "lr_tensor": torch.tensor(options.lr, dtype=of),
        "temperature_tensor": torch.tensor([options.temperature], dtype=of),
    }
    floats = step_kernel.one(op, row, options)
    for temperature in (0.0, 9.0):
        got = step_kernel.one(op, row, replace(options, lr=7.0, temperature=temperature), **tensors)
        assert same(got, floats)


@pytest.mark.parametrize(("op", "noise"), OP_AND_NOISE)
def test_a_temperature_tensor_of_zero_is_no_noise_at_all(op, noise, step_kernel):
    # Where D is infinite, 0 times the noise would be NaN; and adding 0 to -0 would lose its sign.
    options = Options(temperature=0.0, noise=noise)
    row = make_row(Case((65,)), options)
    row.grad[:3] = torch.tensor([math.inf, -math.inf, 0.0])
    row.exp_avg[2] = row.param[2] = -0.0
    row.exp_avg_sq[3] = math.inf
    floats = step_kernel.one(op, row, options)
    for changes in (
        {"temperature_tensor": torch.zeros(())},
        {"lr_tensor": torch.tensor(options.lr, dtype=F64)},
    ):
        assert same_values(step_kernel.one(op, row, options, **changes), floats)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nan_and_infinity_stay_where_they_are(dtype, stochastic, step_kernel):
    options = Options(stochastic_rounding=stochastic)
    row = make_row(Case((1000,)), options, dtype)
    row.grad[5], row.grad[600], row.param[7] = math.nan, math.inf, -math.inf
    row.grad[9] = torch.tensor(-1, dtype=torch.int16 if dtype == BF16 else torch.int32).view(
        dtype
    )  # all bits set
    after = step_kernel.one("langevin_adam_", row, options)
    assert after.param.isnan().nonzero().flatten().tolist() == [5, 9, 600]
    assert after.exp_avg_sq.isnan().nonzero().flatten().tolist() == [5, 9]
    assert after.param[7] == -math.inf and after.exp_avg_sq[600] == math.inf
    if step_kernel.exact:
        call("langevin_adam_", [row], options, "cpp")
        assert same_values(after, row)
