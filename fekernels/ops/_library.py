"""The one library object that the operators' schemas belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.torch_internals import argument_names

LIBRARY = torch.library.Library("fekernels", "DEF")


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    """``fake`` for operators on the meta device and for tracing; refuses tensors of several devices.

    One tensor on the meta device among the arguments is enough to bring a call of real ones here, and what it returns
    would be memory that nobody has written.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        made = fake(*args, **kwargs)  # first: what it checks itself it knows better names for
        # Looked up here, since the import of the package would pay for it.
        names = argument_names(getattr(torch.ops.fekernels, name).default)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        device = None
        for argument, value in given.items():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                device = tensor.device if device is None else device
                if tensor.device != device:
                    raise ValueError(
                        f"{name}: {argument} must be on {device} like the others; got {tensor.device}"
                    )
        return made

    torch.library.register_fake(f"fekernels::{name}", checked, lib=LIBRARY)


def define_in_place(
    schema: str, implementation: Callable[..., None], check: Callable[..., None] | None = None
) -> None:
    """Define an operator that only writes to its arguments, for every device; the implementation picks the backend.

    ``check``: of the arguments, where nothing is written: on the meta device and in tracing.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _register_fake(name, check or (lambda *args, **kwargs: None))


def define_functional(schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> str:
    """Define an operator that returns new tensors, for every device; ``fake`` gives their shapes. Returns its name."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _register_fake(name, fake)
    return f"fekernels::{name}"
