"""``philox_bits``, ``philox_uniform``, ``philox_normal``: fill a tensor with counter-based noise.

They fill an ``out`` tensor, since an operator without a tensor argument would never reach a device's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels import _backends
from fekernels.ops._library import define_in_place


def _filler(kernel: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def fill(out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
        if out.dtype != dtype:
            raise ValueError(f"{kernel}: out must be {dtype}; got {out.dtype}")
        if not out.is_contiguous():
            raise ValueError(
                f"{kernel}: out must be contiguous; got strides {out.stride()} for shape {tuple(out.shape)}"
            )
        backend = _backends.choose(out.device.type)
        _backends.implementation(kernel, backend)(out, seed, stream, step, offset, purpose)

    return fill


for _kernel, _dtype in (
    ("philox_bits", torch.int32),
    ("philox_uniform", torch.float32),
    ("philox_normal", torch.float32),
):
    define_in_place(
        f"{_kernel}(Tensor(a!) out, SymInt seed, SymInt stream, SymInt step, SymInt offset, SymInt purpose) -> ()",
        _filler(_kernel, _dtype),
    )
