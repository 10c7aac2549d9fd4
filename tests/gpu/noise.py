"""Draws on a device against the same on the CPU, bit for bit: all of the product behind tests/support/random.py."""

from __future__ import annotations

from functools import partial
from itertools import product

import fekernels as fe
from tests.gpu.checks import Check, Comparison, Numbers, Target
from tests.support.implementations import Place
from tests.support.random import COUNTS, KEYS, KINDS, OFFSETS, SHIFTS, backend_noise

LONG = (4099, 100_003)  # several blocks of a GPU


def check_noise(kind: str, target: Target) -> Numbers:
    """Numbers of every key, length and offset, wherever they begin in memory; nothing is written beside them."""
    comparison = Comparison(exact=True)
    here = backend_noise(Place(target.truth, "cpu"))
    there = backend_noise(Place(target.backend, str(target.device)))
    lengths = [*product(COUNTS, OFFSETS, SHIFTS), *product(LONG, OFFSETS[:3], SHIFTS)]
    for key, (count, offset, shift) in product(KEYS, lengths):
        got, want = (each.draw(kind, count, shift=shift, offset=offset, **key) for each in (there, here))
        comparison.add(f"{kind} {count} {offset} {shift} {key}", got, want)
    return comparison.result()


def check_noise_large(target: Target) -> Numbers:
    """Ten million normals."""
    comparison = Comparison(exact=True)
    with fe.use_backend(target.backend):
        got = fe.random.normal(10_000_000, seed=11, stream=12, step=13, device=target.device)
    with fe.use_backend(target.truth):
        comparison.add("normals", got, fe.random.normal(10_000_000, seed=11, stream=12, step=13))
    return comparison.result()


def noise_checks() -> list[Check]:
    """Each kind of numbers, and very many of one."""
    checks = [Check(f"noise: {kind}", partial(check_noise, kind)) for kind in KINDS]
    return [*checks, Check("noise: ten million", check_noise_large, slow=True)]
