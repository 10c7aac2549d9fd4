"""Every implementation of the noise, over the table of tests/support/random.py: the contract's words and numbers."""

import math

import pytest

import fekernels as fe
from tests.support.implementations import threads
from tests.support.random import DRAWS, KINDS, KNOWN, LARGEST, assert_drawn
from tests.support.tensors import bits_equal


@pytest.mark.parametrize("name", KNOWN)
def test_words_are_the_known_answers(name, noise_kernel):
    key, words = KNOWN[name]
    assert [word & 0xFFFFFFFF for word in noise_kernel.draw("bits", 4, **key).tolist()] == list(words)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_contract(kind, noise_kernel):
    for row in DRAWS:
        drawn = noise_kernel.draw(kind, row.count, shift=row.shift, offset=row.offset, **row.key)
        assert_drawn(kind, drawn, exact=noise_kernel.exact, offset=row.offset, **row.key)


# Offsets, found by search in the draw of seed 0, of words 0 and 2^32 - 1: the ends of what a uniform can be.
WORD_OF_ZEROS, WORD_OF_ONES = 23_483_585_204, 1_119_706_938


def test_ends_of_the_range(noise_kernel):
    def draw(kind, count, offset):
        return noise_kernel.draw(kind, count, seed=0, stream=0, step=0, offset=offset, purpose=4)

    assert draw("bits", 1, WORD_OF_ZEROS).item() == 0
    assert draw("bits", 1, WORD_OF_ONES).item() == -1
    assert draw("uniform", 1, WORD_OF_ZEROS).item() == 2.0**-33
    assert draw("uniform", 1, WORD_OF_ONES).item() == 1.0
    for offset, radius in ((WORD_OF_ZEROS, math.sqrt(66 * math.log(2))), (WORD_OF_ONES, 0.0)):
        pair = draw("normal", 2, offset).double()
        assert offset % 2 == 0  # the first of its pair makes the radius
        assert pair.norm().item() == pytest.approx(radius, abs=2e-6)  # of each of the two, 1.5e-6 at most
        assert pair.abs().max() <= LARGEST


@pytest.mark.parametrize("kind", KINDS)
def test_threads_give_the_same_random_bits(kind, isa):
    drawn = []
    for count in (1, 2):
        with threads(count), fe.use_backend("cpp"):
            drawn.append(getattr(fe.random, kind)(100_001, seed=3, offset=5))
    assert bits_equal(*drawn)
