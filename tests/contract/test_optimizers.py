"""Every operator on every backend that this machine can run, over the table of cases."""

import dataclasses
import itertools

import pytest
import torch

import fekernels as fe
from tests.support.formulas import BY_OPTIONS, STEPS, assert_close_to_formula
from tests.support.optimizers import (
    CASES,
    DRAWS,
    NOISES,
    OPTIONS,
    UNITS_AFTER,
    Case,
    Options,
    Row,
    call_langevin_adam,
    make_row,
    noise_unit,
)
from tests.support.places import ON_GPU, Place, instruction_set, threads
from tests.support.tensors import DTYPES, Frozen, bits_equal

MIXED = (Case((63,)), Case((33, 7), "transposed"), Case((0,)), Case((16385,)), Case((129,), "sliced"))


def assert_step_is_the_formula(op, case, options, place, dtype=torch.float32, **dtypes):
    call, formula, _ = STEPS[op]
    row = make_row(case, options, dtype, **dtypes).clone(place.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, eager = formula(row, options), formula(row, options, wide)
    call([row], options, place.backend)
    for name, value in exact.items():
        if name == "max_exp_avg_sq" and options.amsgrad:  # the maximum of what is stored
            value = torch.maximum(value, row.exp_avg_sq.cpu().double())
        assert_close_to_formula(getattr(row, name), value, eager[name], f"{op} {options} {name}")
    assert row.step.item() == options.t


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", STEPS)
def test_step_is_the_formula_for_every_shape_and_layout(op, case, place):
    assert_step_is_the_formula(
        op, case, Options(**STEPS[op][2].get("everything", STEPS[op][2]["anchor"])), place
    )


@pytest.mark.parametrize(("op", "name"), BY_OPTIONS)
def test_step_is_the_formula_for_every_option(op, name, place):
    assert_step_is_the_formula(op, Case((1000,)), Options(**STEPS[op][2][name]), place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), BY_OPTIONS)
def test_step_is_the_formula_for_every_dtype(op, name, dtype, place):
    assert_step_is_the_formula(op, Case((193,)), Options(**STEPS[op][2][name]), place, dtype)


