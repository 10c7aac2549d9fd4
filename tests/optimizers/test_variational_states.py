"""fe.VariationalAdam's states: checkpoints, GradScaler, shards, replicas, compiled steps."""

import copy
import io
import warnings

import pytest
import torch

import fekernels as fe
from tests.optimizers.test_variational_adam import ESTIMATORS, all_of, loss_of, make, parameters, same, train
from tests.support.implementations import CPU_PLACES
from tests.support.optimizers import BF16, F32
from tests.support.tensors import Frozen, bits_equal


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Checkpoints.


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resumed_run_has_the_bits_of_one_that_went_on(estimator, dtype, samples):
    optimizer = make(parameters(dtype), estimator=estimator, mc_samples=samples)
    train(optimizer, 3, samples)
    saved = through_a_file([optimizer.state_dict(), [param.detach() for param in all_of(optimizer)]])
    resumed = make(
        [torch.nn.Parameter(param) for param in saved[1]], estimator=estimator, mc_samples=samples, seed=5
    )
    resumed.load_state_dict(saved[0])
    for each in (optimizer, resumed):
        train(each, 3, samples)
    assert same(optimizer, resumed)
    for param in all_of(resumed):
        assert resumed.state[param]["mean"].dtype == F32 and resumed.state[param]["draws"].tolist() == [
            6 * samples,
            0,
        ]


BAD_STATES = {
    "draws_missing": ("draws", None, "must have step, draws"),
    "draws_of_one": ("draws", torch.zeros(1), "draws of parameter 0 must be a tensor of two numbers"),
    "draws_half": ("draws", torch.tensor([1.5, 0.0]), "draws of parameter 0 must be whole numbers"),
    "draws_negative": ("draws", torch.tensor([-1.0, 0.0]), "draws of parameter 0 must be finite and >= 0"),
    "hessian_shape": ("hessian", torch.ones(3), r"hessian of parameter 0 must have shape \(7,\)"),
    "hessian_missing": ("hessian", None, "must have step, draws, exp_avg, hessian"),
    "mean_dtype": ("mean", torch.zeros(7, dtype=torch.int32), "mean of parameter 0 must be one of float32"),
}


