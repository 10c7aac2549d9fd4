"""Calls of the free energy's kernels: the one table of cases, their operands, and what is right of them in float64.

`cases` is what every implementation must get right: contract/test_free_energy.py runs it on all that a machine has,
Triton interpreted and the CUDA sources on the CPU among them, and gpu/free_energy.py on a GPU.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, CODES, LIKELIHOODS, MEAN, NONE, SUM, Target
from fekernels.reference.free_energy import free_energy as reference
from tests.support.free_energy_kernels import Kernels
from tests.support.pairwise import pairwise

__all__ = [
    "CATEGORICAL", "DTYPES", "ELEMENTWISE", "GROUPS", "KINDS", "KL", "MEAN", "NAMES", "NONE", "LARGE", "REDUCTIONS",
    "SMALL", "SUM", "Call", "Case", "cases", "judge", "to_the_bit",
]  # fmt: skip

NAMES = [f"{row.name}{len(row.parameters)}" for row in LIKELIHOODS]
ELEMENTWISE = [code for code, row in enumerate(LIKELIHOODS) if not row.classes]
KL = -1  # in place of a likelihood's code: the KL alone
GROUPS = {name: code for code, name in enumerate(NAMES)} | {"kl": KL}

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How an operand broadcasts to [rows, columns]: it is full, a number a column, a number a row, or one number.
KINDS = "fcrs"
REDUCTIONS = (NONE, MEAN, SUM)

# (rows, columns, latents), of what an interpreter runs in less than a second: one of each, less and more than a vector,
# a block (128) and one, rows that share a tile, and nothing at all.
SMALL = ((1, 1, 1), (3, 17, 5), (2, 129, 17), (20, 20, 3), (0, 5, 2), (4, 0, 3))
# Blocks, segments (4096) and one more, two of them, blocks of rows (64) and some, rows of sixteen that share vectors.
LARGE = (
    (5, 128, 16),
    (4, 129, 17),
    (130, 20, 20),
    (2, 4097, 3),
    (3, 8192, 260),
    (65, 300, 7),
    (70, 132, 36),
    (3, 5, 0),
)
# Of a categorical likelihood (rows, positions, latents), and numbers of classes: in a vector, block, tile, and beyond.
POSITIONS = ((1, 1, 2), (3, 5, 4), (2, 2, 1), (40, 1, 0), (0, 3, 1), (4, 0, 3))
FEW_CLASSES, MANY_CLASSES = (1, 3, 16), (128, 129, 700, 4096, 4100)


@dataclass(frozen=True)
class Call:
    """One call of ``free_energy``."""

    params: list[Tensor]
    target: Tensor | None
    mask: Tensor | None
    latent: list[Tensor]
    weight: Tensor | None
    upstream: list[Tensor]
    likelihood: int
    reduction: int = MEAN
    beta: float = 0.7
    needs: int = -1  # bits of the operands whose gradients are wanted
    inplace: bool = False
    latent_mask: Tensor | None = None
    layout: str = "packed"

    @property
    def operands(self) -> list[Tensor]:
        return [*self.params, *self.latent]

    @property
    def wanted(self) -> list[Tensor]:
        """The operands whose gradients are."""
        return [operand for i, operand in enumerate(self.operands) if self.needs >> i & 1]

    def run(self, kernels: Kernels) -> list[Tensor]:
        # A copy to a device packs its rows, so the layout is made there.
        return self.to(kernels.device).map(lambda t: placed(t, self.layout))._arguments(kernels.free_energy)

    def _arguments(self, kernel: Callable[..., list[Tensor]]) -> list[Tensor]:
        needs = self.needs & (1 << len(self.operands)) - 1
        return kernel(
            self.params, self.target, self.mask, self.latent, self.weight, self.upstream, self.likelihood,
            self.reduction, self.beta, needs, self.inplace, self.latent_mask,
        )  # fmt: skip

    def to(self, device: str | torch.device) -> Call:
        return self.map(lambda t: t.to(device))

    def double(self) -> Call:
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor changed."""

        def each(given: Any) -> Any:
            if isinstance(given, list):
                return [change(tensor) for tensor in given]
            return None if given is None else change(given)

        names = ("params", "target", "mask", "latent", "weight", "upstream", "latent_mask")
        return replace(self, **{name: each(getattr(self, name)) for name in names})

    def rows(self, begin: int, end: int) -> Call:
        """The call on a part of its batch."""
        first = self.latent[0] if self.target is None else self.target
        return self.map(lambda t: t[begin:end] if len(t) == len(first) else t)

    def exact(self) -> list[Tensor]:
        """In float64, of the values that the operands really have."""
        exact = self.double()
        # A row of weight 0 is out whatever comes from above.
        exact = replace(exact, upstream=[u.nan_to_num(posinf=1.0) for u in exact.upstream], inplace=False)
        return exact._arguments(reference.free_energy)

    def scales(self) -> list[Tensor]:
        """What an error is measured against: the largest of each result, where what is a sum counts the sum of absolute
        values, as its terms may cancel, and no less than 0.1 an element, as an energy or a gradient may be a difference
        of numbers near 1."""
        rows, columns = (self.target if self.target is not None else self.latent[0]).shape[:2]
        latents = self.latent[0].shape[1] if self.latent else 0
        spread = replace(
            self,
            params=[p if p.dim() == 3 else p.expand(rows, columns).contiguous() for p in self.params],
            latent=[t.expand(rows, latents).contiguous() for t in self.latent],
        )
        least = 0.1 / max(rows, 1)
        gradients = [
            g.abs().clamp_min(least).sum_to_size(o.shape)
            for g, o in zip(spread.exact()[3:], self.wanted, strict=True)
        ]
        energy, kl = (reference.reduced(each, self.reduction) for each in self._sizes())
        values = [energy + self.beta * kl, energy, kl]
        return [each.max() if each.numel() else each.new_zeros(()) for each in [*values, *gradients]]

    def _sizes(self) -> list[Tensor]:
        """Of each row the sums of the absolute values of its energies and KLs."""
        zero = torch.zeros(len(self.latent[0] if self.target is None else self.target), dtype=torch.float64)
        sizes = [zero, zero]
        if self.target is not None:
            seen = reference.counted(self.mask, self.weight)
            given = reference.observed(self.params, self.target, seen, self.likelihood)
            elements = reference.energy_elements(*given, self.likelihood).abs().clamp_min(0.1)
            sizes[0] = reference.masked_row_sums(elements, seen, self.weight)
        if self.latent:
            there = reference.counted(self.latent_mask, self.weight)
            elements = reference.kl_elements(reference.present(self.latent, there)).abs().clamp_min(0.1)
            sizes[1] = reference.masked_row_sums(elements, there, self.weight)
        return sizes


