"""The restricted Boltzmann machine beside the enumeration of all its states, and its training."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fekernels as fe
from fekernels.models import BernoulliRBM


def machine(
    visible: int, hidden: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> BernoulliRBM:
    rbm = BernoulliRBM(visible, hidden, seed=seed, dtype=dtype)
    with torch.no_grad():
        for stream, p in enumerate(rbm.parameters()):
            p.copy_(scale * fe.random.normal(p.shape, seed=seed, stream=100 + stream))
    return rbm


def states(units: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def energies(rbm: BernoulliRBM, v: Tensor, h: Tensor) -> Tensor:
    """[len(v), len(h)], term by term."""
    a, c, w = rbm.visible_bias, rbm.hidden_bias, rbm.weight
    return torch.stack([torch.stack([-(a @ x) - c @ y - x @ w @ y for y in h]) for x in v])


@pytest.mark.parametrize(("visible", "hidden"), [(4, 3), (3, 4)])
def test_all_is_what_the_sum_over_the_states_makes_it(visible: int, hidden: int) -> None:
    rbm = machine(visible, hidden, 7)
    v, h = states(visible), states(hidden)
    joint = energies(rbm, v, h)
    for k in range(len(h)):
        torch.testing.assert_close(rbm.joint_energy(v, h[k].expand(len(v), -1)), joint[:, k])
    torch.testing.assert_close(rbm.free_energy(v), -torch.logsumexp(-joint, 1), rtol=1e-13, atol=1e-13)
    log_z = rbm.log_partition("exact")
    assert float(log_z.detach()) == pytest.approx(
        float(torch.logsumexp(-joint.flatten(), 0).detach()), abs=1e-13
    )
    p = rbm.log_prob(v).exp()
    assert float(p.sum().detach()) == pytest.approx(1, abs=1e-13)
    torch.testing.assert_close(rbm.log_prob(v, log_z=float(log_z.detach())).exp(), p)
    weights = (-joint).softmax(1)  # p(h | v)
    torch.testing.assert_close(rbm.hidden_probabilities(v), weights @ h)
    torch.testing.assert_close(rbm.visible_probabilities(h), (-joint).softmax(0).t() @ v)
    # The gradient of log Z is the model's mean of that of -E.
    found = torch.autograd.grad(log_z, [rbm.weight, rbm.visible_bias, rbm.hidden_bias])
    both = p[:, None] * weights
    expected = [v.t() @ both @ h, p @ v, both.sum(0) @ h]
    for grad, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, exact.detach(), rtol=1e-12, atol=1e-13)


def test_float32_probabilities_sum_to_1() -> None:
    rbm = machine(4, 3, 8, dtype=torch.float32)
    assert float(rbm.log_prob(states(4).float()).exp().sum().detach()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_free_energy_and_its_gradients_are_those_of_plain_torch(reduction: str) -> None:
    rbm, plain = machine(37, 21, 9, 0.4, torch.float32), machine(37, 21, 9, 0.4)
    v = fe.random.uniform((50, 37), seed=1).requires_grad_()
    w = v.detach().double().requires_grad_()
    upstream = fe.random.normal((50,), seed=2)

    def reduced(each: Tensor) -> Tensor:
        if reduction == "none":
            return (each * upstream.to(each.dtype)).sum()
        return each.mean() if reduction == "mean" else each.sum()

    own = rbm.free_energy(v, reduction=reduction)
    own = (own * upstream).sum() if reduction == "none" else own
    expected = reduced(-(w @ plain.visible_bias) - F.softplus(plain.hidden_bias + w @ plain.weight).sum(1))
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)
    own.backward()
    expected.backward()
    for tensor, exact in [(v, w), *zip(rbm.parameters(), plain.parameters(), strict=True)]:
        assert tensor.grad is not None and exact.grad is not None
        error = (tensor.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
        assert float(error) < 1e-5


def test_free_energy_is_differentiated_twice_and_compiles() -> None:
    rbm = machine(5, 4, 9)
    v = fe.random.uniform((3, 5), seed=1).double().requires_grad_()
    for reduction in ("none", "mean"):
        assert torch.autograd.gradgradcheck(lambda v: rbm.free_energy(v, reduction=reduction), v)  # noqa: B023
    small = machine(5, 4, 9, dtype=torch.float32)
    compiled = torch.compile(small.free_energy, fullgraph=True, dynamic=True, backend="eager")
    for n in (3, 6):
        rows = fe.random.uniform((n, 5), seed=n)
        torch.testing.assert_close(compiled(rows), small.free_energy(rows))


def test_large_inputs_neither_overflow_nor_lose_the_sum() -> None:
    rbm = machine(6, 5, 3)
    with torch.no_grad():
        rbm.weight.mul_(400)
    v, h = states(6), states(5)
    torch.testing.assert_close(rbm.free_energy(v), -torch.logsumexp(-energies(rbm, v, h), 1))
    assert float(rbm.log_prob(v).exp().sum().detach()) == pytest.approx(1, abs=1e-12)


def test_log_z_in_many_blocks_is_log_z_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rbm = machine(9, 11, 4)
    whole = rbm.log_partition()
    expected = torch.autograd.grad(whole, list(rbm.parameters()))
    draws = rbm.exact_sample(500, seed=2)
    monkeypatch.setattr("fekernels.models.rbm_partition.BLOCK", 11 * 7)  # 73 blocks of 7 states, and one of 1
    parts = rbm.log_partition()
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)
    for grad, exact in zip(torch.autograd.grad(parts, list(rbm.parameters())), expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-14)
    assert torch.equal(rbm.exact_sample(500, seed=2), draws)


def within(draws: Tensor, p: Tensor, what: str) -> None:
    """Every state as often as p says, to 5 standard errors."""
    units = draws.shape[1]
    numbers = (draws.double() @ 2.0 ** torch.arange(units - 1, -1, -1).double()).long()
    share = torch.bincount(numbers, minlength=2**units) / len(draws)
    error = (share - p).abs() / (p * (1 - p) / len(draws)).sqrt()
    assert float(error.max()) < 5, what


@pytest.mark.parametrize(("visible", "hidden"), [(4, 3), (3, 4)])
def test_draws_have_the_models_distribution(visible: int, hidden: int) -> None:
    rbm = machine(visible, hidden, 17, 1.8)
    with torch.no_grad():  # near half of the time on: what is left is how they go together
        rbm.visible_bias.copy_(0.3 - rbm.weight.sum(1) / 2)
        rbm.hidden_bias.copy_(-rbm.weight.sum(0) / 2)
    p = rbm.log_prob(states(visible)).exp().detach()
    # A wrong distribution, that of independent units with the same means, is off by 20 standard errors and more.
    means = p @ states(visible)
    apart = torch.where(states(visible) == 1, means, 1 - means).prod(1)
    assert float(((apart - p).abs() / (p * (1 - p) / 100_000).sqrt()).max()) > 20
    within(rbm.exact_sample(100_000, seed=1), p, "exact_sample")
    within(rbm.sample(100_000, 30, seed=2), p, "sample")
    smooth = rbm.sample(100_000, 30, seed=2, probabilities=True)
    assert float((smooth.mean(0) - means).abs().max()) < 5 * 0.5 / math.sqrt(100_000)


def test_draws_are_named_by_their_seed_on_every_backend() -> None:
    rbm = machine(12, 7, 6)
    first = rbm.sample(20, 15, seed=3)
    assert torch.equal(rbm.sample(20, 15, seed=3), first) and not torch.equal(
        rbm.sample(20, 15, seed=4), first
    )
    with fe.use_backend("reference"):
        assert torch.equal(rbm.sample(20, 15, seed=3), first)
        assert torch.equal(BernoulliRBM(5, 4, seed=1).weight, fe.models.BernoulliRBM(5, 4, seed=1).weight)
    # A chain is the same alone and in a batch, and goes on where it stopped.
    assert torch.equal(
        rbm.sample(5, 15, initial=first[:5], seed=9), rbm.sample(20, 15, initial=first, seed=9)[:5]
    )
    half = rbm.gibbs(first, 4, seed=9, step=1)
    assert torch.equal(rbm.gibbs(half, 3, seed=9, step=5), rbm.gibbs(first, 7, seed=9, step=1))


def test_ais_is_within_three_standard_errors_of_enumeration() -> None:
    """12 hidden units; forward below on average, reverse above, Bennett's between."""
    rbm = machine(20, 12, 11, 0.5, torch.float32)
    exact = float(rbm.log_partition("exact").detach())
    for betas in (1000, 30):
        forward = rbm.log_partition("ais", betas=betas, particles=500, seed=1)
        samples = rbm.exact_sample(500, seed=2)
        reverse = rbm.log_partition("reverse_ais", samples=samples, betas=betas, seed=1)
        both, error = fe.anneal.bennett_acceptance_ratio(forward, reverse)
        assert abs(float(forward) - exact) < 3 * forward.standard_error
        assert abs(reverse.log_z - exact) < 3 * reverse.standard_error
        assert abs(both - exact) < 3 * error and error < forward.standard_error
        assert reverse.reverse and not forward.reverse
    slow, fast = (rbm.log_partition("ais", betas=betas, particles=500) for betas in (1000, 30))
    assert slow.standard_error < 0.02 < fast.standard_error
    assert slow.effective_sample_size > 450 > fast.effective_sample_size


