"""A preconditioner that stands still: freeze_preconditioner and the group value ``frozen``, on every backend.

That a frozen step is the formula's, to the bit alike everywhere, is in contract/test_optimizers.py.
"""

import copy
import math
import pickle

import pytest
import torch

import fekernels as fe
from tests.support.cuda_on_cpu import SUCCESS
from tests.support.implementations import at_places
from tests.support.optimizer_rows import call, make_row, settings_of, tables_of
from tests.support.optimizers import BF16, F32, F64, NOISE, Case, Options
from tests.support.parameters import HOT, everything, parameters, same, set_gradients, step
from tests.support.tensors import Frozen, bits_equal, read_only, survives

MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def stepped(place, count=3, dtype=torch.float32, params=None, **changes):
    optimizer = fe.LangevinAdam(
        params or parameters(place, dtype), **{**HOT, **changes}, backend=place.backend
    )
    for i in range(count):
        step(optimizer, i)
    return optimizer


def moments(optimizer):
    return [state[key] for state in optimizer.state.values() for key in MOMENTS if key in state]


def preconditioners(optimizer):
    """D of every element in float64, from the states and the group alone."""
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double().cpu()
            corrected = group["bias_correction"] and not group["frozen"]
            weight = 1 - group["betas"][1] ** state["step"].item() if corrected else 1.0
            result.append(((v / weight).sqrt() + group["eps"]).flatten())
    return torch.cat(result)


# The law.


def test_the_law_is_the_targets_for_a_step_of_a_thousandth():
    """Full batch N(0, 1), h = .003: while v adapts the drift lacks its term, 1.13 of the variance; frozen it has 1."""
    variances = {}
    for frozen in (False, True):
        chains = 20_000
        theta = torch.randn(chains, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = fe.LangevinAdam([theta], lr=3e-3, temperature=1.0, eps=1e-6, seed=0)
        theta.grad = torch.zeros(chains)
        # v of a chain that has run: the mean square of the gradient, which is theta.
        optimizer.state[theta] = {
            "step": torch.tensor(1e6), "exp_avg": torch.zeros(chains), "exp_avg_sq": torch.ones(chains)
        }  # fmt: skip
        optimizer.freeze_preconditioner(frozen)
        total, count = 0.0, 0
        for t in range(3000):
            with torch.no_grad():
                theta.grad.copy_(theta)
            optimizer.step()
            if t >= 2000 and t % 100 == 0:  # a third of a relaxation time, of independent chains
                total += theta.detach().double().var().item()
                count += 1
        variances[frozen] = total / count
    error = math.sqrt(2 / 20_000)  # of one moment in time
    assert abs(variances[True] - 1) < 5 * error
    assert variances[False] - 1 > 10 * error


# v and its bias correction.


@pytest.mark.parametrize(
    **at_places(
        amsgrad=[False, True],
        bias_correction=[False, True],
        dtype=[torch.float32, torch.float64, torch.bfloat16],
    )
)
def test_freezing_and_letting_go_do_not_move_the_preconditioner(amsgrad, bias_correction, dtype, place):
    optimizer = stepped(place, 2, dtype, amsgrad=amsgrad, bias_correction=bias_correction)
    params = optimizer.param_groups[0]["params"]
    set_gradients(optimizer, 2)
    params[1].grad = None  # whose t is another from now on
    optimizer.step()
    tolerance = 2 * torch.finfo(dtype).eps
    before = preconditioners(optimizer)
    optimizer.freeze_preconditioner()
    assert optimizer.param_groups[0]["frozen"] is True
    torch.testing.assert_close(preconditioners(optimizer), before, rtol=tolerance, atol=0)

    held, position = Frozen(moments(optimizer)), Frozen(params)
    for i in range(3, 6):
        step(optimizer, i)
    assert held.unchanged() and not position.unchanged()
    assert optimizer.state[params[0]]["step"].item() == 6 and optimizer.state[params[1]]["step"].item() == 5

    optimizer.freeze_preconditioner(False)
    assert optimizer.param_groups[0]["frozen"] is False
    torch.testing.assert_close(preconditioners(optimizer), before, rtol=2 * tolerance, atol=0)
    held = Frozen(moments(optimizer))
    step(optimizer, 6)
    assert not held.unchanged()


def test_what_is_frozen_already_is_left_alone(place):
    optimizer = stepped(place)
    optimizer.freeze_preconditioner(False)
    once = Frozen(moments(optimizer))
    optimizer.freeze_preconditioner(True)
    assert not once.unchanged()
    twice = Frozen(moments(optimizer))
    optimizer.freeze_preconditioner(True)
    assert twice.unchanged()


def test_a_frozen_step_has_the_preconditioner_of_the_step_that_made_v(place):
    """At T = 0 and beta1 = 0 a step is lr g / D: D is read off the parameters, to the rounding of their difference."""
    params = [torch.zeros(65, device=place.device, dtype=torch.float64).requires_grad_()]
    optimizer = fe.LangevinAdam(params, lr=0.1, betas=(0.0, 0.9), eps=0.01, backend=place.backend)
    step(optimizer, 0)
    wanted = preconditioners(optimizer)
    optimizer.freeze_preconditioner()
    for i in (1, 2):
        before = params[0].detach().clone()
        set_gradients(optimizer, i, scale=100.0)
        optimizer.step()
        found = (0.1 * params[0].grad / (before - params[0].detach())).cpu()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_a_second_moment_written_by_hand_is_taken_as_it_stands(place):
    params = parameters(place)
    fisher = [torch.rand_like(p) + 0.5 for p in params]
    optimizer = fe.LangevinAdam(params, **HOT, backend=place.backend)
    for p, f in zip(params, fisher, strict=True):
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": f.clone()
        }  # fmt: skip
    by_hand = copy.deepcopy(optimizer)
    by_hand.param_groups[0]["frozen"] = True
    optimizer.freeze_preconditioner()
    for i in range(3):
        step(optimizer, i)
        step(by_hand, i)
    assert all(bits_equal(optimizer.state[p]["exp_avg_sq"], f) for p, f in zip(params, fisher, strict=True))
    assert same(optimizer, by_hand)


