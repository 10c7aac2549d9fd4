"""Warnings of fe.LangevinAdam while it samples: weights that nothing holds, and decoupled decay as a prior."""

import warnings

import pytest
import torch

import fekernels as fe
from tests.optimizers.test_langevin_adam import parameter


def test_one_warning_of_weights_that_nothing_holds():
    p = parameter(3)
    p.grad = torch.ones_like(p)
    with pytest.warns(
        UserWarning, match="temperature > 0 with prior_precision = 0 and eps = 1e-08"
    ) as caught:
        optimizer = fe.LangevinAdam([p], temperature=1e-9)
        for _ in range(3):
            optimizer.step()
    assert len(caught) == 1
    optimizer = fe.LangevinAdam([p])
    optimizer.param_groups[0]["temperature"] = 0.5
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            optimizer.step()
    assert len(caught) == 1


@pytest.mark.parametrize("calm", [dict(prior_precision=0.1), dict(eps=1e-6), dict(temperature=0.0)], ids=str)
def test_no_warning_where_something_holds_them(calm):
    p = parameter(3)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.LangevinAdam([p], **{"temperature": 1e-9, **calm}).step()


def test_one_warning_of_decoupled_decay_while_it_samples():
    p = parameter(3)
    p.grad = torch.ones_like(p)
    decay = dict(weight_decay=0.01, prior_precision=0.1, seed=1)
    with pytest.warns(UserWarning, match="prior of precision weight_decay .* D, another for every") as caught:
        optimizer = fe.LangevinAdam([p], **decay, decoupled_weight_decay=True, temperature=1e-9)
        for _ in range(3):
            optimizer.step()
    assert len(caught) == 1
    optimizer = fe.LangevinAdam([p], **decay, decoupled_weight_decay=True)
    optimizer.step()
    optimizer.param_groups[0]["temperature"] = torch.tensor(0.5)  # as a schedule turns it up
    with pytest.warns(UserWarning, match="decoupled_weight_decay"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.LangevinAdam([p], **decay, temperature=1e-9).step()
        fe.LangevinAdam([p], **decay, decoupled_weight_decay=True).step()
        fe.LangevinAdam(
            [p], **{**decay, "weight_decay": 0}, decoupled_weight_decay=True, temperature=1e-9
        ).step()