def test_weights_of_ais_are_unbiased() -> None:
    """E[exp(-W)] = Z1/Z0 with three steps as well, where the mean work is far from log Z; both ways."""
    rbm = machine(8, 6, 12, 0.8)
    exact = float(rbm.log_partition().detach())
    forward = rbm.log_partition("ais", betas=3, particles=100_000, seed=1)
    base = 6 * math.log(2) + float(F.softplus(rbm.visible_bias.detach()).sum())
    assert abs(forward.log_z - exact) < 5 * forward.standard_error < 0.05
    assert float(forward.work.mean()) + exact - base > 0.3  # the work that was lost
    samples = rbm.exact_sample(100_000, seed=2)
    reverse = rbm.log_partition("reverse_ais", samples=samples, betas=3, seed=1)
    assert abs(reverse.log_z - exact) < 5 * reverse.standard_error < 0.05


def test_ais_from_the_datas_base_rates_gives_the_same() -> None:
    rbm = machine(15, 8, 13, 0.6)
    exact = float(rbm.log_partition().detach())
    data = rbm.exact_sample(300, seed=1)
    for rates in (data, data.mean(0)):
        found = rbm.log_partition("ais", base_rates=rates, betas=200, seed=2)
        assert abs(found.log_z - exact) < 3 * found.standard_error < 0.1


