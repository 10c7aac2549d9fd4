"""HashedTextEncoder: equal words in equal buckets, inverse document frequencies, hashes of any process."""

from __future__ import annotations

import zlib

import torch

from fekernels.models import HashedTextEncoder


def test_hashed_texts() -> None:
    encoder = HashedTextEncoder(2048, prefix=0)
    one, same, humps, other = encoder(["open_file now", "Now: open FILE!", "openFile now", "lock the thread"])
    torch.testing.assert_close(one, same)
    torch.testing.assert_close(one, humps)
    assert abs(one @ other) < 0.1 and abs(one.norm() - 1) < 0.1
    assert bool((encoder(["", "..."]) == 0).all()) and encoder([]).shape == (0, 2048)
    stems = HashedTextEncoder(2048)
    walk = stems(["connect", "connection"])
    assert walk[0] @ walk[1] > 0.3 > encoder(["connect", "connection"]).prod(0).sum().abs()


def test_inverse_document_frequencies() -> None:
    encoder = HashedTextEncoder(16, 1 << 12, prefix=0).weigh_by_frequency(["the file", "the lock", "the"])
    weight = {w: encoder.log_weight[next(iter(encoder.terms(w)))].exp() for w in ("the", "file", "unseen")}
    expected = {
        "the": 1.0,
        "file": 1 + torch.log(torch.tensor(2.0)),
        "unseen": 1 + torch.log(torch.tensor(4.0)),
    }
    for word, value in expected.items():
        torch.testing.assert_close(weight[word], torch.tensor(float(value)))


def test_hashes_are_those_of_any_process() -> None:
    """By value: a saved model's weights are of these buckets. Python's own hash changes with each process."""
    encoder = HashedTextEncoder(2, prefix=0)
    assert sorted(encoder.terms("file path").items()) == [(2831, 1), (13840, 1)]
    assert encoder.terms("naïve naïve") == {zlib.crc32("naïve".encode()) % (1 << 15): 2}
