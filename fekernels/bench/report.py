"""The tables: as text of what was just measured, and the Markdown of what ``--json`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fekernels.bench.registry import FAMILIES, peaks_of

__all__ = ["markdown", "summary", "table", "tables"]

BELOW_FLOOR = "floor"  # instead of NO, where this run's floor is above the aim


def _verdict(row: dict[str, Any]) -> str:
    if row["met"]:
        return "yes"
    return BELOW_FLOOR if row.get("aim_below_floor") else "NO"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios as text; the last columns are the larger floor of the same run and how near ours is to it."""
    pairs = any("pairs_per_ns" in row for row in rows)
    header = f"{'case':51}{'peer = 1':38}{'peer ms':>9}{'ours ms':>9}{'ratio':>7}{'reach':>7}  met  "
    header += f"{'pairs/ns' if pairs else 'GB/s':>9}{'floor ms':>10}  {'floor':12}{'x floor':>7}"
    lines = [header, "-" * len(header)]
    for row in rows:
        start = f"{row['case']:51}{row['peer']:38}"
        if "missing" in row:
            lines.append(f"{start}not measured: {row['missing']}")
            continue
        goal = f"{'-':>7}{'':7}"
        if row["reach"] is not None:
            goal = f"{row['reach']:7.3g}{_verdict(row):>6} "
        rate = row.get("pairs_per_ns") or row.get("gb_per_s")
        told = f"{'-':>9}" if rate is None else f"{rate:9.3f}" if pairs else f"{rate:9.1f}"
        ratio = f"{row['ratio']:7.2f}" if row["ratio"] >= 0.1 else f"{row['ratio']:7.3f}"
        floor = f"{'-':>10}  {'':12}{'':>7}"
        if "floor" in row:
            floor = f"{row['floor_ms']:10.3f}  {row['floor']:12}{row['of_floor']:7.2f}"
        lines.append(f"{start}{row['peer_ms']:9.3f}{row['ours_ms']:9.3f}{ratio}{goal}{told}{floor}".rstrip())
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md, from what ``python -m fekernels bench --json PATH`` wrote: its parts.

    What misses its aim stands in bold, unless the run's own floor is above the aim, which is then told beside it.
    """
    return "\n\n".join(tables(report).values())


def tables(report: dict[str, Any]) -> dict[str, str]:
    """A table, or two, for each part of the report, by the part's name: a family's, or "once"."""
    parts = {}
    for family in FAMILIES:
        found = [_ratios(family, report[family])] if family in report else []
        if peaks_of(family) in report:
            found.append(_peaks(report[peaks_of(family)]))
        if found:
            parts[family] = "\n\n".join(found)
    if "once" in report:
        parts["once"] = _waits(report["once"])
    return parts


def summary(report: dict[str, Any]) -> str:
    """One line: how many rows meet their aims, miss them, or have aims that this machine's floor is above."""
    found = [row for family in FAMILIES for row in report.get(family, ()) if "ratio" in row]
    verdicts = [_verdict(row) for row in found if row["reach"] is not None]
    met, below = (verdicts.count(word) for word in ("yes", BELOW_FLOOR))
    missed = len(verdicts) - met - below
    faster = sum(row["ratio"] < 1 for row in found)
    aims = f"of {len(verdicts)} aims {met} met, {missed} missed, {below} below the floor of this run"
    return f"{faster} of {len(found)} rows faster than the peer; {aims}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _ratios(family: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = _head("case", "peer", "peer ms", "ours ms", "ratio", "aim", "floor", "x floor")
    for row in rows:
        case = row["case"].removeprefix("direction, ") if family == "stein" else row["case"]
        aim = "" if row["reach"] is None else f"{row['reach']:g}"
        if "missing" in row:
            lines.append(_line(case, row["peer"], row["missing"], "", "", aim, "", ""))
            continue
        ratio = f"{row['ratio']:.2g}" if row["ratio"] < 0.1 else f"{row['ratio']:.2f}"
        if row.get("aim_below_floor") and not row["met"]:
            aim = f"{aim}, below the floor"
        elif row["met"] is False:
            ratio = f"**{ratio}**"
        floor = row.get("floor", "")
        near = f"{row['of_floor']:.2f}" if floor else ""
        lines.append(
            _line(case, row["peer"], _ms(row["peer_ms"]), _ms(row["ours_ms"]), ratio, aim, floor, near)
        )
    return "\n".join(lines)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _peaks(rows: Sequence[dict[str, Any]]) -> str:
    lines = _head("peak memory beyond the operands", "by", "MB", "aim")
    for row in rows:
        grown = row["missing"] if "missing" in row else f"{row['growth_mb']:.0f}"
        aim = f"{row['reach_mb']:.0f}" if "reach_mb" in row else ""
        lines.append(_line(row["case"], row["contestant"], grown, aim))
    return "\n".join(lines)


def _waits(rows: Sequence[dict[str, Any]]) -> str:
    lines = _head("once", "seconds", "aim")
    for row in rows:
        seconds = row["missing"] if "missing" in row else f"{row['seconds']:.3g}"
        if row.get("met") is False:
            seconds = f"**{seconds}**"
        lines.append(_line(row["case"], seconds, f"{row['reach_s']:g}"))
    return "\n".join(lines)