def test_groups_are_frozen_one_by_one(place):
    params = parameters(place)
    optimizer = stepped(place, params=[{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.5)}])
    optimizer.param_groups[0]["frozen"] = True  # by hand, v as it stands
    first = Frozen([optimizer.state[p]["exp_avg_sq"] for p in params[:2]])
    v = optimizer.state[params[2]]["exp_avg_sq"].clone()
    optimizer.freeze_preconditioner()
    assert first.unchanged()
    torch.testing.assert_close(optimizer.state[params[2]]["exp_avg_sq"], v / (1 - 0.5**3), rtol=1e-6, atol=0)


def test_a_tensor_beta_is_heeded(place):
    plain = stepped(place, betas=(0.9, 0.75))
    given = stepped(place, betas=(0.9, torch.tensor(0.75)))
    for optimizer in (plain, given):
        optimizer.freeze_preconditioner()
        step(optimizer, 3)
    assert same(plain, given)


def test_a_maximum_that_is_switched_on_while_frozen_is_what_stands(place):
    optimizer = stepped(place)
    optimizer.freeze_preconditioner()
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["amsgrad"] = True
    step(optimizer, 3)
    step(other, 3)
    pairs = zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    assert all(bits_equal(p, q) for p, q in pairs)


def test_setting_the_value_by_hand_counts_at_the_next_step(place):
    """Between steps whose settings and pointers are kept."""
    optimizer = stepped(place)
    for i, frozen in enumerate((True, False, True)):
        step(optimizer, i)
        optimizer.param_groups[0]["frozen"] = frozen
        held = Frozen(moments(optimizer))
        step(optimizer, i)
        assert held.unchanged() is frozen


def test_a_value_that_is_set_back_does_not_make_another_moment_of_v(place):
    """By hand, or by who copies groups of its own over the optimizer's, as wrappers do."""
    optimizer = stepped(place)
    before = preconditioners(optimizer)
    optimizer.freeze_preconditioner()
    set_gradients(optimizer, 3)
    held = Frozen(everything(optimizer))
    optimizer.param_groups[0]["frozen"] = False
    copies = [optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for each in copies:
        with pytest.raises(ValueError, match="LangevinAdam: frozen must stay True from freeze_precond"):
            set_gradients(each, 3)
            each.step()
        with pytest.raises(ValueError, match=r"LangevinAdam.state_dict: frozen must stay True"):
            each.state_dict()
    assert held.unchanged()
    copies[0].freeze_preconditioner()
    torch.testing.assert_close(preconditioners(copies[0]), before, rtol=1e-6, atol=0)
    copies[1].freeze_preconditioner(False)
    torch.testing.assert_close(preconditioners(copies[1]), before, rtol=1e-6, atol=0)
    for each in copies[:2]:
        step(each, 3)
        each.state_dict()


def test_other_moments_are_what_their_group_says(place):
    optimizer = stepped(place)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.freeze_preconditioner()
    for p in optimizer.param_groups[0]["params"]:  # as who sets states aside and puts them back
        optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].clone()
    optimizer.param_groups[0]["frozen"] = False
    step(optimizer, 3)
    optimizer.freeze_preconditioner()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["frozen"] is False
    step(optimizer, 3)


# Memory.

