"""Stein sums by strips of pair matrices: some rows at a time, as many as leave the memory O(n d).

For many dimensions, and for what needs several matrices of the same pairs. Three kernels per strip: inner products over
parts of the dimensions; from them, elementwise, the pairs' weights; products of these with the particles.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fekernels._catalogue.stein import PRECISIONS
from fekernels.triton.stein import kernels as stein
from fekernels.triton.stein import strip_kernels as kernels

ROWS = 64  # of a block; strips are a multiple
PAIRS = {"M": 16, "N": 128}
LEAST = 1 << 24  # pairs of all strips at once, though n d be less
PROGRAMS = 512  # about four per multiprocessor of the largest GPUs
LONGEST = 512  # dimensions at least, of a part


def padded(
    source: Tensor,
    pitch: int,
    mean: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[B, pitch, a multiple of a tile's width], float32, zeros beside [B, n, d]; or so in `out`, for those `chosen`."""
    source = source.contiguous()
    batch, n, d = source.shape
    width = triton.cdiv(d, tile_width(d)) * tile_width(d)
    if out is None:
        out = torch.empty(batch, pitch, width, dtype=torch.float32, device=source.device)
    kernels.pad_kernel[(pitch // 16 * (width // tile_width(d)), batch)](
        source, mean, chosen, out, n, d, pitch, width, ROWS=16, D=tile_width(d), num_warps=4, **stein.OPTIONS
    )  # fmt: skip
    return out


def tile_width(d: int) -> int:
    """Columns of a product's tile."""
    return min(max(stein.power_of_two(d), 16), 64)


class Strips:
    """The pairs' weights of all problems, strip by strip.

    Attributes: x, scores, grad: padded operands, x centred but where `apart`, [B], says that differences of the
    particles as they are given are taken: where a kernel or few dimensions ask for them, and for a sharp bandwidth.
    pitch: of a strip's rows; strip: its rows, a multiple of ROWS; totals: shares of dL/dh, or None.
    """

    def __init__(
        self, mode: int, particles: Tensor, scores: Tensor, grad: Tensor | None, bandwidth: Tensor, kernel: int,
        beta: float, c: float, temperature: float, precision: int, by_bandwidth: bool = False,
    ) -> None:  # fmt: skip
        batch, n, d = particles.shape
        device = particles.device

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.mode, self.particles, self.bandwidth, self.kernel = mode, particles, bandwidth, kernel
        self.beta, self.c, self.temperature, self.precision = beta, c, temperature, precision
        self.pitch = triton.cdiv(n, ROWS) * ROWS
        # How many rows there are to a strip changes no row's sums, so that it may depend on the other problems.
        most = max(batch * n * d, LEAST) // (batch * self.pitch)
        self.strip = min(max(most // ROWS, 1) * ROWS, self.pitch)
        self.tile_count = self.pitch // PAIRS["M"] * triton.cdiv(self.pitch, PAIRS["N"])
        self.totals = new(batch, self.tile_count, 1, dtype=torch.float64) if by_bandwidth else None

        always = stein.takes_differences(kernel, d)
        mean = None if always else self.means()
        self.x, self.scores = padded(particles, self.pitch, mean), padded(scores, self.pitch)
        self.grad = None if grad is None else padded(grad, self.pitch)
        self.other = self.scores if self.grad is None else self.grad
        self.operands: list[tuple[Tensor, Tensor | None]] = [(self.x, None)]
        if mode != kernels.DIRECTION.value:
            self.operands += [(self.other, None if self.grad is None else self.scores), (self.other, self.x)]
        self.norms, self.inner = (self.row_products(y) for y in (self.x, self.other))
        self.apart = torch.ones(batch, dtype=torch.int32, device=device)
        if not always:
            find_sharp(self.norms, bandwidth, self.apart, n)
            padded(particles, self.pitch, None, self.apart, self.x)

        width = self.x.shape[2]
        parts = min(triton.cdiv(PROGRAMS, (self.pitch // ROWS) ** 2), triton.cdiv(width, LONGEST))
        # Where operands of a tensor core come from registers, there is room for fewer.
        self.depth = min(tile_width(d), 32 if stein.large_shared_memory(particles) else 16)
        self.part = triton.cdiv(triton.cdiv(width, parts), self.depth) * self.depth
        self.parts = triton.cdiv(width, self.part)
        self.products = new(self.parts, len(self.operands), batch, self.strip, self.pitch)
        self.weights = new(
            1 if mode == kernels.DISCREPANCY.value else 3 if mode == kernels.BACKWARD.value else 2,
            *self.products.shape[2:],
        )

    def means(self) -> Tensor:
        """[B, d]"""
        batch, n, d = self.particles.shape
        statistics = stein.column_statistics(self.particles, None)
        mean = torch.empty(batch, d, dtype=torch.float32, device=self.particles.device)
        kernels.mean_kernel[(triton.cdiv(d, 128), batch)](
            statistics, mean, n, d, statistics.shape[2], D=128, CHUNKS=stein.MOST_CHUNKS, num_warps=4, **stein.OPTIONS
        )  # fmt: skip
        return mean

    def row_products(self, y: Tensor) -> Tensor:
        """[B, pitch] of x and y."""
        out = torch.empty(y.shape[:2], dtype=torch.float32, device=y.device)
        width = y.shape[2]
        rows = 1 if width > 4096 else 16  # few long rows still make many programs
        kernels.row_products_kernel[(out.numel() // rows,)](
            self.x, y, out, width, ROWS=rows, D=tile_width(width), num_warps=1 if rows == 1 else 4, **stein.OPTIONS
        )  # fmt: skip
        return out

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first row, blocks of ROWS rows) of each strip, while `weights` has that strip's."""
        return self.of_rows(0, self.particles.shape[1])

    def of_rows(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The same, of the strips with any of these rows alone."""
        batch, n, d = self.particles.shape
        precision = PRECISIONS[self.precision].dot
        for first in range(begin // self.strip * self.strip, end, self.strip):
            blocks = triton.cdiv(min(self.strip, n - first), ROWS)
            for number, (x, y) in enumerate(self.operands):
                kernels.inner_kernel[(blocks * (self.pitch // ROWS), self.parts, batch)](
                    x, y, self.products[0, number], self.products.stride(0), first, self.pitch, x.shape[2], self.strip,
                    self.part, PRECISION=precision, M=ROWS, N=ROWS, D=self.depth,
                    num_warps=4, num_stages=2,
                    **stein.OPTIONS,
                )  # fmt: skip
            tiles = blocks * ROWS // PAIRS["M"] * triton.cdiv(self.pitch, PAIRS["N"])
            kernels.pairs_kernel[(tiles, batch)](
                self.x, self.other, self.apart, self.norms, self.inner, self.bandwidth, self.products, self.weights,
                self.totals, self.tile_count, first, n, d, self.pitch, self.x.shape[2], self.strip, self.parts,
                self.beta, self.c, self.temperature,
                KERNEL=self.kernel, MODE=self.mode, PRECISION=precision, **PAIRS, num_warps=8, **stein.OPTIONS,
            )  # fmt: skip
            yield first, blocks

    def product(
        self, first: int, blocks: int, out: Tensor, weights: int, values: Tensor, factor: float,
        base: float | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """`product_kernel` for this strip, weights by their number; without `base` the values repel."""
        batch, n, d = self.particles.shape
        width = tile_width(d)
        kernels.product_kernel[(blocks * (values.shape[2] // width), batch)](
            self.weights[weights], values, self.apart, self.row_sums(weights) if base is None else None, base or 0.0,
            factor, out,
            first, n, d, self.pitch, values.shape[2], self.strip, ADD=add,
            PRECISION=PRECISIONS[self.precision].dot, M=ROWS, N=32, D=width, num_warps=4, num_stages=2,
            **stein.OPTIONS,
        )  # fmt: skip

    def row_sums(self, number: int) -> Tensor:
        """[B, strip] of the weights of this number."""
        weights = self.weights[number]
        sums = torch.empty(weights.shape[:2], dtype=torch.float32, device=weights.device)
        kernels.row_sums_kernel[(triton.cdiv(sums.numel(), 4),)](
            weights, sums, sums.numel(), self.pitch, M=4, N=512, num_warps=4, **stein.OPTIONS
        )  # fmt: skip
        return sums


def find_sharp(norms: Tensor, bandwidth: Tensor, sharp: Tensor, n: int, scale: float = 0.0) -> None:
    """Fills `sharp` [B] by `sharp_kernel`."""
    kernels.sharp_kernel[(len(sharp),)](
        norms, bandwidth, sharp, n, norms.shape[1], scale, BLOCK=1024, num_warps=4, **stein.OPTIONS
    )  # fmt: skip


def total(totals: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, m] of float64 [B, count, m]."""
    batch, count, m = totals.shape
    out = torch.empty(batch, m, dtype=dtype, device=totals.device)
    width = min(stein.power_of_two(m), 32)
    kernels.total_kernel[(triton.cdiv(m, width), batch)](
        totals, out, count, m, BLOCK=1024 // width, D=width, num_warps=4, **stein.OPTIONS
    )  # fmt: skip
    return out
