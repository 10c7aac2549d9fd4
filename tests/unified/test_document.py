"""Each demonstration of the design document, called as it calls it, runs and holds what it claims."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional

import fekernels as fe
from fekernels.unified import (
    EfficientFreeEnergyMinimizer,
    FreeEnergyMinimizer,
    GradientAsMessagePassing,
    RelevanceAsUnifiedObjective,
    TheTrainStation,
    UnifiedOptimizer,
    benchmark_unified_view,
    show_unified_perspective,
    visualize_train_station,
)
from tests.support.tensors import bits_equal


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_gradient_as_message_passing() -> None:
    model = GradientAsMessagePassing(10, 20, 1)
    x, y = torch.randn(32, 10), torch.randn(32, 1)
    other = GradientAsMessagePassing(10, 20, 1)
    other.load_state_dict(model.state_dict())

    output, activations = model.forward(x)
    loss = ((output - y) ** 2).mean()
    messages = model.backward_as_messages(loss)
    assert len(messages) == 3 and messages[0]["weight_message"].shape == (20, 10)
    # The document's output goes through a ReLU, which stops half of the messages: here it does not.
    assert (output < 0).any() and len(activations) == 3
    # Called again, nothing of the last call is left in the messages.
    with fe.messages.GradientMessages(model) as observed:
        output, _ = model(x)
        again = model.backward_as_messages(((output - y) ** 2).mean())
    for k, message in enumerate(again):
        assert bits_equal(observed[f"layers.{k}"], message["error_message"])
    assert all(bits_equal(a[key], b[key]) for a, b in zip(messages, again, strict=True) for key in a)
    # The error message of a layer, [32, outputs]: the gradient in what it gave.
    assert messages[-1]["error_message"].shape == (32, 1)
    assert torch.allclose(messages[-1]["error_message"], 2 / 32 * (output - y).detach())

    model.update_with_messages(messages, lr=0.01)
    sgd = torch.optim.SGD(other.parameters(), lr=0.01)
    ((other(x)[0] - y) ** 2).mean().backward()
    sgd.step()
    assert all(bits_equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_messages_are_copied_checked_and_not_piled_up() -> None:
    model = GradientAsMessagePassing(4, 5, 2)
    x = torch.randn(3, 4)
    messages = model.backward_as_messages(model(x)[0].square().mean())
    model.zero_grad(set_to_none=False)
    assert messages[0]["weight_message"].abs().sum() > 0
    with pytest.raises(RuntimeError, match="must be of a forward pass since the last call"):
        model.backward_as_messages(torch.zeros((), requires_grad=True))
    before = [p.clone() for p in model.parameters()]
    messages[1]["weight_message"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=r"messages\[1\]\['weight_message'\] must have shape \(5, 5\); got"):
        model.update_with_messages(messages)
    assert all(bits_equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    model(x)
    again = copy.deepcopy(model)
    assert bits_equal(again(x)[0], model(x)[0])


def test_free_energy_minimizer_and_its_three_names() -> None:
    model = FreeEnergyMinimizer(784, 20, 784)
    x = torch.randn(32, 784)
    physics, inference, optimization = (
        model.loss_as_free_energy(x), model.loss_as_inference(x), model.loss_as_optimization(x)
    )  # fmt: skip
    assert torch.allclose(physics["free_energy"], inference["neg_log_posterior"])
    assert torch.allclose(physics["free_energy"], optimization["total_loss"])
    assert physics["elbo"] == -physics["free_energy"]
    assert torch.allclose(physics["energy"] + physics["neg_entropy"], physics["free_energy"])
    assert torch.allclose(inference["neg_likelihood"] + inference["kl_to_prior"], physics["free_energy"])
    recon, mean, logvar = model(x)
    z = model.reparameterize(mean, logvar)
    assert recon.shape == x.shape and z.shape == mean.shape == (32, 20)
    # The entropy is q's own, not a KL.
    entropy = Normal(mean, (logvar / 2).exp()).entropy().sum()
    assert torch.allclose(-physics["neg_entropy"], entropy)
    with pytest.raises(ValueError, match="output_dim must be input_dim, 784, .* got 10"):
        FreeEnergyMinimizer(784, 20, 10)


def test_training_sees_fresh_noise_at_every_step_and_views_do_not() -> None:
    model = FreeEnergyMinimizer(20, 4, 20, seed=1)
    optimizer = UnifiedOptimizer(model)
    x = torch.randn(16, 20)
    for _ in range(3):
        before = model.loss_as_free_energy(x)["energy"]
        assert model.loss_as_inference(x)["neg_log_posterior"] == model.loss_as_optimization(x)["total_loss"]
        assert model.loss_as_free_energy(x)["energy"] == before
        noise = model.noise(x)
        optimizer.step(model.loss_as_free_energy(x)["free_energy"])
        assert model.noise(x)["step"] == noise["step"] + 1


def test_show_unified_perspective(capsys: pytest.CaptureFixture[str]) -> None:
    found = show_unified_perspective()
    assert found["free energy"] == pytest.approx(found["inference"], rel=1e-6)
    assert found["gradient_difference"] < 1e-6
    assert f"F = {found['free energy']:.2f}" in capsys.readouterr().out


def test_visualize_train_station(capsys: pytest.CaptureFixture[str]) -> None:
    found = visualize_train_station()
    assert found["minimum"] == pytest.approx(0, abs=1e-9)
    assert found["saddle"] == pytest.approx(0.39, abs=1e-9)
    assert found["maximum"] == pytest.approx(4.0)
    assert [found[name] for name in ("minima", "saddles", "maxima")] == [2, 2, 1]
    assert "0.390" in capsys.readouterr().out


def test_benchmark_unified_view(capsys: pytest.CaptureFixture[str]) -> None:
    found = benchmark_unified_view(steps=20)
    assert found["adam_seconds"] > 0 and found["unified_seconds"] > 0
    assert found["unified_loss"] == pytest.approx(found["adam_loss"], rel=1e-3)
    assert "Speedup" in capsys.readouterr().out


def test_efficient_free_energy_minimizer_both_ways() -> None:
    assert EfficientFreeEnergyMinimizer(None, amortized=True).amortized
    with pytest.raises(ValueError, match="model must have decode"):
        EfficientFreeEnergyMinimizer(None).infer_latents(torch.randn(4, 30))
    model = FreeEnergyMinimizer(30, 3, 30, seed=0)
    x = torch.randn(64, 30)
    amortised = EfficientFreeEnergyMinimizer(model, amortized_inference=True, seed=0)
    optimizer = torch.optim.Adam(amortised.parameters(), lr=1e-2)
    first = amortised.compute_free_energy_batch(x).item()
    for _ in range(50):
        optimizer.zero_grad()
        amortised.compute_free_energy_batch(x).backward()
        optimizer.step()
    last = amortised.compute_free_energy_batch(x).item()
    assert last < first
    refined = EfficientFreeEnergyMinimizer(model, amortized_inference=False, seed=0)
    # What is reported is not measured by the noise that the latents were fitted to.
    few = EfficientFreeEnergyMinimizer(model, False, refine_steps=3, refine_lr=1.0, seed=0)
    reported = few.compute_free_energy_batch(x)
    fresh = few.free_energy(x, posterior=few.infer_latents(x), samples=500, seed=9).free_energy
    assert abs(reported - fresh) < 0.05 * fresh
    # Any likelihood and dtype that the model has.
    for likelihood, data, options in (
        ("poisson", torch.randint(0, 5, (5, 6)), {}), ("categorical", torch.randint(0, 3, (5, 6)), {"classes": 3})
    ):  # fmt: skip
        for amortized in (True, False):
            vae = fe.models.VAE(6, 2, (8,), likelihood=likelihood, **options).double()
            given = EfficientFreeEnergyMinimizer(vae, amortized, refine_steps=2)
            assert given.compute_free_energy_batch(data).isfinite()
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 30\); got \(64, 29\)"):
        refined.compute_free_energy_batch(x[:, 1:])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module with decode"):
        EfficientFreeEnergyMinimizer(object())
    # Latents that were fitted to each data point explain it better than a network's first guess.
    untrained = EfficientFreeEnergyMinimizer(model, seed=0)
    assert refined.compute_free_energy_batch(x) < untrained.compute_free_energy_batch(x)
    assert amortised.memory(10) == amortised.memory(10**6)
    assert refined.memory(10**6) == 10**6 * 2 * 3 * 4


def test_the_train_station(capsys: pytest.CaptureFixture[str]) -> None:
    model = FreeEnergyMinimizer(784, 20, 784)
    station = TheTrainStation(model)
    x = torch.randn(32, 784)
    found = station.verify_equivalence(x)
    assert found.equal and str(found) in capsys.readouterr().out
    physics, parts = station.compute_as_physics(x)
    assert torch.allclose(parts["energy"] - parts["entropy"], physics)
    loss, parts = station.compute_as_ml(x)
    assert torch.allclose(parts["recon"] + parts["reg"], loss)
    inference, parts = station.compute_as_inference(x)
    assert torch.allclose(parts["neg_ll"] + parts["kl"], inference)
    message, parts = station.compute_as_message_passing(x)
    assert torch.allclose(parts["forward_error"] + parts["backward_error"], message)
    assert torch.allclose(torch.stack([physics, loss, inference]), message.expand(3))
    # A model of the user's own, which has no noise of its own.
    plain = nn.Module()
    plain.encode = lambda x: (x[:, :2], x[:, 2:4])  # type: ignore[assignment]
    plain.decode = lambda z: z @ torch.ones(2, 784)  # type: ignore[assignment]
    assert TheTrainStation(plain).verify_equivalence(x).equal


class Networks:
    """A model that is no module."""

    def __init__(self) -> None:
        self.net, self.likelihood = nn.Linear(4, 4), "mse"

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.net(x).chunk(2, -1)
        return mean, logvar

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, z], -1)


def test_the_station_has_fresh_noise_for_models_without_their_own() -> None:
    model, x = Networks(), torch.randn(8, 4)
    station = TheTrainStation(model, seed=0)
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.0)
    values = []
    for _ in range(3):
        physics, ml = station.compute_as_physics(x)[0], station.compute_as_ml(x)[0]
        assert torch.allclose(physics, ml)
        values.append(physics.item())
        physics.backward()
        optimizer.step()
    assert len(set(values)) == 3
    assert TheTrainStation(model, seed=0).compute_as_physics(x)[0] == values[0]


class Context(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def infer_intent(
        self, utterance: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.net(torch.cat([utterance, context], -1)).chunk(2, -1)
        return mean, logvar


class Dialogue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit, self.reply = nn.Linear(6, 1), nn.Linear(8, 4)

    def score_relevance(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.logit(torch.cat([z, context], -1))

    def generate(self, utterance: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.reply(torch.cat([utterance, context], -1))


def test_relevance_as_unified_objective() -> None:
    assert RelevanceAsUnifiedObjective(dialogue_model=None, context_model=None) is not None
    objective = RelevanceAsUnifiedObjective(Dialogue(), Context(), seed=0)
    utterance, context, reply = (torch.randn(5, 4) for _ in range(3))
    score = objective.compute_relevance(utterance, context)
    assert score.shape == (5,) and (score < 0).all()  # the logit is [5, 1]: not [5, 5]
    assert bits_equal(score, objective.compute_relevance(utterance, context))
    # A bound of the log of the probability that z's prior gives: by many draws of it.
    z = torch.randn(20_000, 1, 2)
    with torch.no_grad():
        logits = objective.dialogue.score_relevance(z.expand(-1, 5, 2), context.expand(20_000, 5, 4)).squeeze(
            -1
        )
        log_evidence = functional.logsigmoid(logits).logsumexp(0) - math.log(20_000)
    many = torch.stack([objective.compute_relevance(utterance.clone(), context) for _ in range(200)]).mean(0)
    assert (many < log_evidence + 0.05).all()
    batch = [(utterance, context, reply)] * 2
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = objective.optimize_relevance(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_relevance_of_models_that_are_no_modules_has_fresh_noise_too() -> None:
    class Plain:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

    dialogue, context = Plain(Dialogue()), Plain(Context())
    dialogue.score_relevance = dialogue.module.score_relevance  # type: ignore[attr-defined]
    context.infer_intent = context.module.infer_intent  # type: ignore[attr-defined]
    objective = RelevanceAsUnifiedObjective(dialogue, context, seed=0)
    utterance, about = torch.randn(5, 4), torch.randn(5, 4)
    optimizer = torch.optim.SGD(context.module.parameters(), lr=0.0)
    scores = []
    for _ in range(3):
        score = objective.compute_relevance(utterance, about)
        assert bits_equal(score, objective.compute_relevance(utterance, about))
        scores.append(score.sum().item())
        score.sum().backward()
        optimizer.step()
    assert len(set(scores)) == 3


def test_every_name_of_the_document_is_there() -> None:
    names = {
        "BayesianOptimizer", "EfficientFreeEnergyMinimizer", "FreeEnergyMinimizer", "GradientAsMessagePassing",
        "GradientDescentAsVI", "RelevanceAsUnifiedObjective", "TheTrainStation", "UnifiedOptimizer",
        "benchmark_unified_view", "optimization_as_inference", "show_unified_perspective", "visualize_train_station",
    }  # fmt: skip
    assert names <= set(fe.unified.__all__) and all(hasattr(fe.unified, name) for name in names)
