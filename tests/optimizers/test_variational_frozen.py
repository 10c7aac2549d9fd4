"""fe.VariationalAdam and parameters that are frozen: they are no part of the Gaussian while they are."""

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from tests.optimizers.test_variational_adam import ESTIMATORS, all_of, make, parameters, same, train
from tests.support.optimizers import BF16, F32
from tests.support.tensors import bits_equal


def bits(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def equal(a: list[Tensor], b: list[nn.Parameter]) -> list[bool]:
    return [bits_equal(x, y.detach()) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_and_steps_leave_frozen_parameters(estimator, dtype, backend, samples):
    params = parameters(dtype)
    optimizer = make(params, estimator=estimator, backend=backend, mc_samples=samples)
    train(optimizer, 1, samples)
    for frozen in (0, 2, 0):  # the first of the group, the last, and another again
        params[frozen].requires_grad_(False)
        params[frozen].grad = torch.ones_like(
            params[frozen]
        )  # left over; torch's optimizers would step by it
        before = bits(params)
        for training in (True, False):
            with optimizer.sampled_params(train=training):
                assert equal(before, params) == [i == frozen for i in range(3)]
                if training:
                    torch.stack([p.float().square().sum() for p in params]).sum().backward()
            assert all(equal(before, params))
        optimizer.step()
        assert equal(before, params) == [i == frozen for i in range(3)]
        params[frozen].requires_grad_(True)
        train(optimizer, 1, samples)
        assert not any(equal(before, params))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_noise_of_the_others_stays_theirs(estimator):
    """As if the frozen one had no gradient: a loss that is a sum over parameters does not see its draws."""
    frozen, ungraded = make(estimator=estimator), make(estimator=estimator)
    train(frozen, 2)
    train(ungraded, 2)
    params, others = all_of(frozen), all_of(ungraded)
    params[1].requires_grad_(False)
    for _ in range(3):
        train(frozen, 1)
        with ungraded.sampled_params(train=True):
            ungraded.zero_grad()
            (torch.cosh(0.5 * others[0]).sum() + others[0].sum()).backward()
            (torch.cosh(0.5 * others[2]).sum() + others[2].sum()).backward()
        ungraded.step()
    assert equal(bits(others), params) == [True] * 3


def test_frozen_between_a_draw_and_its_step_is_not_stepped():
    optimizer = make()
    params = all_of(optimizer)
    before = bits(params)
    with optimizer.sampled_params(train=True):
        torch.stack([p.square().sum() for p in params]).sum().backward()
    params[1].requires_grad_(False)
    optimizer.step()
    assert equal(before, params) == [False, True, False]
    # Frozen inside: the context still ends at the mean.
    params[1].requires_grad_(True)
    before = bits(params)
    with optimizer.sampled_params():
        params[1].requires_grad_(False)
    assert all(equal(before, params))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_posterior_is_a_point_there_and_the_kl_without_it(estimator, dtype):
    params = parameters(dtype)
    optimizer = make(params, estimator=estimator)
    train(optimizer, 2)
    params[0].requires_grad_(False)
    first, *rest = optimizer.posterior()
    assert torch.equal(first.mean, params[0].float()) and not first.std.any()
    assert first.mean.data_ptr() != params[0].data_ptr()
    assert [g.mean.shape for g in rest] == [p.shape for p in params[1:]] and all(g.std.all() for g in rest)
    params[0].requires_grad_(True)
    whole = optimizer.kl()
    for param in params[1:]:
        param.requires_grad_(False)
    of_first = optimizer.kl()
    params[0].requires_grad_(False)
    for param in params[1:]:
        param.requires_grad_(True)
    torch.testing.assert_close(optimizer.kl() + of_first, whole)
    assert optimizer.free_energy(0.0) == pytest.approx(float(optimizer.kl()) / 40.0)


def test_all_frozen_is_a_point():
    optimizer = make()
    params = all_of(optimizer)
    for param in params:
        param.requires_grad_(False)
    before = bits(params)
    with optimizer.sampled_params():
        assert all(equal(before, params))
    assert optimizer.kl() == 0 and optimizer.free_energy(1.5) == 1.5
    assert not any(g.std.any() for g in optimizer.posterior())


def test_a_checkpoint_with_a_frozen_parameter_goes_on():
    def frozen() -> fe.VariationalAdam:
        params = parameters()
        params[0].requires_grad_(False)
        return make(params)

    through, saved, loaded = frozen(), frozen(), frozen()
    train(through, 4)
    train(saved, 2)
    loaded.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for a, b in zip(all_of(loaded), all_of(saved), strict=True):
            a.copy_(b)
    train(loaded, 2)
    for optimizer in (through, loaded):  # never drawn: it has no state, until it is unfrozen
        assert all_of(optimizer)[0] not in optimizer.state
        all_of(optimizer)[0].requires_grad_(True)
        train(optimizer, 1)
    assert same(through, loaded)


def test_samples_hold_a_frozen_parameter_as_it_is():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = fe.VariationalAdam(model.parameters(), 0.1, 50.0, seed=1)
    samples = fe.PosteriorSamples(model)
    for _ in range(3):
        with optimizer.sampled_params():
            samples.collect()
    assert all(torch.equal(sample["bias"], model.bias) for sample in samples)
    assert not torch.equal(samples[0]["weight"], samples[1]["weight"])


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_with_a_frozen_parameter_goes_on(flat, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    pairs = []
    for _ in range(2):
        net = nn.ParameterList(parameters(F32))
        net[1].requires_grad_(False)
        pairs.append((net, make(list(net))))
    (net, optimizer), (other, resumed) = pairs
    train(optimizer, 2, 1)
    # One process needs no group; torch says that it saves alone.
    dcp.save(get_optimizer_state_dict(net, optimizer, options=options), checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(net.state_dict())
    state = get_optimizer_state_dict(other, resumed, options=options)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, state, options=options)
    for each in (optimizer, resumed):
        train(each, 1, 1)
    assert same(optimizer, resumed)
