"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time for the machine code's sake.

What runs them on a GPU is contract/test_optimizers.py. Interpreted, they must give the C++ kernels' bits where both can
be had (Triton 3.9 rounds an fma once, as a GPU does; 3.6 twice), and always what the formula gives.
"""

import dataclasses
import math
import re

import pytest
import torch

from fekernels.reference import random as reference
from tests.support.formulas import BY_OPTIONS, STEPS, assert_close_to_formula, langevin_adam_formula
from tests.support.optimizers import (
    CASES,
    NOISES,
    OPTIONS,
    SEED,
    SGLD_OPTIONS,
    UNITS_AFTER,
    Case,
    Options,
    Row,
    make_row,
)
from tests.support.places import Place
from tests.support.tensors import DTYPES, UNIT, bits_equal, lay_out

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import machine_code as triton_aot  # noqa: E402

CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def run(interpret):
    return interpret


@pytest.fixture(scope="module")
def fuses(run):
    """Whether the interpreter's bits are a GPU's."""
    return run("fuses")


@pytest.fixture
def check(run, fuses):
    """check(op, rows, options, **changes): one interpreted step against the formula and the C++ kernels."""

    def compare(op, rows, options, formula=True, **changes):
        call, exact_step, _ = STEPS[op]
        got = run("step", op, rows, options, changes)
        for row, before in zip(got, rows, strict=True):
            assert row.step.item() == options.t and row.step.dtype == before.step.dtype
            assert all(getattr(row, n).stride() == getattr(before, n).stride() for n in Row.WRITTEN)
            if not formula:
                continue
            wide = torch.float64 if row.param.dtype == torch.float64 and fuses else torch.float32
            eager = exact_step(before, options, wide)
            for name, exact in exact_step(before, options).items():
                if name == "max_exp_avg_sq" and options.amsgrad:  # the maximum of what is stored
                    exact = torch.maximum(exact, row.exp_avg_sq.double())
                assert_close_to_formula(getattr(row, name), exact, eager[name], f"{op} {options} {name}")
        if fuses and Place("cpp", "cpu").obstacle() is None:
            expected = [row.clone() for row in rows]
            call(expected, options, "cpp", **changes)
            for row, peer in zip(got, expected, strict=True):
                assert all(bits_equal(getattr(row, n), getattr(peer, n)) for n in Row.WRITTEN), (
                    f"{op} {options}"
                )
        return got

    return compare


# Noise.


def test_known_answers(run):
    # Salmon et al.'s vectors: counter and key all zeros; and counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822
    # 299f31d0, of which our counter can express all but c1's upper half by the purpose.
    assert [w & 0xFFFFFFFF for w in run("draw", "bits", 4, 0, 0, 0, 0, 0).tolist()] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    seed, offset = 0x299F31D0A4093822, 4 * (0x08D3 << 32 | 0x243F6A88)
    assert [w & 0xFFFFFFFF for w in run("draw", "bits", 4, seed, 0x03707344, 0x13198A2E, offset, 0x85A3).tolist()] == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


@pytest.mark.parametrize("offset", [0, 5, 2**34 - 6, 2**50 - 4096])
def test_draws_are_the_references(run, fuses, offset):
    key = (-SEED, 2**32 - 1, 2**31 + 5, offset, 65535)
    for kind, dtype in (("bits", torch.int32), ("uniform", torch.float32), ("normal", torch.float32)):
        expected = torch.empty(2500, dtype=dtype)
        getattr(reference, f"philox_{kind}")(expected, *key)
        got = run("draw", kind, 2500, *key)
        if kind != "normal" or fuses:
            assert bits_equal(got, expected), kind
        else:
            # Three units in the last place of the largest normals, as random/test_random.py.
            torch.testing.assert_close(got, expected, rtol=0, atol=1.5e-6)


def test_slices_are_slices_of_the_whole(run):
    for kind in ("bits", "uniform", "normal"):
        whole = run("draw", kind, 2100, 3, 1, 2, 0, 4)
        for begin, end in ((0, 0), (0, 1), (1, 2), (4, 1029), (1023, 2100)):
            assert torch.equal(run("draw", kind, end - begin, 3, 1, 2, begin, 4), whole[begin:end]), (
                kind,
                begin,
                end,
            )


# Steps.


@pytest.mark.parametrize(("op", "name"), BY_OPTIONS)
def test_step_with_every_option(check, op, name):
    check(op, [make_row(Case((200,)), Options(**STEPS[op][2][name]))], Options(**STEPS[op][2][name]))


@pytest.mark.parametrize("case", [case for case in CASES if math.prod(case.shape) < 5000], ids=str)
def test_step_with_every_shape_and_layout(check, case):
    for op, (_, _, table) in STEPS.items():
        options = Options(**table.get("everything", table["anchor"]))
        check(op, [make_row(case, options)], options)


DTYPES_AND_ROUNDINGS = [
    pytest.param(dtype, states, rounding, id=f"{dtype}-{states}-{rounding}".replace("torch.", ""))
    for dtype in DTYPES
    for states in DTYPES
    for rounding in ("nearest", "stochastic")[: 1 + (torch.bfloat16 in (dtype, states))]
]


@pytest.mark.parametrize("operand", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor"])
def test_one_operand_off_an_aligned_address(check, operand):
    # The worker checks every alignment that a kernel promises.
    options = Options(**OPTIONS["everything"])
    row = make_row(Case((64,)), options)
    setattr(row, operand, lay_out(getattr(row, operand), "misaligned"))
    check("langevin_adam_", [row], options)


@pytest.mark.parametrize(("dtype", "states", "rounding"), DTYPES_AND_ROUNDINGS)
def test_step_with_every_dtype(check, dtype, states, rounding):
    stochastic = rounding == "stochastic"
    options = Options(**OPTIONS["everything"], stochastic_rounding=stochastic)
    rows = [make_row(Case(shape), options, dtype, states, grad_dtype=states) for shape in ((65,), (1024,))]
    check("langevin_adam_", rows, options, formula=not stochastic)
    options = Options(**SGLD_OPTIONS["anchor"], stochastic_rounding=stochastic)
    row = make_row(Case((1032,)), options, dtype, grad_dtype=states)
    check("sgld_", [row], options, formula=not stochastic)


def test_stochastic_rounding_is_one_of_the_two_neighbours(run):
    # Without the C++ kernels' bits to compare with, this still tells a wrong half of a word from a right one: the mean.
    options = Options(stochastic_rounding=True, temperature=0.0)
    row = make_row(Case((4096,)), options, torch.bfloat16)
    row.param.fill_(1.0 + 2.0**-7)
    row.grad.fill_(0.5)
    row.exp_avg.fill_(0.2)
    row.exp_avg_sq.fill_(0.1)
    exact = langevin_adam_formula(row, options)
    (got,) = run("step", "langevin_adam_", [row], options, {})
    for name in ("param", "exp_avg", "exp_avg_sq"):
        value, stored = exact[name][0].item(), getattr(got, name).double()
        low, high = stored.min().item(), stored.max().item()
        assert low <= value <= high and high - low <= 2.0**-7 * abs(value), name
        assert abs(stored.mean().item() - value) < 5 * (high - low) / 2 / math.sqrt(4096), name


def test_stochastic_rounding_keeps_nan(run):
    # Sixteen bits added to this NaN make 0 of it.
    options = Options(stochastic_rounding=True)
    row = make_row(Case((64,)), options, torch.bfloat16, grad_dtype=torch.float32)
    row.grad = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    (got,) = run("step", "langevin_adam_", [row], options, {})
    assert all(getattr(got, name).isnan().all() for name in ("param", "exp_avg", "exp_avg_sq"))


def test_rows_of_several_dtypes_are_refused(run):
    rows = [make_row(Case((4,)), Options(), dtype) for dtype in (torch.float32, torch.bfloat16)]
    with pytest.raises(ValueError, match="rows of a table must all have dtypes 0x0"):
        run("step", "sgld_", rows, Options(), {}, False)


@pytest.mark.parametrize("op", STEPS)
def test_many_rows_in_one_launch(check, op):
    options = Options(amsgrad=True, stochastic_rounding=True)
    shapes = ((63,), (0,), (4096,), (4100,), (1,), (33, 7))
    dtypes = (torch.float32, torch.bfloat16)
    rows = [make_row(Case(s), options, d, stream=i) for d in dtypes for i, s in enumerate(shapes)]
    for row in rows[::2]:
        row.step = row.step.double()
    check(op, rows, options, formula=False)


@pytest.mark.parametrize("op", STEPS)
def test_more_rows_than_are_counted_at_once(check, op):
    options = Options()
    check(
        op,
        [make_row(Case((int(i % 60 == 59),)), options, stream=i) for i in range(300)],
        options,
        formula=False,
    )


@pytest.mark.parametrize("op", STEPS)
def test_nothing_but_empty_tensors_is_still_a_step(run, op):
    rows = run(
        "step", op, [make_row(Case((0,)), Options()), make_row(Case((2, 0)), Options())], Options(), {}
    )
    assert [row.step.item() for row in rows] == [4.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shard", [(4, 300, 300), (8, 300, 300), (3, 300, 300), (2**34 - 8, 60, 101), (0, 300, 9000)]
)
def test_shards(run, check, dtype, shard):
    """Elements of a shard are those of the whole parameter, wherever the shard begins and however it is cut."""
    options = Options(stochastic_rounding=True)
    row = make_row(Case((300,)), options, dtype)
    row.shard = shard
    for op in STEPS:
        check(op, [row], options, formula=False)

    offset, run_length, pitch = shard
    index = torch.arange(300) // run_length * pitch + torch.arange(300) % run_length
    noise = run("draw", "normal", int(index.max()) + 1, options.seed, row.stream, options.t, offset, 0)[index]
    plain = dataclasses.replace(options, stochastic_rounding=False)
    row = make_row(Case((300,)), plain)
    row.shard = shard
    row.grad.zero_()
    row.param.zero_()
    (got,) = run("step", "sgld_", [row], plain, {})
    # The scale, and the product: two roundings on either side.
    wanted = math.sqrt(2 * plain.temperature * plain.lr) * noise
    torch.testing.assert_close(got.param, wanted, rtol=4 * UNIT, atol=0)


@pytest.mark.parametrize("op", STEPS)
def test_found_inf_changes_nothing(run, op):
    for found in (1.0, math.nan, 0.0):
        options = Options(found_inf=found, grad_scale=2.0, noise_unit=0.7)
        before = make_row(Case((65,)), options)
        (after,) = run("step", op, [before], options, {})
        unchanged = all(bits_equal(getattr(before, name), getattr(after, name)) for name in Row.WRITTEN)
        assert unchanged is (found != 0)


@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("op", "noise"), [("sgld_", "momentum"), *(("langevin_adam_", noise) for noise in NOISES)]
)
def test_tensor_lr_and_temperature_replace_the_floats(run, op, noise, of):
    options = Options(lr=2.0**-5, temperature=0.375, noise=noise, noise_unit=0.75)  # exact in float32
    row = make_row(Case((65,)), options)
    (floats,) = run("step", op, [row], options, {})
    tensors = {
        "lr_tensor": torch.tensor(options.lr, dtype=of),
        "temperature_tensor": torch.tensor([0.375], dtype=of),
    }
    other = dataclasses.replace(options, lr=7.0, temperature=0.0)
    (got,) = run("step", op, [row], other, tensors)
    assert all(bits_equal(getattr(got, name), getattr(floats, name)) for name in Row.WRITTEN)


@pytest.mark.parametrize(
    ("op", "noise"), [("sgld_", "momentum"), *(("langevin_adam_", noise) for noise in NOISES)]
)
def test_a_temperature_tensor_of_zero_is_no_noise_at_all(run, op, noise):
    # Where D is infinite, 0 times the noise would be NaN; and adding 0 to -0 would lose its sign.
    options = Options(temperature=0.0, noise=noise)
    row = make_row(Case((65,)), options)
    row.grad[:3] = torch.tensor([math.inf, -math.inf, 0.0])
    row.exp_avg[2] = row.param[2] = -0.0
    row.exp_avg_sq[3] = math.inf
    (floats,) = run("step", op, [row], options, {})
    for changes in (
        {"temperature_tensor": torch.zeros(())},
        {"lr_tensor": torch.tensor(options.lr, dtype=torch.float64)},
    ):
        (got,) = run("step", op, [row], options, changes)
        assert all(bits_equal(getattr(got, name), getattr(floats, name)) for name in Row.WRITTEN)


@pytest.mark.parametrize(("changes", "expected"), UNITS_AFTER)
def test_the_noise_unit_is_that_of_the_last_step_that_moved(run, changes, expected):
    options = Options(**{"noise_unit": 0.7, **changes})
    rows = [make_row(Case(shape), options) for shape in ((3,), (0,), (5,))]
    assert [row.noise_unit.item() for row in run("step", "langevin_adam_", rows, options, {})] == [
        expected
    ] * 3


# Machine code.


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, id=f"{name}-sm_{capability}")
        for name in triton_aot.SPECS
        for capability in CAPABILITIES
        if capability == 90 or name not in triton_aot.VARIANTS
    ],
)
def test_compiled_kernel_keeps_to_registers_and_whole_vectors(name, capability):
    spec, code = triton_aot.SPECS[name], triton_aot.compiled(name, capability)
    assert code.spills == 0 and code.local == 0
    assert code.registers <= spec.constants.get("maxnreg", 40)
    assert (code.loads_128, code.stores_128) == (spec.reads, spec.writes)
    # The slow path's reordering of a few words goes through shared memory; the fast path's must not.
    assert code.shared <= 4 * 128


@pytest.mark.parametrize("name", triton_aot.SPECS)
def test_compiled_kernel_rounds_as_written(name):
    code = triton_aot.compiled(name, 90)
    assert not code.fuses
    widths = re.findall(r"call [\w ]*?(?:<(\d+) x )?float>? @llvm\.fma", code.llvm)
    assert code.ptx.count("fma.rn.f32") == sum(int(width or 1) for width in widths) > 0
    if name == "normal":  # two counter blocks a thread, two pairs a block, and the fmas of csrc/core/normal.h
        assert code.ptx.count("fma.rn.f32") == 2 * 2 * 16
    assert "fma.rn.f64" not in code.ptx  # coefficients have none
    assert not re.search(r"\.(?:approx|full|ftz)\b", code.ptx)
    if name != "sgld":
        assert "sqrt.rn.f32" in code.ptx
    if "sgld" not in name and name != "normal":
        assert "div.rn.f32" in code.ptx and "sqrt.rn.f64" in code.ptx and "div.rn.f64" in code.ptx


def test_compiled_programs_have_all_read_before_the_last_one_writes():
    # One thread counts the program as done: not before all have read the step that the last program will advance.
    between = r"bar\.sync(?:(?!ld\.global|st\.global).)*?atom\.global\.gpu\.acq_rel"
    assert re.search(between, triton_aot.compiled("cold", 90).ptx, re.DOTALL)


def test_a_new_value_compiles_nothing():
    """Triton compiles anew for an integer that is 1 or a multiple of 16, and for such a pointer; here it must not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    def specialisations(kernel, *calls):
        bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        found = [bind(*call)[1] for call in calls]
        assert kernel.cache_key and not kernel.used_global_vals  # each would be compared at every launch
        assert all(one == found[0] for one in found), kernel.__name__
        return dict(zip(kernel.arg_names, found[0], strict=True))

    aligned, misaligned = (torch.zeros(17, dtype=torch.int64)[i:] for i in (0, 1))

    def step(pointer, count, h, temperature, seed):
        table = (pointer, count, pointer, pointer, count, pointer)
        floats = (h, None, temperature, None, 0.9, h, h, h, h)
        return (*table, *floats, seed, pointer, pointer, *(0,) * 7)

    types = specialisations(
        triton_aot.langevin_adam.langevin_adam_kernel,
        step(aligned, 1, 1e-3, 1.0, 1),
        step(misaligned, 16, 1.0, 1e-30, -(2**63)),
        step(aligned, 1000, 0.0, 1e300, 2**63 - 1),
    )
    # A Python float is float32 to Triton unless told otherwise.
    assert {types[name][0] for name in ("lr", "temperature", "beta1", "beta2", "eps", "weight_decay")} == {
        "fp64"
    }
    specialisations(
        triton_aot.random.fill_kernel,
        (aligned, 1, 1, 1, 1, 0, 0, 2, True, 1024),
        (misaligned, 16, -(2**63), 2**32 - 1, 16, 2**50, 65535, 2, True, 1024),
    )
