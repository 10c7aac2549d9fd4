"""A temperature above 0 in bfloat16 or float16, where small steps round to nothing: said once, and not when cold."""

import warnings

import pytest
import torch

import fekernels as fe

MAKE = {
    "LangevinAdam": lambda params, **more: fe.LangevinAdam(params, 1e-3, eps=0.1, seed=1, **more),
    "SGLD": lambda params, **more: fe.SGLD(params, 1e-6, seed=1, **more),
    "UnifiedOptimizer": lambda params, **more: fe.UnifiedOptimizer(Holder(params), eps=0.1, seed=1, **more),
}
ADVICE = {torch.bfloat16: "Set stochastic_rounding=True", torch.float16: "Keep float32 parameters"}


class Holder(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def parameter(dtype):
    p = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    p.grad = torch.zeros_like(p)
    return p


def said(name, dtype, temperatures, compiled=False, **options):
    """How often a run at these temperatures, the first at construction, warns of lost steps."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        p = parameter(dtype)
        optimizer = MAKE[name]([p], temperature=temperatures[0], **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for temperature in temperatures:
            optimizer.param_groups[0]["temperature"] = temperature
            p.grad = torch.zeros_like(p)
            step()
        optimizer.load_state_dict(optimizer.state_dict())
        p.grad = torch.zeros_like(p)
        step()
    return [str(w.message) for w in caught if "rounds to nothing" in str(w.message)]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", ADVICE, ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_a_hot_optimizer_says_once_that_its_steps_are_lost(name, dtype, backend):
    for temperatures in ([0.5, 0.25], [0.0, 0.0, 0.5, 0.25], [torch.tensor(0.5)] * 2):
        (message,) = said(name, dtype, temperatures, backend=backend)
        assert message.startswith(f"{name}: temperature > 0 with {str(dtype)[6:]} parameters")
        assert ADVICE[dtype] in message and "stochastic_rounding=True" in message
    if dtype == torch.float16:  # which stochastic rounding leaves as it is
        assert len(said(name, dtype, [0.5], backend=backend, stochastic_rounding=True)) == 1


@pytest.mark.parametrize("name", ["LangevinAdam", "SGLD"])
def test_a_compiled_step_says_it_too(name):
    assert len(said(name, torch.bfloat16, [0.0, 0.0, 0.5, 0.25], compiled=True)) == 1


@pytest.mark.parametrize("name", MAKE)
def test_nothing_is_said_of_what_is_cold_fine_or_rounded_at_random(name):
    assert not said(name, torch.bfloat16, [0.0, 0.0])
    assert not said(name, torch.float32, [0.5, 0.25])
    assert not said(name, torch.bfloat16, [0.5, 0.25], stochastic_rounding=True)