WRITING = ["reference", "cpp", "cuda_on_cpu"]  # Triton's machine code is looked at for it


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("noise", ["momentum", "isotropic", "cold"])
@pytest.mark.parametrize("name", WRITING)
def test_frozen_moments_are_not_written(name, noise, amsgrad, request):
    kernels = request.getfixturevalue("cuda_steps") if name == "cuda_on_cpu" else None
    if name == "cpp":
        request.getfixturevalue("native")
    for dtype, state, rounding in (
        (F32, F32, False),
        (BF16, BF16, True),
        (BF16, BF16, False),
        (F64, F64, False),
    ):
        options = Options(frozen=True, amsgrad=amsgrad, stochastic_rounding=rounding, **NOISE[noise])
        row = make_row(Case((1165,)), options, dtype, state_dtype=state)
        row.exp_avg_sq, row.max_exp_avg_sq = map(read_only, (row.exp_avg_sq, row.max_exp_avg_sq))
        rows = [row]

        def run(options=options, rows=rows):
            if kernels is None:
                call("langevin_adam_", rows, options, name)
            else:
                (table,) = tables_of("langevin_adam_", rows, options)
                assert (
                    kernels.step("langevin_adam_", table, settings_of("langevin_adam_", rows, options))
                    == SUCCESS
                )

        assert survives(run), f"{dtype}, {rounding}"
        assert not survives(lambda rows=rows: rows[0].exp_avg_sq.add_(1))


# What is refused.


def test_a_first_gradient_in_a_frozen_group_raises_before_anything_moves(place):
    params = parameters(place)
    late = params[1]
    names = [("a", params[0]), ("b", late), ("c", params[2])]
    optimizer = fe.LangevinAdam([{"params": names[2:]}, {"params": names[:2]}], **HOT, backend=place.backend)
    for i in range(2):
        set_gradients(optimizer, i)
        late.grad = None
        optimizer.step()
    optimizer.freeze_preconditioner()
    set_gradients(optimizer, 2)
    before = Frozen(everything(optimizer))
    with pytest.raises(
        ValueError,
        match=r"params\[1\] \('b'\) must have exp_avg_sq where the preconditioner is frozen; got its first",
    ):
        optimizer.step()
    assert before.unchanged() and late not in optimizer.state
    optimizer.freeze_preconditioner(False)
    optimizer.step()
    assert optimizer.state[late]["step"].item() == 1


def test_an_empty_parameter_needs_no_second_moment(place):
    p = torch.zeros(0, device=place.device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = fe.LangevinAdam([p], **HOT, backend=place.backend)
    optimizer.freeze_preconditioner()
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1


@pytest.mark.parametrize("value", ["yes", 0.5, None])
def test_what_is_no_bool_is_refused(value, place):
    optimizer = stepped(place)
    before = Frozen(everything(optimizer))
    with pytest.raises(TypeError, match=r"LangevinAdam.freeze_preconditioner: frozen must be"):
        optimizer.freeze_preconditioner(value)
    optimizer.param_groups[0]["frozen"] = value
    set_gradients(optimizer, 3)
    with pytest.raises(TypeError, match="LangevinAdam: frozen must be"):
        optimizer.step()
    assert before.unchanged()


def test_a_float16_moment_that_would_overflow_is_refused(place):
    optimizer = stepped(place, 1, torch.float16, state_dtype=torch.float16)
    optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg_sq"][5] = (
        100.0  # 1e5 without its correction
    )
    before = Frozen(everything(optimizer))
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of params\[1\] must fit float16 without its bias correction"
    ):
        optimizer.freeze_preconditioner()
    assert before.unchanged() and optimizer.param_groups[0]["frozen"] is False


def test_sgld_has_none():
    assert not hasattr(fe.SGLD, "freeze_preconditioner")


# torch.compile.


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_step_freezes_and_lets_go(place, fresh_dynamo):
    eager, traced = (stepped(place) for _ in range(2))
    compiled = torch.compile(traced.step, backend="aot_eager", fullgraph=True)
    for i in range(3, 9):
        for optimizer in (eager, traced):
            if i in (4, 7):
                optimizer.freeze_preconditioner(i == 4)
            set_gradients(optimizer, i)
        held = Frozen(moments(traced))
        eager.step()
        compiled()
        assert same(eager, traced)
        assert held.unchanged() is (4 <= i < 7)


def test_a_compiled_step_refuses_a_first_gradient(place, fresh_dynamo):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    optimizer.freeze_preconditioner()
    set_gradients(optimizer, 0)
    before = Frozen(everything(optimizer))
    # torch.compile does not put the grad mode back where its graph raises.
    with pytest.raises(Exception, match="where the preconditioner is frozen"), torch.enable_grad():
        torch.compile(optimizer.step, backend="eager")()
    assert before.unchanged()
