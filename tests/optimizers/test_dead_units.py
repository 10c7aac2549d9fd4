"""Weights whose gradients are 0 from some step on: their moments end at 0, and not as denormal numbers."""

import pytest
import torch

import fekernels as fe
from tests.support.optimizer_rows import make_row
from tests.support.optimizers import Case, Options
from tests.support.tensors import bits_equal

TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def dead(make, steps):
    """A parameter with one gradient, and then none."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    optimizer = make(p)
    for i in range(steps):
        p.grad = torch.full_like(p, 1.0 if i == 0 else 0.0)
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_first_moment_ends_at_zero(backend):
    settings = dict(lr=1e-3, betas=(0.5, 0.999), eps=1e-8)
    p, state = dead(lambda p: fe.LangevinAdam([p], **settings, backend=backend), 200)
    theirs, their_state = dead(lambda p: torch.optim.Adam([p], **settings), 200)
    stuck = their_state["exp_avg"]
    assert (stuck.abs() < TINY[torch.float32]).all()
    assert not state["exp_avg"].any() and not state["exp_avg"].signbit().any()
    torch.testing.assert_close(p, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", list(TINY), ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_what_is_below_goes_and_what_is_not_stays(step_kernel, dtype, amsgrad):
    # The factors 1/2 and 3/4 make exact products.
    options = Options(amsgrad=amsgrad, temperature=0.0, beta1=0.5, beta2=0.75)
    tiny, least, nan = TINY[dtype], 2.0**31 * TINY[dtype], float("nan")
    row = make_row(Case((9,)), options, dtype)
    row.grad.zero_()
    for moment, held in (
        (row.exp_avg, [least, -least, 2 * least, -2 * least, 0.0, nan, 1.0, 5.0, tiny]),
        (row.exp_avg_sq, [tiny, 4 * tiny, 1.25 * tiny, 1.0, 0.0, nan, float("inf"), 1.5 * tiny, 2.0]),
    ):
        moment.copy_(torch.tensor(held, dtype=torch.float64))
    row = step_kernel.one("langevin_adam_", row, options)
    for moment, left in (
        (row.exp_avg, [0.0, 0.0, least, -least, 0.0, nan, 0.5, 2.5, 0.0]),
        (row.exp_avg_sq, [0.0, 3 * tiny, 0.0, 0.75, 0.0, nan, float("inf"), 1.125 * tiny, 1.5]),
    ):
        wanted = torch.tensor(left, dtype=torch.float64).to(dtype)
        assert torch.equal(moment.isnan(), wanted.isnan())
        assert bits_equal(moment.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", list(TINY), ids=str)
def test_the_variational_momentum_too(step_kernel, dtype):
    options = Options(temperature=0.0, beta1=0.5)
    least = 2.0**31 * TINY[dtype]
    row = make_row(Case((3,)), options, dtype)
    row.grad.zero_()
    row.exp_avg.copy_(torch.tensor([least, -least, 2 * least], dtype=torch.float64))
    row = step_kernel.one("variational_adam_", row, options)
    assert bits_equal(row.exp_avg, torch.tensor([0.0, 0.0, least], dtype=torch.float64).to(dtype))
