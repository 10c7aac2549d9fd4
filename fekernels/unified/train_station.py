"""The document's train station: four ways to compute one free energy, and the check that they are one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fekernels import views
from fekernels.models.noise_counter import NoiseCounter
from fekernels.unified.visible_weights import visible_weights

__all__ = ["TheTrainStation"]


class TheTrainStation:
    """Physics, machine learning, inference and messages over one model: ``fe.views`` under the document's names.

    Every method takes a batch and gives (value, parts), scalars summed over the batch, in nats. One batch has one noise
    in all four until the model's weights change, so the values agree; a training loop has fresh noise at every step. A
    model with a ``noise`` of its own, as ``FreeEnergyMinimizer`` and ``fe.models.VAE``, gives it; others get the
    station's.

    Args:
        model: ``encode(x)`` -> (mean, logvar) and ``decode(z)``; its ``likelihood``, or "mse" where it has none. What
            is no module shows its weights as attributes that are modules or parameters: others' steps are not seen.
        seed: of the station's noise; None draws one from torch's default generator.
    """

    def __init__(self, model: Any, *, seed: int | None = None) -> None:
        self.model = model
        self.noise_counter = NoiseCounter(seed, "TheTrainStation")

    def _noise(self, x: Tensor) -> dict[str, Any]:
        if callable(getattr(self.model, "noise", None)):
            return {"seed": None}
        seed, step = self.noise_counter.next(x, visible_weights(self.model))
        return {"seed": seed, "step": step}

    def compute_as_physics(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """F = E - T H at T = 1: parts "energy", E_q[-log p(x, z)], and "entropy", H[q]."""
        value, parts = views.physics(self.model, x, **self._noise(x), reduction="sum")
        return value, {"energy": parts["energy"], "entropy": parts["entropy"]}

    def compute_as_ml(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction plus regularisation: parts "recon" and "reg"."""
        value, parts = views.machine_learning(self.model, x, **self._noise(x), reduction="sum")
        return value, {"recon": parts["reconstruction"], "reg": parts["regulariser"]}

    def compute_as_inference(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-log p(x, z) + log q(z | x): parts "neg_ll", -log p(x | z), and "kl", E_q[log q(z | x) - log p(z)]."""
        value, parts = views.inference(self.model, x, **self._noise(x), reduction="sum")
        neg_ll = parts["negative_log_likelihood"]
        return value, {"neg_ll": neg_ll, "kl": parts["negative_log_joint"] - neg_ll + parts["log_q"]}

    def compute_as_message_passing(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Errors sent both ways: parts "forward_error", to the data, and "backward_error", to the prior."""
        return views.message_passing(self.model, x, **self._noise(x), reduction="sum")

    def verify_equivalence(self, x: Tensor) -> views.Equivalence:
        """Compare values and gradients of all four, print the table, and return it.

        Raises:
            AssertionError: they differ by more than rounding; with the differences.
        """
        found = views.verify_equivalence(self.model, x, **self._noise(x), reduction="sum")
        print(found)
        return found
