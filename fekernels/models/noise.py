"""Which noise a call of a model gets that nobody gave a seed: fresh at each training step, kept in checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.ranks import draw_seed, has_ranks, seed_of_rank_0
from fekernels._runtime.torch_internals import never_traced
from fekernels.ops._noise_key import COUNTERS, signed_seed

__all__ = ["NoiseCounter"]


class NoiseCounter(nn.Module):
    """A seed and a count of the draws so far, as one buffer of two int64, so that a checkpoint goes on with its noise.

    ``next`` counts on, unless it is asked again for the very batch that it was last asked for while the weights are
    still the same: then what is computed are views of one thing, and they get one noise. "The same batch" is the same
    tensor, unwritten since; weights are the same by their version counters, and on a CPU by the sum of the last one
    too, because ``weight.data -= ...`` counts no version. (Reading it on a GPU would wait for the GPU.)

    Args:
        seed: 64 bits; None draws one from torch's default generator, rank 0's in a process group.
    """

    state: Tensor

    def __init__(self, seed: int | None = None, function: str = "NoiseCounter") -> None:
        super().__init__()
        if seed is None:
            seed = draw_seed()
            seed = seed_of_rank_0(seed) if has_ranks() else seed
        # On the CPU whatever the default device is: it is read there.
        self.register_buffer(
            "state", torch.tensor([signed_seed(function, seed), 0], dtype=torch.int64, device="cpu")
        )
        self._known: tuple[Tensor, int, int, int] | None = None
        self._last: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be written, and a copy has another buffer.
        return {**self.__dict__, "_known": None, "_last": None}

    def read(self) -> tuple[int, int]:
        """(seed, draws so far). The buffer is read only after somebody else has written or replaced it."""
        known = self._known
        if known is None or known[0] is not self.state or known[1] != _version(self.state):
            seed, step = self.state.tolist()
            self._known = known = (self.state, _version(self.state), seed, step)
        return known[2], known[3]

    @never_traced
    def next(self, batch: Tensor, weights: Iterable[Tensor]) -> tuple[int, int]:
        """(seed, step) for ``batch``; step is 1 for the first."""
        seed, step = self.read()
        now = (_version(batch), *_state_of(weights))
        if self._last is not None and self._last[0]() is batch and self._last[1] == now and step:
            return seed, step
        step = step % (COUNTERS - 1) + 1
        with torch.no_grad():
            self.state[1] = step
        self._known = (self.state, _version(self.state), seed, step)
        self._last = (weakref.ref(batch), now)
        return seed, step

    def extra_repr(self) -> str:
        return "seed={}, step={}".format(*self.read())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _state_of(weights: Iterable[Tensor]) -> tuple[float, ...]:
    versions, last = 0, None
    for weight in weights:
        versions += _version(weight)
        last = weight
    if last is None or not last.is_cpu:
        return (versions,)
    return versions, float(last.detach().sum())