def test_a_poor_annealing_is_warned_of() -> None:
    rbm = machine(30, 12, 14, 1.5)
    with pytest.warns(
        UserWarning, match=r"the weights are worth \d+\.\d of 200 particles: log_z is too low"
    ) as warned:
        found = rbm.log_partition("ais", betas=2, particles=200, seed=1)
    assert found.effective_sample_size < 20 and warned[0].filename == __file__


def test_contrastive_divergences_gradient_is_data_less_samples() -> None:
    rbm = machine(6, 4, 15)
    v = rbm.exact_sample(10, seed=3)
    samples = rbm.gibbs(v, 3, seed=rbm.seed, step=0)
    rbm.contrastive_divergence(v, k=3).backward()
    h, g = rbm.hidden_probabilities(v), rbm.hidden_probabilities(samples)
    expected = {
        "weight": (samples.t() @ g - v.t() @ h) / 10,
        "visible_bias": (samples - v).mean(0),
        "hidden_bias": (g - h).mean(0),
    }
    for name, p in rbm.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected[name].detach())
    assert rbm.draws == 3
    rbm.zero_grad()
    rbm.contrastive_divergence(v, k=3).backward()  # fresh noise without being asked
    assert rbm.weight.grad is not None and not torch.allclose(rbm.weight.grad, expected["weight"])


def test_persistent_chains_go_on_and_are_saved() -> None:
    rbm = machine(6, 4, 16)
    v = rbm.exact_sample(10, seed=3)
    assert rbm.chains.shape == (0, 6)
    rbm.contrastive_divergence(v, k=2, persistent=True)
    first = rbm.gibbs(v, 2, seed=rbm.seed, step=0)
    assert torch.equal(rbm.chains, first)
    rbm.contrastive_divergence(v[:4], persistent=True)  # the last batch of an epoch
    second = rbm.gibbs(first[:4], 1, seed=rbm.seed, step=2)
    assert torch.equal(rbm.chains, torch.cat([second, first[4:]]))
    file = io.BytesIO()
    torch.save(rbm.state_dict(), file)
    file.seek(0)
    again = BernoulliRBM(6, 4, seed=99, dtype=torch.float64)
    again.load_state_dict(torch.load(file))  # with weights_only
    for _ in range(2):
        losses = [each.contrastive_divergence(v, persistent=True) for each in (rbm, again)]
        assert torch.equal(*losses)
    assert torch.equal(rbm.chains, again.chains) and copy.deepcopy(again).draws == rbm.draws == 5


