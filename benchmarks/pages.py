"""``python -m benchmarks.pages RESULTS.json``: README's rows and chart, and docs/benchmarks.md's tables and charts.

RESULTS.json is what ``python -m fekernels bench --json`` wrote. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fekernels.bench import free_energy, optimizers, peers, report, stein, vae
from fekernels.bench.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKS, IMAGES = ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/images"


class Line(NamedTuple):
    """A row of README: which it is in the registry, by its case and contestants, and how README calls both sides."""

    case: str
    contestant: str
    peer: str
    ours: str
    theirs: str


# Those that show what the package is for, then those that it loses.
ADAM, MOMENTUM = peers.ADAM, f"{optimizers.HOT}, momentum"
LINES = (
    Line("optimizers/large", optimizers.COLD, ADAM, "`LangevinAdam`, T = 0, 25.6M weights", f"`{ADAM}`"),
    Line("optimizers/large", MOMENTUM, peers.ADAM_WITH_NOISE,
         "`LangevinAdam`, T > 0, 25.6M weights", "the same and noise by `randn_like`"),
    Line("optimizers/many_of_1000", optimizers.COLD, ADAM, "`LangevinAdam`, T = 0, 200 tensors of 1,000", f"`{ADAM}`"),
    Line("optimizers/dead_units", optimizers.COLD, ADAM, "`LangevinAdam`, T = 0, half of all units dead", f"`{ADAM}`"),
    Line("free_energy/large_bernoulli", free_energy.OURS, free_energy.COMPILED,
         "`free_energy` and gradients, 8192 x 4096", "`torch.compile` of the plain lines"),
    Line("stein/middle", stein.OURS, stein.PLAIN,
         "`svgd_direction`, 10,000 particles, d = 64", "matrix products, in place"),
    Line("optimizers/in_cache", optimizers.HOT, ADAM, "`LangevinAdam`, T > 0, 640k weights in cache",
         f"`{ADAM}`, which makes no noise"),
    Line("vae/training", vae.OURS, vae.COMPILED.removesuffix(", Adam") + vae.FUSED,
         "`models.VAE`, a step on 128 digits", f"`torch.compile` of it, `{ADAM}`"),
)  # fmt: skip
NOISE = Line("optimizers/large", MOMENTUM, ADAM, "A step of 25.6M weights at T > 0",
             f"`{ADAM}`, which makes no noise")  # fmt: skip

THEMES = {
    "light": dict(ink="#1f2328", paper="#ffffff", won="#4c8ed9", lost="#c2571a"),
    "dark": dict(ink="#e6edf3", paper="#0d1117", won="#5aa2f2", lost="#f0883e"),
}


# The parts of docs/benchmarks.md, in its order.
TITLES = {**{name: family.title for name, family in FAMILIES.items()}, "once": "Once"}
# Read on a white page as on a dark one: one picture a family for both.
NEUTRAL = dict(ink="#7d8590", won="#4c8ed9", lost="#d9703a", floor="#7d8590")


def rows(results: Mapping[str, Any], lines: Sequence[Line] = LINES) -> list[tuple[Line, dict[str, Any]]]:
    """README's rows in the results. KeyError for one that is not there, or that was not measured."""
    measured = {
        (row["name"], row["contestant"], row["peer"]): row
        for family in FAMILIES
        for row in results.get(family, ())
        if "ratio" in row
    }
    found = []
    for line in lines:
        if line[:3] not in measured:
            raise KeyError(
                f"pages: the results must have {line.contestant!r} of {line.case!r} beside {line.peer!r}, measured"
            )
        found.append((line, measured[line[:3]]))
    return found


def noise(results: Mapping[str, Any]) -> str:
    """What sampling costs beside an Adam that makes no noise, where the weights are in memory: told below the rows."""
    ((_, row),) = rows(results, (NOISE,))
    return f"{NOISE.ours} takes {row['ratio']:.2f} times as long as {NOISE.theirs}"


def lost(row: Mapping[str, Any]) -> bool:
    """Slower than the peer by as much as the two digits of a table show."""
    return row["ratio"] >= 1.005


def table(results: Mapping[str, Any]) -> str:
    lines = ["| ours | beside | theirs | ours | ratio |", "|---|---|---|---|---|"]
    for line, row in rows(results):
        ratio = f"**{row['ratio']:.2f}**" if lost(row) else f"{row['ratio']:.2f}"
        theirs, ours = (f"{row[key]:.3g} ms" for key in ("peer_ms", "ours_ms"))
        lines.append(f"| {line.ours} | {line.theirs} | {theirs} | {ours} | {ratio} |")
    lines.append(f"\n{machine(results)}; medians of rounds in turn; in bold what is lost. {noise(results)}.")
    return "\n".join(lines)


def machine(results: Mapping[str, Any]) -> str:
    """Where and when it was measured, in a line."""
    facts = results["machine"]
    return (
        f"{facts['cpu'].replace('(R)', '')}, {facts['cores']} cores, {facts['threads']} threads, "
        f"torch {facts['torch'].split('+')[0]}, {facts['date'][:10]}"
    )


