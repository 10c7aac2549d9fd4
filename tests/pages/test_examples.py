"""Every script of docs/examples runs in its quick form, and says what the pages say of it."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gallery
from tests.support import ROOT

EXAMPLES = sorted(
    path
    for path in (ROOT / "docs" / "examples").glob("*.py")
    if not path.stem.startswith("trainer_")  # run in distributed/test_examples.py, on one process and on two
)


def vae_digits(printed: str, bars: str) -> None:
    found = re.search(r"free energy ([\d.]+) .* energy ([\d.]+) \+ KL ([\d.]+)", printed)
    other = re.search(r"untrained ([\d.]+); .* samples: ([\d.]+)", printed)
    assert found and other, printed
    free_energy, energy, kl = map(float, found.groups())
    untrained, evidence = map(float, other.groups())
    assert abs(free_energy - energy - kl) < 0.02
    assert kl > 0.5 and free_energy < 0.75 * untrained  # it learned, and uses its latents
    assert free_energy - 4 < evidence < free_energy  # the tighter bound of the two
    assert "300/300" in bars


def posterior_band(printed: str, bars: str) -> None:
    assert "Nothing measured speaks against these samples" in printed
    ratios = re.findall(r"sd over the exact sd, .*: ([\d.]+) to ([\d.]+)", printed)
    assert len(ratios) == 2 and all(0.85 < float(a) and float(b) < 1.2 for a, b in ratios)


def vae(printed: str, bars: str) -> None:
    rows = dict(re.findall(r"^\| (models.VAE|plain torch) \| (.*) \|$", printed, re.MULTILINE))
    free_energy, refined, evidence, _ = map(float, rows["models.VAE"].split(" | "))
    assert evidence < refined < free_energy < 40  # 44 is what 64 fair coins have
    other = [cell.strip() for cell in rows["plain torch"].split("|")]
    assert abs(float(other[0]) - free_energy) < 1 and other[1] == "" and float(other[2]) < float(other[0])
    gain = re.search(r"gains ([\d.]+) nats a digit, .*; (\d+) of 297 are worse", printed)
    assert gain and float(gain[1]) > 0.01 and int(gain[2]) == 0
    assert len(re.findall(r"us a digit, peak", printed)) == 2 and "latents active" in printed
    assert "epoch 4/4" in bars


def views(printed: str, bars: str) -> None:
    values = re.findall(r"step 55: ([\d.]+) = ([\d.]+) \+ (-?[\d.]+)", printed)
    assert len(values) == 4 and len({value for value, _, _ in values}) <= 2  # but for the last digit
    assert all(abs(float(value) - float(a) - float(b)) < 1e-4 for value, a, b in values)
    assert printed.count("regulariser") == 2 and "60/60" in bars


def messages(printed: str, bars: str) -> None:
    shares = dict(re.findall(r"(sigmoid|ReLU): the first layer is sent ([\d.e-]+) of", printed))
    assert float(shares["sigmoid"]) < 0.01 < float(shares["ReLU"])
    assert bars.count("60/60") >= 2  # a bar may draw its end twice


def svgd_collapse(printed: str, bars: str) -> None:
    rows = re.findall(r"^\| ([^|(]+) \| ([\d.]+) \| ([\d.]+) \|$", printed, re.MULTILINE)
    table = {name: (float(one), float(ten)) for name, one, ten in rows}
    assert len(table) == 13 and "26/26" in bars
    assert table["median bandwidth"][0] > 0.9 and table["median bandwidth"][1] < 0.4
    assert table["16 times the median"][1] > 0.9
    assert 0.8 < table["kernel noise"][1] < 1.2


def distributed_particles(printed: str, bars: str) -> None:
    assert "1 processes, 50 particles" in printed and "every bit of every particle is the same" in printed
    rows = dict(re.findall(r"^\| (one particle|all 50) \| ([\d.]+) \|", printed, re.MULTILINE))
    assert (
        float(rows["all 50"]) > 0.95 and len(re.findall(r"^\| (?:mean|worst) ", printed, re.MULTILINE)) == 5
    )


def svgd_posteriors(printed: str, bars: str) -> None:
    for line in re.findall(r"^banana.*", printed, re.MULTILINE):
        found = [(float(a), float(b)) for a, b in re.findall(r"(-?[\d.]+) \( *(-?[\d.]+)\)", line)]
        assert len(found) == 4 and all(abs(a - b) < 0.2 for a, b in found), line
    shares = [
        [float(share) for share in re.findall(r"([\d.]+) \(", line)]
        for line in re.findall(r"^shares.*: (.*)$", printed, re.MULTILINE)
    ]
    assert shares[0] == [1.0, 0.0, 0.0] and min(shares[1]) > 0.1
    assert bars.count("300/300") >= 4  # a bar may draw its end twice


def svgd_ensemble(printed: str, bars: str) -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if re.match(r"\| (one|plain|SVGD)", line)
    ]
    assert [row[0] for row in rows] == ["one network", "plain ensemble", "SVGD, T = 1/N", "SVGD, T = 30/N"]
    assert all(float(row[1]) > 0.85 and float(row[2]) < 0.4 for row in rows)
    assert float(rows[3][7]) > float(rows[1][7])  # disagreement tells more where members repel each other
    assert "360/360" in bars


def uncertainty(printed: str, bars: str) -> None:
    rows = re.findall(
        r"^\| ([A-Z][^|]*|ensemble) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) \|", printed, re.MULTILINE
    )
    methods = [
        "Adam", "ensemble", "LangevinAdam", "SGLD", "VariationalAdam, natural", "VariationalAdam, reparam", "SVGD"
    ]  # fmt: skip
    assert [row[0] for row in rows] == 2 * methods
    assert all(float(row[1]) < 0.95 and float(row[2]) < 2.31 for row in rows)  # no worse than guessing
    assert rows[7][4] == "" and float(rows[8][4]) > 0.5  # one network of a regression has no spread
    assert "14/14" in bars


def rbm_digits(printed: str, bars: str) -> None:
    (exact,) = re.findall(r"exact over 2\^16 states: ([\d.]+)", printed)
    found = re.findall(r"(?:annealed|in reverse|from both): ([\d.]+) \+- ([\d.]+)", printed)
    assert len(found) == 3 and all(
        abs(float(log_z) - float(exact)) < 4 * float(se) < 0.1 for log_z, se in found
    )
    (likelihoods,) = re.findall(r"pixels (-[\d.]+), the machine (-[\d.]+)", printed)
    assert float(likelihoods[1]) > float(likelihoods[0]) + 3 and "12/12" in bars


def annealing(printed: str, bars: str) -> None:
    (exact,) = map(float, re.findall(r"log Z by quadrature (-[\d.]+);", printed))
    rows = [
        [float(x) for x in re.findall(r"-?[\d.]+", line)] for line in re.findall(r"^\| \d.*", printed, re.M)
    ]
    assert [row[0] for row in rows] == [3, 10, 30] and "3/3" in bars
    for _, forward, error, effective, *_, both, se in rows:
        assert abs(forward - exact) < 4 * error < 1 and 20 < effective < 1000
        assert abs(both - exact) < 4 * se < 4 * error


def landscape(printed: str, bars: str) -> None:
    points = re.findall(
        r"^(\w+) at \((-?[\d.]+), (-?[\d.]+)\): F = ([\d.]+), by hand ([\d.]+)$", printed, re.M
    )
    assert [kind for kind, *_ in points] == ["minimum"] * 2 + ["saddle"] * 2 + ["maximum"]
    assert all(float(found) == pytest.approx(float(exact), abs=1e-6) for *_, found, exact in points)
    (exact,) = map(float, re.findall(r"by quadrature ([\d.]+);", printed))
    means = {name: (float(mean), float(error)) for name, mean, error in re.findall(MEANS, printed)}
    assert list(means) == ["Adam", "LangevinAdam", "SVGD"] and means["Adam"][0] < exact
    assert all(abs(means[name][0] - exact) < 4 * means[name][1] < 0.2 for name in ("LangevinAdam", "SVGD"))
    assert "600/600" in bars and "625/625" in bars


MEANS = r"  (\w+): ([\d.]+) \+- ([\d.]+) over the starts"


def belief_propagation(printed: str, bars: str) -> None:
    rows = [
        [float(cell) for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\| 0\..*", printed, re.MULTILINE)
    ]
    assert len(rows) == 9
    for _, lattice, tree, onsager, gap, _, _, _ in rows:
        assert abs(lattice - tree) < 2e-9 and 0 < gap < 0.02 and abs(lattice - onsager - gap) < 2e-6
    assert "9/9" in bars


def denoise_digits(printed: str, bars: str) -> None:
    found = re.search(r"pixels wrong .*: ([\d.]+) noisy, ([\d.]+) by", printed)
    assert found and float(found[1]) > 0.1 and float(found[2]) < 0.04
    losses = re.search(r"loss ([\d.]+) -> ([\d.]+) nats", printed)
    assert losses and float(losses[2]) < float(losses[1]) and "15/15" in bars


def relevance_retrieval(printed: str, bars: str) -> None:
    rows = {
        row.split(" | ")[0][2:]: re.findall(r"([\d.]+) \(", row)
        for row in re.findall(r"^\| .*", printed, re.M)
    }
    methods = ["dot product", "RelevanceModel"] + (["BM25"] if "no row of BM25" not in printed else [])
    for method in methods:
        mrr, recall, wrong, *_ = map(float, rows[method])
        assert 0.15 < mrr < recall and wrong < 0.95, method  # of 74 contexts: .07 by chance
    told = dict(re.findall(r"^  ([a-z, ]+): ([\d.]+) ", printed, re.MULTILINE))
    assert float(told["wrong, half left out by total variance"]) < 0.7 * float(told["wrong"])
    assert float(told["calibration error"]) < 0.15
    assert "2/2" in bars and "60/60" in bars


def distributed_training(printed: str, bars: str) -> None:
    """Alone: the script itself fails where a bit of the noise differs, on any number of ranks."""
    assert re.search(r"1 ranks, 20 steps: [5-9]\d\.\d% of 360 other digits", printed)  # 10% by chance
    assert "| 1 of 1 | 0 of 3760 weights | 0.0e+00 |" in printed


def distributed_posterior(printed: str, bars: str) -> None:
    assert "NOT to be believed yet" in printed and "32 samples by 1 processes" in printed  # of 4 a chain
    rows = re.findall(r"^ *(?:lowest half|\w+ quarter) +(\d+) +([\d.]+)%", printed, re.MULTILINE)
    assert [int(count) for count, _ in rows] == [84, 42, 43]
    assert float(rows[0][1]) > 98 and float(rows[0][1]) > float(
        rows[2][1]
    )  # it errs where its samples disagree


def counts(printed: str, bars: str) -> None:
    (truth,) = map(float, re.findall(r"means known: ([\d.]+) nats", printed))
    rows = {
        name: tuple(map(float, values))
        for name, *values in re.findall(
            r"^(\w+): free energy ([\d.]+), groups ([\d.]+), batches (-?[\d.]+)$", printed, re.M
        )
    }
    poisson, binomial, inflated = (
        rows[name] for name in ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
    )
    # What the data are wins, and is the nearest to what nobody can be below but by chance.
    assert truth < inflated[0] < binomial[0] < poisson[0] - 100 and inflated[0] < truth + 25
    assert min(binomial[1], inflated[1]) > 0.6 and all(abs(row[2]) < 0.1 for row in rows.values())
    factors = list(map(float, re.findall(r"dispersion off by a factor of ([\d.]+)", printed)))
    assert len(factors) == 2 and 1 < factors[1] < factors[0] < 3
    assert bars.count("234/234") >= 3  # a bar may draw its end twice


def sequence_vae(printed: str, bars: str) -> None:
    """The script itself fails where padding matters."""
    (moved,) = map(
        float, re.findall(r"padding change free energy and gradients by ([\de+-]+)$", printed, re.M)
    )
    assert moved < 1e-5
    found = re.search(r"^500 held-out words of \d+: ([\d.]+) nats a letter", printed, re.M)
    assert found and 2 < float(found[1]) < 3.1  # 26 letters that are as frequent: 3.26
    rows = re.findall(
        r"^ ?(\d+) letters: ([\d.]+) nats each, ([\d.]+) wrong; (\w+), (\w+), (\w+)$", printed, re.M
    )
    assert [int(row[0]) for row in rows] == list(range(3, 13))
    assert all(len(word) == int(row[0]) for row in rows for word in row[3:])
    assert "60/60" in bars


def transformer_head(printed: str, bars: str) -> None:
    assert "NOT to be believed yet" in printed and "burn_in 50" in printed  # which a run this short is not
    rows = {
        row[0]: list(map(float, row[1].split(" | ")))
        for row in re.findall(r"^\| ([A-Za-z_, ]+) \| ([\d. |]+) \|$", printed, re.M)
    }
    assert list(rows) == ["Adam", "Adam, prior", "VariationalAdam", "sample_posterior"]
    assert all(row[0] < 0.78 and len(row) == 6 for row in rows.values())  # .875 by chance
    nll = [row[1] for row in rows.values()]
    assert nll[0] > nll[1] > nll[2] and nll[3] < nll[1] + 0.05  # the last is of a run cut short
    # Draws disagree about what they do not know. The snippets are another Python's, other numbers.
    assert sum(rows["VariationalAdam"][3:]) > sum(rows["Adam"][3:]) + 0.05
    assert "40/40" in bars


def svgd_nuts(printed: str, bars: str) -> None:
    rows = {
        name: tuple(map(float, values))
        for name, *values in re.findall(
            r"^\| (\w[\w ]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) \|", printed, re.M
        )
    }
    assert list(rows) == ["median", "4 x median", "16 x median", "linear", "noise"]
    assert rows["median"][3] < 1 and rows["median"][1] < 0.6  # it is too narrow everywhere
    assert rows["linear"][1] < 0.3 and 0.9 < rows["linear"][2] and rows["linear"][3] < 1.4
    assert 0.75 < rows["noise"][2] and rows["noise"][3] < 1.35
    assert bars.count("150/150") >= 5  # a bar may draw its end twice


SAYS: dict[str, Callable[[str, str], None]] = {
    check.__name__: check
    for check in (
        posterior_band,
        vae_digits,
        vae,
        views,
        messages,
        svgd_collapse,
        svgd_posteriors,
        svgd_ensemble,
        uncertainty,
        rbm_digits,
        annealing,
        landscape,
        belief_propagation,
        denoise_digits,
        relevance_retrieval,
        distributed_training,
        distributed_particles,
        distributed_posterior,
        counts,
        sequence_vae,
        transformer_head,
        svgd_nuts,
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, which has imported torch; its picture is in the working directory."""
    source = "".join(path.read_text() for path in gallery.parts(example))
    needed = r"^(?:from|import) (sklearn|matplotlib|fekernels\.plots)\b"
    for package in re.findall(needed, source, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(example.parent)  # where a program finds its parts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--quick"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example), run_name="__main__")
    printed, bars = capsys.readouterr()
    assert not ended.value.code, bars
    if example.stem in SAYS:
        SAYS[example.stem](printed, bars)
    pictures = list(tmp_path.iterdir())
    assert bool(pictures) == ("--out" in example.read_text())
    for picture in pictures:
        assert picture.read_bytes().startswith((b"\x89PNG", b"<?xml")) and picture.stat().st_size > 20_000


def test_every_check_has_its_example() -> None:
    assert SAYS.keys() <= {path.stem for path in EXAMPLES}
