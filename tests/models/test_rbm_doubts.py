"""What the machine's estimates do not see by themselves is warned of, and right runs are silent."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.models import BernoulliRBM
from fekernels.models import rbm_doubts as doubts


def two_modes() -> BernoulliRBM:
    """All of 20 units on holds exp(20) times what all the others do, and independent units never go there."""
    rbm = BernoulliRBM(20, 4, seed=0)
    with torch.no_grad():
        rbm.weight.fill_(6.0)
        rbm.visible_bias.fill_(-11.0)
        rbm.hidden_bias.fill_(-60.0)
    return rbm


def clusters(rows: int = 1000, units: int = 40) -> Tensor:
    """Three quarters near ones, one near zeros, shuffled."""
    v = (fe.random.uniform((rows, units), seed=5) <= 0.02).float()
    v[rows // 4 :] = 1 - v[rows // 4 :]
    return v[fe.random.uniform((rows,), seed=6).argsort()]


def messages(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def test_an_annealing_that_missed_the_mode_is_warned_of_with_both_numbers() -> None:
    rbm = two_modes()
    exact = float(rbm.log_partition().detach())
    with pytest.warns(
        UserWarning,
        match=r"from the visible biases, log Z is 0\.00 \+- 0\.00; from fair coins it is (19\.[5-9]|20\.)",
    ) as warned:
        found = rbm.log_partition("ais", betas=300, seed=1)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert found.log_z < exact - 19 and found.effective_sample_size > 900  # nothing else shows it
    again = rbm.log_partition("ais", betas=300, particles=2000, seed=1, base_rates=torch.full((20,), 0.5))
    assert abs(again.log_z - exact) < 4 * again.standard_error < 0.2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_right_annealing_is_silent(seed: int, scale: float) -> None:
    rbm = BernoulliRBM(20, 8, seed=seed)
    with torch.no_grad():
        for stream, p in enumerate(rbm.parameters()):
            p.copy_(scale * fe.random.normal(p.shape, seed=seed, stream=100 + stream))
    found: list[fe.anneal.AnnealedEstimate] = []
    assert not messages(lambda: found.append(rbm.log_partition("ais", betas=300, seed=seed)))
    v = rbm.exact_sample(200, seed=1)
    assert not messages(lambda: rbm.log_prob(v, log_z=found[0]))


@pytest.mark.filterwarnings("ignore:BernoulliRBM.fit", "ignore:along_path")
@pytest.mark.parametrize("kind", ["tensor", "loader"])
def test_annealing_begins_at_the_rates_of_the_data_that_fit_saw(kind: str) -> None:
    v = clusters(400).sort(0).values  # whose first batch knows one cluster only
    rbm = BernoulliRBM(40, 4, seed=0)
    assert rbm.base_odds.shape == (0,)
    data = v if kind == "tensor" else list(v.split(100))
    rbm.fit(data, epochs=2, lr=0.05, progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(rbm.base_odds, doubts.log_odds(v.mean(0), 400), rtol=1e-5, atol=1e-6)
    by_default = rbm.log_partition("ais", betas=20, particles=50, seed=3)
    assert by_default.log_z == pytest.approx(
        rbm.log_partition("ais", betas=20, particles=50, seed=3, base_rates=v).log_z, abs=1e-4
    )
    file = io.BytesIO()
    torch.save(rbm.state_dict(), file)
    file.seek(0)
    again = BernoulliRBM(40, 4, seed=9)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again.base_odds, rbm.base_odds)
    rbm.set_base_rates(v[:100])
    assert torch.equal(rbm.base_odds, rbm.visible_bias)


def test_a_state_that_is_older_than_the_rates_loads() -> None:
    rbm = BernoulliRBM(6, 4, seed=0)
    state = rbm.state_dict()
    del state["base_odds"]
    del state["_extra_state"]["calls"]
    again = BernoulliRBM(6, 4, seed=9)
    again.set_base_rates(torch.full((6,), 0.3))
    torch.nn.ModuleList([again]).load_state_dict({f"0.{name}": each for name, each in state.items()})
    assert not len(again.base_odds) and again.seed == rbm.seed and torch.equal(again.weight, rbm.weight)


def test_a_probability_above_1_is_warned_of_once_for_each_log_z() -> None:
    rbm, v = two_modes(), torch.ones(3, 20)
    low = rbm.log_partition("ais", betas=50, seed=1, base_rates=torch.full((20,), 1e-6))
    with pytest.warns(
        UserWarning, match=r"log p\(v\) of a row is 20\.00, .* log_z, 0\.00, is too low"
    ) as warned:
        rbm.log_prob(v, log_z=low)
    assert warned[0].filename == __file__
    assert not messages(lambda: rbm.log_prob(v, log_z=low))
    assert len(messages(lambda: rbm.log_prob(v, log_z=torch.tensor(19.0)))) == 1
    exact = rbm.log_partition().detach()
    for right in (exact, float(exact), None):  # of probability 1, all but 5e-5
        assert not messages(lambda: rbm.log_prob(v, log_z=right))  # noqa: B023
    assert not messages(lambda: rbm.log_prob(v, log_z=3.0, validate=False))


def test_grey_levels_have_no_probability() -> None:
    rbm, v = two_modes(), torch.ones(3, 20)
    v[1, 2] = 0.25
    with pytest.raises(ValueError, match=r"log_prob: v must be 0 and 1, .*; got 0\.25: binarise"):
        rbm.log_prob(v)
    assert rbm.log_prob(v, validate=False).shape == rbm.free_energy(v).shape == (3,)


BELOW, OFF = (
    r"log p of the data is (-[\d.]+) nats a row, less than the -22\.9",
    r"on at rates that are (0\.[2-7]\d)",
)


@pytest.mark.parametrize(
    ("hidden", "options", "expected"),
    [
        (8, {}, BELOW),
        (8, {"persistent": False, "epochs": 20}, BELOW),
        (8, {"lr": 0.05, "k": 5, "epochs": 20}, OFF),
        (40, {"epochs": 10}, BELOW.replace("is ", "is at most ")),
    ],
)
def test_a_fit_that_lost_a_mode_is_warned_of(hidden: int, options: dict[str, Any], expected: str) -> None:
    v = clusters(2000 if "lr" in options else 6000)
    rbm = BernoulliRBM(40, hidden, seed=0)
    found = messages(lambda: rbm.fit(v, progress=False, **{"epochs": 40, **options}))
    assert len(found) == 1
    told = re.search(expected, found[0])
    assert told is not None, found[0]
    if expected is BELOW:  # some thousand rows of all
        assert float(told[1]) == pytest.approx(float(rbm.log_prob(v).mean().detach()), abs=1)
    if hidden == 8:
        share = float((rbm.exact_sample(4000).mean(1) > 0.5).double().mean())
        assert abs(share - 0.75) > 0.2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [6, 40])
def test_a_fit_that_went_well_is_silent(seed: int, hidden: int) -> None:
    v = (fe.random.uniform((500, 30), seed=seed) <= 0.3).float()
    v[:, 15:] = v[:, :15]
    for options in ({"epochs": 1}, {"epochs": 20}, {"epochs": 20, "lr": 0.03, "k": 5}):
        rbm = BernoulliRBM(30, hidden, seed=seed)
        assert not messages(lambda: rbm.fit(v, progress=False, **options))  # type: ignore[arg-type] # noqa: B023
        grey = BernoulliRBM(30, hidden, seed=seed)
        assert not messages(lambda: grey.fit(0.8 * v + 0.1, progress=False, **options))  # type: ignore[arg-type] # noqa: B023


def test_modes_with_the_wrong_shares_are_warned_of() -> None:
    """Log p of the data is far above that of independent units: the shares alone cost it 2 nats."""
    v, rbm = clusters(), BernoulliRBM(40, 1, seed=0)
    with torch.no_grad():  # the hidden unit chooses the cluster; log odds -3 for that of ones
        rbm.visible_bias.fill_(-3.9)
        rbm.weight.fill_(7.8)
        rbm.hidden_bias.fill_(-40 * 3.9 - 3.0)
    doubt = doubts.doubt_fit(rbm, v, 6)
    assert doubt is not None and "rates that are 0.6" in doubt and "wrong shares" in doubt
    with torch.no_grad():
        rbm.hidden_bias.add_(3.0 + 1.1)  # three quarters
    assert doubts.doubt_fit(rbm, v, 6) is None


def test_what_a_fit_keeps_is_spread_over_its_batches() -> None:
    kept = doubts.Kept()
    for batch in range(1000):
        kept.add(torch.full((100, 1), float(batch)))
    rows = kept.rows()
    assert doubts.MOST_KEPT / 2 < len(rows) <= 2 * doubts.MOST_KEPT
    assert float((rows.mean() - 499.5).abs()) < 20
    kept.add(torch.zeros(10 * doubts.MOST_KEPT, 1))
    assert len(kept.rows()) <= 2 * doubts.MOST_KEPT


def test_every_call_without_a_seed_is_fresh_and_goes_on_from_a_saved_state() -> None:
    rbm, other = BernoulliRBM(16, 8, seed=3), BernoulliRBM(16, 8, seed=4)
    calls: list[Any] = [
        lambda r, **k: r.sample(10, steps=5, **k),
        lambda r, **k: r.exact_sample(10, **k),
        lambda r, **k: r.log_partition("ais", betas=5, particles=20, **k).log_weights,
    ]
    for call in calls:
        first, second = call(rbm), call(rbm)
        assert not torch.equal(first, second)
        other.load_state_dict(rbm.state_dict())
        assert torch.equal(call(rbm), call(other))
        assert torch.equal(call(rbm, seed=7), call(rbm, seed=7))
    assert rbm.calls == 9  # those with a seed are not counted
    assert len(torch.cat([rbm.sample(10, steps=5) for _ in range(20)]).unique(dim=0)) > 190
    first = BernoulliRBM(16, 8, seed=3).sample(10, steps=5)  # that of the machine's own seed
    assert torch.equal(BernoulliRBM(16, 8, seed=3).sample(10, steps=5, seed=3), first)


def test_fit_names_its_data_and_a_machine_that_is_frozen() -> None:
    rbm, v = BernoulliRBM(4, 3, seed=0), torch.zeros(6, 4)
    v[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^fit: data must hold .*\[0, 1\].*; got nan"):
        rbm.fit(v, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"^fit: epoch 1, step 1: v must hold .*; got nan"):
        rbm.fit([v], epochs=1, progress=False)
    assert not len(rbm.base_odds) and not bool(rbm.visible_bias.any())
    rbm.requires_grad_(False)
    with pytest.raises(
        ValueError, match="fit: a parameter of the machine must require a gradient; none does"
    ):
        rbm.fit(torch.zeros(6, 4), epochs=1, progress=False)
    assert not len(rbm.base_odds)