@pytest.mark.parametrize("states", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_and_gradients_may_have_dtypes_of_their_own(dtype, states, place):
    options = Options(**OPTIONS["everything"])
    assert_step_is_the_formula("langevin_adam_", Case((65,)), options, place, dtype, state_dtype=states)
    assert_step_is_the_formula("langevin_adam_", Case((65,)), options, place, dtype, grad_dtype=states)
    assert_step_is_the_formula("sgld_", Case((65,)), Options(), place, dtype, grad_dtype=states)


@pytest.mark.parametrize("factor", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype, factor, place):
    # Decay by the factor and nothing else: halves of subnormals and three quarters of odd numbers are ties.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    row = make_row(Case((2**16,)), Options(), dtype)
    row.param = numbers.clone()
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        getattr(row, name).zero_()
    row = row.clone(place.device)
    options = Options(lr=1.0, temperature=0.0, eps=1.0, weight_decay=1 - factor, decoupled_weight_decay=True)
    call_langevin_adam([row], options, place.backend)
    want = (numbers.float() * factor).to(dtype)
    assert torch.equal(row.param.cpu().isnan(), want.isnan())
    assert torch.equal(row.param.cpu().nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("noise", NOISES)
def test_float64_step_counter(noise, place):
    options = Options(noise=noise)
    rows = [make_row(Case((65,)), options).clone(place.device) for _ in range(2)]
    rows[1].step = rows[1].step.double()
    for row in rows:
        call_langevin_adam([row], options, place.backend)
    assert bits_equal(rows[0].param, rows[1].param)
    assert rows[1].step.dtype == torch.float64 and rows[1].step.item() == options.t


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("op", STEPS)
def test_one_call_over_many_rows_is_a_call_for_each(op, stochastic, place):
    call = STEPS[op][0]
    options = Options(amsgrad=True, stochastic_rounding=stochastic)
    dtypes = [*DTYPES, torch.bfloat16]
    rows = [make_row(c, options, d, stream=i) for i, (c, d) in enumerate(zip(MIXED, dtypes, strict=True))]
    together, apart = ([row.clone(place.device) for row in rows] for _ in range(2))
    call(together, options, place.backend)
    for row in apart:
        call([row], options, place.backend)
    for a, b in zip(together, apart, strict=True):
        assert all(bits_equal(getattr(a, name), getattr(b, name)) for name in Row.WRITTEN)


@pytest.mark.parametrize("op", STEPS)
def test_layout_does_not_change_the_bits(op, place):
    call = STEPS[op][0]
    options = Options(**STEPS[op][2].get("everything", STEPS[op][2]["anchor"]))
    for case in CASES:
        laid_out = make_row(case, options).clone(place.device)
        plain = make_row(dataclasses.replace(case, layout="contiguous"), options).clone(place.device)
        plain.grad = laid_out.grad.contiguous()
        for row in (laid_out, plain):
            call([row], options, place.backend)
        assert all(bits_equal(getattr(laid_out, name), getattr(plain, name)) for name in Row.WRITTEN), str(
            case
        )


def split(row: Row, sizes: list[int], dim: int) -> list[Row]:
    """Shards of a parameter along one dimension, with what tells each which elements it holds."""
    shape = row.param.shape
    below = shape[dim + 1 :].numel()
    shards, begin = [], 0
    for size in sizes:
        shard = row.clone()
        for name, tensor in vars(row).items():
            if isinstance(tensor, torch.Tensor) and name not in ("step", "noise_unit"):
                setattr(
                    shard, name, tensor.narrow(dim, begin, size).clone(memory_format=torch.contiguous_format)
                )
        shard.shard = (begin * below, max(size * below, 1), shape[dim] * below)
        begin += size
        shards.append(shard)
    return shards


@pytest.mark.parametrize(
    ("shape", "sizes", "dim"),
    [
        ((1000,), [3, 0, 500, 497], 0),
        ((33, 7), [16, 17], 0),
        ((33, 7), [3, 4], 1),
        ((4, 1100, 3), [513, 587], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", STEPS)
def test_shards_get_the_bits_of_the_whole(op, shape, sizes, dim, dtype, place):
    call = STEPS[op][0]
    options = Options(amsgrad=True, stochastic_rounding=True)
    whole = make_row(Case(shape), options, dtype).clone(place.device)
    shards = split(whole, sizes, dim)
    call([whole], options, place.backend)
    call(shards, options, place.backend)
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert bits_equal(torch.cat([getattr(s, name) for s in shards], dim), getattr(whole, name)), name


# 40,001 elements are more than the 32,768 that a second thread needs, and three spans.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", STEPS)
def test_threads_and_instruction_sets_give_the_same_bits(op, dtype, isa):
    call, _, table = STEPS[op]
    for name, count in (
        ("everything", 1),
        ("everything", 2),
        ("plain", 2),
        ("preconditioned", 1),
        ("isotropic", 1),
    ):
        options = Options(**table.get(name, {}), stochastic_rounding=True)
        rows = [make_row(Case((40001,)), options, dtype)]
        got, expected = ([row.clone() for row in rows] for _ in range(2))
        with threads(count):
            call(got, options, "cpp")
        with threads(1), instruction_set("avx2" if isa != "avx2" else "baseline"):
            call(expected, options, "cpp")
        assert all(bits_equal(getattr(got[0], n), getattr(expected[0], n)) for n in Row.WRITTEN), name


@pytest.mark.parametrize("kind", DRAWS)
def test_threads_give_the_same_random_bits(kind, isa):
    drawn = []
    for count in (1, 2):
        with threads(count), fe.use_backend("cpp"):
            drawn.append(getattr(fe.random, kind)(100_001, seed=3, offset=5))
    assert bits_equal(*drawn)


@pytest.mark.parametrize("gpu", ON_GPU)
def test_gpu_gives_the_bits_of_the_cpu(gpu):
    obstacle = gpu.obstacle() or Place("cpp", "cpu").obstacle()
    if obstacle is not None or gpu.backend == "reference":  # the reference promises the noise's bits only
        pytest.skip(obstacle or "not promised")
    for op, (call, _, table) in STEPS.items():
        for name, switches in table.items():
            options = Options(**switches, stochastic_rounding=True)
            for dtype, case in itertools.product(DTYPES, CASES):
                here = make_row(case, options, dtype)
                there = here.clone("cuda")
                call([here], options, "cpp")
                call([there], options, gpu.backend)
                same = all(bits_equal(getattr(here, n), getattr(there, n)) for n in Row.WRITTEN)
                assert same, f"{op} {name} {dtype} {case}"


@pytest.mark.parametrize("op", STEPS)
def test_found_inf_changes_nothing(op, place):
    call = STEPS[op][0]
    for found, expected in ((1.0, True), (0.0, False)):
        options = Options(found_inf=found, grad_scale=2.0, noise_unit=0.7)
        row = make_row(Case((65,)), options).clone(place.device)
        frozen = Frozen([getattr(row, name) for name in Row.WRITTEN])
        call([row], options, place.backend)
        assert frozen.unchanged() is expected


@pytest.mark.parametrize(("changes", "expected"), UNITS_AFTER)
def test_the_noise_unit_is_that_of_the_last_step_that_moved(changes, expected, place):
    options = Options(**{"noise_unit": 0.7, **changes})
    rows = [make_row(Case(shape), options).clone(place.device) for shape in ((3,), (0,))]
    call_langevin_adam(rows, options, place.backend)
    assert [row.noise_unit.item() for row in rows] == [expected, expected]


def test_without_noise_units_none_are_kept_and_nothing_is_rescaled(place):
    options = Options(noise_unit=0.7)
    row, other = (make_row(Case((65,)), options).clone(place.device) for _ in range(2))
    call_langevin_adam([row], options, place.backend, noise_units=[])
    other.noise_unit.zero_()
    call_langevin_adam([other], options, place.backend)
    assert row.noise_unit.item() == 0.7 and bits_equal(row.exp_avg, other.exp_avg)


def test_each_parameter_has_its_own_noise_unit(place):
    units = (0.0, noise_unit(0.02, 0.8), noise_unit(0.08, 0.8), noise_unit(0.02, 0.95), 0.7)
    one = [make_row(Case((65,)), Options(noise_unit=unit), seed=i) for i, unit in enumerate(units)]
    together = [row.clone(place.device) for row in one]
    for row in one:
        call_langevin_adam([row], Options(), "reference" if place.device != "cpu" else place.backend)
    call_langevin_adam(together, Options(), place.backend)
    for row, other in zip(one, together, strict=True):
        torch.testing.assert_close(row.exp_avg, other.exp_avg.cpu(), rtol=1e-6, atol=1e-7)
        assert other.noise_unit.item() == noise_unit(0.02, 0.8)


@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", STEPS)
def test_tensor_lr_and_temperature_replace_the_floats(op, of, place):
    call = STEPS[op][0]
    options = Options(lr=2.0**-5, temperature=0.375)  # exact in float32
    rows = [make_row(Case((65,)), options).clone(place.device) for _ in range(2)]
    call(rows[:1], options, place.backend)
    tensors = {
        "lr_tensor": torch.tensor(options.lr, dtype=of, device=place.device),
        "temperature_tensor": torch.tensor([options.temperature], dtype=of, device=place.device),
    }
    call(rows[1:], dataclasses.replace(options, lr=7.0, temperature=9.0), place.backend, **tensors)
    assert bits_equal(rows[0].param, rows[1].param)
