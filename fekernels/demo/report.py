"""What the demo measures and prints: scores, their table and verdict, and the time of one optimizer step."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor

from fekernels.bench.timing import Contestant, Timing, interleave
from fekernels.diagnostics import auroc, calibration
from fekernels.optim import LangevinAdam
from fekernels.posterior import PosteriorReport, PosteriorSamples

ADAM, ENSEMBLE, LANGEVIN, BAYES = "Adam", "ensemble", "T chosen", "T = 1"
TITLES = {
    ADAM: "torch.optim.Adam, tuned",
    ENSEMBLE: "ensemble of such networks",
    LANGEVIN: "sample_posterior, T chosen",
    BAYES: "sample_posterior, T = 1 (Bayes)",
}
LOW_IS_GOOD = ("NLL", "ECE")
# Of the digits tested to those that a split learns from: the splits share digits, and the variance of a mean over them
# is larger by that (Nadeau & Bengio 2003, "Inference for the generalization error", section 3).
TEST_TO_TRAIN = 1097 / 700


@dataclass(frozen=True)
class Outcome:
    """A predictor on one split: the scores, and what the figure pools over splits."""

    scores: dict[str, float]
    clean: tuple[Tensor, Tensor]  # probabilities [n, 10] and labels [n] of the test digits
    shifted: tuple[Tensor, Tensor]  # the same of all shifts of them
    entropies: dict[str, Tensor]


@dataclass(frozen=True)
class SeedResult:
    """One split: what validation chose, how each predictor did, and what the samplers say of themselves."""

    chosen: dict[str, str]
    outcomes: dict[str, Outcome]
    reports: dict[str, PosteriorReport]


def judge(samples: PosteriorSamples, inputs: dict[str, Tensor], labels: Tensor) -> Outcome:
    """Scores on the test digits ("clean"), on all shifts of them, and of telling each shift by the entropy."""
    prediction = samples.predict(torch.cat(list(inputs.values())))
    assert prediction.log_mean is not None and prediction.predictive_entropy is not None
    sizes = [len(value) for value in inputs.values()]
    entropies = dict(zip(inputs, prediction.predictive_entropy.split(sizes), strict=True))
    scores: dict[str, float] = {}
    answers: list[tuple[Tensor, Tensor]] = []
    for prefix, rows, times in (
        ("", slice(sizes[0]), 1),
        ("shifted ", slice(sizes[0], None), len(sizes) - 1),
    ):
        mean, truth = prediction.mean[rows], labels.repeat(times)
        answers.append((mean, truth))
        scores[f"{prefix}accuracy"] = (mean.argmax(1) == truth).double().mean().item()
        scores[f"{prefix}NLL"] = F.nll_loss(prediction.log_mean[rows], truth).item()
        scores[f"{prefix}ECE"] = calibration(mean, truth).error
    for name, value in entropies.items():
        if name != "clean":
            scores[f"AUROC {name}"] = auroc(entropies["clean"], value)
    return Outcome(scores, answers[0], answers[1], entropies)


def table(results: Sequence[SeedResult]) -> str:
    """Mean and standard deviation over the splits of every score of every predictor."""
    columns = list(results[0].outcomes[ADAM].scores)
    digits = len(results[0].outcomes[ADAM].clean[1])
    lines = [f"Test: mean +- standard deviation over {len(results)} splits of {digits} digits"]
    for part in (columns[:6], columns[6:]):
        if part is not columns[:6]:
            lines.append("")
        lines.append(f"{'':31}" + "".join(f"{name:>18}" for name in part))
        for name, title in TITLES.items():
            cells = [_mean_and_spread([r.outcomes[name].scores[column] for r in results]) for column in part]
            lines.append(f"{title:31}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(
        "shifted: rotated, noisy and occluded test digits together; AUROC: of telling those from the"
    )
    lines.append("unchanged ones by the predictive entropy, 0.5 is chance")
    return "\n".join(lines)


def numbers(results: Sequence[SeedResult]) -> dict[str, dict[str, list[float]]]:
    """Every predictor's scores, by name, split by split."""
    columns = list(results[0].outcomes[ADAM].scores)
    return {
        title: {column: [result.outcomes[name].scores[column] for result in results] for column in columns}
        for name, title in TITLES.items()
    }


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def choices(results: Sequence[SeedResult]) -> str:
    """What the validation set chose on each split, and what the runs say of themselves."""
    lines = ["Chosen on the validation set, split by split"]
    for result in results:
        lines.append(f"  Adam: {result.chosen[ADAM]}; sampler: {result.chosen[LANGEVIN]}")
    for name in (LANGEVIN, BAYES):
        found = [result.reports[name] for result in results]
        believed = sum(each.converged for each in found)
        worst, of_loss = (max(getattr(each, key) for each in found) for key in ("rhat_max", "rhat_loss"))
        lines.append(
            f"  {TITLES[name]}: {believed} of {len(found)} runs call themselves converged; R-hat of the weights up to "
            f"{worst:.2f}, of the loss up to {of_loss:.2f}"
        )
    return "\n".join(lines)


