"""Checks of a backend on a device against the CPU, bit for bit: what they share; each family has its own beside it.

`python -m benchmarks.gpu_check` runs them one after another, `test_gpu_check.py` as tests; both take `all_checks()`.
A check returns the numbers that belong in a report, or raises AssertionError with what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]

BITS_OF = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


class NotPossible(Exception):
    """A check that this machine cannot make; the message says why."""


@dataclass(frozen=True)
class Target:
    """What is checked: ``backend`` on ``device``, against ``truth`` (a backend) on the CPU."""

    backend: str
    device: torch.device
    truth: str = "cpp"

    @property
    def exact(self) -> bool:
        """The reference is excused from the kernels' last bits (not from those of the noise)."""
        return "reference" not in (self.backend, self.truth)


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Target], Numbers]
    needs_gpu: bool = False
    slow: bool = False  # left out by a quick run


# Comparisons.


def ordered(tensor: Tensor) -> Tensor:
    """Bits as integers in the order of the values, so that neighbours differ by one; a float32 step is one ulp."""
    bits = tensor.contiguous().view(BITS_OF[tensor.dtype]).long().flatten()
    low = torch.iinfo(BITS_OF[tensor.dtype]).max
    return torch.where(bits < 0, -(bits & low), bits)


@dataclass
class Comparison:
    """Compares tensors one pair after another, and says all that differ at the end."""

    exact: bool
    tensors: int = 0
    unequal: int = 0
    max_ulp: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, name: str, got: Tensor, want: Tensor) -> None:
        got, want = got.detach().cpu().contiguous(), want.detach().cpu().contiguous()
        assert got.dtype == want.dtype and got.shape == want.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
        self.tensors += 1
        if got.numel() == 0:
            return
        kind = BITS_OF.get(got.dtype, got.dtype)
        differs = (got.view(kind) != want.view(kind)).flatten()
        count = int(differs.sum())
        if count == 0:
            return
        self.unequal += count
        ulp = (ordered(got) - ordered(want)).abs() if got.is_floating_point() else differs.long()
        self.max_ulp = max(self.max_ulp, int(ulp.max()))
        if self.exact or not close(got, want):
            first = int(differs.nonzero()[0])
            self.differences.append(
                f"{name}: {count} of {got.numel()} differ, at most {int(ulp.max())} ulp; element {first} is "
                f"{got.flatten()[first].item()!r}, not {want.flatten()[first].item()!r}"
            )

    def result(self) -> Numbers:
        assert not self.differences, "; ".join(self.differences[:6])
        return {"tensors": self.tensors, "unequal": self.unequal, "max_ulp": self.max_ulp}


def close(got: Tensor, want: Tensor) -> bool:
    """Whether the reference's own rounding explains the difference."""
    if not got.is_floating_point():
        return False
    unit = max(8 * torch.finfo(got.dtype).eps, 1e-5)
    a, b = got.double().flatten(), want.double().flatten()
    scale = max(1e-3, float(b.abs().max()))
    far = ~((a - b).abs() <= unit * (b.abs() + scale))
    # Where the denominator nearly cancels, one bit of it is many of the result.
    return int(far.sum()) <= got.numel() // 200


def all_checks() -> list[Check]:
    """Every check there is, those of noise and steps first."""
    from tests.gpu.free_energy import free_energy_checks
    from tests.gpu.noise import noise_checks
    from tests.gpu.stein import svgd_checks
    from tests.gpu.steps import step_checks
    from tests.gpu.systems import system_checks

    return noise_checks() + step_checks() + free_energy_checks() + svgd_checks() + system_checks()
