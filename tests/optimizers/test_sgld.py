"""fe.SGLD: the formula, its state, and what it shares with fe.LangevinAdam."""

import copy
import math

import pytest
import torch

import fekernels as fe
from tests.support.formulas import assert_close_to_formula, sgld_formula
from tests.support.implementations import threads
from tests.support.optimizer_rows import make_row
from tests.support.optimizers import Case, Options
from tests.support.parameters import step
from tests.support.tensors import DTYPES, UNIT, Frozen, bits_equal, lay_out


def leaf(values, place):
    return values.detach().clone().to(place.device).requires_grad_()


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(prior_precision=2.0, anchor=True),
        dict(maximize=True, weight_decay=0.3),
        dict(temperature=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_the_formula(dtype, switches, place):
    for t in (1, 2):
        options = Options(**switches, t=t)
        row = make_row(Case((33, 7)), options, dtype, stream=0).clone(place.device)
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        exact, eager = sgld_formula(row, options), sgld_formula(row, options, compute_dtype)
        p = row.param.requires_grad_()
        optimizer = fe.SGLD(
            [p], options.lr, temperature=options.temperature, prior_precision=options.prior_precision,
            anchor=[row.anchor] if options.anchor else None, weight_decay=options.weight_decay,
            maximize=options.maximize, seed=options.seed, backend=place.backend,
        )  # fmt: skip
        optimizer.state[p]["step"] = torch.tensor(t - 1.0, device=place.device)
        p.grad = row.grad
        optimizer.step()
        assert_close_to_formula(p, exact["param"], eager["param"], str(options))
        assert optimizer.state[p]["step"].item() == t


def test_noise_is_the_named_draw(place):
    params = [leaf(torch.zeros(5), place), leaf(torch.zeros(33, 7), place)]
    optimizer = fe.SGLD(params, 0.125, temperature=4.0, seed=99, backend=place.backend)
    for t in (1, 2):
        with torch.no_grad():
            params[1].zero_()
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        xi = fe.random.normal((33, 7), seed=99, stream=1, step=t, purpose=0)
        assert bits_equal(params[1], xi)  # sqrt(2 T h) = 1, and 0 + 1 * xi is exact


def test_the_only_state_is_the_step(place):
    p = leaf(torch.zeros(5), place)
    optimizer = fe.SGLD([p], 0.1, prior_precision=1.0, anchor="init", backend=place.backend)
    step(optimizer, 0)
    assert set(optimizer.state[p]) == {"step", "anchor"} and optimizer.state[p]["step"].shape == ()
    optimizer = fe.SGLD([p], 0.1, backend=place.backend)
    step(optimizer, 0)
    assert set(optimizer.state[p]) == {"step"}


def test_localised_sgld_of_local_learning_coefficients(place):
    # Lau et al. 2023: delta = -(e/2)(n beta g + gamma (theta - theta0)) + sqrt(e) xi
    e, n, beta, gamma = 1e-3, 50, 0.3, 4.0
    start = torch.randn(1000)
    p = leaf(start, place)
    optimizer = fe.SGLD(
        [p], e * n * beta / 2, temperature=1 / (n * beta), prior_precision=gamma / (n * beta), anchor="init", seed=1,
        backend=place.backend,
    )  # fmt: skip
    want = start.double()
    for t in (1, 2, 3):
        step(optimizer, t)
        xi = fe.random.normal(1000, seed=1, step=t, purpose=0).double()
        want = want - e / 2 * (n * beta * p.grad.cpu().double() + gamma * (want - start)) + math.sqrt(e) * xi
    # Two roundings a step of numbers near the parameter, which are far larger than what is added to it.
    torch.testing.assert_close(p.detach().cpu().double(), want, rtol=8 * UNIT, atol=8 * UNIT)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "channels_last"])
def test_layout_does_not_change_the_bits(layout, place):
    values = torch.randn(3, 5, 8, 9)
    plain = leaf(values, place)
    laid_out = lay_out(values, layout).to(place.device).requires_grad_()
    for p in (plain, laid_out):
        optimizer = fe.SGLD([p], 0.1, seed=1, backend=place.backend)
        for i in range(2):
            step(optimizer, i)
    assert bits_equal(plain, laid_out)


def test_bits_do_not_depend_on_threads_or_instruction_set(isa):
    runs = []
    for count in (1, 2):
        params = [torch.linspace(-1, 1, 50_001).requires_grad_(), torch.ones(33, 7, requires_grad=True)]
        optimizer = fe.SGLD(params, 0.1, seed=1, backend="cpp")
        with threads(count):
            step(optimizer, 0)
        runs.append(params)
    reference = [torch.linspace(-1, 1, 50_001).requires_grad_(), torch.ones(33, 7, requires_grad=True)]
    optimizer = fe.SGLD(reference, 0.1, seed=1, backend="reference")
    step(optimizer, 0)
    for a, b, c in zip(*runs, reference, strict=True):
        assert bits_equal(a, b)
        # Four roundings of numbers near 1 on either side.
        torch.testing.assert_close(a, c, rtol=8 * UNIT, atol=8 * UNIT)


