"""fe.LangevinAdam inside PyTorch: compiled steps, GradScaler, hooks, autograd."""

import copy
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import fekernels as fe
from tests.support.implementations import CPU_PLACES, PLACES, Place
from tests.support.inductor import scalar_loops
from tests.support.optimizers import NOISES
from tests.support.parameters import HOT, everything, parameters, same, set_gradients, step
from tests.support.tensors import Frozen, bits_equal

# torch.compile.


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


COMPILED = {
    **{noise: dict(noise=noise) for noise in NOISES},
    "cold": dict(temperature=0.0),
    "everything": dict(amsgrad=True, prior_precision=0.5, anchor="init", weight_decay=0.1),
    "tensors": dict(lr=torch.tensor(0.1), temperature=torch.tensor(0.5)),
}


# What is compiled is the operator's call, whatever the backend: one of them tries every variant, each of them one.
@pytest.mark.parametrize(
    ("variant", "place"),
    [(variant, Place("cpp", "cpu")) for variant in COMPILED]
    + [pytest.param("everything", *each.values, marks=each.marks) for each in PLACES if each.id != "cpp"],
    indirect=["place"],
)
def test_a_compiled_step_is_the_step_and_compiles_once(variant, place, fresh_dynamo):
    eager, traced = (
        fe.LangevinAdam(parameters(place), **{**HOT, **COMPILED[variant]}, backend=place.backend)
        for _ in range(2)
    )
    compiled = torch.compile(traced.step, backend="aot_eager", fullgraph=True)
    for i in range(4):
        if variant == "tensors" and i == 2:  # as a schedule moves them
            for optimizer in (eager, traced):
                optimizer.param_groups[0]["lr"].fill_(0.05)
                optimizer.param_groups[0]["temperature"].fill_(0.125)
        step(eager, i)
        set_gradients(traced, i)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):  # the first call makes the states
            compiled()
    assert same(eager, traced)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= compiles <= 2


def test_inductor_compiles_the_step(fresh_dynamo):
    place = CPU_PLACES[0]
    eager, traced = (fe.LangevinAdam(parameters(place), **HOT) for _ in range(2))
    compiled = torch.compile(traced.step, fullgraph=True)
    with scalar_loops():
        for i in range(3):
            step(eager, i)
            set_gradients(traced, i)
            compiled()
    assert same(eager, traced)


def test_a_compiled_step_of_a_trained_network(place, fresh_dynamo):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(
            place.device
        )
        optimizer = fe.LangevinAdam(net.parameters(), **{**HOT, "temperature": 1e-4}, backend=place.backend)
        take = (
            torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        )
        x = torch.linspace(-1, 1, 64, device=place.device).view(16, 4)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(x) - x[:, :1]).square().mean()
            loss.backward()
            take()
        losses.append(loss.item())
    assert losses[0] == losses[1]


# GradScaler.


@pytest.mark.parametrize("noise", NOISES)
def test_found_inf_skips_all_and_the_next_step_is_as_if_never(noise, place):
    skipping, plain = (
        fe.LangevinAdam(parameters(place), **HOT, noise=noise, backend=place.backend) for _ in range(2)
    )
    for optimizer in (skipping, plain):
        step(optimizer, 0)
    frozen = Frozen(everything(skipping))
    skipping.grad_scale = torch.tensor(4.0, device=place.device)
    skipping.found_inf = torch.tensor(1.0, device=place.device)
    skipping.param_groups[0]["lr"] = 0.03  # an lr that is never used must not be remembered either
    step(skipping, 1)
    assert frozen.unchanged()
    skipping.found_inf.zero_()
    for optimizer, scale in ((skipping, 4.0), (plain, 1.0)):
        optimizer.param_groups[0]["lr"] = 0.05
        set_gradients(optimizer, 2, scale)
        optimizer.step()
    assert same(skipping, plain) and not frozen.unchanged()


def test_a_skipped_first_step_leaves_everything_at_zero(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    frozen = Frozen(list(optimizer.param_groups[0]["params"]))
    optimizer.found_inf = torch.tensor(1.0, device=place.device)
    step(optimizer, 0)
    assert frozen.unchanged()
    assert all((t == 0).all() for state in optimizer.state.values() for t in state.values())


def test_grad_scale_divides_without_touching_the_gradient(place):
    scaled, plain = (fe.LangevinAdam(parameters(place), **HOT, backend=place.backend) for _ in range(2))
    scaled.grad_scale = torch.tensor(3.0, device=place.device)
    scaled.found_inf = torch.tensor(0.0, device=place.device)
    for i in range(3):
        set_gradients(plain, i)
        for p, q in zip(plain.param_groups[0]["params"], scaled.param_groups[0]["params"], strict=True):
            q.grad = p.grad * 3.0
            p.grad = q.grad / 3.0  # rounded as the kernel's quotient is
        frozen = Frozen([p.grad for p in scaled.param_groups[0]["params"]])
        scaled.step()
        plain.step()
        assert frozen.unchanged()
    assert same(scaled, plain)


@pytest.mark.parametrize("fused", [None, False, True])
def test_grad_scaler(fused, place):
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 1).to(place.device)
        optimizer = fe.LangevinAdam(net.parameters(), **HOT, fused=fused, backend=place.backend)
        assert optimizer._step_supports_amp_scaling is bool(fused)
        scaler = torch.amp.GradScaler(place.device, init_scale=2.0**10, growth_interval=3, enabled=scaled)
        scales, versions = [], []
        for i in range(8):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i)).to(place.device)
            if i == 4:
                if not scaled:
                    continue  # the step that GradScaler skips
                x[0, 0] = torch.inf
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            gradients = Frozen([net.weight.grad])
            scaler.step(optimizer)
            if i != 4:
                versions.append(gradients.unchanged())
            scaler.update()
            scales.append(scaler.get_scale())
        # In the kernel only where it was asked for; the powers of two divide exactly either way.
        assert all(versions) if fused or not scaled else not any(versions)
        assert not scaled or scales == [1024.0, 1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0]
        assert optimizer.state[net.weight]["step"].item() == 7
        runs.append(optimizer)
    assert same(*runs)