def compare(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and the half width of its 95% interval; inf for one pair.

    Student's t with the variance of Nadeau & Bengio (2003), for splits that share most of their data.
    """
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        return differences[0], math.inf
    error = statistics.stdev(differences) * math.sqrt(1 / count + TEST_TO_TRAIN)
    return statistics.mean(differences), float(student_t.ppf(0.975, count - 1)) * error


def _judgement(results: Sequence[SeedResult], column: str, other: str) -> tuple[str, str]:
    """A word and its numbers: how the chosen sampler's score stands to that of `other`."""
    mine, theirs = ([r.outcomes[name].scores[column] for r in results] for name in (LANGEVIN, other))
    difference, width = compare(mine, theirs)
    low_is_good = column.endswith(LOW_IS_GOOD)
    wins = sum((a < b) == low_is_good and a != b for a, b in zip(mine, theirs, strict=True))
    if math.isinf(width):
        return "one split cannot tell", f"{difference:+.4f}"
    if abs(difference) <= width:
        word = "no clear difference"
    else:
        word = "better" if (difference < 0) == low_is_good else "worse"
    return word, f"{difference:+.4f} +- {width:.4f}, {wins} of {len(results)}"


def verdict(results: Sequence[SeedResult]) -> str:
    """Whether sampling beats the tuned point estimate and the ensemble, score by score."""
    columns = list(results[0].outcomes[ADAM].scores)
    judged = {c: {other: _judgement(results, c, other) for other in (ADAM, ENSEMBLE)} for c in columns}
    lines = [
        "T chosen, less the other: mean paired difference, its 95% interval (for splits that share data), splits won",
        f"{'':20}{'tuned Adam':52}the ensemble of as many gradients",
    ]
    for column, pair in judged.items():
        cells = "".join(f"{numbers:29}{word:23}" for word, numbers in pair.values())
        lines.append(f"  {column:18}{cells}".rstrip())
    return "\n".join([*lines, "", *_in_words(judged)])


def _in_words(judged: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    def where(word: str, other: str, columns: Sequence[str]) -> str:
        return ", ".join(column for column in columns if judged[column][other][0] == word)

    columns = list(judged)
    if "one split cannot tell" in judged["NLL"][ADAM]:
        return ["Verdict: one split cannot tell a difference from chance; run more seeds."]
    lines = []
    for other, whom in ((ADAM, "the tuned point estimate"), (ENSEMBLE, "the ensemble")):
        for column in ("NLL", "ECE", "shifted NLL", "shifted ECE"):
            word = judged[column][other][0]
            said = {"better": "Sampling beats", "worse": "Sampling is WORSE than"}
            start = said.get(word, "Sampling does NOT clearly beat")
            lines.append(f"{start} {whom} in {column} ({judged[column][other][1]}).")
        shifts = [column for column in columns if column.startswith("AUROC")]
        lines.append(
            f"Detection of shifted digits beside {whom}: better in {where('better', other, shifts) or 'none'}, "
            f"worse in {where('worse', other, shifts) or 'none'}."
        )
    filled = [textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    ") for line in lines]
    return ["Verdict", *filled]


def summary(results: Sequence[SeedResult]) -> str:
    """One line: the mean negative log-likelihood of each predictor on the test digits."""
    said = {
        ADAM: "by Adam",
        ENSEMBLE: "by the ensemble",
        LANGEVIN: "sampled at the T chosen",
        BAYES: "at T = 1",
    }
    means = {name: statistics.mean(r.outcomes[name].scores["NLL"] for r in results) for name in said}
    return f"NLL of test digits: {', '.join(f'{means[name]:.3f} {words}' for name, words in said.items())}"


def step_times(rounds: int, layers: int, turn_seconds: float = 0.01) -> str:
    """Time of one optimizer step, gradients given: each optimizer in turn, so that a slow moment hits all.

    On the demo's network and on `layers` layers of 256 x 256, in `rounds` rounds of turns of about `turn_seconds`.
    """
    digits_network = [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)]
    larger = [(256, 256), (256,)] * layers
    return times_table(
        {
            title: interleave(_steps(shapes), rounds=rounds, turn_seconds=turn_seconds)
            for title, shapes in (
                ("this network", digits_network),
                (f"{len(larger)} tensors, {layers * 0.0658:.1f}M", larger),
            )
        }
    )


FUSED = "torch.optim.Adam(fused=True)"
# Rounds of an idle machine differ by a few hundredths. Beyond this, what the table is to show (1.0 or 1.2?) is lost.
BUSY = 0.2


def times_table(cases: dict[str, dict[str, Timing]]) -> str:
    """Medians, the quartiles about them, and ratios to the fused Adam; whether the host was too busy to compare.

    A ratio is the median over rounds of the ratio within the round, in which a slow moment cancels.
    """
    lines = [
        f"Time of one optimizer step: medians (quartiles) of interleaved rounds, {torch.get_num_threads()} threads",
        f"{'':36}" + "".join(f"{title:>42}" for title in cases),
    ]
    unsteady: dict[str, float] = {}
    for name in next(iter(cases.values())):
        cells = []
        for title, times in cases.items():
            timing = times[name]
            pairs = zip(timing.rounds, times[FUSED].rounds, strict=True)
            ratio = Timing(tuple(mine / peer for mine, peer in pairs), 1)
            first, third = (_three_digits(value * 1e6) for value in timing.quartiles())
            median = _three_digits(timing.median * 1e6)
            cells.append(f"{median} us ({first} to {third})  x {_three_digits(ratio.median)}")
            # The peer's ratio to itself says nothing: its own times do.
            judged = timing if name == FUSED else ratio
            low, high = judged.quartiles()
            unsteady[f"{name}, {title}"] = (high - low) / judged.median
        lines.append(f"{name:36}" + "".join(f"{cell:>42}" for cell in cells))
    worst = max(unsteady, key=lambda case: unsteady[case])
    if unsteady[worst] > BUSY:
        lines.append(
            "The host was too busy to compare: the middle half of the rounds spans"
            f" {unsteady[worst]:.2g} times the median ({worst}). Run it again when nothing else runs."
        )
    return "\n".join(lines)


def _three_digits(value: float) -> str:
    """Three significant digits, and no fewer than stand before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _steps(shapes: Sequence[tuple[int, ...]]) -> list[Contestant]:
    def parameters() -> list[Tensor]:
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape)
        return tensors

    def fused_and_noise() -> Callable[[], object]:
        tensors = parameters()
        optimizer = torch.optim.Adam(tensors, fused=True)

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            for tensor in tensors:
                tensor.add_(torch.randn_like(tensor), alpha=1e-4)

        return step

    return [
        Contestant(FUSED, torch.optim.Adam(parameters(), fused=True).step),
        Contestant("torch.optim.Adam()", torch.optim.Adam(parameters()).step),
        Contestant("LangevinAdam, T = 0", LangevinAdam(parameters()).step),
        Contestant(
            "LangevinAdam, T > 0", LangevinAdam(parameters(), temperature=1e-9, prior_precision=1e-4).step
        ),
        Contestant("Adam(fused=True) + randn_like + add_", fused_and_noise()),
    ]
