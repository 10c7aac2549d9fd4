"""The free energy's CUDA kernels, run on the CPU behind the signatures of ``torch.ops.fekernels_native``.

What the kernels write to, their scratch memory included, is poisoned before and guarded on both sides.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL
from fekernels._runtime.pointer_table import DTYPE_CODES
from tests.support import ROOT
from tests.support.free_energy_kernels import Kernels

_CODES = (ROOT / "csrc/formulas/free_energy_codes.h").read_text()
OPERANDS = int(re.findall(r"kMaxParams = (\d+);", _CODES)[0])  # what a call has room for

GUARD = 64  # elements on either side; a multiple of 16 bytes


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride")),
        ("gradient", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    ]


class FreeEnergyCall(ctypes.Structure):
    _fields_ = [
        ("params", Operand * OPERANDS),
        ("latent", Operand * OPERANDS),
        ("target", Operand),
        ("mask", ctypes.c_void_p),
        ("latent_mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_stride", "latent_mask_stride")),
        ("weight", ctypes.c_void_p),
        ("upstream", ctypes.c_void_p * 2),
        ("out", ctypes.c_void_p * 3),
        ("scratch", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "latents", "classes")),
        ("beta", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("n_params", "n_latent", "likelihood", "reduction")),
    ]


class ReparameterizeCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "logvar", "z", "grad", "grad_mean", "grad_logvar")),
        *((name, ctypes.c_int64) for name in ("rows", "latents", "samples", "offset", "seed")),
        *((name, ctypes.c_uint32) for name in ("stream", "step")),
        *((name, ctypes.c_int32) for name in ("dtype", "logvar_dtype")),
    ]


class ScaledTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("count", ctypes.c_int64), ("dtype", ctypes.c_int32)]


class ScaleCall(ctypes.Structure):
    _fields_ = [
        ("tensors", ScaledTensor * 8),
        ("factor", ctypes.c_void_p),
        ("n_tensors", ctypes.c_int64),
    ]


class Guarded:
    """Makes outputs full of ones (a NaN in every float dtype) between guards, and sees that the guards stay."""

    def __init__(self, misaligned: bool = False) -> None:
        self._start = GUARD + misaligned
        self._buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        itemsize = torch.empty(0, dtype=dtype).element_size()
        raw = torch.full(((count + 2 * GUARD + 1) * itemsize,), 0xFF, dtype=torch.uint8)
        buffer = raw.view(dtype)
        self._buffers.append((raw, count * itemsize))
        return buffer[self._start : self._start + count].view(tuple(shape))

    def check(self) -> None:
        for raw, used in self._buffers:
            before = self._start * (raw.numel() - used) // (2 * GUARD + 1)
            assert (raw[:before] == 0xFF).all()
            assert (raw[before + used :] == 0xFF).all()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _operand(tensor: Tensor, gradient: Tensor | None) -> Operand:
    return Operand(
        data=tensor.data_ptr(),
        rows=tensor.shape[0],
        columns=tensor.shape[1],
        row_stride=tensor.stride(0),
        gradient=_address(gradient),
        dtype=DTYPE_CODES.get(tensor.dtype, 0),
    )


class FreeEnergyKernels:
    """The entry points; a returned error code, or a guard that is overwritten, fails the test."""

    def __init__(self, library: ctypes.CDLL, misaligned: bool = False) -> None:
        self._library = library
        self._library.fe_cuda_free_energy_scratch.restype = ctypes.c_int64
        self._misaligned = misaligned

    def kernels(self) -> Kernels:
        return Kernels(
            "cuda_on_cpu",
            "cpu",
            self.free_energy,
            self.reparameterize,
            self.reparameterize_backward,
            self.scale_,
        )

    def _run(self, entry: str, call: ctypes.Structure, guarded: Guarded) -> None:
        function: Callable[..., int] = getattr(self._library, f"fe_cuda_{entry}")
        assert function(ctypes.byref(call), None) == 0
        guarded.check()

    def free_energy(
        self,
        params: Sequence[Tensor],
        target: Tensor | None,
        mask: Tensor | None,
        latent: Sequence[Tensor],
        weight: Tensor | None,
        upstream: Sequence[Tensor],
        likelihood: int,
        reduction: int,
        beta: float,
        needs: int,
        inplace: bool,
        latent_mask: Tensor | None = None,
    ) -> list[Tensor]:
        guarded, scratch = Guarded(self._misaligned), Guarded()
        widest = latent[0] if target is None else target
        rows = widest.shape[0]
        operands = [*params, *latent]
        gradients: list[Tensor | None] = [
            (params[0] if inplace and i == 0 else guarded.empty(operand.shape, operand.dtype))
            if needs >> i & 1
            else None
            for i, operand in enumerate(operands)
        ]
        out = [guarded.empty((rows,) if reduction == 0 else (), torch.float32) for _ in range(3)]
        described = [_operand(*pair) for pair in zip(operands, gradients, strict=True)]
        call = FreeEnergyCall(
            params=tuple(described[: len(params)]),
            latent=tuple(described[len(params) :]),
            target=Operand() if target is None else _operand(target, None),
            mask=_address(mask),
            mask_stride=0 if mask is None else mask.stride(0),
            latent_mask=_address(latent_mask),
            latent_mask_stride=0 if latent_mask is None else latent_mask.stride(0),
            weight=_address(weight),
            upstream=tuple(_address(u) for u in upstream) or (None, None),
            out=tuple(map(_address, out)),
            rows=rows,
            columns=widest.shape[1] if params else 0,
            latents=latent[0].shape[1] if latent else 0,
            classes=params[0].shape[2] if likelihood == CATEGORICAL and params else 0,
            beta=beta,
            n_params=len(params),
            n_latent=len(latent),
            likelihood=likelihood,
            reduction=reduction,
        )
        needed = self._library.fe_cuda_free_energy_scratch(ctypes.byref(call))
        call.scratch = scratch.empty((needed,), torch.uint8).data_ptr()
        self._run("free_energy", call, guarded)
        scratch.check()
        return [*out, *(g for g in gradients if g is not None)]

    def reparameterize(
        self, mean: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int, samples: int
    ) -> Tensor:
        guarded = Guarded(self._misaligned)
        z = guarded.empty((samples, *mean.shape), mean.dtype)
        call = ReparameterizeCall(
            mean=mean.data_ptr(),
            logvar=logvar.data_ptr(),
            z=z.data_ptr(),
            rows=mean.shape[0],
            latents=mean.shape[1],
            samples=samples,
            offset=offset,
            seed=seed,
            stream=stream,
            step=step,
            dtype=DTYPE_CODES[mean.dtype],
            logvar_dtype=DTYPE_CODES[logvar.dtype],
        )
        self._run("reparameterize", call, guarded)
        return z

    def reparameterize_backward(
        self, grad: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int
    ) -> list[Tensor]:
        guarded = Guarded(self._misaligned)
        results = [guarded.empty(logvar.shape, dtype) for dtype in (grad.dtype, logvar.dtype)]
        call = ReparameterizeCall(
            logvar=logvar.data_ptr(),
            grad=grad.data_ptr(),
            grad_mean=results[0].data_ptr(),
            grad_logvar=results[1].data_ptr(),
            rows=logvar.shape[0],
            latents=logvar.shape[1],
            samples=grad.shape[0],
            offset=offset,
            seed=seed,
            stream=stream,
            step=step,
            dtype=DTYPE_CODES[grad.dtype],
            logvar_dtype=DTYPE_CODES[logvar.dtype],
        )
        self._run("reparameterize_backward", call, guarded)
        return results

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        assert self.scaled(tensors, factor) == 0

    def scaled(self, tensors: Sequence[Tensor], factor: Tensor) -> int:
        """The error code of `scale_`."""
        call = ScaleCall(factor=factor.data_ptr(), n_tensors=len(tensors))
        for i, tensor in enumerate(tensors[:8]):
            call.tensors[i] = ScaledTensor(tensor.data_ptr(), tensor.numel(), DTYPE_CODES[tensor.dtype])
        return int(self._library.fe_cuda_scale(ctypes.byref(call), None))
