"""What several processes of a ``torch.distributed`` group need to be as one: a batch or particles in parts.

Functions here take the default group where ``process_group`` is None, as torch's own do, and in a script that runs
alone are those of one process. All that exchange something are collectives: every rank of the group calls them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fekernels.distributed import cost
    from fekernels.distributed.batches import batch_mean, batch_offset, share
    from fekernels.distributed.particles import median_bandwidth, pairwise_sq_dist_median, svgd_direction
    from fekernels.distributed.zero import streams_of

__all__ = [
    "batch_mean",
    "batch_offset",
    "cost",
    "median_bandwidth",
    "pairwise_sq_dist_median",
    "share",
    "streams_of",
    "svgd_direction",
]

_LATER = {
    "batch_mean": "batches",
    "batch_offset": "batches",
    "median_bandwidth": "particles",
    "pairwise_sq_dist_median": "particles",
    "share": "batches",
    "streams_of": "zero",
    "svgd_direction": "particles",
}


if not TYPE_CHECKING:  # or a name that does not exist would be Any

    def __getattr__(name: str) -> Any:
        if name == "cost":
            return importlib.import_module(f"{__name__}.cost")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
