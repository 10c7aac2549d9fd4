"""The two checks of a group between steps, csrc/torch/host and its twin in Python, refuse and accept the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._runtime import backends, host
from fekernels.optim._table_cache import SHARE, TableCache
from tests.support.group_changes import CHANGES, Change, Ones, state, stepped


@pytest.fixture
def steps() -> tuple[Any, list[Tensor]]:
    return stepped()


def checks(optimizer: torch.optim.Optimizer, caches: Mapping[Any, TableCache]) -> dict[str, bool]:
    """What each check says of the group, which the cache of the last step or draw knows."""
    (cache,) = caches.values()
    assert isinstance(cache, TableCache) and cache.native is not None
    params, native = optimizer.param_groups[0]["params"], cache.native
    said = {}
    for name, check in {"native": native, "python": None}.items():
        cache.native = check
        said[name] = cache.point_to_gradients(params, optimizer.state, snapshot=False)
        if said[name]:
            vars(optimizer).pop("twin", None)  # else data_ptr() makes memory that it shares another
            live = [grad for grad in cache.gradients(params) if grad is not None]
            assert cache.tables[0].table[:, 1].tolist() == [grad.data_ptr() for grad in live]
            cache.tables[0].table[:, 1] = 0
    cache.native = native
    return said


@pytest.mark.parametrize("name", CHANGES)
def test_both_checks_say_the_same(steps: tuple[Any, list[Tensor]], name: str) -> None:
    if missing := host.unavailable_reason():
        pytest.skip(f"no native check: {missing}")
    optimizer, params = steps
    accepted, make = CHANGES[name]
    make(optimizer, params)
    assert checks(optimizer, optimizer._caches) == {"native": accepted, "python": accepted}


# Of states that lie where they lay, which Python's check compares by parts, of many one part a step.
LATE = {
    "a_state_transposed_where_it_lies",
    "a_smaller_state_where_it_lies",
    "another_dtype_of_a_state_where_it_lies",
}


@pytest.mark.parametrize("name", CHANGES)
def test_both_checks_say_the_same_of_parameters_among_200(name: str) -> None:
    if missing := host.unavailable_reason():
        pytest.skip(f"no native check: {missing}")
    optimizer, params = stepped(100, 94)
    accepted, make = CHANGES[name]
    make(optimizer, params)
    said = [checks(optimizer, optimizer._caches) for _ in range(SHARE)]
    assert all(answer["native"] == accepted for answer in said)
    python = [answer["python"] for answer in said]
    if name in LATE:
        assert python[0] and not all(python)
    else:
        assert python == [accepted] * SHARE


DRAW_CHANGES: dict[str, tuple[bool, Change]] = {
    "nothing": (True, lambda o, p: None),
    "no gradients": (True, lambda o, p: [setattr(q, "grad", None) for q in p]),
    "frozen": (False, lambda o, p: p[2].requires_grad_(False)),
    "thawed": (False, lambda o, p: p[3].requires_grad_(True)),
    "other data": (False, lambda o, p: setattr(p[0], "data", p[0].data.clone())),
    "smaller where it lies": (False, lambda o, p: setattr(p[0], "data", p[0].data[:5])),
    "a lazy clone of a parameter": (False, lambda o, p: setattr(o, "twin", torch._lazy_clone(p[0].detach()))),
    "a lazy clone of a mean": (False, lambda o, p: setattr(o, "twin", torch._lazy_clone(state(o)["mean"]))),
    "a mean of another name": (False, lambda o, p: state(o).update(m=state(o).pop("mean"))),
    "a tuple": (True, lambda o, p: o.param_groups[0].update(params=tuple(p))),
    "another class": (False, lambda o, p: setattr(p[0], "__class__", Ones)),
    "another mean": (False, lambda o, p: state(o).update(mean=state(o)["mean"].clone())),
    "a curvature elsewhere": (False, lambda o, p: state(o)["hessian"].set_(state(o)["hessian"].clone())),
    "one parameter less": (False, lambda o, p: o.param_groups[0]["params"].pop()),
}


@pytest.fixture
def draws() -> tuple[Any, list[Tensor]]:
    """An optimizer that has drawn all parameters but the last, which is frozen."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 4), (5, 3), (24,), (2,)]]
    params[1].data = params[1].data.t().contiguous().t()
    params[3].requires_grad_(False)
    optimizer: Any = fe.VariationalAdam(params, lr=1e-3, ess=100.0, seed=0, backend="cpp")
    optimizer.first = 0
    with optimizer.sampled_params(train=True):
        pass
    return optimizer, params


@pytest.mark.parametrize("name", DRAW_CHANGES)
def test_both_checks_say_the_same_of_draws(draws: tuple[Any, list[Tensor]], name: str) -> None:
    if missing := host.unavailable_reason():
        pytest.skip(f"no native check: {missing}")
    optimizer, params = draws
    accepted, make = DRAW_CHANGES[name]
    make(optimizer, params)
    assert checks(optimizer, optimizer._draw_caches) == {"native": accepted, "python": accepted}


def test_without_the_module_python_checks(
    steps: tuple[Any, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, params = steps
    monkeypatch.setattr("fekernels.optim._table_optimizer.host", lambda: None)
    optimizer._reset_caches()
    optimizer.step()
    (cache,) = optimizer._caches.values()
    assert cache.native is None and cache.point_to_gradients(params, optimizer.state, False)


def test_the_table_of_backends_names_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_loaded", lambda: (None, "no compiler"))
    assert "none, Python instead (no compiler)" in str(backends.backends())
    monkeypatch.setattr(host, "_loaded", lambda: (torch, None))
    assert "calls of free energies and samples): compiled" in str(backends.backends())
