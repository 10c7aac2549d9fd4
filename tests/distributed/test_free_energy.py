"""A batch, or the samples of a bound, split over real processes: values and gradients of the whole on each of them."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fekernels as fe
from tests.support.processes import run_processes
from tests.support.tensors import bits_equal

WORLD = 3
ROWS = {"uneven": (5, 0, 3), "even": (2, 2, 2), "first empty": (0, 1, 6)}
SAMPLES = {"uneven": (4, 0, 3), "one each": (1, 1, 1)}
EVENT, LATENT = (2, 3), 4
PARAMETERS = {"bernoulli": 1, "gaussian": 2, "negative_binomial": 2}
OPTIONS = {
    "plain": dict(likelihood="bernoulli"),
    "inplace": dict(likelihood="bernoulli", inplace_backward=True),
    "two parameters, beta": dict(likelihood="gaussian", beta=3.0),
    "beta a tensor": dict(likelihood="bernoulli", beta=torch.tensor(0.5)),
    "counts, weight, mask": dict(likelihood="negative_binomial", weight=True, mask=True),
    "free bits": dict(likelihood="bernoulli", free_bits=0.6),
    "free bits of what counts": dict(likelihood="bernoulli", free_bits=0.5, weight=True, latent_mask=True),
}
ESTIMATORS = {"iwae": None, "dreg": None, "renyi": (0.5, 1.0, -math.inf, math.inf, 3.0)}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def operands(rows, likelihood, dtype):
    generator = torch.Generator().manual_seed(rows)
    params = [
        torch.randn(rows, *EVENT, generator=generator, dtype=torch.float64)
        for _ in range(PARAMETERS[likelihood])
    ]
    if likelihood == "negative_binomial":
        params = [p.exp() for p in params]
    target = torch.randint(0, 2, (rows, *EVENT), generator=generator).double()
    mean, logvar = torch.randn(2, rows, LATENT, generator=generator, dtype=torch.float64)
    extras = {
        "weight": torch.rand(rows, generator=generator) * (torch.arange(rows) != 2),
        "mask": torch.rand(rows, *EVENT, generator=generator) > 0.3,
        "latent_mask": torch.rand(rows, LATENT, generator=generator) > 0.3,
    }
    return [each.to(dtype) for each in (*params, mean, logvar, target)], extras


def part(sizes, rank):
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def terms_and_gradients(rows, switches, dtype, reduction, mine, process_group):
    switches = dict(switches)
    tensors, extras = operands(rows, switches["likelihood"], dtype)
    for name, value in extras.items():
        if switches.pop(name, False):
            switches[name] = value[mine]
    *leaves, target = (each[mine].clone() for each in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    *params, mean, logvar = (leaf * 1 for leaf in leaves)
    terms = fe.free_energy(
        tuple(params), target, mean, logvar, reduction=reduction, process_group=process_group, **switches
    )
    (terms.free_energy + 0.25 * terms.kl).backward()
    return [t.detach() for t in terms], [leaf.grad for leaf in leaves]


def cases():
    for kind, sizes in ROWS.items():
        for name, switches in OPTIONS.items():
            for dtype in TOLERANCE:
                for reduction in ("mean", "sum"):
                    yield kind, sizes, name, switches, dtype, reduction


def bound(estimator, alpha, dtype, mine, process_group):
    """By z, of which log w is a function, and a parameter that all samples share."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(7, 5, 2, generator=generator, dtype=torch.float64)[mine].to(dtype).requires_grad_()
    weight = torch.tensor([0.7, -1.1], dtype=dtype, requires_grad=True)
    at = z * 1
    log_w = (at * weight).sum(-1).sin() * 3 - at.square().sum(-1)
    found = fe.importance_weighted_bound(
        log_w, 0, estimator, at if estimator == "dreg" else None, alpha, process_group=process_group
    )
    found.square().sum().backward()
    return found.detach(), z.grad, weight.grad


def few_samples(process_group):
    """The documented lines, of fewer samples than ranks: the last rank has none."""
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    logvar = (mean.detach() / 10).requires_grad_()
    mine = range(2) if process_group is None else fe.distributed.share(2, process_group)
    z = fe.reparameterize(mean, logvar, seed=0, samples=len(mine), stream=mine.start)
    log_w = -z.square().sum(-1) - fe.monte_carlo_kl(mean, logvar, z)
    found = fe.importance_weighted_bound(log_w, process_group=process_group)
    found.sum().backward()
    return found.detach(), torch.stack([mean.grad, logvar.grad])