@pytest.mark.parametrize(("key", "value", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_states_that_do_not_fit_are_refused(key, value, message):
    optimizer = make()
    train(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    if value is None:
        del saved["state"][0][key]
    else:
        saved["state"][0][key] = value
    frozen = Frozen([t for param in all_of(optimizer) for t in (param, *optimizer.state[param].values())])
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert frozen.unchanged()


def test_estimators_do_not_take_each_others_states():
    natural, reparam = make(), make(estimator="reparam")
    for optimizer in (natural, reparam):
        train(optimizer, 1)
    saved = copy.deepcopy(natural.state_dict())
    with pytest.raises(ValueError, match="must have step, draws, exp_avg, exp_avg_sq, scale"):
        reparam.load_state_dict(saved)
    for key, value in (("estimator", "natural"), ("scale", "log")):
        saved = copy.deepcopy(reparam.state_dict())
        saved["param_groups"][0][key] = value
        with pytest.raises(
            ValueError, match=f"load_state_dict: {key} must be '(reparam|softplus)'; got '{value}'"
        ):
            reparam.load_state_dict(saved)


@pytest.mark.parametrize(
    "change", ["state", "parameter", "stream", "ess", "weight_decay", "temperature", "seed"]
)
def test_what_somebody_puts_in_between_steps_is_used(change):
    changed, other = make(), make()
    for optimizer in (changed, other):
        train(optimizer, 2)
    param = all_of(changed)[0]
    if change == "state":
        changed.state[param] = {key: value.clone() for key, value in changed.state[param].items()}
        changed.state[param]["hessian"] *= 4
    elif change == "parameter":
        param.data = param.data.flip(0)
    elif change != "stream":
        changed.param_groups[0][change] *= 4
    else:
        changed.param_groups[0]["streams"] = [9, 1, 2]
    for optimizer in (changed, other):
        train(optimizer, 1)
    assert not bits_equal(param, all_of(other)[0])
    # Against one that has never held other tensors.
    fresh_params = [torch.nn.Parameter(p.detach().clone()) for p in all_of(changed)]
    fresh = make(fresh_params)
    fresh.load_state_dict(copy.deepcopy(changed.state_dict()))
    for optimizer in (changed, fresh):
        train(optimizer, 2)
    assert same(changed, fresh)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_distributed_checkpoint_state_dicts(estimator, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def network(seed: int) -> tuple[torch.nn.Module, fe.VariationalAdam]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 3)
        return module, make(module.parameters(), estimator=estimator, seed=seed)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    (module, optimizer), (copied, resumed) = network(1), network(2)
    train(optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
    copied.load_state_dict(module.state_dict())
    set_optimizer_state_dict(copied, resumed, saved, options=options)
    for each in (optimizer, resumed):
        train(each, 2)
    assert same(optimizer, resumed)


# GradScaler.


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_step_is_the_step_and_a_skipped_one_is_none(estimator, samples):
    plain, scaled = make(estimator=estimator), make(estimator=estimator)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def scaled_step(bad: int | None = None) -> None:
        for sample in range(samples):
            with scaled.sampled_params(train=True):
                scaled.zero_grad()
                scaler.scale(loss_of(all_of(scaled))).backward()
                if sample == bad:
                    all_of(scaled)[1].grad[0, 0] = float("inf")
        scaler.step(scaled)
        scaler.update()

    for i in range(5):
        if i == 2:
            for bad in range(samples):  # also in the draw that GradScaler does not look at
                frozen = Frozen([t for p in all_of(scaled) for t in (p, scaled.state[p]["step"])])
                scaled_step(bad)
                assert frozen.unchanged()
            for param in all_of(plain):
                plain.state[param]["draws"][0] += samples * samples
        scaled_step()
        train(plain, 1, samples)
    for p, q in zip(all_of(plain), all_of(scaled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_unscaling_before_a_step_of_several_draws_is_refused():
    optimizer, scaler = make(), torch.amp.GradScaler("cpu")
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(all_of(optimizer))).backward()
    scaler.unscale_(optimizer)
    frozen = Frozen(all_of(optimizer))
    with pytest.raises(RuntimeError, match="GradScaler.unscale_ must not come before"):
        scaler.step(optimizer)
    assert frozen.unchanged()


KINDS = {
    "natural": {},
    "reparam": {"estimator": "reparam"},
    "sync": {"sync": True},
    "of 2": {"mc_samples": 2},
}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradients_clipped_after_a_context_are_those_clipped_inside(options, samples):
    plain, inside, after, anew = (make(**options) for _ in range(4))

    def clip(optimizer):
        torch.nn.utils.clip_grad_norm_(all_of(optimizer), 0.1)

    for _ in range(2):
        for optimizer in (plain, inside, after, anew):
            for _ in range(samples):
                with optimizer.sampled_params(train=True):
                    loss_of(all_of(optimizer)).backward()
                    if optimizer is inside:
                        clip(optimizer)
                if optimizer is after:
                    clip(optimizer)
            if optimizer is anew and samples == 1:
                for param in all_of(optimizer):
                    param.grad = param.grad.clone()
                clip(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert same(inside, after) and not same(inside, plain)
    assert samples == 2 or same(inside, anew)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_unscaled_and_clipped_gradients_of_one_draw_are_taken(options):
    clipped, scaled = make(**options), make(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for optimizer, scale in ((clipped, lambda loss: loss), (scaled, scaler.scale)):
        with optimizer.sampled_params(train=True):
            scale(loss_of(all_of(optimizer))).backward()
    scaler.unscale_(scaled)
    for optimizer in (clipped, scaled):
        torch.nn.utils.clip_grad_norm_(all_of(optimizer), 0.1)
    clipped.step()
    scaler.step(scaled)
    for p, q in zip(all_of(clipped), all_of(scaled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Replicas. (Two that train together, and shards: distributed/test_optimizers.py.)


@pytest.fixture
def rank_of_two():
    """A group of two processes of which only this one is there; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def on_rank(rank):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())

    yield on_rank
    torch.distributed.destroy_process_group()


def test_replicas_draw_alike_unless_sync_has_them_draw_apart(rank_of_two):
    drawn = {}
    for sync in (False, True):
        for rank in range(2):
            rank_of_two(rank)
            optimizer = make(sync=sync)
            with optimizer.sampled_params():
                drawn[sync, rank] = all_of(optimizer)[0].detach().clone()
    assert bits_equal(drawn[False, 0], drawn[False, 1]) and bits_equal(drawn[False, 0], drawn[True, 0])
    assert not torch.isclose(drawn[True, 0], drawn[True, 1], atol=1e-4, rtol=0).any()


def test_only_noise_for_the_same_purpose_is_shared():
    params = parameters()
    kept = fe.LangevinAdam([params[0]], temperature=1.0, eps=1e-3, seed=123)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = make([params[1]], seed=123)
    with pytest.warns(UserWarning, match="another optimizer has seed 123 and stream 0 too"):
        make([params[2]], seed=123)
    assert kept.param_groups and first.param_groups


# Backends.


@pytest.mark.parametrize("place", CPU_PLACES, ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_backend_of_a_cpu_takes_the_steps(estimator, samples, place):
    if (obstacle := place.obstacle()) is not None:
        pytest.skip(obstacle)
    optimizer, other = (make(estimator=estimator, backend=name) for name in (place.backend, "reference"))
    for each in (optimizer, other):
        train(each, 3, samples)
    for p, q in zip(all_of(optimizer), all_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# torch.compile.


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_compiled_step_is_the_step(estimator, samples):
    """Of one draw in one graph, whatever number the draw has; sums stay outside of graphs."""
    eager, traced = make(estimator=estimator), make(estimator=estimator)
    whole = estimator == "natural" and samples == 1
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(traced.step, backend="aot_eager", fullgraph=whole)
    for i in range(4):
        for optimizer, step in ((eager, eager.step), (traced, compiled)):
            for _ in range(samples):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss_of(all_of(optimizer)).backward()
            with torch._dynamo.config.patch(error_on_recompile=whole and i >= 1):
                step()
    assert same(eager, traced)
    assert not whole or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