@pytest.mark.parametrize("cls", [fe.LangevinAdam, lambda p, **kw: fe.SGLD(p, lr=0.1, **kw)])
def test_unscaling_in_the_kernel_is_offered_as_torch_offers_it(cls):
    for fused in (None, False, True):
        optimizer = cls([torch.nn.Parameter(torch.zeros(2))], fused=fused)
        peer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], fused=fused)
        for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            offered = getattr(other, "_step_supports_amp_scaling", False)
            assert offered is getattr(peer, "_step_supports_amp_scaling", False) is bool(fused)


def test_unscaling_first_as_for_clipping(place):
    torch.manual_seed(0)
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 1).to(place.device)
        optimizer = fe.LangevinAdam(net.parameters(), **HOT, backend=place.backend)
        scaler = torch.amp.GradScaler(place.device, init_scale=2.0**10, enabled=scaled)
        for i in range(3):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i)).to(place.device)
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        runs.append(optimizer)
    assert same(*runs)


# Hooks.


def test_hooks(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    calls = []
    first = optimizer.param_groups[0]["params"][0]

    def before(self, args, kwargs):
        calls.append(("before", self is optimizer, first.detach().clone()))

    def after(self, args, kwargs):
        calls.append(("after", self is optimizer, first.detach().clone()))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    start = first.detach().clone()
    step(optimizer, 0)
    assert [call[:2] for call in calls] == [("before", True), ("after", True)]
    assert bits_equal(calls[0][2], start) and bits_equal(calls[1][2], first) and not bits_equal(first, start)
    for handle in handles:
        handle.remove()
    step(optimizer, 1)
    assert len(calls) == 2


def test_hooks_may_change_the_arguments(place):
    optimizer, other = (fe.LangevinAdam(parameters(place), **HOT, backend=place.backend) for _ in range(2))
    losses = []
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: losses.append(1)), {}))
    step(optimizer, 0)
    assert losses == [1]
    step(other, 0)
    for one, another in zip(*(o.param_groups[0]["params"] for o in (optimizer, other)), strict=True):
        assert bits_equal(one, another)


@pytest.mark.parametrize(
    "make", [fe.LangevinAdam, lambda p: fe.SGLD(p, lr=0.1), lambda p: fe.VariationalAdam(p, lr=0.1, ess=100)]
)
def test_a_profiler_sees_steps(make):
    optimizer = make([torch.nn.Parameter(torch.ones(3))])
    name = type(optimizer).__name__

    def train():
        if name == "VariationalAdam":
            with optimizer.sampled_params(train=True):
                optimizer.param_groups[0]["params"][0].square().sum().backward()
        else:
            optimizer.param_groups[0]["params"][0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train()
    seen = {event.key for event in profiler.key_averages()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= seen


def test_state_dict_hooks_and_global_step_hooks(place):
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("step"))
    try:
        optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
        optimizer.register_state_dict_post_hook(lambda self, saved: seen.append("save"))
        optimizer.register_load_state_dict_pre_hook(lambda self, saved: seen.append("load"))
        step(optimizer, 0)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        handle.remove()
    assert seen == ["step", "save", "load"]


def test_stepping_inside_the_backward_pass(place):
    # post_accumulate_grad_hook with an optimizer a parameter, which frees each gradient at once
    p = parameters(place)[0]
    optimizer = fe.LangevinAdam([p], **HOT, backend=place.backend)

    def hook(parameter):
        optimizer.step()
        optimizer.zero_grad()

    p.register_post_accumulate_grad_hook(hook)
    frozen = Frozen([p])
    for _ in range(3):
        p.square().sum().backward()
    assert p.grad is None and not frozen.unchanged() and optimizer.state[p]["step"].item() == 3


# Autograd.


def test_autograd_notices_that_a_saved_parameter_was_stepped(place):
    p = parameters(place)[0]
    optimizer = fe.LangevinAdam([p], **HOT, backend=place.backend)
    for _ in range(2):  # the first step builds the table, the second goes by it
        loss = p.square().sum()
        p.grad = torch.ones_like(p)
        version = p._version
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_without_gradient_keeps_its_version(place):
    p, q = parameters(place)[:2]
    optimizer = fe.LangevinAdam([p, q], **HOT, backend=place.backend)
    p.grad = torch.ones_like(p)
    loss = q.square().sum()
    optimizer.step()
    loss.backward()


def test_the_step_works_whatever_the_grad_mode(place):
    ends = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
        for i in range(2):
            set_gradients(optimizer, i)
            with context():
                optimizer.step()
        ends.append(optimizer)
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])
    assert all(p.requires_grad and p.is_leaf for p in ends[0].param_groups[0]["params"])


# Clearing gradients.


@pytest.mark.parametrize("kind", [fe.LangevinAdam, fe.SGLD])
def test_gradients_are_cleared_as_torchs(kind):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    kept = [torch.ones(3), torch.ones(3)]
    params[0].grad, params[1].grad = kept
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is kept[0] and params[2].grad is None
    assert all((grad == 0).all() for grad in kept)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    params[0].grad = kept[0]
    torch.compile(optimizer.zero_grad, backend="eager")()
    assert params[0].grad is None
