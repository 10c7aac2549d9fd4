"""Seeds that nobody gave: drawn, and one for all processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["draw_seed", "has_ranks", "seed_of_rank_0"]


def draw_seed() -> int:
    """63 bits from torch's default generator."""
    return int(torch.randint(0, (1 << 63) - 1, (), device="cpu"))


def has_ranks() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def seed_of_rank_0(seed: int) -> int:
    """Rank 0's ``seed``, on every rank of the default process group.

    A collective: every rank calls it. Ranks are often seeded apart, so that they see different data, and replicas whose
    noise differs drift apart without a word.
    """
    kinds = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    box = torch.tensor([seed], dtype=torch.int64, device="cpu" if "cpu" in kinds else kinds[0])
    dist.broadcast(box, src=0)
    return int(box.item())