@pytest.mark.parametrize("how", ["checkpoint", "deepcopy"])
def test_a_resumed_run_is_the_uninterrupted_run(how, place):
    p = leaf(torch.randn(100), place)
    optimizer = fe.SGLD([p], 0.1, prior_precision=0.5, anchor="init", seed=1, backend=place.backend)
    for i in range(3):
        step(optimizer, i)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        other = fe.SGLD([leaf(p, place)], 0.1, prior_precision=0.5, anchor="init", backend=place.backend)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, other):
        for i in range(3, 6):
            step(o, i)
    assert bits_equal(p, other.param_groups[0]["params"][0])


def test_lr_zero_none_gradients_and_found_inf(place):
    params = [leaf(torch.randn(10), place) for _ in range(2)]
    optimizer = fe.SGLD(params, 0.0, seed=1, backend=place.backend)
    frozen = Frozen(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert frozen.unchanged() and params[1] not in optimizer.state
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.found_inf = torch.ones((), device=place.device)
    optimizer.step()
    assert frozen.unchanged() and optimizer.state[params[0]]["step"].item() == 1
    optimizer.found_inf = torch.zeros((), device=place.device)
    optimizer.grad_scale = torch.tensor(2.0, device=place.device)
    optimizer.step()
    xi = fe.random.normal(10, seed=1, step=2, purpose=0)
    want = frozen.before[0].cpu() - 0.1 / 2 + math.sqrt(0.2) * xi
    torch.testing.assert_close(params[0].detach().cpu(), want)


def test_a_step_without_any_gradient(place):
    p = leaf(torch.randn(10), place)
    frozen = Frozen([p])
    fe.SGLD([p], 0.1, backend=place.backend).step()
    assert frozen.unchanged()


def test_a_compiled_step_is_the_step(place):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        p = leaf(torch.linspace(-1, 1, 100), place)
        optimizer = fe.SGLD([p], 0.1, seed=1, backend=place.backend)
        take = (
            torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        )
        for i in range(3):
            p.grad = torch.full_like(p, float(i))
            take()
        runs.append(p)
    torch._dynamo.reset()
    assert bits_equal(*runs)


def test_tensor_lr_and_temperature(place):
    runs = []
    for tensors in (False, True):
        p = leaf(torch.linspace(-1, 1, 100), place)
        lr, temperature = 0.25, 0.5
        if tensors:
            lr, temperature = (torch.tensor([x], device=place.device) for x in (lr, temperature))
        optimizer = fe.SGLD([p], lr, temperature=temperature, seed=1, backend=place.backend)
        step(optimizer, 0)
        runs.append(p)
    assert bits_equal(*runs)


# bfloat16.


def test_stochastic_rounding_keeps_small_steps(place):
    # Drift 5e-5 and noise 4.5e-4 a step, where half the spacing below 1 is 2e-3: to nearest, nearly nothing moves.
    count, steps, lr, grad = 200_000, 20, 1e-7, 500.0
    moved = {}
    for stochastic in (False, True):
        p = torch.ones(count, dtype=torch.bfloat16, device=place.device, requires_grad=True)
        optimizer = fe.SGLD([p], lr, stochastic_rounding=stochastic, seed=0, backend=place.backend)
        for _ in range(steps):
            p.grad = torch.full_like(p, grad)
            optimizer.step()
        moved[stochastic] = (1 - p.detach().double()).mean().item()
    # Of the mean, from roundings by up to 2^-8.
    drift, error = grad * lr * steps, 2.0**-8 * math.sqrt(steps / count)
    assert abs(moved[True] - drift) < 5 * error and drift > 20 * error
    assert moved[False] < 0.05 * drift


def test_stochastic_rounding_is_of_the_same_bits_as_langevin_adams(place):
    # Word g of the parameter's stream, purpose 1, its low half: between neighbours a and b the fraction of the way.
    p = torch.ones(64, dtype=torch.bfloat16, device=place.device, requires_grad=True)
    optimizer = fe.SGLD([p], 1.0, temperature=0.0, stochastic_rounding=True, seed=5, backend=place.backend)
    p.grad = torch.full_like(p, -(2.0**-9))
    optimizer.step()
    words = fe.random.bits(64, seed=5, stream=0, step=1, purpose=1) & 0xFFFF
    bits = torch.tensor(1 + 2.0**-9).view(torch.int32) + words
    assert bits_equal(p, (bits & ~0xFFFF).view(torch.float32).bfloat16())
    other = torch.ones(64, dtype=torch.float32, device=place.device, requires_grad=True)
    other.grad = torch.full_like(other, -(2.0**-9))
    fe.SGLD([other], 1.0, temperature=0.0, stochastic_rounding=True, seed=5, backend=place.backend).step()
    assert (other == 1 + 2.0**-9).all()
