"""The one library object that the operators' schemas belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fekernels", "DEF")


def define_in_place(schema: str, implementation: Callable[..., None]) -> None:
    """Define an operator that only writes to its arguments, for every device; the implementation picks the backend."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fekernels::{name}", lambda *args, **kwargs: None, lib=LIBRARY)


def define_functional(schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> str:
    """Define an operator that returns new tensors, for every device; ``fake`` gives their shapes. Returns its name."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fekernels::{name}", fake, lib=LIBRARY)
    return f"fekernels::{name}"
