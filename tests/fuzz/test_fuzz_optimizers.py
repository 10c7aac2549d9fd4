"""Steps of the optimizers under random settings, against the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

import fekernels as fe
from tests.fuzz.budget import examples
from tests.fuzz.drawn_arguments import BACKENDS, LAYOUTS, laid_out, on
from tests.support.formulas import noise_start

# Eager float32 of the same formula errs by less than 4e-7 of the largest value a step; a wrong term by 1e-2 and more.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-7}


@st.composite
def settings_of_langevin_adam(draw: st.DrawFn) -> dict[str, Any]:
    unit = st.floats(0, 1)
    temperature = draw(st.sampled_from((0.0, 1e-4, 0.3)))
    decoupled = draw(st.booleans()) if temperature == 0 else False  # which warns above
    return dict(
        lr=10 ** -(1 + 3 * draw(unit)),
        betas=(draw(st.sampled_from((0.0, 0.5, 0.9))), draw(st.sampled_from((0.0, 0.9, 0.999)))),
        eps=draw(st.sampled_from((1e-8, 1e-3))) if temperature == 0 else 1e-3,
        weight_decay=draw(st.sampled_from((0.0, 0.1))),
        amsgrad=draw(st.booleans()),
        temperature=temperature,
        noise=draw(st.sampled_from(("momentum", "preconditioned", "isotropic"))),
        prior_precision=draw(st.sampled_from((0.0, 0.5, 20.0))),
        decoupled_weight_decay=decoupled,
        bias_correction=draw(st.booleans()),
        maximize=draw(st.booleans()),
        seed=draw(st.integers(0, (1 << 63) - 1)),
    )


@st.composite
def changes(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What schedules do to lr and temperature before the second and third step, and whether v stands still then."""
    factors = st.sampled_from((1.0, 0.1, 3.0))
    return [
        {
            "lr": draw(factors),
            "temperature": draw(st.sampled_from((1.0, 0.0, 2.0))),
            "frozen": draw(st.booleans()),
        }
        for _ in range(2)
    ]


class Exact:
    """LangevinAdam for one parameter in float64, transcribed line by line."""

    def __init__(self, theta: Tensor, stream: int) -> None:
        self.theta, self.stream, self.anchor = theta.double(), stream, torch.zeros_like(theta).double()
        self.m, self.v, self.largest = (torch.zeros_like(self.theta) for _ in range(3))
        self.t, self.h_prev, self.hot_prev, self.beta1_prev = 0, 0.0, False, 0.0
        self.frozen = False
        # The largest terms that each was a sum of so far: what rounding is measured against.
        self.size = {"theta": self.theta.abs(), "m": self.m, "v": self.v}

    def _sum(self, name: str, *terms: Tensor) -> Tensor:
        total = sum(term.abs() for term in terms)
        self.size[name] = torch.maximum(self.size[name], total)
        return sum(terms[1:], terms[0])

    def freeze(self, frozen: bool, o: dict[str, Any]) -> None:
        weight = 1 - o["betas"][1] ** self.t if o["bias_correction"] else 1.0
        if frozen != self.frozen:
            factor = 1 / weight if frozen else weight
            self.v, self.largest, self.size["v"] = (
                x * factor for x in (self.v, self.largest, self.size["v"])
            )
        self.frozen = frozen

    def step(self, g: Tensor, o: dict[str, Any]) -> None:
        self.t += 1
        h, (beta1, beta2), T = o["lr"], o["betas"], o["temperature"]
        with fe.use_backend("reference"):
            xi = fe.random.normal(
                tuple(g.shape), seed=o["seed"], stream=self.stream, step=self.t, purpose=0
            ).double()
        g = -g.double() if o["maximize"] else g.double()
        if o["decoupled_weight_decay"]:
            self.theta = self.theta * (1 - h * o["weight_decay"])
        else:
            g = g + o["weight_decay"] * self.theta
        if not self.frozen:
            self.v = self._sum("v", beta2 * self.v, (1 - beta2) * g * g)
            self.largest = torch.maximum(self.largest, self.v)
        drift = g + o["prior_precision"] * (self.theta - self.anchor)
        bc1, bc2 = (1 - beta1**self.t, 1 - beta2**self.t) if o["bias_correction"] else (1.0, 1.0)
        bc2 = 1.0 if self.frozen else bc2
        D = ((self.largest if o["amsgrad"] else self.v) / bc2).sqrt() + o["eps"]
        D = D.clamp_min(h * o["prior_precision"])
        if o["noise"] == "momentum":
            if self.hot_prev and (h, beta1) != (self.h_prev, self.beta1_prev):
                b, p = beta1, self.beta1_prev
                self.m = self.m * math.sqrt(self.h_prev / h * (1 - b) * (1 + p) / ((1 + b) * (1 - p)))
            if T:
                drift = drift + noise_start(beta1, self.t, o["bias_correction"]) * (2 * T * D / h).sqrt() * xi
        self.m = self._sum("m", beta1 * self.m, (1 - beta1) * drift)
        noise = {"preconditioned": (2 * T * h / D).sqrt(), "isotropic": math.sqrt(2 * T * h)}.get(
            o["noise"], 0.0
        )
        self.theta = self._sum("theta", self.theta, -h * (self.m / bc1) / D, noise * xi)
        self.h_prev, self.hot_prev, self.beta1_prev = h, T > 0, beta1