def placed(tensor: Tensor, layout: str) -> Tensor:
    """The same values with NaN, or True, after each row ("gaps") or before all, so that none is aligned ("shifted")."""
    beside = torch.nan if tensor.is_floating_point() else 1
    if layout == "gaps" and tensor.dim() == 2:
        return torch.cat((tensor, tensor.new_full((len(tensor), 3), beside)), dim=1)[:, : tensor.shape[1]]
    if layout == "shifted":
        return torch.cat((tensor.new_full((1,), beside), tensor.flatten()))[1:].view(tensor.shape)
    return tensor


def judge(results: list[Tensor], call: Call, exact: list[Tensor], scales: list[Tensor]) -> Iterator[str]:
    """What is wrong with the results, beyond the rounding of their dtypes; a 0 of what does not count must be one."""
    if len(results) != len(exact):
        yield f"{len(results)} results, not {len(exact)}"
        return
    for i, (result, wanted, scale) in enumerate(zip(results, exact, scales, strict=True)):
        dtype = torch.float32 if i < 3 else call.wanted[i - 3].dtype
        result = result.cpu()
        if (result.shape, result.dtype) != (wanted.shape, dtype):
            yield f"result {i} is {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(wanted.shape)}"
        elif not torch.equal(result.isnan(), wanted.isnan()):
            yield f"result {i} has NaN in other places"
        elif result[wanted == 0].any():
            yield f"result {i} is not 0 where it must be"
        elif result.numel() and not bool(wanted.isnan().all()):
            error = (result.double() - wanted).abs().nan_to_num(0.0).max()
            if not error <= (1e-6 + torch.finfo(dtype).eps) * scale:
                yield f"result {i} is off by {float(error):.2g} of {float(scale):.2g}"


def to_the_bit(kernels: Kernels, call: Call, results: list[Tensor], peer: list[Tensor]) -> Iterator[int]:
    """Which results have not the bits that the C++ kernels gave, of those that promise them: all of C++ and CUDA, and
    of interpreted Triton the gradients of every element."""
    shapes = [p.shape for p in call.params if call.target is not None and p.shape == call.target.shape]
    shapes += [t.shape for t in call.latent if t.shape == call.latent[0].shape]
    for i, (mine, theirs) in enumerate(zip(results, peer, strict=True)):
        mine = mine.cpu()
        if kernels.name.startswith(("cpp", "cuda")):
            mine, theirs = (
                t.view(BITS[t.dtype]) if not t.isnan().any() else t.nan_to_num(7.0) for t in (mine, theirs)
            )
        elif not (kernels.interpreted and kernels.exact) or i < 3 or mine.shape not in shapes:
            continue
        # Of Triton's, a 0 of what does not count may have the other sign.
        if not torch.equal(mine, theirs):
            yield i


