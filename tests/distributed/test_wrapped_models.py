"""Models that DistributedDataParallel wraps or fully_shard shards: control variates, gradient noise, refusals."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fekernels as fe
from tests.support.processes import run_processes

WORLD = 4
ROWS = 22  # as many as no number of ranks divides
LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 3, generator=generator), torch.randn(ROWS, 1, generator=generator)


def loss_fn(model, rows):
    return (model(rows[0]) - rows[1]).square().mean()


def shares():
    """Each rank's batches."""
    return [
        list(zip(x.split(3), y.split(3), strict=True))
        for x, y in zip(*(t.tensor_split(WORLD) for t in data()), strict=True)
    ]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def langevin(params, **options):
    return fe.LangevinAdam(params, lr=0.02, temperature=0.05, prior_precision=0.1, eps=0.1, seed=4, **options)


def control_variates():
    net, own = network(), shares()[dist.get_rank()]
    wrapped = DistributedDataParallel(net)
    optimizer = langevin(wrapped.parameters())
    control = fe.ControlVariate(wrapped, loss_fn, own)
    results = {"full": flat(control.full_gradient), "grads": []}
    for i in range(4):
        control.backward(own[i % 2])
        results["grads"].append(flat(p.grad for p in net.parameters()))
        optimizer.step()
    control.recentre()
    control.backward(own[0])
    results["again"] = flat(p.grad for p in net.parameters())
    optimizer.zero_grad()
    loss_fn(wrapped, own[0]).backward()  # DDP goes on as if nothing had been
    results["ddp"] = flat(p.grad for p in net.parameters())
    return results | {"weights": flat(net.parameters())}


def controlled_by_one_process():
    """The same by a control of each rank's data, whose gradients are averaged."""
    net = network()
    optimizer = langevin(net.parameters())
    controls = [fe.ControlVariate(net, loss_fn, own) for own in shares()]

    def mean(i):
        found = []
        for control, own in zip(controls, shares(), strict=True):
            control.backward(own[i])
            found.append([p.grad.clone() for p in net.parameters()])
        return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]

    results = {"full": torch.stack([flat(c.full_gradient) for c in controls]).mean(0), "grads": []}
    for i in range(4):
        gradient = mean(i % 2)
        results["grads"].append(flat(gradient))
        for p, g in zip(net.parameters(), gradient, strict=True):
            p.grad = g
        optimizer.step()
    for control in controls:
        control.recentre()
    return results | {"again": flat(mean(0)), "weights": flat(net.parameters())}


def refused():
    """What copies a model says that it wants it whole, and has changed nothing."""
    net = fully_shard(network())
    before = flat(p.full_tensor() for p in net.parameters())
    given = dict(data_size=ROWS, progress=False)
    told = {}
    for name, call in {
        "ControlVariate": lambda: fe.ControlVariate(net, loss_fn, [data()]),
        "Chains": lambda: fe.Chains(net, 2),
        "sample_posterior": lambda: fe.sample_posterior(net, loss_fn, [data()], prior_precision=1.0, **given),
        "local_learning_coefficient": lambda: fe.local_learning_coefficient(net, loss_fn, [data()], **given),
        "SVGDEnsemble": lambda: fe.SVGD.from_model(net, loss_fn, size=2),
    }.items():
        try:
            call()
        except ValueError as error:
            told[name] = str(error)
    assert torch.equal(flat(p.full_tensor() for p in net.parameters()), before)
    return told


def shardings():
    """The network's parameters in several ways: all of it here, split over ranks, and both."""
    one, two = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    yield "fsdp", list(fully_shard(network(), mesh=one).parameters())
    yield "hsdp", list(fully_shard(network(), mesh=two).parameters())
    for name, mesh, placements in (
        ("replicas", one, [Replicate()]),
        ("columns", one, [Shard(-1)]),
        ("twice", two, [Shard(0), Shard(0)]),
    ):
        yield (
            name,
            [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in network().parameters()],
        )


def stepped(params, **options):
    optimizer = langevin(params, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for p in params:
            whole = torch.randn(p.shape, generator=generator)
            sharded = hasattr(p, "placements")
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if sharded else whole
        optimizer.step()
    return optimizer


def noise_ratios():
    found = {}
    for amsgrad in (False, True):
        for name, params in shardings():
            optimizer = stepped(params, amsgrad=amsgrad)
            ratio = fe.diagnostics.gradient_noise_ratio(optimizer)
            found[name, amsgrad] = ratio.ratios.sort().values, ratio.median, ratio.quantiles(LEVELS)
    if dist.get_rank() == 0:  # alone: nothing is exchanged
        samples = fe.PosteriorSamples(network(), optimizer=optimizer)
        samples.collect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples.predict(data()[0], activation=None)
        assert any("gradients' noise is r = " in str(each.message) for each in caught)
    return found


def on_a_rank():
    return {"control": control_variates(), "refused": refused(), "ratios": noise_ratios()}


def test_wrapped_models():
    every = run_processes(on_a_rank, WORLD, timeout=300)
    one = controlled_by_one_process()
    for each in every:
        got = each["control"]
        for name in ("full", "again", "weights"):
            assert torch.equal(got[name], every[0]["control"][name]), name  # replicas, to the bit
            torch.testing.assert_close(got[name], one[name], rtol=1e-5, atol=1e-6)
        for i, gradient in enumerate(one["grads"]):
            torch.testing.assert_close(got["grads"][i], gradient, rtol=1e-5, atol=1e-6)
        assert torch.equal(got["ddp"], every[0]["control"]["ddp"]) and got["ddp"].abs().max() > 0
        assert len(each["refused"]) == 5
        for name, told in each["refused"].items():
            assert told.startswith(f"{name}: model must be the unsharded one"), told
            assert "'0.weight' is sharded" in told
    for amsgrad in (False, True):
        wanted = fe.diagnostics.gradient_noise_ratio(stepped(list(network().parameters()), amsgrad=amsgrad))
        for each in every:
            for name in ("fsdp", "hsdp", "replicas", "columns", "twice"):
                ratios, median, quantiles = each["ratios"][name, amsgrad]
                assert torch.equal(ratios, wanted.ratios.sort().values), name
                assert (median, quantiles) == (wanted.median, wanted.quantiles(LEVELS)), name
