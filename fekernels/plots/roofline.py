"""How near each case of the benchmark comes to what no version can beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fekernels.plots.panels import GREY, panels

__all__ = ["roofline"]

OURS, PEER = "#1f5a93", "#b5523b"


def roofline(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Times over the floor of their own run: 1 is a copy of the same bytes, or bare arithmetic of the same count.

    Args:
        rows: as ``python -m fekernels bench --json`` writes them: "case", "peer", "ours_ms" and "peer_ms", "floor_ms"
            and "floor" ("memory" or "arithmetic"). Rows without a floor are left out; peers of one case share its line.

    Raises:
        ValueError: no row has a floor.
    """
    known = [row for row in rows if row.get("floor_ms")]
    if not known:
        raise ValueError(f"roofline: rows must hold one with floor_ms; got {len(rows)} without")
    cases = list(dict.fromkeys(row["case"] for row in known))
    figure, axes = panels(1, 1, (9, 1 + 0.3 * len(cases)))
    ax = axes[0, 0]
    for row in known:
        at = len(cases) - 1 - cases.index(row["case"])
        ours, peer = (row[key] / row["floor_ms"] for key in ("ours_ms", "peer_ms"))
        ax.plot([ours, peer], [at, at], color=GREY, lw=1, zorder=1)
        ax.plot(peer, at, "o", color=PEER, ms=5)
        ax.plot(ours, at, "o", color=OURS, mfc=OURS if row["floor"] == "memory" else "white", ms=6, zorder=3)
    ax.axvline(1, color=GREY, ls="--", lw=1)
    ax.set_xscale("log")
    ax.set(xlabel="time over the floor of the same run", yticks=range(len(cases)), yticklabels=cases[::-1])
    for color, face, label in (
        (OURS, OURS, "ours, floor: memory"), (OURS, "white", "ours, floor: arithmetic"), (PEER, PEER, "peers")
    ):  # fmt: skip
        ax.plot([], [], "o", color=color, mfc=face, label=label)
    ax.legend(frameon=False, fontsize=8)
    return figure
