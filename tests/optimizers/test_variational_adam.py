"""fe.VariationalAdam: contexts, the step by one draw and by several, and what happens around them."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import fekernels as fe
from tests.support.optimizers import BF16, F16, F32, F64
from tests.support.tensors import Frozen, bits_equal

ESTIMATORS = ("natural", "reparam")
ESS, DELTA = 40.0, 0.05


def parameters(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7,), (5, 3), (1,))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make(params=None, lr=0.1, ess=ESS, **options) -> fe.VariationalAdam:
    given = dict(weight_decay=DELTA, betas=(0.8, 0.9), seed=11) | options
    return fe.VariationalAdam(parameters() if params is None else params, lr, ess, **given)


def all_of(optimizer: fe.VariationalAdam) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def loss_of(params: list[torch.nn.Parameter]) -> Tensor:
    """Not a quadratic: what a draw changes is more than its gradient's mean."""
    return sum(
        (torch.cosh(0.5 * param.float()).sum() + param.float().sum() for param in params), torch.zeros(())
    )


def train(optimizer: fe.VariationalAdam, steps: int, samples: int = 1) -> None:
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(all_of(optimizer)).backward()
        optimizer.step()


def same(a: fe.VariationalAdam, b: fe.VariationalAdam) -> bool:
    pairs = zip(all_of(a), all_of(b), strict=True)
    return all(
        bits_equal(p, q) and all(bits_equal(a.state[p][key], b.state[q][key]) for key in a.state[p])
        for p, q in pairs
    )


def xi(param: Tensor, stream: int, draw: int, seed: int = 11) -> Tensor:
    return fe.random.normal(param.shape, seed=seed, stream=stream, step=draw, purpose=2)