SHAPES = st.lists(
    st.tuples(
        st.sampled_from(((), (1,), (3,), (17,), (65,), (4, 5), (3, 0), (2, 3, 4), (130,))),
        LAYOUTS,
        LAYOUTS,
    ),
    min_size=1,
    max_size=3,
)


def close(got: Tensor, exact: Tensor, size: Tensor, what: str, steps: int) -> None:
    if not got.numel():
        return
    bound = steps * TOLERANCE[got.dtype] * size.max() + torch.finfo(got.dtype).smallest_normal
    error = (got.detach().double() - exact).abs()
    at = int(error.flatten().argmax())
    assert bool((error <= bound).all()), (
        f"{what}: {got.flatten()[at]:.9g} for {exact.flatten()[at]:.9g}, error {error.max():.2g} > {bound:.2g}"
    )


@examples(0.15)
@given(
    settings_of_langevin_adam(), changes(), SHAPES, BACKENDS, st.sampled_from((torch.float32, torch.float64)),
    st.integers(0, 1 << 30), st.booleans(),
)  # fmt: skip
def test_langevin_adam(settings, schedule, shapes, backend, dtype, seed, skip) -> None:
    event(settings["noise"])
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], layout: str) -> Tensor:
        return laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)

    params = [torch.nn.Parameter(normal(shape, layout)) for shape, layout, _ in shapes]
    exact = [Exact(p.detach(), stream) for stream, p in enumerate(params)]
    optimizer = fe.LangevinAdam(params, **settings)
    (group,) = optimizer.param_groups
    for number in range(3):
        if number:
            change = schedule[number - 1]
            group["lr"] *= change["lr"]
            group["temperature"] *= change["temperature"]
            optimizer.freeze_preconditioner(change["frozen"])
            for judge in exact:
                judge.freeze(change["frozen"], settings)
        for i, (param, judge) in enumerate(zip(params, exact, strict=True)):
            param.grad = normal(param.shape, shapes[i][2])
            if skip and number == 1 and i == 0:  # a parameter without a gradient keeps what it had
                param.grad = None
                continue
            judge.step(param.grad, {k: group[k] for k in settings})
        on(backend, optimizer.step)
        for i, (param, judge) in enumerate(zip(params, exact, strict=True)):
            state = optimizer.state.get(param, {})
            close(
                param, judge.theta, judge.size["theta"], f"parameter {i} after step {number + 1}", number + 1
            )
            if judge.t:
                close(
                    state["exp_avg"],
                    judge.m,
                    judge.size["m"],
                    f"exp_avg {i} after step {number + 1}",
                    number + 1,
                )
                close(state["exp_avg_sq"], judge.v, judge.size["v"], f"exp_avg_sq {i}", number + 1)
                assert float(state["step"]) == judge.t


@examples(0.05)
@given(
    st.floats(0, 1), st.sampled_from((0.0, 1e-3, 0.5)), st.sampled_from((0.0, 0.5, 20.0)), st.sampled_from((0.0, 0.1)),
    st.booleans(), SHAPES, BACKENDS, st.sampled_from((torch.float32, torch.float64)), st.integers(0, 1 << 30),
)  # fmt: skip
def test_sgld(rate, temperature, precision, decay, maximize, shapes, backend, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    lr = 10 ** -(1 + 3 * rate)

    def normal(shape: tuple[int, ...], layout: str) -> Tensor:
        return laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)

    params = [torch.nn.Parameter(normal(shape, layout)) for shape, layout, _ in shapes]
    exact = [p.detach().double() for p in params]
    sizes = [e.abs() for e in exact]
    optimizer = fe.SGLD(
        params, lr=lr, temperature=temperature, prior_precision=precision, weight_decay=decay, maximize=maximize,
        seed=seed,
    )  # fmt: skip
    for step in (1, 2):
        for i, (param, (shape, _, layout)) in enumerate(zip(params, shapes, strict=True)):
            param.grad = normal(shape, layout)
            with fe.use_backend("reference"):
                xi = fe.random.normal(shape, seed=seed, stream=i, step=step, purpose=0).double()
            g = (-1 if maximize else 1) * param.grad.double() + (decay + precision) * exact[i]
            terms = (exact[i], -lr * g, math.sqrt(2 * temperature * lr) * xi)
            sizes[i] = torch.maximum(sizes[i], sum(term.abs() for term in terms))
            exact[i] = sum(terms)
        on(backend, optimizer.step)
        for i, param in enumerate(params):
            close(param, exact[i], sizes[i], f"parameter {i} after step {step}", step)
