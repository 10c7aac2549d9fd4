"""A user's file that names everything public, for tests/runtime/test_typing.py: it is type-checked and never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import assert_type

import fekernels as fe
from fekernels import (
    anneal,
    diagnostics,
    distributed,
    graph,
    losses,
    messages,
    models,
    optim,
    plots,
    posterior,
    random,
    stein,
    unified,
    views,
)
from fekernels.distributed import cost
from fekernels.losses import likelihoods
from fekernels.stein import kernels

Batch = tuple[Tensor, Tensor]
x, target, mean, logvar = torch.rand(4, 8), torch.rand(4, 8), torch.zeros(4, 2), torch.zeros(4, 2)
weight = nn.Parameter(torch.zeros(3))
model = nn.Sequential(nn.Linear(8, 1))
loader = [(x, target)]


def loss_fn(network: nn.Module, batch: Batch) -> Tensor:
    prediction: Tensor = network(batch[0])
    return (prediction - batch[1]).square().mean()


def of_weights(point: Tensor) -> Tensor:
    return point.square().sum(-1)


def closure() -> Tensor:
    return weight.square().sum()


def package() -> None:
    assert_type(fe.__version__, str)
    assert_type(fe.build(), Path)
    table = fe.backends()
    assert_type(table["langevin_adam_", "cpu"].in_use, str)
    try:
        with fe.use_backend("reference"):
            pass
    except fe.BackendUnavailable as error:
        print(error)


def optimizers() -> None:
    adam = fe.LangevinAdam([weight], lr=1e-3, temperature=1e-4)
    assert_type(adam.step(closure), Tensor)
    assert_type(adam.step(lambda: 1.0), float)
    adam.step()
    fe.SGLD(model.parameters(), lr=1e-3).step()
    assert_type(fe.SGLD(model.parameters(), lr=1e-3).step(closure), Tensor)
    assert_type(fe.UnifiedOptimizer(model).step(closure()), Tensor)
    gaussian = fe.VariationalAdam([weight], lr=0.1, ess=100.0)
    with gaussian.sampled_params(train=True):
        torch.autograd.backward(closure())
    assert_type(gaussian.step(closure), Tensor)
    assert_type(gaussian.kl(), Tensor)
    assert_type(gaussian.posterior(), list[optim.WeightGaussian])
    base: type[torch.optim.Optimizer] = optim.LangevinAdam
    print(base, optim.SGLD, optim.UnifiedOptimizer, optim.VariationalAdam, optim.PosteriorSamples)
    schedules: list[optim.TemperatureScheduler] = [
        optim.ConstantTemperature(adam),
        optim.CosineTemperature(adam, T_max=100),
        optim.CyclicalTemperature(adam, 100),
        optim.ExponentialTemperature(adam, 0.99),
        optim.LambdaTemperature(adam, lambda step: 1 / (1 + step)),
    ]
    for schedule in schedules:
        schedule.step()
        assert_type(schedule.get_last_temperature(), list[float | Tensor])
        assert_type(schedule.sampling, bool)


def posteriors() -> None:
    run = fe.sample_posterior(model, loss_fn, loader, data_size=4, prior_precision=1.0)
    assert_type(run, posterior.PosteriorRun)
    assert_type(run.samples, fe.PosteriorSamples)
    assert_type(run.samples, posterior.PosteriorSamples)
    assert_type(run.report, posterior.PosteriorReport)
    assert_type(run.report.converged, bool)
    assert_type(run.report.plot(), Figure)
    prediction = run.samples.predict(x)
    assert_type(prediction.mean, Tensor)
    assert_type(prediction.predictive_entropy, Tensor | None)
    assert_type(run.samples[0], dict[str, Tensor])
    chains = fe.Chains(model, 4)
    assert_type(chains.losses(loss_fn, (x, target)), Tensor)
    control = fe.ControlVariate(chains, loss_fn, loader)
    assert_type(control.backward((x, target)), Tensor)
    print(posterior.Chains, posterior.ControlVariate, posterior.sample_posterior)
    found = fe.local_learning_coefficient(model, loss_fn, loader, data_size=4)
    assert_type(found, posterior.LearningCoefficient)
    assert_type(found.mean, float)
    assert_type(found.diagnostics, posterior.LearningCoefficientDiagnostics)
    print(posterior.local_learning_coefficient, fe.posterior, fe.optim, fe.losses)


def free_energies() -> None:
    terms = fe.free_energy(x, target, mean, logvar, likelihood="bernoulli")
    assert_type(terms, fe.FreeEnergyTerms)
    assert_type(terms.free_energy, Tensor)
    assert_type(terms.elbo, Tensor)
    assert_type(fe.FreeEnergyLoss("bernoulli")(x, target, mean, logvar), losses.FreeEnergyTerms)
    assert_type(fe.energy(x, target), Tensor)
    assert_type(fe.gaussian_kl(mean, logvar), Tensor)
    z = fe.reparameterize(mean, logvar, seed=0)
    assert_type(z, Tensor)
    assert_type(fe.importance_weighted_bound(z), Tensor)
    mixture = fe.GaussianMixturePrior(mean, logvar)
    vamp = fe.VampPrior(x, lambda inputs: (inputs, inputs))
    assert_type(mixture.log_prob(z), Tensor)
    assert_type(vamp.sample(3), Tensor)
    assert_type(fe.monte_carlo_kl(mean, logvar, z, prior=mixture), Tensor)
    assert_type(fe.monte_carlo_kl(mean, logvar, z, prior=vamp), Tensor)
    step = losses.natural_step(mean, logvar, mean, logvar)
    assert_type(step, losses.GaussianParameters)
    assert_type(losses.natural_gradient(logvar, mean, logvar).logvar, Tensor)
    print(
        losses.FreeEnergyLoss,
        losses.GaussianMixturePrior,
        losses.VampPrior,
        losses.energy,
        losses.free_energy,
    )
    print(losses.gaussian_kl, losses.importance_weighted_bound, losses.monte_carlo_kl, losses.reparameterize)
    assert_type(fe.likelihoods.mean("poisson", x), Tensor)
    assert_type(losses.likelihoods.sample("poisson", x, seed=0), Tensor)
    assert_type(likelihoods.PARAMETERS, dict[str, tuple[str, ...]])
    names: tuple[str, ...] = likelihoods.NAMES
    print(names, likelihoods.OPTIONAL, likelihoods.mean, likelihoods.sample)


def particles() -> None:
    sampler = fe.SVGD(of_weights, x)
    result = sampler.run(10)
    assert_type(result, stein.SVGDResult)
    assert_type(result.particles, Tensor)
    assert_type(sampler.particles, Tensor)
    ensemble = fe.SVGD.from_model(model, loss_fn, size=4)
    assert_type(ensemble, stein.SVGDEnsemble)
    assert_type(ensemble.predict(x).mean, Tensor)
    every: list[object] = [
        kernels.RBF(),
        kernels.IMQ(),
        kernels.Laplace(),
        kernels.Matern32(),
        kernels.Linear(),
    ]
    every += [
        stein.RBF(),
        stein.IMQ(),
        stein.Laplace(),
        stein.Matern32(),
        stein.Linear(),
        stein.kernels.RBF(),
    ]
    assert_type(fe.svgd_direction(x, x, kernel=fe.kernels.RBF()), Tensor)
    assert_type(fe.kernel_stein_discrepancy(x, x), Tensor)
    assert_type(fe.median_bandwidth(x), Tensor)
    assert_type(fe.pairwise_sq_dist_median(x), Tensor)
    assert_type(fe.stein.kernel_matrix(x, x), Tensor)
    assert_type(stein.thinning(x, x, 2), Tensor)
    fit = stein.goodness_of_fit(x, x)
    assert_type(fit, stein.GoodnessOfFit)
    assert_type(stein.CyclicalAnnealing(100)(3), float)
    assert_type(stein.TanhAnnealing(100)(3), float)
    print(every, stein.SVGD, stein.svgd_direction, stein.kernel_stein_discrepancy, stein.median_bandwidth)
    print(stein.pairwise_sq_dist_median)


def noise() -> None:
    assert_type(fe.random.normal((3, 4), seed=0), Tensor)
    assert_type(random.uniform(3, seed=0), Tensor)
    assert_type(random.bits(3, seed=0), Tensor)


def ranks() -> None:
    assert_type(fe.distributed.share(10), range)
    assert_type(distributed.batch_offset(10), int)
    assert_type(distributed.batch_mean(x), Tensor)
    assert_type(distributed.svgd_direction(x, x), Tensor)
    assert_type(distributed.median_bandwidth(x), Tensor)
    assert_type(distributed.pairwise_sq_dist_median(x), Tensor)
    assert_type(distributed.streams_of(fe.LangevinAdam, [weight]), type[fe.LangevinAdam])
    trained = distributed.cost.training(1e9, 8)
    assert_type(trained, cost.TrainingCost)
    assert_type(cost.particles(100, 10, 8), cost.ParticleCost)
    assert_type(cost.samples_on_disk(1e9, 100), float)
    assert_type(cost.H200, cost.Hardware)
    bytes_of: Mapping[str, cost.OptimizerBytes] = cost.OPTIMIZERS
    print(bytes_of, cost.EXCHANGES, cost.SHARDINGS)


def whole_models() -> None:
    vae = fe.models.VAE(8, 2)
    parent: models.LatentModel = vae
    assert_type(vae.free_energy(x), fe.FreeEnergyTerms)
    assert_type(vae.infer(x), models.Posterior)
    assert_type(vae.sample(3), Tensor)
    history = parent.fit(loader)
    assert_type(history, models.History)
    assert_type(history.plot(), Figure)
    rbm = models.BernoulliRBM(8, 4)
    assert_type(rbm.free_energy(x), Tensor)
    assert_type(rbm.log_partition(), Tensor)
    assert_type(rbm.log_partition("ais"), anneal.AnnealedEstimate)
    relevance = models.RelevanceModel(seed=0)
    index = relevance.encode_contexts(["a"])
    assert_type(index, models.ContextIndex)
    assert_type(index.top(["b"], 1), tuple[Tensor, models.Relevance])
    assert_type(relevance.calibrate(["a"], ["b"]), models.Calibration)
    assert_type(models.HashedTextEncoder()(["a"]), Tensor)
    assert_type(vae(x), tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor])
    assert_type(models.LinearLogit(2, 3)(mean, x), Tensor)
    assert_type(models.relevance_of(lambda z: z.sum(-1), mean, logvar, seed=0), models.Relevance)


def forms() -> None:
    vae = models.VAE(8, 2)
    shared = fe.views.share(vae, x)
    assert_type(shared, views.Shared)
    for view in (views.physics, views.machine_learning, views.inference, views.message_passing):
        assert_type(view(vae, x), tuple[Tensor, dict[str, Tensor]])
    equivalence = views.verify_equivalence(vae, x)
    assert_type(equivalence, views.Equivalence)
    assert_type(equivalence.equal, bool)
    print(views.VIEWS)
    with fe.messages.GradientMessages(model) as sent:
        assert_type(sent.history, dict[str, messages.LayerHistory])
        assert_type(sent.norms(), dict[str, float])
        assert_type(sent.plot(), Figure)
    found = fe.graph.belief_propagation(x, torch.zeros(3, 2, dtype=torch.int64), x)
    assert_type(found, graph.BeliefPropagation)
    assert_type(found.beliefs, Tensor)
    assert_type(graph.NotConverged("no"), graph.NotConverged)


def annealing() -> None:
    base = torch.distributions.Normal(mean, mean.exp())
    estimate = fe.anneal.importance_sampling(of_weights, base)
    assert_type(estimate, anneal.AnnealedEstimate)
    assert_type(estimate.log_z, float)
    back = anneal.reverse_importance_sampling(of_weights, base, x)
    assert_type(anneal.bennett_acceptance_ratio(estimate, back), tuple[float, float])
    assert_type(anneal.jarzynski(estimate.work).log_ratio, float)
    path: anneal.Path = anneal.GeometricPath(of_weights, base)
    assert_type(anneal.along_path(path), anneal.AnnealedEstimate)
    assert_type(anneal.sigmoid_betas(10), Tensor)
    assert_type(anneal.betas_from_temperature(lambda step: 1.0, 10), Tensor)


def measures(draws: Tensor) -> None:
    assert_type(fe.diagnostics.split_rhat(draws), Tensor)
    assert_type(diagnostics.effective_sample_size(draws), Tensor)
    assert_type(diagnostics.chain_statistics(draws), diagnostics.ChainStatistics)
    adam = fe.LangevinAdam([weight])
    assert_type(diagnostics.gradient_noise_ratio(adam), diagnostics.GradientNoiseRatio)
    assert_type(diagnostics.TrajectoryKL(adam).total, float)
    assert_type(diagnostics.configurational_temperature(draws, draws), Tensor)
    assert_type(diagnostics.posterior_temperature(model, loss_fn, (x, target), 8), float)
    points = diagnostics.critical_points(of_weights)
    assert_type(points, list[diagnostics.CriticalPoint])
    assert_type(diagnostics.trajectories(of_weights, x), dict[str, diagnostics.Trajectory])
    assert_type(diagnostics.loss_plane(model, loss_fn, (x, target)), diagnostics.LossPlane)
    found = diagnostics.calibration(x, target)
    assert_type(found, diagnostics.Calibration)
    assert_type(found.error, float)
    assert_type(diagnostics.auroc(x, x), float)
    assert_type(diagnostics.brier_score(x, target), float)
    assert_type(diagnostics.mutual_information(x), Tensor)
    assert_type(diagnostics.predictive_entropy(x), Tensor)


def pictures(ax: Axes, history: models.History, draws: Tensor) -> Iterator[Figure]:
    yield fe.plots.landscape(of_weights)
    yield plots.free_energy_history(history)
    yield plots.messages({})
    yield plots.posterior_run(draws, draws, ["w"])
    yield plots.learning_coefficient(draws, 0.0, 1.0, 0.5)
    yield plots.roofline([])
    figure, axes = plots.panels(1, 2, (8, 4))
    assert_type(figure, Figure)
    assert_type(plots.GREY, str)
    plots.contours(ax, (x, x, x))
    plots.paths(ax, draws)
    plots.training(ax, [1.0], [0.1], [True], [0], "C0")
    plots.trajectory(ax, [x], [0], [True])
    plots.trace(ax, draws)
    plots.posterior(ax, draws)
    plots.reliability(ax, diagnostics.calibration(x, target), "C0")
    plots.entropies(ax, {"x": x}, {"x": "C0"}, 1.0)
    print(axes)


def of_the_document() -> None:
    minimizer = fe.unified.FreeEnergyMinimizer(8, 2, 8)
    assert_type(minimizer.loss_as_free_energy(x), dict[str, Tensor])
    assert_type(unified.EfficientFreeEnergyMinimizer(minimizer).infer_latents(x), tuple[Tensor, Tensor])
    assert_type(unified.TheTrainStation(minimizer).verify_equivalence(x), views.Equivalence)
    assert_type(unified.BayesianOptimizer(model).q_mean, dict[str, Tensor])
    assert_type(unified.GradientDescentAsVI(model).visualize_as_inference(), list[float])
    network = unified.GradientAsMessagePassing(8, 4, 2)
    assert_type(network(x), tuple[Tensor, list[Tensor]])
    fit = unified.optimization_as_inference(x, of_weights, torch.distributions.Normal(mean, mean.exp()))
    assert_type(fit, unified.VariationalFit)
    assert_type(unified.RelevanceAsUnifiedObjective(model, model).compute_relevance(x, x), Tensor)
    assert_type(unified.show_unified_perspective(), dict[str, float])
    assert_type(unified.benchmark_unified_view(), dict[str, float])
    print(unified.visualize_train_station(), unified.UnifiedOptimizer)