@pytest.mark.parametrize("persistent", [False, True])
def test_training_finds_a_distribution(persistent: bool) -> None:
    """Bars of 2 x 3: 10 of 64 states (rows on or off, or columns); the likelihood is exact."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))[:, :, None].expand(4, 2, 3).flatten(1)
    columns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))[:, None].expand(8, 2, 3).flatten(1)
    data = torch.cat([rows.repeat(2, 1), columns]).repeat(20, 1)
    rbm = BernoulliRBM(6, 16, std=0.1, seed=2)
    seen: list[float] = []

    def keep(rbm: BernoulliRBM, epoch: int) -> None:
        seen.append(float(rbm.log_prob(data).mean().detach()))

    gaps = rbm.fit(
        data, epochs=100, lr=0.05, batch_size=32, k=5, persistent=persistent, progress=False, callback=keep
    )
    assert len(gaps) == len(seen) == 100
    share = torch.unique(data, dim=0, return_counts=True)[1] / len(data)
    entropy = float((share * share.log()).sum())  # minus it: no model can be above
    assert seen[0] < -3.9 and entropy - 0.25 < seen[-1] < entropy


def test_a_loader_trains_as_its_batches_do_and_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    data = (fe.random.uniform((40, 2, 3), seed=1) <= 0.4).double()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data, torch.arange(40)), batch_size=16
    )
    by_fit, by_hand = (BernoulliRBM(6, 3, seed=4) for _ in range(2))
    optimizer = torch.optim.SGD(by_fit.parameters(), lr=0.1)
    gaps = by_fit.fit(loader, epochs=2, k=3, persistent=False, optimizer=optimizer)
    assert "2/2" in capsys.readouterr().err and len(gaps) == 2
    flat = data.flatten(1).float()
    by_hand.set_base_rates(flat[:16])
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        for v in flat.split(16):
            optimizer.zero_grad()
            by_hand.contrastive_divergence(v, k=3).backward()
            optimizer.step()
    for p, q in zip(by_fit.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q)


def test_base_rates_alone_are_the_data_means() -> None:
    data = (fe.random.uniform((1000, 5), seed=1) <= torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])).float()
    rbm = BernoulliRBM(5, 3, std=0.0, seed=1)
    rbm.set_base_rates(data)
    rates = rbm.visible_probabilities(torch.zeros(1, 3))[0].detach()
    assert float((rates - data.mean(0)).abs().max()) < 1e-3 and bool(rbm.visible_bias.isfinite().all())


V = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: BernoulliRBM(0, 3), ValueError, r"BernoulliRBM: n_visible must be in \[1"),
        (lambda r: BernoulliRBM(4, 3, dtype=torch.float16), ValueError, "dtype must be float32 or float64"),
        (lambda r: r.free_energy(torch.zeros(2, 5)), ValueError, r"free_energy: v must have shape \(n, 4\); got"),
        (lambda r: r.free_energy(V.double()), TypeError, "v must be float32 like the weights; got float64"),
        (lambda r: r.free_energy(V, reduction="all"), ValueError, "must be one of none, mean, sum; got 'all'"),
        (lambda r: r.joint_energy(V, torch.zeros(3, 3)), ValueError, "h must have 2 rows like v; got 3"),
        (lambda r: r.log_partition("bethe"), ValueError, "method must be one of exact, ais, reverse_ais; got 'bethe'"),
        (lambda r: r.log_partition("exact", betas=3), TypeError, "betas belong to 'ais'"),
        (lambda r: r.log_partition("ais", foo=1), TypeError, "options of 'ais' must be of particles, .*; got foo"),
        (lambda r: r.log_partition("reverse_ais"), ValueError, "samples must be given with method='reverse_ais'"),
        (lambda r: r.log_partition("ais", samples=V), ValueError, "and no other; got samples"),
        (lambda r: r.log_partition("ais", betas=[0, 0.5]), ValueError, "betas must rise from 0 to 1; got 0 to 0.5"),
        (lambda r: r.log_partition("ais", base_rates=V[0] + 2), ValueError, r"must be in \[0, 1\]; got 2.0 to 2.0"),
        (lambda r: BernoulliRBM(26, 40).log_partition(), ValueError, "at most 25 units .*; got 26 visible and"),
        (lambda r: r.contrastive_divergence(V, k=0), ValueError, r"contrastive_divergence: k must be in \[1"),
        (lambda r: r.contrastive_divergence(V, persistent=1), TypeError, "persistent must be a bool; got int"),
        (lambda r: r.sample(3, initial=V), ValueError, "initial must have 3 rows; got 2"),
        (lambda r: r.fit(3), TypeError, "fit: data must be a tensor or an iterable of batches; got int"),
        (lambda r: r.fit(torch.zeros(3, 5)), ValueError, r"data must have shape \(n, 4\) once flattened; got \(3, 5\)"),
        (lambda r: r.fit([]), ValueError, "data must yield a batch in every epoch"),
        (lambda r: r.fit(V, optimizer="adam"), TypeError, "optimizer must be a torch.optim.Optimizer; got str"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(call: object, error: type[Exception], message: str) -> None:
    rbm = BernoulliRBM(4, 3, seed=1)
    before = copy.deepcopy(rbm.state_dict())
    with pytest.raises(error, match=message):
        call(rbm)  # type: ignore[operator]
    after = rbm.state_dict()
    assert before.pop("_extra_state") == after.pop("_extra_state")
    assert all(torch.equal(before[name], after[name]) for name in before)
