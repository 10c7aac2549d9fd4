"""What several processes of a ``torch.distributed`` group need to be as one: a batch or particles in parts.

Functions here take the default group where ``process_group`` is None, as torch's own do, and in a script that runs
alone are those of one process. All that exchange something are collectives: every rank of the group calls them.
"""

from typing import TYPE_CHECKING

from fekernels import _lazy

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

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            ".batches": ["batch_mean", "batch_offset", "share"],
            ".particles": ["median_bandwidth", "pairwise_sq_dist_median", "svgd_direction"],
            ".zero": ["streams_of"],
        },
        ["cost"],
    )
