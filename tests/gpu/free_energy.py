"""The free energy and reparameterised samples on a device against the CPU: kernels, autograd, compiler, graphs.

CUDA C++ must give the CPU's bits. Triton may add in another order, so its sums, and what is made of them, must be
close.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from tests.gpu.checks import Check, Comparison, Numbers, Target
from tests.support.free_energy import (
    CATEGORICAL,
    DTYPES,
    GROUPS,
    KINDS,
    KL,
    LARGE,
    POSITIONS,
    REDUCTIONS,
    SUM,
    Case,
    cases,
    judge,
)
from tests.support.free_energy_kernels import implementation
from tests.support.reparameterize import OFFSETS


def likelihood_name(code: int) -> str:
    return "KL" if code == KL else f"{LIKELIHOODS[code].name}, {len(LIKELIHOODS[code].parameters)} parameters"


def comparison_for(target: Target) -> Comparison:
    return Comparison(exact=target.exact and target.backend != "triton")


def add_all(comparison: Comparison, name: str, got: list[Tensor], want: list[Tensor]) -> None:
    """Results of two calls. All NaNs are one: their payloads differ between processors and mean nothing."""
    assert len(got) == len(want), f"{name}: {len(got)} results, not {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        there = a.detach().cpu()
        assert torch.equal(there.isnan(), b.isnan()), f"{name}, result {i}: NaN in other places"
        comparison.add(f"{name}, result {i}", there.nan_to_num(), b.detach().nan_to_num())


def check_kernel(likelihood: int, target: Target) -> Numbers:
    """Every case of the table; the full product of its larger shapes, kinds, reductions and masks; and in place."""
    comparison = comparison_for(target)
    rows = list(cases(likelihood))
    if likelihood != KL:
        shapes = POSITIONS if likelihood == CATEGORICAL else LARGE
        others = len(LIKELIHOODS[likelihood].parameters) - 1
        for shape, kind, reduction, masked in itertools.product(
            shapes, KINDS if others else "f", REDUCTIONS, ("", "some")
        ):
            weight = "random" if masked else ""
            rows.append(
                Case(
                    likelihood, shape, "f" + others * kind, "ffcs", reduction=reduction, masked=masked, weight=weight
                )
            )  # fmt: skip
    calls = [(str(case), case.call()) for case in rows]
    if likelihood != KL:
        call = Case(likelihood, (66, 150, 9), reduction=SUM).call()
        calls.append(("in place", replace(call, inplace=True)))
    truth, checked = implementation(target.truth, "cpu"), implementation(target.backend, target.device)
    for name, call in calls:
        # Of copies, as the gradient in place overwrites what it is given.
        got = call.map(torch.clone).run(checked)
        if comparison.exact:
            add_all(comparison, name, got, call.map(torch.clone).run(truth))
        else:  # sums may cancel, so what is right is float64's, to the size of what was added up
            comparison.tensors += len(got)
            comparison.differences += [
                f"{name}: {what}" for what in judge(got, call, call.exact(), call.scales())
            ]
    return comparison.result()


def leaves(device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """Prediction, mean and log-variance of a batch, wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((96, 700), (96, 12), (96, 12))
    values = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    return [value.to(device).requires_grad_() for value in values]


def check_autograd(target: Target) -> Numbers:
    """The public function: a factor from above, a second backward, one gradient alone, in place, "none"."""
    comparison = comparison_for(target)

    def results(device: torch.device, backend: str) -> list[tuple[str, list[Tensor]]]:
        found = []
        x = torch.rand(96, 700, generator=torch.Generator().manual_seed(1)).to(device)
        with fe.use_backend(backend):
            for likelihood, reduction in itertools.product(("mse", "bernoulli"), ("mean", "sum", "none")):
                given = leaves(device)
                terms = fe.free_energy(
                    given[0], x, *given[1:], likelihood=likelihood, beta=0.3, reduction=reduction
                )
                name = f"{likelihood}, {reduction}"
                loss = (0.37 * terms.free_energy + 0.11 * terms.kl).sum()
                first = torch.autograd.grad(loss, given, retain_graph=True)
                found.append((name, [*terms, *first]))
                found.append((f"{name}, again", list(torch.autograd.grad(loss, given, retain_graph=True))))
                found.append((f"{name}, energy", list(torch.autograd.grad(terms.energy.sum(), given[:1]))))
                if reduction != "none":
                    given = leaves(device)
                    # What may be overwritten is a result that its producer needs no longer, never a leaf.
                    terms = fe.free_energy(
                        2 * given[0],
                        x,
                        *given[1:],
                        likelihood=likelihood,
                        reduction=reduction,
                        inplace_backward=True,
                    )
                    terms.free_energy.backward()
                    found.append((f"{name}, in place", [*terms, *(leaf.grad for leaf in given)]))  # type: ignore[list-item]
        return found

    want = results(torch.device("cpu"), target.truth)
    got = results(target.device, target.backend)
    for (name, a), (_, b) in zip(got, want, strict=True):
        add_all(comparison, name, a, b)
    return comparison.result()


