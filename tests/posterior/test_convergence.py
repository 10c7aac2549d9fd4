"""PosteriorSamples.diagnostics, and the warning where samples are too few or gradients too noisy."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.posterior.convergence import _spread


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def samples(draws: Tensor, **options: int | str) -> fe.PosteriorSamples:
    """Of draws [draws, chains, 8]: weight and bias."""
    network = model()
    kept = fe.PosteriorSamples(network, chains=draws.shape[1], **options)
    for step in draws:
        for weights in step:
            kept.collect({"weight": weights[:6].view(2, 3), "bias": weights[6:]})
    return kept


def independent(draws: int, chains: int) -> Tensor:
    return torch.randn(draws, chains, 8, generator=torch.Generator().manual_seed(7))


def test_weights_are_judged_chains_apart() -> None:
    draws = independent(200, 3)
    found = samples(draws).diagnostics()
    by_chain = draws.transpose(0, 1)
    rhat = fe.diagnostics.split_rhat(by_chain)
    size = torch.minimum(
        fe.diagnostics.effective_sample_size(by_chain), fe.diagnostics.effective_sample_size(by_chain, "tail")
    )
    assert (found.chains, found.draws) == (3, 200)
    assert found.rhat_max == pytest.approx(float(rhat.max()))
    assert found.ess_min == pytest.approx(float(size.min()))
    assert found.by_parameter["bias"] == pytest.approx((float(rhat[6:].max()), float(size[6:].min())))
    assert "3 chains of 200 draws" in str(found)
    draws[:, 1] += 3.0
    assert samples(draws).diagnostics().rhat_max > 1.5
    assert (
        samples(draws.flatten(0, 1)[:, None]).diagnostics().rhat_max < 1.1
    )  # taken for one chain: nothing seen


def test_dropped_samples_leave_the_chains_apart() -> None:
    draws = independent(40, 3)
    draws[:, 2] += 100.0
    kept = samples(draws, max_samples=100)
    found = kept.diagnostics()
    assert found.draws == 33
    assert found.rhat_max == pytest.approx(
        float(fe.diagnostics.split_rhat(draws[-33:].transpose(0, 1)).max()), rel=1e-6
    )


def test_weights_that_never_move_count_nowhere() -> None:
    draws = independent(50, 2)
    draws[..., :7] = 1.0
    found = samples(draws).diagnostics()
    assert list(found.by_parameter) == ["bias"]
    assert found.ess_min > 20


def test_predictions_from_few_effective_samples_warn_once_with_the_number() -> None:
    kept = samples(independent(60, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.predict(torch.ones(4, 3))
    slow = samples(independent(60, 1).cumsum(0))
    with pytest.warns(UserWarning, match=r"60 samples are worth about [1-9] independent ones, fewer than 50"):
        slow.predict(torch.ones(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slow.predict(torch.ones(4, 3))
    with pytest.warns(UserWarning, match="2 samples are worth about 2 independent ones"):
        samples(independent(2, 1)).predict(torch.ones(4, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_of_a_chain_that_has_diverged_are_told(value: float) -> None:
    draws = independent(60, 1)
    draws[53:, 0, 2] = value
    with pytest.warns(UserWarning, match="7 of 60 samples have weights that are not finite") as caught:
        samples(draws).predict(torch.ones(4, 3))
    assert len(caught) == 1


@pytest.mark.parametrize(("count", "chains"), [(100, 1), (100, 2), (60, 30)])
def test_the_same_weights_over_and_over_are_worth_one_sample(count: int, chains: int) -> None:
    kept = samples(torch.ones(count // chains, chains, 8))
    with pytest.warns(
        UserWarning, match=f"{count} samples are worth about 1 independent ones, fewer than 50"
    ):
        kept.predict(torch.ones(4, 3))


def test_samples_of_a_network_that_is_frozen_afterwards_are_judged_as_before() -> None:
    kept, frozen = samples(independent(60, 1).cumsum(0)), samples(independent(60, 1).cumsum(0))
    frozen._model.requires_grad_(False)
    assert frozen.diagnostics() == kept.diagnostics() and kept.diagnostics().ess_min > 1
    told = []
    for each in (kept, frozen):
        with pytest.warns(UserWarning, match="independent ones") as caught:
            each.predict(torch.ones(4, 3))
        told.append([str(warning.message) for warning in caught])
    assert told[0] == told[1]


def test_a_weight_among_many_that_stand_still_is_found() -> None:
    kept = fe.PosteriorSamples(nn.Linear(1000, 2))
    for place in independent(60, 1).cumsum(0)[:, 0, 0]:
        weight = torch.zeros(2, 1000)
        weight[0, 1] = place
        kept.collect({"weight": weight, "bias": torch.zeros(2)})
    with pytest.warns(UserWarning, match="60 samples are worth about [2-9] independent ones, fewer than 50"):
        kept.predict(torch.ones(4, 1000))


def test_places_in_large_parameters_are_in_them() -> None:
    """float32 has no 2^25 - 1."""
    assert _spread(2**25, 3).tolist() == [0, 2**24, 2**25 - 1]
    assert _spread(5, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("lr", "noisy"), [(1e-5, False), (0.1, True)])
def test_predictions_under_gradient_noise_warn_once_with_the_number(lr: float, noisy: bool) -> None:
    network = model()
    optimizer = fe.LangevinAdam(
        network.parameters(), lr=lr, temperature=1e-3, prior_precision=1e-3, betas=(0.9, 0.99)
    )
    kept = fe.PosteriorSamples(network, optimizer=optimizer)
    g = torch.Generator().manual_seed(1)
    for draw in independent(100, 1)[:, 0]:
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        kept.collect({"weight": draw[:6].view(2, 3), "bias": draw[6:]})
    ratio = fe.diagnostics.gradient_noise_ratio(optimizer).median
    assert (ratio > 0.1) == noisy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept.predict(torch.ones(4, 3))
        kept.predict(torch.ones(4, 3))
    assert [f"r = {ratio:.2f}" in str(each.message) for each in caught] == [True] * noisy


def test_a_cold_optimizer_says_nothing_and_no_other_is_taken() -> None:
    """A run may end in a cold phase of its schedule: predictions go on."""
    network = model()
    optimizer = fe.LangevinAdam(network.parameters(), lr=0.1)
    kept = fe.PosteriorSamples(network, optimizer=optimizer)
    for draw in independent(100, 1)[:, 0]:
        kept.collect({"weight": draw[:6].view(2, 3), "bias": draw[6:]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.predict(torch.ones(4, 3))
    others = [
        torch.optim.Adam(network.parameters()),
        fe.SGLD(network.parameters(), 0.1, temperature=0.0),
        fe.VariationalAdam(network.parameters(), 0.1, 10, estimator="reparam"),
    ]
    for other in others:
        with pytest.raises(TypeError, match=f"must be a LangevinAdam or None; got {type(other).__name__}"):
            fe.PosteriorSamples(network, optimizer=other)
        with pytest.raises(TypeError, match=f"must be a LangevinAdam; got {type(other).__name__}"):
            fe.diagnostics.gradient_noise_ratio(other)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="samples must hold 4 draws of each of 2 chains; got 6 in all"):
        samples(independent(3, 2)).diagnostics()
    with pytest.raises(ValueError, match="policy must be 'fifo' to tell several chains apart"):
        samples(independent(8, 2), policy="reservoir", max_samples=16).diagnostics()
    with pytest.raises(ValueError, match="chains must be at least 0; got -1"):
        fe.PosteriorSamples(model(), chains=-1)
    with pytest.raises(TypeError, match="optimizer must be a LangevinAdam or None; got str"):
        fe.PosteriorSamples(model(), optimizer="adam")
    with pytest.raises(
        ValueError, match=r"PosteriorSamples.collect: state must hold 'bias'; got \['weight'\]"
    ):
        fe.PosteriorSamples(model()).collect({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="names and shapes of state"):
        fe.PosteriorSamples(model()).collect({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