BITS = {F32: torch.int32, BF16: torch.int16, F16: torch.int16}


# The table.


@dataclass(frozen=True)
class Case:
    """Random operands of one call, the same ones every time.

    What a mask hides holds NaN, and so does the row that has a weight of 0, of all operands. Nothing hides a parameter
    that all rows or all columns share.
    """

    likelihood: int
    shape: tuple[int, int, int] = (5, 130, 7)
    kinds: str = "fff"  # of the parameters
    latent: str = "ff"  # kinds of mean, log-variance and both of the prior: none of these, two or four
    dtypes: tuple[torch.dtype, ...] = (F32,) * 6  # three parameters, target, means, log-variances
    reduction: int = MEAN
    upstream: bool = False  # factors from above, where nothing is reduced
    masked: str = ""  # "some" or "all" elements
    padded: str = ""  # the same of the latents
    weight: str = ""  # "random", and "dropped" for a row of weight 0
    needs: int = -1
    layout: str = "packed"
    classes: int = 5

    def call(self, generator: torch.Generator | None = None) -> Call:
        generator = generator or torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        rows, columns, latents = self.shape
        normal, uniform = (functools.partial(draw, generator=generator) for draw in (torch.randn, torch.rand))

        def operand(kind: str, width: int, dtype: torch.dtype, positive: bool = False) -> Tensor:
            values = normal(rows if kind in "fr" else 1, width if kind in "fc" else 1)
            return (values.exp() if positive else values).to(dtype)

        def hiding(which: str, width: int) -> Tensor | None:
            seen = uniform(rows, width) < 0.7
            return {"": None, "some": seen, "all": torch.zeros_like(seen)}[which]

        params, target, mask = [], None, None
        if self.likelihood == CATEGORICAL:
            params = [3 * normal(rows, columns, self.classes).to(self.dtypes[0])]
            target = torch.randint(0, self.classes, (rows, columns), generator=generator)
        elif self.likelihood != KL:
            row = LIKELIHOODS[self.likelihood]
            params = [
                operand(kind, columns, dtype, parameter.not_negative)
                for kind, dtype, parameter in zip(self.kinds, self.dtypes, row.parameters, strict=False)
            ]
            target = uniform(rows, columns)
            if row.target is Target.COUNTS:
                target = torch.poisson(torch.where(target < 0.7, 0.0, 6.0), generator=generator)
            elif row.target is Target.POSITIVE:
                target = target + 0.01
            target = target.to(self.dtypes[3])
        if target is not None and (mask := hiding(self.masked, columns)) is not None:
            for hidden in (*params, target):
                if hidden.shape[:2] == mask.shape and hidden.is_floating_point():
                    hidden[~mask] = torch.nan
        latent = [
            operand(kind, latents, dtype)
            for kind, dtype in zip(self.latent, 2 * self.dtypes[4:], strict=False)
        ]
        latent_mask = hiding(self.padded, latents) if latent else None
        for hidden in latent if latent_mask is not None else ():
            if hidden.shape == latent_mask.shape:
                hidden[~latent_mask] = torch.nan
        weight = uniform(rows) if self.weight else None
        upstream = [normal(rows), normal(rows)] if self.upstream else []
        if weight is not None and self.weight == "dropped" and rows > 1:
            weight[rows // 2] = 0.0
            for hidden in (*params, *latent, target):
                if hidden is not None and len(hidden) == rows and hidden.is_floating_point():
                    hidden[rows // 2] = torch.nan
            for factor in upstream:
                factor[rows // 2] = torch.inf
        return Call(
            params, target, mask, latent, weight, upstream, max(self.likelihood, 0), self.reduction, needs=self.needs,
            latent_mask=latent_mask, layout=self.layout,
        )  # fmt: skip


def _every_likelihood(**options: Any) -> Iterator[Case]:
    return (Case(code, **options) for code in ELEMENTWISE)


# Cases that no pair of options stands for; the first of them for the interpreter too.
KEPT = (
    # Gradients of every element, which have the C++ kernels' bits in Triton as well.
    *_every_likelihood(shape=(3, 40, 5), reduction=NONE, upstream=True, masked="some", weight="random"),
    *_every_likelihood(shape=(3, 40, 5), dtypes=(BF16, F16, F32, F16, F32, BF16), weight="dropped"),
    # Two and three of Triton's segments, whole and not.
    Case(CODES["student_t"][3], (2, 2049, 3), reduction=NONE),
    Case(CODES["bernoulli"][1], (2, 8200, 3), reduction=SUM),
    # Groups of eight 16-bit elements, and those beside groups of four float32.
    Case(CODES["mse"][1], (6, 2056, 3), dtypes=(BF16,) * 6),
    Case(CODES["gaussian"][2], (6, 2056, 3), dtypes=(F32, BF16, F16, BF16, F32, F16), masked="some", reduction=SUM),
    # Classes in two tiles.
    Case(CATEGORICAL, (2, 1, 1), reduction=SUM, masked="some", classes=4100),
    Case(CATEGORICAL, (1, 2, 1), dtypes=(BF16,) * 6, classes=4100),
    # Padding in rows of every kind of loop.
    *(Case(KL, (3, 0, n), latent=q, padded="some") for n in (16, 40) for q in ("ff", "ffcs")),
)  # fmt: skip
KEPT_LARGE = (
    # More rows than the last kernel has warps, and more than the 256 partial sums over rows.
    Case(CODES["laplace"][2], (8300, 3, 2), "fs", "ffcs"),
    # Classes in three tiles.
    Case(CATEGORICAL, (2, 3, 4), reduction=NONE, upstream=True, masked="some", classes=9000),
    *(Case(KL, (37, 0, n), latent=q, padded="some") for n in (16, 40, 4099) for q in ("ff", "ffcs")),
)


@functools.cache
def _rows(small: bool) -> tuple[Case, ...]:
    """Each pair of values of two options at least once, of the likelihoods with one, two and three parameters, with
    classes, and of the KL alone."""
    shapes = SMALL if small else LARGE
    whole = {
        "reduction": ((NONE, False), (NONE, True), (MEAN, False), (SUM, False)),
        "weight": ("", "random", "dropped"),
        "layout": ("packed", "gaps", "shifted"),
        "needs": (-1, 0, 1, -2),
        **{name: DTYPES for name in ("first", "target", "mean")},
    }
    energy = {"masked": ("", "some", "all"), "latent": ("", "ff", "ffcs")}
    kl = {"padded": ("", "some", "all"), "logvar": DTYPES}
    rows: list[dict[str, Any]] = []

    def add(**factors: Any) -> None:
        rows.extend(row._asdict() for row in pairwise(**factors))

    one, two, three = (
        [code for code in ELEMENTWISE if len(LIKELIHOODS[code].parameters) == n] for n in (1, 2, 3)
    )
    add(likelihood=one, shape=shapes, k0=KINDS, **energy, **whole)
    add(likelihood=two, shape=shapes, k0=KINDS, k1=KINDS, second=DTYPES, **energy, **whole)
    kinds = {"k0": KINDS, "k1": KINDS, "k2": KINDS}
    add(likelihood=three, shape=shapes, **kinds, second=DTYPES, third=DTYPES, **energy, **whole)
    of_kl = [(batch, 0, columns) for batch, columns, _ in shapes]
    add(likelihood=(KL,), shape=of_kl, l1=KINDS, l2=KINDS, l3=KINDS, prior=(False, True), **kl, **whole)
    if not small:  # the gradient of every element once more
        add(likelihood=ELEMENTWISE, shape=LARGE[:6], **{**energy, **whole, "needs": (-1,)})
    whole["layout"] = ("packed", "shifted")  # classes are contiguous
    classes = FEW_CLASSES if small else MANY_CLASSES
    add(likelihood=(CATEGORICAL,), shape=POSITIONS, classes=classes, **energy, **whole)
    return (*(KEPT if small else KEPT_LARGE), *map(_case, rows))


def _case(row: dict[str, Any]) -> Case:
    get = row.get
    reduction, upstream = row["reduction"]
    latent = get("latent", "f" + get("l1", "") + (get("l2", "") + get("l3", "") if get("prior") else ""))
    names = ("first", "second", "third", "target", "mean", "logvar")
    return Case(
        row["likelihood"], row["shape"], get("k0", "f") + get("k1", "f") + get("k2", "f"), latent,
        tuple(get(name, row["first"]) for name in names), reduction, upstream, get("masked", ""), get("padded", ""),
        row["weight"], row["needs"], row["layout"], get("classes", 5),
    )  # fmt: skip


@functools.cache
def cases(likelihood: int, small: bool = False) -> tuple[Case, ...]:
    """The table's rows of one likelihood, or of the KL alone; `small`: those that can be interpreted."""
    rows = _rows(True) if small else _rows(True) + _rows(False)
    return tuple(case for case in rows if case.likelihood == likelihood)
