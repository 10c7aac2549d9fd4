"""Which noise a call of a model gets that nobody gave a seed: fresh at each training step, kept in checkpoints."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.ranks import draw_seed, has_ranks, seed_of_rank_0
from fekernels._runtime.torch_internals import never_traced, own_parts
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
        self._known: tuple[Tensor, int, int, int, Tensor] | None = None
        self._last: tuple[Any, ...] | None = None
        self.known_seed, _ = self.read()  # for torch.compile, which does not look into buffers
        self.register_load_state_dict_post_hook(_read_again)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be written, and a copy has another buffer.
        return {**self.__dict__, "_known": None, "_last": None}

    def read(self) -> tuple[int, int]:
        """(seed, draws so far). The buffer is read only after somebody else has written or replaced it."""
        known = self._known
        if known is None or known[0] is not self.state or known[1] != _version(self.state):
            seed, step = self.state.tolist()
            self.known_seed = seed
            self._known = known = (self.state, _version(self.state), seed, step, self.state[1])
        return known[2], known[3]

    def next(self, batch: Tensor, model: nn.Module) -> tuple[int, int]:
        """(seed, step) for ``batch`` under the weights of ``model``; step is 1 for the first."""
        if torch.compiler.is_compiling():
            return _next_untraced(self, batch, model)
        seed, step = self.read()
        now = (_version(batch), *_state_of(model))
        if self._last is not None and self._last[0]() is batch and self._last[1] == now and step:
            return seed, step
        step = step % (COUNTERS - 1) + 1
        assert self._known is not None
        view = self._known[4]
        view.fill_(step)
        self._known = (self.state, _version(self.state), seed, step, view)
        self._last = (weakref.ref(batch), now)
        return seed, step

    def extra_repr(self) -> str:
        return "seed={}, step={}".format(*self.read())


def _read_again(counter: NoiseCounter, _: object) -> None:
    counter.read()


@never_traced
def _next_untraced(counter: NoiseCounter, batch: Tensor, model: nn.Module) -> tuple[int, int]:
    return counter.next(batch, model)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # of a tensor made under torch.inference_mode, which counts none
        return 0


def _state_of(model: nn.Module) -> tuple[float, ...]:
    versions, last = _versions(model)
    if last is None or not last.is_cpu:
        return (versions,)
    return versions, float(last.detach().sum())


def _versions(module: nn.Module) -> tuple[int, Tensor | None]:
    """The sum over all weights, and the last of them."""
    total = 0
    last: Tensor | None = None
    weights, children = own_parts(module)
    for weight in weights.values():
        if weight is not None:
            total, last = total + _version(weight), weight
    for child in children.values():
        if child is not None:
            of_child, of_last = _versions(child)
            total, last = total + of_child, last if of_last is None else of_last
    return total, last
