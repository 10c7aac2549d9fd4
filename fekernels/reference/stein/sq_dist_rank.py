"""Order statistics of the squared distances between pairs of particles, exact, in O(n d + block) memory.

Floating numbers that are not negative are ordered as their bits are. So a histogram of the leading bits of all
distances tells in which bin a rank lies, and a second pass, over that bin alone, the next bits: two passes for float32,
four for float64. Every pass computes the distances again, by the same operations on the same blocks: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fekernels.reference.stein.kernels import PAIRS, centred, problems, row_blocks, square_distances

__all__ = ["sq_dist_rank"]

DIGIT = 16  # bits per pass
BINS = 1 << DIGIT


def sq_dist_rank(particles: Tensor, ranks: Sequence[int], hint: Tensor | None = None) -> Tensor:
    """The ``ranks``-th smallest (from 0) of the n (n - 1)/2 squared distances of pairs i < j; NaN counts as largest.

    Args:
        particles: [B, n, d].
        ranks: each in [0, n (n - 1)/2).
        hint: [B, len(ranks)], near the result: saves a pass where the leading bits are those, or next to them.

    Returns:
        [B, len(ranks)] float32, float64 for float64 particles.
    """
    dtype = torch.float64 if particles.dtype == torch.float64 else torch.float32
    batch, n, _ = particles.shape
    result = torch.empty(batch, len(ranks), dtype=dtype, device=particles.device)
    if not len(ranks):
        return result
    if n * n <= PAIRS:
        index = torch.tensor(ranks, device=particles.device)
        above = torch.ones(n, n, dtype=torch.bool, device=particles.device).triu(1)
        for part in problems(batch, n):
            x = centred(particles[part])
            t = square_distances(x, x).to(dtype)[:, above]
            result[part] = t.sort(1).values[:, index]
        return result
    for i in range(batch):
        near = [] if hint is None else hint[i].to(dtype).tolist()
        bits = _select(centred(particles[i : i + 1]), ranks, dtype, near)
        integer = torch.int64 if dtype == torch.float64 else torch.int32
        result[i] = torch.tensor(bits, dtype=integer, device=particles.device).view(dtype)
    return result


def _keys(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The bits of the distances of all pairs i < j, block by block, ordered as the distances are, NaN last."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    for rows in row_blocks(x.shape[1]):
        t = square_distances(x[:, rows], x[:, rows.start :])[0].to(dtype)
        count = rows.stop - rows.start
        own = torch.triu_indices(count, count, 1, device=x.device)
        for part in (t[:, :count][own[0], own[1]], t[:, count:].reshape(-1)):
            yield torch.where(part.isnan(), torch.nan, part).view(integer).abs()


def _select(x: Tensor, ranks: Sequence[int], dtype: torch.dtype, near: Sequence[float]) -> list[int]:
    """The bits of the distances at ``ranks``, from the leading to the last: a pass over all pairs for each digit."""
    shift = 64 if dtype == torch.float64 else 32
    # For each rank its leading bits, as far as they are known, and the rank among the distances that have them.
    found = [(0, rank) for rank in ranks]
    if dtype == torch.float32 and near:
        by_hint = _near(x, ranks, near)
        if by_hint is not None:
            return by_hint
    while shift:
        shift -= DIGIT
        counts = {prefix: torch.zeros(BINS, dtype=torch.int64, device=x.device) for prefix, _ in found}
        for keys in _keys(x, dtype):
            for prefix, count in counts.items():
                inside = (keys >> shift) - (prefix << DIGIT)
                count += torch.bincount(inside[(inside >= 0) & (inside < BINS)], minlength=BINS)
        found = [(prefix << DIGIT | digit, rest) for prefix, digit, rest in _bins(found, counts)]
    return [bits for bits, _ in found]


def _bins(found: Sequence[tuple[int, int]], counts: dict[int, Tensor]) -> Iterator[tuple[int, int, int]]:
    """(prefix, bin, rank within the bin) of each rank."""
    ends = {prefix: count.cumsum(0) for prefix, count in counts.items()}
    for prefix, rank in found:
        digit = int(torch.searchsorted(ends[prefix], rank, right=True))
        yield prefix, digit, rank - (int(ends[prefix][digit - 1]) if digit else 0)


def _near(x: Tensor, ranks: Sequence[int], near: Sequence[float]) -> list[int] | None:
    """The bits at ``ranks`` by one pass, if their leading halves are those of ``near`` or next to them."""
    values = torch.tensor(near, dtype=torch.float32)
    if not bool((values >= 0).all()):
        return None
    leading = values.view(torch.int32) >> DIGIT
    first, last = max(0, int(leading.min()) - 1), int(leading.max()) + 2
    if last - first > 16:  # one histogram serves all ranks, unless they lie far apart
        return None
    first, last = first << DIGIT, last << DIGIT
    below = 0
    counts = torch.zeros(last - first, dtype=torch.int64, device=x.device)
    for keys in _keys(x, torch.float32):
        below += int((keys < first).sum())
        inside = keys[(keys >= first) & (keys < last)] - first
        counts += torch.bincount(inside, minlength=last - first)
    if not below <= min(ranks) or not max(ranks) < below + int(counts.sum()):
        return None
    found = _bins([(0, rank - below) for rank in ranks], {0: counts})
    return [first + digit for _, digit, _ in found]