def check_reparameterize(target: Target) -> Numbers:
    """Samples and gradients of every dtype, of several samples, and of a batch that begins anywhere."""
    comparison = Comparison(exact=target.exact)
    for dtype, (rows, latents), samples, offset in itertools.product(
        DTYPES, ((1, 1), (5, 3), (64, 20), (257, 130)), (None, 3), OFFSETS
    ):
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, latents) if samples is None else (samples, rows, latents)
        mean, logvar = (torch.randn(rows, latents, generator=generator).to(dtype) for _ in range(2))
        above = torch.randn(shape, generator=generator).to(dtype)

        def run(backend: str, device: torch.device) -> list[Tensor]:
            here = [tensor.to(device).requires_grad_() for tensor in (mean, logvar)]  # noqa: B023
            with fe.use_backend(backend):
                z = fe.reparameterize(*here, seed=9, step=4, stream=2, offset=offset, samples=samples)  # noqa: B023
                return [z, *torch.autograd.grad(z, here, above.to(device))]  # noqa: B023

        name = f"{dtype}, {rows} x {latents}, samples {samples}, offset {offset}"
        want = run(target.truth, torch.device("cpu"))
        add_all(comparison, name, run(target.backend, target.device), want)
    return comparison.result()


def train(given: list[Tensor], x: Tensor, likelihood: str, scale: Tensor) -> Tensor:
    """Forward and backward of a loss that is scaled on the device, as a GradScaler does."""
    for leaf in given:
        leaf.grad = None
    z = fe.reparameterize(given[1], given[2], seed=3, step=1)
    terms = fe.free_energy(given[0], x, given[1], given[2], likelihood=likelihood)
    loss = terms.free_energy + 1e-3 * z.square().sum()
    (loss * scale).backward()
    return terms.free_energy


def check_no_sync(target: Target) -> Numbers:
    """Forward and backward never wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    x = torch.rand(96, 700, device=target.device)
    scale = torch.tensor(8.0, device=target.device)
    calls = 0
    with fe.use_backend(target.backend):
        for likelihood in ("mse", "bernoulli"):
            given = leaves(target.device)
            train(given, x, likelihood, scale)  # what is compiled at first use
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    train(given, x, likelihood, scale)
                    calls += 1
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    return {"calls": calls}


def check_graph(target: Target) -> Numbers:
    """Replays of a captured forward and backward, data and scale changing in place, are eager ones, bit for bit."""
    device = target.device
    comparison = Comparison(exact=True)
    with fe.use_backend(target.backend):
        for likelihood in ("mse", "bernoulli"):
            given = leaves(device)
            x, scale = torch.rand(96, 700, device=device), torch.tensor(1.0, device=device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    train(given, x, likelihood, scale)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                value = train(given, x, likelihood, scale)
            for replay in range(3):
                x.copy_(torch.rand(96, 700, generator=torch.Generator().manual_seed(replay)))
                scale.fill_(1.0 + replay)
                graph.replay()
                eager = leaves(device)
                want = train(eager, x, likelihood, scale)
                comparison.add(f"{likelihood}, value of replay {replay}", value, want)
                for i, (a, b) in enumerate(zip(given, eager, strict=True)):
                    assert a.grad is not None and b.grad is not None
                    comparison.add(f"{likelihood}, gradient {i} of replay {replay}", a.grad, b.grad)
    return comparison.result()


def check_compile(target: Target) -> Numbers:
    """torch.compile(fullgraph=True, dynamic=True) gives the eager gradients, and the value but for its last sums."""
    comparison = comparison_for(target)

    def loss(r: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        z = fe.reparameterize(mean, logvar, seed=1, step=2)
        return fe.free_energy(r, x, mean, logvar, likelihood="bernoulli").free_energy + z.sum()

    with fe.use_backend(target.backend):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        for rows in (64, 96, 33):
            given = [leaf.detach()[:rows].requires_grad_() for leaf in leaves(target.device)]
            x = torch.rand(rows, 700, device=target.device)
            values = [function(given[0], x, *given[1:]) for function in (compiled, loss)]
            # Among the sums are up to 1152 normals, added in float32 in another order.
            torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
            gradients = [[g.cpu() for g in torch.autograd.grad(value, given)] for value in values]
            add_all(comparison, f"batch of {rows}", *gradients)
    return comparison.result()


def free_energy_checks() -> list[Check]:
    checks = [
        Check(f"free energy: {likelihood_name(code)}", partial(check_kernel, code))
        for code in GROUPS.values()
    ]
    return [
        *checks,
        Check("free energy: autograd", check_autograd),
        Check("reparameterize: samples and gradients", check_reparameterize),
        Check("free energy: no host synchronisation", check_no_sync, needs_gpu=True),
        Check("free energy: torch.compile", check_compile, slow=True),
        Check("free energy: CUDA graph of forward and backward", check_graph, needs_gpu=True),
    ]
