"""The variational autoencoder's cases: a training step, and the check of the four views, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fekernels import views
from fekernels.bench.case import Case, Group, Row, Shape
from fekernels.bench.timing import Contestant
from fekernels.models import VAE
from fekernels.optim import LangevinAdam

__all__ = ["CASES", "COMPILED", "FOUR", "OURS", "PLAIN", "VERIFY", "Plain"]

OURS, PLAIN, COMPILED = "models.VAE, LangevinAdam", "plain torch, Adam", "torch.compile, Adam"
FUSED = ", Adam(fused=True)"
LAYERS = "its layers alone, forward and backward"
VERIFY, FOUR, FOUR_WITH_GRADIENTS = (
    "verify_equivalence",
    "four plain passes",
    "four plain passes, gradients too",
)
LR = 1e-3
FEW = 8  # rows of the tests' size, where nothing is timed and torch.compile's code generator would take 20 s


class Plain(nn.Module):
    """The same networks and loss, as they are written without this package."""

    def __init__(self, inputs: int, latents: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.fc_mean, self.fc_logvar = nn.Linear(64, latents), nn.Linear(64, latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, inputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mean, logvar = self.fc_mean(h), self.fc_logvar(h)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        energy = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return (energy + kl) / len(x)


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def layers_alone(model: Plain, x: Tensor, above: Tensor) -> None:
    """What no loss and no optimizer can save."""
    model.zero_grad()
    h = model.encoder(x)
    model.decoder(model.fc_mean(h) + model.fc_logvar(h)).backward(above)


def _data(shape: Shape) -> Tensor:
    return torch.rand(shape[0], shape[1], generator=torch.Generator().manual_seed(0))


def _training(shape: Shape) -> Group:
    """[rows, inputs, latents]: forward, backward and the optimizer's step."""
    rows, inputs, latents = shape
    x = _data(shape)
    vae = VAE(inputs, latents, seed=0)
    own = LangevinAdam(vae.parameters(), lr=LR)
    contestants = [
        Contestant(OURS, partial(step, lambda: vae.free_energy(x).free_energy, own)),
        Contestant(LAYERS, partial(layers_alone, Plain(inputs, latents), x, torch.ones_like(x))),
    ]
    missing = {}
    for name, compiled in ((PLAIN, False), (COMPILED, True)):
        for fused in (False, True):
            model = Plain(inputs, latents)
            adam = torch.optim.Adam(model.parameters(), lr=LR, fused=fused or None)
            called: Callable[[Tensor], Tensor] = model
            if compiled:
                called = torch.compile(model, dynamic=False, backend="eager" if rows <= FEW else "inductor")
            run = partial(step, partial(called, x), adam)
            label = name.removesuffix(", Adam") + FUSED if fused else name
            try:
                run()
            except Exception as error:  # without a C++ compiler, and whatever else torch.compile may raise
                missing[label] = f"torch.compile: {str(error).strip().splitlines()[0]}"
                continue
            contestants.append(Contestant(label, run))
    return Group(contestants, missing)


def _views(shape: Shape) -> Group:
    """[rows, inputs, latents]."""
    x, vae = _data(shape), VAE(shape[1], shape[2], seed=0)
    plain = Plain(shape[1], shape[2])

    @torch.no_grad()
    def values() -> list[Tensor]:
        return [plain(x) for _ in range(4)]

    def gradients() -> None:
        for _ in range(4):
            torch.autograd.grad(plain(x), list(plain.parameters()))

    return Group([
        Contestant(VERIFY, partial(views.verify_equivalence, vae, x)), Contestant(FOUR, values),
        Contestant(FOUR_WITH_GRADIENTS, gradients),
    ])  # fmt: skip


CASES = (
    Case(
        "vae/training",
        lambda shape: "VAE training step, {} x {}, latent {}".format(*shape),
        ((128, 784, 20), (32, 784, 20), (FEW, 12, 2)),
        _training,
        (
            Row(OURS, PLAIN.removesuffix(", Adam") + FUSED, 0.9),
            Row(OURS, COMPILED.removesuffix(", Adam") + FUSED, 0.95),
            Row(OURS, PLAIN),
            Row(OURS, COMPILED),
            Row(OURS, LAYERS),
        ),
        lambda shape: shape[0] * shape[1],
        cached=True,
    ),
    Case(
        "vae/views",
        lambda shape: "four views and their differences, {:,} x {}".format(*shape),
        ((4096, 784, 20), (512, 784, 20), (FEW, 12, 2)),
        _views,
        (Row(VERIFY, FOUR, 0.5), Row(VERIFY, FOUR_WITH_GRADIENTS)),
        lambda shape: shape[0] * shape[1],
    ),
)