def bounds():
    for kind, sizes in SAMPLES.items():
        for estimator, alphas in ESTIMATORS.items():
            for alpha in alphas or (None,):
                for dtype in TOLERANCE:
                    yield kind, sizes, estimator, alpha, dtype


class Loss(torch.nn.Module):
    """What DistributedDataParallel wraps."""

    def __init__(self, vae, method, **options):
        super().__init__()
        self.vae, self.method, self.options = vae, method, options

    def forward(self, x):
        found = getattr(self.vae, self.method)(x, **self.options)
        return found.free_energy if isinstance(found, tuple) else -found.mean()


VAES = {
    "free energy": ("free_energy", {}),
    "free bits, samples": ("free_energy", dict(free_bits=0.1, samples=2, antithetic=True, beta=2.0)),
    "semi-amortised": ("semi_amortised_free_energy", dict(refine_steps=3)),
    "bound": ("importance_weighted_bound", dict(samples=5, seed=3)),
    "dreg": ("importance_weighted_bound", dict(samples=2, seed=3, estimator="dreg")),
}


def vae_gradients(name, mine, process_group):
    """Of two steps: the second sees the noise that the first left the model with."""
    torch.manual_seed(0)
    method, options = VAES[name]
    model = Loss(fe.models.VAE(6, 2, (5,), seed=9), method, process_group=process_group, **options).double()
    wrapped = model if process_group is None else DistributedDataParallel(model)
    x = torch.randint(0, 2, (8, 6), generator=torch.Generator().manual_seed(1)).double()
    x = x if method == "importance_weighted_bound" else x[mine]  # whose samples are split, not its data
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = wrapped(x)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


def own_noise(rank):
    """What ranks that tell each other nothing draw: (of evaluation, of training)."""
    vae = fe.models.VAE(6, 2, (5,), seed=9)
    with torch.no_grad():
        for p in vae.parameters():
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
    x = torch.ones(4 + 3 * rank, 6)
    whole = torch.ones(7, 6)
    vae.eval()
    with torch.no_grad():
        same = [
            vae.free_energy(whole).free_energy,
            vae.free_energy(whole, seed=1, step=2).free_energy,
            vae.importance_weighted_bound(whole, 3, seed=1, step=2),
            vae.importance_weighted_bound(whole, 3),
            vae.infer(whole, 2).mean,
        ]
    vae.train()
    apart = [vae.noise(x), vae.noise(x, seed=4, step=2)]
    rows = len(x), vae.latent_dim
    drawn = [fe.reparameterize(torch.zeros(rows), torch.zeros(rows), **noise) for noise in apart]
    with pytest.warns(UserWarning, match="VAE.fit: each rank of the process group trains a model of its own"):
        vae.fit([x], progress=False)
    with pytest.warns(
        UserWarning, match="BernoulliRBM.fit: each rank of the process group trains a model of its own"
    ):
        fe.models.BernoulliRBM(6, 2).fit([x], progress=False)
    wide = fe.models.VAE(1, 1 << 20, (1,), seed=9)
    wide.noise(x[:, :1])
    fe.random.normal((1, 1 << 20), seed=0, offset=wide.noise(x[:, :1])["offset"] << 20)  # that there is
    return same, apart, drawn


def on_a_rank():
    world, rank = dist.group.WORLD, dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    results = {}
    for kind, sizes, name, switches, dtype, reduction in cases():
        results[kind, name, dtype, reduction] = terms_and_gradients(
            sum(sizes), switches, dtype, reduction, part(sizes, rank), mesh if name == "plain" else world
        )
    for kind, sizes, estimator, alpha, dtype in bounds():
        results[kind, estimator, alpha, dtype] = bound(estimator, alpha, dtype, part(sizes, rank), world)
    mean, logvar = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))
    for kind, sizes in ROWS.items():
        own = part(sizes, rank)
        both = mean[: sum(sizes)][own], logvar[: sum(sizes)][own]
        results["noise", kind] = fe.reparameterize(*both, seed=5, offset="rank")
        once = fe.distributed.batch_offset(sizes[rank], mesh)
        results["noise, once", kind] = fe.reparameterize(*both, seed=5, offset=once)
        rows = torch.arange(float(sum(sizes)), dtype=torch.float64).sin()[own].requires_grad_()
        average = fe.distributed.batch_mean(rows)
        average.backward()
        results["batch mean", kind] = average.detach(), rows.grad
    results["own noise"] = own_noise(rank)
    mine = fe.distributed.share(7)
    results["share"] = mine
    results["samples"] = fe.reparameterize(mean, logvar, seed=5, samples=len(mine), stream=10 + mine.start)
    results["few samples"] = few_samples(world)
    for name in VAES:
        results["vae", name] = vae_gradients(name, part((5, 0, 3), rank), world)
    with pytest.raises(TypeError, match="free_energy: process_group must be a ProcessGroup, .* got str"):
        terms_and_gradients(3, OPTIONS["plain"], torch.float32, "mean", slice(3), "world")
    with pytest.raises(ValueError, match="DeviceMesh of one dimension, such as .*; got 2 dimensions"):
        grid = dist.device_mesh.init_device_mesh("cpu", (1, WORLD))
        terms_and_gradients(3, OPTIONS["plain"], torch.float32, "mean", slice(3), grid)
    return results


