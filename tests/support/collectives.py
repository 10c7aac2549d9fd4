"""What collectives are asked for, as PyTorch's dispatcher sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collectives"]


class Collectives(TorchDispatchMode):
    """Inside, every collective of this process is noted, also those that DDP and FSDP2 start from C++.

    Attributes:
        seen: by name, bytes of the largest tensor of each: what an all-gather makes, what a reduce-scatter or an
            all-reduce takes. Floating point alone: DDP tells its ranks a few integers about its buckets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes = [
                t.numel() * t.element_size()
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            ]
            if sizes:
                name = func.name().split("::")[1].strip("_").removesuffix("_base")
                self.seen.setdefault(name, []).append(max(sizes))
        return func(*args, **(kwargs or {}))