def sections(results: Mapping[str, Any]) -> str:
    """The body of docs/benchmarks.md: of each family its chart and its tables."""
    made = report.tables(dict(results))
    parts = [
        f"{machine(results)}, load {results['machine']['load']:g} at the start: {report.summary(dict(results))}."
    ]
    for family, title in TITLES.items():
        if family in made:
            parts.append(f"## {title}")
            if drawn(results, family):
                alt = f"{title}: the time of each peer, and of the floor, as multiples of ours."
                parts.append(f"![{alt}](images/benchmarks/{family}.svg)")
            parts.append(made[family])
    return "\n\n".join(parts)


def drawn(results: Mapping[str, Any], family: str) -> dict[str, list[dict[str, Any]]]:
    """The measured rows of a family by case, as its chart has them; those of one case share its line."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in results.get(family, ()):
        if "ratio" in row:
            cases.setdefault(row["case"], []).append(row)
    return cases


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the comments of that name. ValueError where they are not there once."""
    begin, end = f"<!-- {name}: made by benchmarks/pages.py -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"pages: the page must have {begin!r} and {end!r} once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def chart(results: Mapping[str, Any], path: Path, colors: Mapping[str, str]) -> None:
    """Bars of the ratios on a logarithmic axis, from 1, where both take the same time."""
    import matplotlib.pyplot as plt

    found = rows(results)[::-1]
    with plt.rc_context({"svg.hashsalt": "fekernels", "font.size": 10.5, "text.color": colors["ink"]}):
        figure, ax = plt.subplots(figsize=(8.4, 3.0), layout="constrained", facecolor=colors["paper"])
        ax.set_facecolor(colors["paper"])
        for y, (_, row) in enumerate(found):
            speed = 1 / row["ratio"]
            ax.barh(y, speed - 1, left=1, height=0.62, color=colors["lost" if lost(row) else "won"])
            ax.text(max(speed, 1) * 1.04, y, f"{speed:.3g} x", va="center", fontsize=9.5)
        ax.set_xscale("log")
        ticks = [0.5, 1, 2, 4, 8, 16]
        ax.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
        ax.set_xlim(0.5, 30)
        ax.set_yticks(range(len(found)), [line.ours.replace("`", "") for line, _ in found])
        ax.tick_params(colors=colors["ink"], length=0, which="both")
        ax.minorticks_off()
        ax.axvline(1, color=colors["ink"], lw=0.8)
        ax.spines[:].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def family_chart(results: Mapping[str, Any], family: str, path: Path) -> None:
    """A line a case: ours at 1, its peers where their times are, the run's floor as a tick left of ours."""
    import matplotlib.pyplot as plt

    cases = drawn(results, family)
    ink = NEUTRAL["ink"]
    with plt.rc_context({"svg.hashsalt": "fekernels", "font.size": 9.5, "text.color": ink}):
        figure, ax = plt.subplots(figsize=(8.4, 0.75 + 0.27 * len(cases)), layout="constrained")
        for y, found in enumerate(cases.values()):
            times = [1 / row["ratio"] for row in found]
            ax.plot([min(1, *times), max(1, *times)], [y, y], color=ink, lw=0.8, alpha=0.6, zorder=1)
            for x, row in zip(times, found, strict=True):
                ax.plot(x, y, "o", ms=6, color=NEUTRAL["lost" if lost(row) else "won"], zorder=3)
            for row in found[:1]:
                if "floor" in row:
                    ax.plot(1 / row["of_floor"], y, "|", ms=11, mew=1.8, color=NEUTRAL["floor"], zorder=2)
        ax.axvline(1, color=ink, lw=1.0)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} x")
        ax.set_yticks(range(len(cases)), list(cases))
        ax.set_ylim(len(cases) - 0.4, -0.6)
        ax.set_xlabel("time of a peer (dot) and of the floor (tick), ours = 1", color=ink)
        ax.tick_params(colors=ink, length=0, which="both")
        ax.grid(axis="x", which="major", color=ink, alpha=0.25, lw=0.6)
        ax.spines[:].set_visible(False)
        figure.savefig(path, metadata={"Date": None}, transparent=True)
        plt.close(figure)


def pages(results: Mapping[str, Any]) -> dict[Path, str]:
    """The two pages as they are to be."""
    return {
        README: between(README.read_text(), "speed", table(results)),
        BENCHMARKS: between(BENCHMARKS.read_text(), "tables", sections(results)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("results", type=Path, help="what python -m fekernels bench --json wrote")
    results = json.loads(parser.parse_args(argv).results.read_text())
    for path, text in pages(results).items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    for theme, colors in THEMES.items():
        path = IMAGES / f"speed-{theme}.svg"
        chart(results, path, colors)
        print(f"written: {path.relative_to(ROOT)}")
    (IMAGES / "benchmarks").mkdir(exist_ok=True)
    for family in TITLES:
        if drawn(results, family):
            path = IMAGES / "benchmarks" / f"{family}.svg"
            family_chart(results, family, path)
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