@pytest.fixture(scope="module")
def found():
    return run_processes(on_a_rank, WORLD, timeout=300)


def close(got, want, dtype, what):
    torch.testing.assert_close(
        got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda m: f"{what}: {m}"
    )


def test_reductions_and_gradients_are_the_whole_batchs(found):
    for kind, sizes, name, switches, dtype, reduction in cases():
        what = kind, name, dtype, reduction
        terms, gradients = terms_and_gradients(sum(sizes), switches, dtype, reduction, slice(None), None)
        for rank in range(WORLD):
            its_terms, its_gradients = found[rank][what]
            for got, want in zip(its_terms, terms, strict=True):
                close(got, want, dtype, what)
            for got, want in zip(its_gradients, gradients, strict=True):
                close(got / WORLD, want[part(sizes, rank)], dtype, what)


@pytest.mark.filterwarnings("ignore:importance_weighted_bound")
def test_bounds_and_gradients_are_those_of_all_samples(found):
    for kind, sizes, estimator, alpha, dtype in bounds():
        what = kind, estimator, alpha, dtype
        value, of_z, of_weight = bound(estimator, alpha, dtype, slice(sum(sizes)), None)
        for rank in range(WORLD):
            close(found[rank][what][0], value, dtype, what)
            close(found[rank][what][1] / WORLD, of_z[part(sizes, rank)], dtype, what)
        close(sum(found[rank][what][2] for rank in range(WORLD)) / WORLD, of_weight, dtype, what)


@pytest.mark.filterwarnings("ignore:importance_weighted_bound")
def test_a_rank_may_have_no_samples(found):
    value, gradients = few_samples(None)
    for rank in range(WORLD):
        close(found[rank]["few samples"][0], value, torch.float64, rank)
    of_ranks = sum(results["few samples"][1] for results in found) / WORLD
    close(of_ranks, gradients, torch.float64, "gradients")
    assert found[WORLD - 1]["few samples"][1].abs().max() == 0


def test_noise_is_the_whole_batchs_to_the_bit(found):
    mean, logvar = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))
    for kind, sizes in ROWS.items():
        rows = sum(sizes)
        whole = fe.reparameterize(mean[:rows], logvar[:rows], seed=5)
        for name in ("noise", "noise, once"):
            assert bits_equal(torch.cat([each[name, kind] for each in found]), whole)
    whole = fe.reparameterize(mean, logvar, seed=5, samples=7, stream=10)
    assert bits_equal(torch.cat([each["samples"] for each in found]), whole)
    assert [each["share"] for each in found] == [range(3), range(3, 5), range(5, 7)]


def test_ranks_that_tell_each_other_nothing(found):
    evaluated, apart, drawn = zip(*(each["own noise"] for each in found), strict=True)
    for its in evaluated:
        assert all(bits_equal(got, want) for got, want in zip(its, evaluated[0], strict=True))
    for i in range(2):
        values = torch.cat([its[i].flatten() for its in drawn])
        assert len(values.unique()) == values.numel()  # none of float32's collide among so few
        assert len({(its[i]["seed"], its[i]["stream"], its[i]["step"]) for its in apart}) == 1
        assert [its[i]["offset"] for its in apart] == [0, 1 << 32, 2 << 32]


def test_batch_mean(found):
    for kind, sizes in ROWS.items():
        rows = torch.arange(float(sum(sizes)), dtype=torch.float64).sin()
        for rank in range(WORLD):
            average, gradient = found[rank]["batch mean", kind]
            close(average, rows.mean(), torch.float64, kind)
            close(
                gradient,
                torch.full((sizes[rank],), WORLD / len(rows), dtype=torch.float64),
                torch.float64,
                kind,
            )


@pytest.mark.parametrize("name", list(VAES))
def test_vae_under_ddp_has_the_gradients_of_the_whole_batch(name, found):
    for its in found:
        for got, want in zip(its["vae", name], vae_gradients(name, slice(None), None), strict=True):
            close(got, want, torch.float64, name)
