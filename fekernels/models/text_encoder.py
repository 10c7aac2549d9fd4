"""Vectors of texts with nothing to download: weighted sums of hashed words' fixed random codes."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._checks import integer
from fekernels.ops.noise_key import signed_seed

__all__ = ["HashedTextEncoder", "check_codes"]

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[^\W\d_]+|\d+")
_REMEMBERED = 1 << 16  # texts whose terms are kept: those of a training set are asked for in every epoch


class HashedTextEncoder(nn.Module):
    """Texts to vectors [B, dim]: the sum of their terms' random codes, each times the term's learned weight.

    Terms are words, split at humps and underscores and without case, and the first letters of longer words, which
    stand for their stem. A term's code is a fixed Gaussian vector of length 1 or so, the same on every machine
    (``fe.random``); inner products of such sums estimate the weighted overlap of the terms with an error of
    1/sqrt(dim), so that rare words meet across texts that no training has seen (random projections: Johnson &
    Lindenstrauss 1984; hashing: Weinberger et al. 2009, arXiv:0902.2206). Only the weights are learned, ``buckets``
    numbers: codes learned from a few thousand texts memorise them. A term that occurs n times counts 1 + log n times.

    Hashing is CRC-32 of the term's UTF-8, which no process, machine or release of Python changes.

    Args:
        dim: of the vectors. 512: on docstrings the ranks of 128 are a quarter worse, and those of exact sums are close.
        buckets: hashed terms that are told apart; a text collection has some ten thousand.
        prefix: letters that stand for a word's stem; 0 leaves them out.
        seed: of the codes.

    The state dict holds the weights and what the codes are made from, not the codes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a state dict of other codes.
    """

    def __init__(self, dim: int = 512, buckets: int = 1 << 15, *, prefix: int = 5, seed: int = 0) -> None:
        super().__init__()
        name = "HashedTextEncoder"
        self.dim = integer(name, "dim", dim, 1)
        self.buckets = integer(name, "buckets", buckets, 1)
        self.prefix = integer(name, "prefix", prefix, 0)
        self.seed = signed_seed(name, seed)
        codes = random.normal((self.buckets, self.dim), seed=seed) / math.sqrt(self.dim)
        self.codes: Tensor
        # Made again from the seed: a checkpoint need not hold them.
        self.register_buffer("codes", codes, persistent=False)
        self.log_weight = nn.Parameter(torch.zeros(self.buckets))
        self._terms: dict[str, tuple[Tensor, Tensor]] = {}

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "prefix": self.prefix, "dim": self.dim, "buckets": self.buckets}

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: ``check_codes`` has seen that they are these."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_codes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, buckets={self.buckets}, prefix={self.prefix}, seed={self.seed}"

    def terms(self, text: str) -> Counter[int]:
        """Buckets of a text's terms, and how often each occurs."""
        words = _WORD.findall(_HUMP.sub(" ", text).casefold())
        if self.prefix:
            # Behind a sign that no word has, so that a stem is another term than the word of the same letters.
            words += ["^" + word[: self.prefix] for word in words if len(word) >= self.prefix]
        return Counter(zlib.crc32(word.encode()) % self.buckets for word in words)

    def weigh_by_frequency(self, texts: Sequence[str]) -> HashedTextEncoder:
        """Start the weights as inverse document frequencies, log((N + 1) / (n + 1)) + 1 for a term of n texts out of N.

        Terms that none of them holds weigh most. Training goes on from there.
        """
        _check("HashedTextEncoder.weigh_by_frequency", texts)
        holding = torch.zeros(self.buckets, dtype=torch.float64)
        for text in texts:
            holding[self._looked_up(text)[0]] += 1
        weight = torch.log((len(texts) + 1) / (holding + 1)) + 1
        with torch.no_grad():
            self.log_weight.copy_(weight.log())
        return self

    def _looked_up(self, text: str) -> tuple[Tensor, Tensor]:
        found = self._terms.get(text)
        if found is None:
            counted = self.terms(text)
            times = torch.tensor(list(counted.values()), dtype=torch.float64)
            found = torch.tensor(list(counted), dtype=torch.int64), 1 + times.log()
            if len(self._terms) >= _REMEMBERED:
                self._terms.clear()
            self._terms[text] = found
        return found

    __call__: Callable[..., Tensor]  # torch says Any of every module's

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Vectors [B, dim] of B texts: their sums of codes over the root of the sum of squared weights, about 1 long.

        A text without a term gives zeros.
        """
        _check("HashedTextEncoder", texts)
        if not len(texts):
            return self.codes.new_zeros(0, self.dim)
        found = [self._looked_up(text) for text in texts]
        counts = torch.tensor([len(ids) for ids, _ in found])
        device, dtype = self.codes.device, self.log_weight.dtype
        ids = torch.cat([ids for ids, _ in found]).to(device)
        times = torch.cat([times for _, times in found]).to(device, dtype)
        weight = self.log_weight[ids].exp() * times
        starts = (counts.cumsum(0) - counts).to(device)
        sums = nn.functional.embedding_bag(ids, self.codes, starts, mode="sum", per_sample_weights=weight)
        owner = torch.repeat_interleave(torch.arange(len(texts)), counts).to(device)
        squares = weight.new_zeros(len(texts)).index_add(0, owner, weight * weight)
        return sums / squares.clamp_min(torch.finfo(dtype).tiny).sqrt()[:, None]


def check_codes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """ValueError where an encoder in ``module`` has other codes than the one whose state would be loaded into it.

    A module that holds encoders calls it first, since loading writes one child after the other.
    """
    for name, encoder in module.named_modules():
        if not isinstance(encoder, HashedTextEncoder):
            continue
        path = f"{prefix}{name}." if name else prefix
        own = encoder.get_extra_state()
        saved = state_dict.get(f"{path}_extra_state", own)  # of a missing one, loading itself says so
        other = [key for key in own if saved.get(key) != own[key]]
        if other:
            ours, theirs = (", ".join(f"{key} {of.get(key)}" for key in other) for of in (own, saved))
            where = f"HashedTextEncoder ({path[:-1]})" if path else "HashedTextEncoder"
            raise ValueError(
                f"{where}: the codes must be those of {ours}; got those of a checkpoint of {theirs}: make the encoder "
                "with the checkpoint's"
            )


def _check(owner: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"{owner}: texts must be a sequence of str; got {type(texts).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{owner}: texts must hold str; got {type(text).__name__}")
