"""The table of draws: kinds, keys, offsets, counts; the contract in numpy; every implementation behind one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fekernels as fe
from tests.support.implementations import Place
from tests.support.pairwise import pairwise
from tests.support.tensors import bits_equal, clone, guarded, whole

KINDS = {"bits": torch.int32, "uniform": torch.float32, "normal": torch.float32}

LARGEST = 6.77  # of a normal: sqrt(-2 log 2^-33) is 6.764

# Salmon et al. 2011, known answers of Philox4x32-10: the draw whose counter and key they are, and its words.
KNOWN = {
    "zeros": (
        dict(seed=0, stream=0, step=0, offset=0, purpose=0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        dict(seed=-1, stream=2**32 - 1, step=2**32 - 1, offset=4 * (2**48 - 1), purpose=0xFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        dict(
            seed=0x299F31D0_A4093822,
            stream=0x03707344,
            step=0x13198A2E,
            offset=4 * 0x08D3_243F6A88,
            purpose=0x85A3,
        ),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def philox(count, *, seed, stream=0, step=0, offset=0, purpose=4):
    """The contract in numpy, written for this test alone: words as uint64."""
    mask = np.uint64(0xFFFFFFFF)
    block = np.arange(offset // 4, (offset + count + 3) // 4, dtype=np.uint64)
    counter = [
        block & mask,
        block >> np.uint64(32) | np.uint64(purpose << 16),
        np.full_like(block, step),
        np.full_like(block, stream),
    ]
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            b >> np.uint64(32) ^ counter[1] ^ np.uint64(low),
            b & mask,
            a >> np.uint64(32) ^ counter[3] ^ np.uint64(high),
            a & mask,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(counter, 1).ravel()[offset % 4 :][:count]


def expected(kind, count, **key):
    """What the draw must be: exactly for words and uniforms, to within a float32 polynomial's error for normals."""
    if kind == "bits":
        return torch.from_numpy(philox(count, **key).astype(np.uint32).view(np.int32))
    begin = key.get("offset", 0) % 4
    words = philox(count + begin + 3, **{**key, "offset": key.get("offset", 0) - begin})
    words = words[: (count + begin + 3) // 4 * 4]
    # a * 2^-32 + 2^-33 is exact in float64, so that this is rounded once, like an fma.
    uniform = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    if kind == "uniform":
        return torch.from_numpy(uniform[begin:][:count])
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64).reshape(-1, 2, 2)[..., 0]))
    angle = 2 * np.pi * words.reshape(-1, 2, 2)[..., 1].astype(np.float64) / 2.0**32
    return torch.from_numpy(
        np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).ravel()[begin:][:count]
    )


KEYS = (
    dict(seed=0, stream=0, step=0, purpose=0),
    dict(seed=-1, stream=2**32 - 1, step=2**32 - 1, purpose=2**16 - 1),
    dict(seed=0x299F31D0_A4093822, stream=2**31, step=1, purpose=1),
    dict(seed=-(2**63), stream=1, step=2**31, purpose=4),
)
# Odd offsets, the ends of a 64-element block, the carry of g // 4 past 2^32, and the last element there is.
OFFSETS = (0, 1, 3, 6, 63, 64, 4095, 2**34 - 37, 2**34, 2**40 + 3, 2**50 - 1030)
# Short of, at and beyond a counter block, a vector, a block of noise and a GPU block.
COUNTS = (0, 1, 3, 65, 1030)
SHIFTS = (0, 1, 2, 3)  # elements that the output begins beyond a 16-byte boundary
DRAWS = pairwise(count=COUNTS, offset=OFFSETS, key=KEYS, shift=SHIFTS)


class NoiseKernel(NamedTuple):
    """An implementation. ``fill(kind, out, seed, stream, step, offset, purpose)`` returns a filled copy of ``out``."""

    name: str
    fill: Callable[..., Tensor]
    exact: bool = True  # normals have the reference's bits

    def draw(self, kind: str, count: int, *, shift: int = 0, offset: int = 0, **key: int) -> Tensor:
        """Numbers drawn ``shift`` elements from a 16-byte boundary, with nothing written beside them."""
        out = guarded(torch.zeros(count + shift, dtype=KINDS[kind])[shift:])
        got = self.fill(kind, out, key["seed"], key["stream"], key["step"], offset, key["purpose"])
        memory = clone(out)
        memory.copy_(got)
        assert bits_equal(whole(memory), whole(got)), f"written beside {count} {kind} at {offset}"
        return got.contiguous()


def backend_noise(place: Place, name: str | None = None) -> NoiseKernel:
    """The operators of a backend, on its device."""

    def fill(kind: str, out: Tensor, *key: int) -> Tensor:
        there = clone(out, place.device)
        with fe.use_backend(place.backend):
            getattr(torch.ops.fekernels, f"philox_{kind}")(there, *key)
        return clone(there, "cpu")

    return NoiseKernel(name or str(place), fill)


def assert_drawn(kind: str, drawn: Tensor, *, exact: bool = True, **key: Any) -> None:
    """Words and uniforms are the contract's; normals are close to it and have the reference's bits."""
    want = expected(kind, drawn.numel(), **key).view(drawn.shape)
    if kind != "normal":
        assert bits_equal(drawn, want), f"{drawn.numel()} {kind} of {key}"
        return
    if drawn.numel():  # three units in the last place of the largest normals, between 4 and 8
        assert (drawn.cpu().double() - want).abs().amax() < 1.5e-6, f"{drawn.numel()} normals of {key}"
    if exact:
        with fe.use_backend("reference"):
            assert bits_equal(drawn, fe.random.normal(drawn.shape, **key)), (
                f"{drawn.numel()} normals of {key}"
            )