# Draws.


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_a_draw_is_mean_and_noise_and_leaving_restores_every_bit(dtype, estimator):
    optimizer = make(parameters(dtype), estimator=estimator, hess_init=2.0)
    params = all_of(optimizer)
    with torch.no_grad():
        params[0][:2] = torch.tensor([-0.0, math.inf])
    before = [param.detach().clone() for param in params]
    std = 1 / math.sqrt(ESS * (2.0 + DELTA))
    for train_too in (True, False):
        with optimizer.sampled_params(train=train_too):
            for i, (param, start) in enumerate(zip(params, before, strict=True)):
                stream = i if train_too else i ^ 0x80000000
                drawn = start.double() + std * xi(param, stream, 1).double()
                tolerance = max(torch.finfo(dtype).eps, 1e-6 if estimator == "reparam" else 3e-7)
                torch.testing.assert_close(param.double(), drawn, rtol=tolerance, atol=tolerance)
            assert not any(bits_equal(p, b) for p, b in zip(params, before, strict=True))
            if train_too:
                loss_of(params).backward()
        assert all(bits_equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("train_too", [False, True])
def test_an_exception_inside_restores_the_mean_and_counts_no_draw(train_too):
    optimizer = make()
    frozen = Frozen(all_of(optimizer))
    with pytest.raises(KeyError, match="inside"), optimizer.sampled_params(train=train_too):
        assert not frozen.unchanged()
        loss_of(all_of(optimizer)).backward()
        raise KeyError("inside")
    assert frozen.unchanged()
    with pytest.raises(RuntimeError, match="step must follow a backward inside"):
        optimizer.step()
    assert frozen.unchanged()
    train(optimizer, 1)  # and the next goes on


def test_backward_of_weights_from_before_a_draw_or_its_end_is_an_error_of_autograd():
    optimizer = make()
    for _ in range(3):  # the first makes the tables by which the others go
        before = all_of(optimizer)[0].square().sum()
        with optimizer.sampled_params(train=True):
            inside = all_of(optimizer)[0].square().sum()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                before.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            inside.backward()


def test_evaluation_does_not_change_the_noise_of_training():
    plain, watched = make(), make()
    for steps in (2, 3):
        train(plain, steps)
        train(watched, steps)
        for _ in range(steps):
            with watched.sampled_params():
                loss_of(all_of(watched))
    assert all(bits_equal(p, q) for p, q in zip(all_of(plain), all_of(watched), strict=True))
    assert watched.state[all_of(watched)[0]]["draws"].tolist() == [5, 5]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_first_draw_may_be_one_of_inference_mode(estimator):
    optimizer, other = make(estimator=estimator), make(estimator=estimator)
    with torch.inference_mode(), optimizer.sampled_params():
        loss_of(all_of(optimizer))
    assert not any(value.is_inference() for p in all_of(optimizer) for value in optimizer.state[p].values())
    for each in (optimizer, other):
        train(each, 2, samples=2)
    assert all(bits_equal(p, q) for p, q in zip(all_of(optimizer), all_of(other), strict=True))


def test_at_temperature_0_the_draw_is_the_mean():
    for estimator in ESTIMATORS:
        optimizer = make(estimator=estimator, temperature=0.0)
        frozen, (before, *_) = Frozen(all_of(optimizer)), optimizer.posterior()
        key = "deviation" if estimator == "reparam" else "hessian"
        spread = optimizer.state[all_of(optimizer)[0]][key].clone()
        with optimizer.sampled_params(train=True):
            assert frozen.unchanged()
            loss_of(all_of(optimizer)).backward()
        optimizer.step()
        assert not frozen.unchanged() and bits_equal(optimizer.state[all_of(optimizer)[0]][key], spread)
        assert not before.std.any() or estimator == "reparam"


# Several draws.


def test_the_gradients_of_a_context_survive_any_zeroing():
    def loop(zero: str) -> fe.VariationalAdam:
        optimizer = make()
        module = torch.nn.ParameterList(all_of(optimizer))
        for _ in range(4):
            for _ in range(3):
                if zero.startswith("before"):
                    optimizer.zero_grad(set_to_none=zero == "before")
                with optimizer.sampled_params(train=True):
                    if zero == "inside":
                        optimizer.zero_grad()
                    if zero == "module":
                        module.zero_grad()
                    if zero == "in place":
                        optimizer.zero_grad(set_to_none=False)
                    loss_of(all_of(optimizer)).backward()
                if zero == "module after":
                    module.zero_grad()
            optimizer.step()
            if zero.startswith("before") or zero == "by the step":
                optimizer.zero_grad()
        return optimizer

    expected = loop("inside")
    for zero in ("before", "before, in place", "module", "in place", "module after", "by the step"):
        assert same(loop(zero), expected), zero


def test_a_step_of_one_draw_whose_gradients_were_dropped_is_the_step():
    expected, dropped = make(), make()
    train(expected, 1)
    with dropped.sampled_params(train=True):
        loss_of(all_of(dropped)).backward()
    torch.nn.ParameterList(all_of(dropped)).zero_grad()
    dropped.step()
    for p, q in zip(all_of(expected), all_of(dropped), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_closure_is_called_for_every_draw(estimator, samples):
    looped, closed = (make(estimator=estimator, mc_samples=samples) for _ in range(2))
    losses: list[float] = []

    def closure() -> Tensor:
        with closed.sampled_params(train=True):
            closed.zero_grad()
            loss = loss_of(all_of(closed))
            loss.backward()
        losses.append(loss.item())
        return loss

    train(looped, 2, samples)
    for _ in range(2):
        losses.clear()
        mean = closed.step(closure)
        assert len(losses) == samples and mean.item() == pytest.approx(sum(losses) / samples)
    assert same(looped, closed)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_parameter_without_gradient_gets_no_step(samples):
    optimizer = make()
    used, idle = all_of(optimizer)[:2], all_of(optimizer)[2]
    before = idle.detach().clone()
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(used).backward()
    optimizer.step()
    assert bits_equal(idle, before) and optimizer.state[idle]["step"].item() == 0
    assert all(optimizer.state[param]["step"].item() == 1 for param in used)


# Groups, schedules, copies.


def test_groups_have_their_own_values():
    params = parameters()
    optimizer = make(
        [{"params": params[:1], "ess": 4.0, "lr": 0.0}, {"params": params[1:], "temperature": 0.25}]
    )
    means = [param.detach().clone() for param in params]
    with optimizer.sampled_params(train=True):
        spread = [(p - m) / xi(p, i, 1) for i, (p, m) in enumerate(zip(params, means, strict=True))]
        loss_of(params).backward()
    for each, ess in zip(spread, (4.0, 160.0, 160.0), strict=True):
        torch.testing.assert_close(
            each, torch.full_like(each, 1 / math.sqrt(ess * 1.05)), rtol=2e-3, atol=1e-4
        )
    optimizer.step()
    assert bits_equal(params[0], means[0]) and not bits_equal(params[1], means[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_schedules_and_tensors_move_lr_and_temperature(estimator):
    numbers = make(estimator=estimator)
    tensors = make(estimator=estimator, lr=torch.tensor(0.1), temperature=torch.tensor(1.0))
    for optimizer in (numbers, tensors):
        lr = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        temperature = fe.optim.ExponentialTemperature(optimizer, gamma=0.5)
        for _ in range(4):
            train(optimizer, 1)
            lr.step()
            temperature.step()
    for p, q in zip(all_of(numbers), all_of(tensors), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_at_lr_0_without_a_draw_makes_the_states():
    optimizer = make(lr=0.0)
    frozen = Frozen(all_of(optimizer))
    optimizer.step()
    assert frozen.unchanged() and all("hessian" in optimizer.state[param] for param in all_of(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_copies_go_on_alike(estimator, copied):
    params = parameters()
    optimizer = make(params, estimator=estimator)
    train(optimizer, 2)
    _, other = copied((params, optimizer))
    for each in (optimizer, other):
        train(each, 2)
    assert same(optimizer, other)


# 16-bit parameters.


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_mean_of_16_bit_parameters_moves_by_less_than_they_show(dtype, estimator):
    optimizer = make(parameters(dtype), lr=1e-4, estimator=estimator)
    begins = [param.detach().float() for param in all_of(optimizer)]
    train(optimizer, 20)
    for param, begin in zip(all_of(optimizer), begins, strict=True):
        mean = optimizer.state[param]["mean"]
        assert mean.dtype == F32 and (mean != begin).all() and bits_equal(param, mean.to(dtype))


@pytest.mark.parametrize("samples", [1, 2])
def test_16_bit_parameters_that_somebody_sets_are_the_new_mean(samples):
    optimizer = make(parameters(BF16))
    train(optimizer, 2, samples)
    param = all_of(optimizer)[0]
    with torch.no_grad():
        param[:3] = torch.tensor([1.0, 2.0, 3.0])
    kept = optimizer.state[param]["mean"].clone()
    with optimizer.sampled_params():
        pass
    mean = optimizer.state[param]["mean"]
    assert mean[:3].tolist() == [1.0, 2.0, 3.0] and bits_equal(mean[3:], kept[3:])
    assert param[:3].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_what_is_restored_is_the_mean_wherever_the_parameters_lie_by_then(moved, transposed):
    shapes = [(3,), (), (40, 41), (0,), (16_384,), (5, 7)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    if transposed:
        params[5].data = params[5].data.t()
    optimizer = fe.VariationalAdam(params, lr=1e-3, ess=10.0, seed=0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        with optimizer.sampled_params():
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel())
            if moved:
                held = [p.data for p in params]
                drawn = [old.clone() for old in held]
                for p in params:
                    p.data = p.data.clone()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        if moved:  # what somebody else may have by now is not written
            assert all(map(torch.equal, held, drawn))
