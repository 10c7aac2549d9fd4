"""Which noise a call of a model gets that nobody gave a seed: fresh at each training step, kept in checkpoints."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.host import model_checks
from fekernels._runtime.ranks import draw_seed, has_ranks, seed_of_rank_0
from fekernels._runtime.torch_internals import never_traced, own_parts, version
from fekernels.ops.free_energy.reparameterize import rank_offset
from fekernels.ops.noise_key import COUNTERS, LAST_INDEX, signed_seed

__all__ = ["CountedNoise", "NoiseCounter", "nth_seed"]

TRAINING, EVALUATION = 0, 1 << 28  # streams
APART = 1 << 32  # rows between the noises of two ranks

OTHER_SEED = 0x9E3779B97F4A7C15  # odd, 2^64 over the golden ratio
CALLS = 1 << 31  # that are told apart
REMEMBERED = 64  # batches of one state of the weights, before those that were freed are looked for


def nth_seed(seed: int, call: int) -> int:
    """Of a model's call-th draw that was given none, from 0; that of the first is ``seed``."""
    return signed_seed("nth_seed", (seed + call * OTHER_SEED) & ((1 << 64) - 1))


class NoiseCounter(nn.Module):
    """A seed and what was drawn so far, as one buffer of two int64, so that a checkpoint goes on with its noise.

    ``next`` counts on, unless it is asked again for a batch that it has been asked for since the weights last changed:
    then what is computed are views of one thing, and they get one noise, whatever batches came in between. "The same
    batch" is the same tensor, unwritten since; a slice ``x[:5]`` is a new tensor each time, and so a new batch. Weights
    are the same by their version counters, and on a CPU by the sum of the last one too, because ``weight.data -= ...``
    counts no version. (Reading it on a GPU would wait for the GPU.) Batches are forgotten once they are freed.

    ``call`` counts draws that belong to no batch, such as a model's samples, and leaves the batches' noise as it is.
    The second number holds both counts: steps in its low 32 bits, calls above them.

    Args:
        seed: 64 bits; None draws one from torch's default generator, rank 0's in a process group.
    """

    state: Tensor
    _room = REMEMBERED

    def __init__(self, seed: int | None = None, function: str = "NoiseCounter") -> None:
        super().__init__()
        if seed is None:
            seed = draw_seed()
            seed = seed_of_rank_0(seed) if has_ranks() else seed
        # On the CPU whatever the default device is: it is read there.
        self.register_buffer(
            "state", torch.tensor([signed_seed(function, seed), 0], dtype=torch.int64, device="cpu")
        )
        self._known: tuple[Tensor, int, int, int, int, Tensor] | None = None
        self._weights: tuple[float, ...] = ()
        # By the batch's id: the batch, its version, and the step.
        self._batches: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.known_seed, _ = self.read()  # for torch.compile, which does not look into buffers
        self.register_load_state_dict_post_hook(_read_again)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be written, and a copy has another buffer.
        return {**self.__dict__, "_known": None, "_weights": (), "_batches": {}}

    def read(self) -> tuple[int, int]:
        """(seed, steps so far). The buffer is read only after somebody else has written or replaced it."""
        known, state = self._known, self.state
        if known is None or known[0] is not state or known[1] != version(state):
            seed, counts = state.tolist()
            self.known_seed = seed
            self._batches.clear()  # of another count
            calls, step = divmod(counts, COUNTERS)
            self._known = known = (state, version(state), seed, step, calls, state[1])
        return known[2], known[3]

    def call(self) -> int:
        """The seed of a draw that belongs to no batch: another at every call, the first time the counter's own."""
        if torch.compiler.is_compiling():
            return _call_untraced(self)
        seed, step = self.read()
        assert self._known is not None
        calls = self._known[4]
        self._write(step, (calls + 1) % CALLS)
        return nth_seed(seed, calls)

    def _write(self, step: int, calls: int) -> None:
        assert self._known is not None
        state, _, seed, _, _, view = self._known
        view.fill_(calls * COUNTERS + step)
        self._known = (state, version(state), seed, step, calls, view)

    def next(self, batch: Tensor, model: nn.Module) -> tuple[int, int]:
        """(seed, step) for ``batch`` under the weights of ``model``; step is 1 for the first."""
        if torch.compiler.is_compiling():
            return _next_untraced(self, batch, model)
        seed, step = self.read()
        weights, written, key = _state_of(model), version(batch), id(batch)
        if weights != self._weights:
            self._batches.clear()
            self._weights = weights
        known = self._batches.get(key)
        if known is not None and known[0]() is batch and known[1] == written:
            return seed, known[2]
        step = step % (COUNTERS - 1) + 1
        assert self._known is not None
        self._write(step, self._known[4])
        if len(self._batches) >= self._room:
            alive = {at: entry for at, entry in self._batches.items() if entry[0]() is not None}
            self._batches, self._room = alive, 2 * max(REMEMBERED, len(alive))
        self._batches[key] = (weakref.ref(batch), written, step)
        return seed, step

    def extra_repr(self) -> str:
        return "seed={}, step={}".format(*self.read())


