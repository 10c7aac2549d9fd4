"""Operands of the free energy, and the assertion that two backends give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import LIKELIHOODS as CATALOGUE
from fekernels._catalogue.free_energy import MEAN, Target
from tests.support.cuda_on_cpu.free_energy import FreeEnergyKernels
from tests.support.optimizers import F32

# term -> code, parameters
LIKELIHOODS = {row.term: (code, len(row.parameters)) for code, row in enumerate(CATALOGUE) if not row.classes}
ALL = ~0  # every gradient is wanted


def assert_same(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Bit by bit; but one NaN is like another."""
    assert len(mine) == len(theirs)
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        words = torch.int32 if a.dtype == F32 else torch.int16
        wrong = (a.view(words) != b.view(words)) & ~(a.isnan() & b.isnan())
        assert not wrong.any(), f"result {i} {tuple(a.shape)}: {a[wrong][:3]} for {b[wrong][:3]}"


def strided(tensor: Tensor, gap: int, shift: int = 0) -> Tensor:
    """The same values with ``gap`` elements after each row, ``shift`` elements beyond an aligned address."""
    rows, columns = tensor.shape
    buffer = torch.full((rows * (columns + gap) + shift,), float("nan"), dtype=tensor.dtype)
    view = buffer[shift:].as_strided((rows, columns), (columns + gap, 1))
    return view.copy_(tensor)


def shape_of(kind: str, rows: int, columns: int) -> tuple[int, int]:
    return {"full": (rows, columns), "column": (1, columns), "row": (rows, 1), "scalar": (1, 1)}[kind]


def make_params(
    name: str, rows: int, columns: int, kinds: Sequence[str] = (), dtypes: Sequence[torch.dtype] = ()
) -> list[Tensor]:
    params = []
    for i, parameter in enumerate(CATALOGUE[LIKELIHOODS[name][0]].parameters):
        shape = shape_of(kinds[i] if kinds else "full", rows, columns)
        values = torch.randn(shape) * (2.0 if name.endswith("bernoulli") else 0.7)
        if parameter.not_negative:
            values = values.exp() + 1.0 if parameter.name == "degrees_of_freedom" else (values * 2.0).exp()
        params.append(values.to(dtypes[i] if dtypes else F32))
    return params


def make_target(name: str, rows: int, columns: int, dtype: torch.dtype = F32) -> Tensor:
    of = CATALOGUE[LIKELIHOODS[name][0]].target
    if of is Target.UNIT:
        return torch.rand(rows, columns).to(dtype)
    if of is Target.COUNTS:
        return (torch.randn(rows, columns) * 3.0).exp().sub(1.0).clamp_(0.0, 90.0).floor().to(dtype)
    target = torch.randn(rows, columns)
    return (target.exp() if of is Target.POSITIVE else target).to(dtype)


def make_latent(rows: int, latents: int, prior: Sequence[str] = ()) -> list[Tensor]:
    latent = [torch.randn(rows, latents), torch.randn(rows, latents) * 0.5]
    return latent + [torch.randn(shape_of(kind, rows, latents)) * 0.5 for kind in prior]


def assert_bits_of_the_cpu(
    kernels: FreeEnergyKernels,
    native,
    likelihood: int,
    params: Sequence[Tensor],
    target: Tensor | None,
    latent: Sequence[Tensor] = (),
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    upstream: Sequence[Tensor] = (),
    reduction: int = MEAN,
    beta: float = 1.7,
    needs: int = ALL,
    inplace: bool = False,
    latent_mask: Tensor | None = None,
) -> list[Tensor]:
    """The CUDA kernels give the C++ kernels' results, gradients included, bit for bit. Returns them."""
    needs &= (1 << (len(params) + len(latent))) - 1
    results = []
    for backend in (kernels, native):
        mine = list(params)
        if inplace:
            mine[0] = params[0].clone()
        results.append(
            backend.free_energy(
                mine, target, mask, list(latent), weight, list(upstream), likelihood, reduction, beta, needs,
                inplace, latent_mask,
            )
        )  # fmt: skip
        if inplace:
            assert results[-1][3].data_ptr() == mine[0].data_ptr()
    assert_same(*results)
    assert len(results[0]) == 3 + needs.bit_count()
    return results[0]
