"""``philox_bits``, ``philox_uniform``, ``philox_normal``: fill a tensor with counter-based noise.

They fill an ``out`` tensor, since an operator without a tensor argument would never reach a device's kernel. ``draw``
makes a tensor of noise by them, as functions of this package do, with what ``torch.vmap`` asks for by ``randomness``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime import backends
from fekernels._runtime.torch_internals import CHUNKED_VMAP, transforms_active
from fekernels.ops._library import LIBRARY, define_functional, define_in_place
from fekernels.ops.noise_key import LAST_INDEX, check_key
from fekernels.ops.plain_memory import LOWEST, check_storage

__all__ = ["DTYPES", "draw", "fill", "in_front", "instances", "refuse_chunks"]

DTYPES = {"bits": torch.int32, "uniform": torch.float32, "normal": torch.float32}


def _check_out(kernel: str, out: Tensor) -> None:
    dtype = DTYPES[kernel.removeprefix("philox_")]
    if out.dtype != dtype:
        raise ValueError(f"{kernel}: out must be {dtype}; got {out.dtype}")
    if out.layout is not torch.strided or not out.is_contiguous():
        got = f"strides {out.stride()}" if out.layout is torch.strided else f"layout {str(out.layout)[6:]}"
        raise ValueError(f"{kernel}: out must be contiguous; got {got} for shape {tuple(out.shape)}")


def _filler(kernel: str) -> Callable[..., None]:
    def fill(out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> None:
        _check_out(kernel, out)
        check_key(kernel, stream, step, offset, purpose, last=LAST_INDEX - out.numel())
        if out.data_ptr() < LOWEST:
            check_storage(f"{kernel}: out", out)
        backend = backends.choose(out.device.type)
        backends.implementation(kernel, backend)(out, seed, stream, step, offset, purpose)

    return fill


def _checker(kernel: str) -> Callable[..., None]:
    """Of what is known without values: the numbers of the key may be symbols."""
    return lambda out, *key: _check_out(kernel, out)


def fill(kind: str, out: Tensor, seed: int, stream: int, step: int, offset: int, purpose: int) -> Tensor:
    """``out``, contiguous and of the dtype of ``kind``, filled."""
    getattr(torch.ops.fekernels, f"philox_{kind}")(out, seed, stream, step, offset, purpose)
    return out


def refuse_chunks() -> None:
    """RuntimeError inside ``torch.vmap(chunk_size=...)``, which does not say which instances a chunk holds.

    Every chunk would number its instances from 0 and so give them the noise of the first one's.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == CHUNKED_VMAP:
            raise RuntimeError(
                "vmap: counter-based noise with randomness='different' cannot be made in chunks, of which each would"
                " repeat the noise of the first; leave chunk_size out, or map over chunks with an offset for each"
            )
        frame = frame.f_back


def instances(device: torch.device) -> Tensor:
    """An empty tensor, batched at every level of ``torch.vmap`` that gives its instances noise of their own.

    PyTorch's own draw of no numbers tells: it raises under randomness="error", is one for all under "same", and one an
    instance under "different". It takes nothing from the default generator.
    """
    return torch.rand(0, device=device)


def draw(
    kind: str,
    shape: Sequence[int],
    seed: int,
    stream: int,
    step: int,
    offset: int,
    purpose: int,
    device: torch.device,
) -> Tensor:
    """Noise of ``kind`` ("bits", "uniform" or "normal") and ``shape``, its first element that of index ``offset``.

    Under ``torch.vmap`` with randomness="different" the instances continue each other: instance i begins at
    ``offset + i * numel``, and an outer level's instances hold an inner's.
    """
    if transforms_active():
        return torch.ops.fekernels.draw(instances(device), kind, shape, seed, stream, step, offset, purpose)
    out = torch.empty(shape, dtype=DTYPES[kind], device=device)
    return fill(kind, out, seed, stream, step, offset, purpose)


def in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the batch dimension that a rule of vmap speaks of as the first one."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _empty(probe: Tensor, kind: str, shape: Sequence[int], *_: int) -> Tensor:
    if kind not in DTYPES:
        raise ValueError(f"draw: kind must be one of {', '.join(DTYPES)}; got {kind!r}")
    return torch.empty(shape, dtype=DTYPES[kind], device=probe.device)


def _draw(probe: Tensor, kind: str, shape: Sequence[int], *key: int) -> Tensor:
    if min(shape, default=0) < 0:
        raise ValueError(f"draw: shape must not be negative; got {tuple(shape)}")
    return fill(kind, _empty(probe, kind, shape), *key)


def _draw_instances(
    info: Any, in_dims: Any, probe: Tensor, kind: str, shape: Sequence[int], *key: int
) -> Any:
    refuse_chunks()
    inner = probe.movedim(in_dims[0], 0)[0]
    return torch.ops.fekernels.draw(inner, kind, [info.batch_size, *shape], *key), 0


def _fill_instances(kernel: str) -> Callable[..., Any]:
    def fill_instances(info: Any, in_dims: Any, out: Tensor, *key: int) -> Any:
        if info.randomness == "error":
            raise RuntimeError(
                f"vmap: called random operation {kernel} while in randomness error mode. Please either use the 'same'"
                " or 'different' randomness flags on vmap or perform the randomness operation out of vmap"
            )
        whole = out.movedim(in_dims[0], 0)
        _check_out(kernel, whole[0])
        if info.randomness == "different":
            refuse_chunks()
        made = whole if info.randomness == "different" else whole[0]
        made = torch.empty(made.shape, dtype=out.dtype, device=out.device)
        getattr(torch.ops.fekernels, kernel)(made, *key)
        whole.copy_(made)
        return None, None

    return fill_instances


_NUMBERS = "SymInt seed, SymInt stream, SymInt step, SymInt offset, SymInt purpose"
for _kind in DTYPES:
    _kernel = f"philox_{_kind}"
    define_in_place(
        f"{_kernel}(Tensor(a!) out, {_NUMBERS}) -> ()",
        _filler(_kernel),
        _checker(_kernel),
    )
    torch.library.register_vmap(f"fekernels::{_kernel}", _fill_instances(_kernel), lib=LIBRARY)

define_functional(
    f"draw(Tensor probe, str kind, SymInt[] shape, {_NUMBERS}) -> Tensor",
    _draw,
    _empty,
)
torch.library.register_vmap("fekernels::draw", _draw_instances, lib=LIBRARY)