def _read_again(counter: NoiseCounter, _: object) -> None:
    counter.read()


@never_traced
def _next_untraced(counter: NoiseCounter, batch: Tensor, model: nn.Module) -> tuple[int, int]:
    return counter.next(batch, model)


@never_traced
def _call_untraced(counter: NoiseCounter) -> int:
    return counter.call()


def _state_of(model: nn.Module) -> tuple[float, ...]:
    native = model_checks()
    found: tuple[float, ...] | None = None if native is None else native.weights_state(model, own_parts)
    if found is not None:
        return found
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
            total, last = total + version(weight), weight
    for child in children.values():
        if child is not None:
            of_child, of_last = _versions(child)
            total, last = total + of_child, last if of_last is None else of_last
    return total, last


class CountedNoise(nn.Module):
    """A module whose q(z | x), of ``latent_dim`` numbers a row, is sampled by the noise of its ``noise_counter``."""

    latent_dim: int
    noise_counter: NoiseCounter

    def noise(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int | None = None,
        offset: int | str | None = None,
        process_group: Any = None,
    ) -> dict[str, int]:
        """Seed, stream, step and offset of the noise of batch ``x``, as ``fe.reparameterize`` takes them.

        A seed or a step that is given is taken (the other is the model's seed, or 0). Without either, in training:
        fresh for every batch and after every step of the weights, but the same for the same batch under the same
        weights, so that several views of it agree, whatever batches come in between. The same batch is the same tensor,
        unwritten since: a slice ``x[:5]`` is a new one (``NoiseCounter``). In evaluation always the same,
        so that the free energy of a test set is a number. ``offset`` is the global index of the batch's first row.
        "rank", or a ``process_group``, counts the rows over the ranks, of batches of any sizes: the ranks tell each
        other theirs, so every rank must call, and the noise is the whole batch's on one process. None, without
        ``process_group``, asks nobody. In evaluation it is 0, so that the same rows give the same number on every rank.
        In training, seed given or not, it is 0 on one process and rank * 2^32 on one of several, so that no two ranks
        share noise however many rows each has; 2^50 / (ranks * latents) in place of 2^32, which is the last index that
        there is, where that is less. ``offset=0`` gives one seed and step the same noise on every rank in training too.
        """
        if offset is None and process_group is None:
            offset = self._first_row() if self.training and has_ranks() else 0
        elif offset is None or isinstance(offset, str):
            offset = rank_offset("noise", "rank" if offset is None else offset, len(x), process_group)
        stream = TRAINING
        if seed is not None or step is not None:
            seed = self._own_seed() if seed is None else seed
            step = 0 if step is None else step
        elif self.training:
            seed, step = self.noise_counter.next(x, self)
        else:
            seed, step, stream = self._own_seed(), 0, EVALUATION
        return {"seed": seed, "stream": stream, "step": step, "offset": offset}

    def _first_row(self) -> int:
        """Of this rank's rows where no rank knows how many the others have: so far apart that none has as many."""
        ranks = torch.distributed.get_world_size()
        return torch.distributed.get_rank() * min(APART, LAST_INDEX // (self.latent_dim * ranks))

    def _own_seed(self) -> int:
        return (
            self.noise_counter.known_seed if torch.compiler.is_compiling() else self.noise_counter.read()[0]
        )
