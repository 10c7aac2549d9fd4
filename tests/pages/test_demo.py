"""The demo runs end to end in its quick form, and its verdict says what the numbers say."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fekernels import demo  # noqa: E402
from fekernels.__main__ import main as command  # noqa: E402
from fekernels.bench.timing import Timing  # noqa: E402
from fekernels.demo import report  # noqa: E402
from fekernels.posterior import run  # noqa: E402


def test_quick_demo_prints_everything_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "TRAIN_STEPS", 20)  # of the chains' starts, of four runs
    path, scores = tmp_path / "figure.png", tmp_path / "scores.json"
    options = ["--quick", "--seeds", "2", "--out", str(path), "--json", str(scores)]
    assert command(["demo", *options]) == 0
    printed, bars = capsys.readouterr()
    rows = {
        title: [line for line in printed.splitlines() if line.startswith(title)]
        for title in report.TITLES.values()
    }
    assert all(len(found) == 2 for found in rows.values())
    accuracy = float(rows[report.TITLES[report.ADAM]][0].split()[2])
    assert 0.5 < accuracy < 1.0
    by_split = json.loads(scores.read_text())[report.TITLES[report.ADAM]]["accuracy"]
    assert len(by_split) == 2 and abs(sum(by_split) / 2 - accuracy) < 1e-3
    for word in (
        "accuracy",
        "NLL",
        "ECE",
        "shifted ECE",
        "AUROC rotated",
        "runs call themselves converged",
        "Verdict",
        "Time of one optimizer step",
    ):
        assert word in printed
    assert printed.splitlines()[-1].startswith("NLL of test digits: ")
    assert "12/12" in bars  # the progress bar ends where it said it would
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000


def test_the_thread_count_is_put_back(tmp_path, monkeypatch):
    def stop(*_):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "one_seed", stop)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--quick", "--out", str(tmp_path / "figure.png")])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--out", "/no/such/folder/a.png"], ["--what"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert "--quick" in capsys.readouterr().out


def test_splits_are_disjoint_seeded_and_shifted():
    settings = demo.Settings()
    data, again, other = demo.digits(settings, 3), demo.digits(settings, 3), demo.digits(settings, 4)
    assert torch.equal(data.inputs["noisy"], again.inputs["noisy"])
    assert not torch.equal(data.train[1], other.train[1])
    counts = [len(data.train[0]), len(data.validation[0]), len(data.labels)]
    assert counts == [400, 300, 1097]
    assert {len(value) for value in data.inputs.values()} == {1097}
    everything = torch.cat([data.train[0], data.validation[0], data.inputs["clean"]])
    assert sorted(map(tuple, everything.tolist())) == sorted(
        map(tuple, torch.tensor(digits_as_they_are()).tolist())
    )
    clean = data.inputs["clean"]
    for name in ("rotated", "noisy", "occluded"):
        shifted = data.inputs[name]
        assert shifted.min() >= 0 and shifted.max() <= 1.0001
        assert (shifted - clean).abs().mean() > 0.03
    # An occluded digit is blank in 16 pixels and otherwise the same.
    assert ((data.inputs["occluded"] != clean).sum(1) <= 16).all()
    # Turned about the middle: the ink there stays.
    assert data.inputs["rotated"].view(-1, 8, 8)[:, 3:5, 3:5].mean() > 0.3


def digits_as_they_are():
    from sklearn.datasets import load_digits

    return (load_digits().data / 16).astype("float32")


def test_batches_go_through_whole_epochs():
    data = (torch.arange(10.0)[:, None], torch.arange(10))
    seen = torch.cat([y for _, y in demo.batches(data, 5, 4, seed=0)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def result(adam, sampled, ensemble):
    def outcome(value):
        scores = {
            "accuracy": 0.9,
            "NLL": value,
            "ECE": 0.02,
            "shifted NLL": 1.0,
            "shifted ECE": 0.2,
            "AUROC noisy": 1 - value,
        }
        return report.Outcome(
            scores, (torch.zeros(3, 10), torch.zeros(3)), (torch.zeros(9, 10), torch.zeros(9)), {}
        )

    outcomes = {
        report.ADAM: outcome(adam),
        report.LANGEVIN: outcome(sampled),
        report.ENSEMBLE: outcome(ensemble),
    }
    return report.SeedResult({}, {**outcomes, report.BAYES: outcome(2.0)}, {})


def in_one_line(results):
    return " ".join(report.verdict(results).split())


def test_the_verdict_follows_the_numbers():
    better = in_one_line([result(0.30, 0.20, 0.201), result(0.31, 0.21, 0.209), result(0.32, 0.221, 0.221)])
    assert "Sampling beats the tuned point estimate in NLL" in better
    assert "does NOT clearly beat the tuned point estimate in ECE" in better
    assert "beside the tuned point estimate: better in AUROC noisy, worse in none" in better
    assert "does NOT clearly beat the ensemble in NLL" in better
    worse = in_one_line([result(0.20, 0.30, 0.2), result(0.21, 0.31, 0.2), result(0.22, 0.321, 0.221)])
    assert "Sampling is WORSE than the tuned point estimate in NLL" in worse
    assert "Sampling is WORSE than the ensemble in NLL" in worse
    assert "beside the ensemble: better in none, worse in AUROC noisy" in worse
    unclear = in_one_line([result(0.20, 0.30, 0.2), result(0.30, 0.20, 0.2), result(0.25, 0.24, 0.2)])
    assert "Sampling does NOT clearly beat the tuned point estimate in NLL" in unclear
    assert "one split cannot tell" in report.verdict([result(0.3, 0.2, 0.2)])


def timings(fused, langevin):
    names = (report.FUSED, "LangevinAdam, T > 0")
    return {name: Timing(tuple(seconds), 1) for name, seconds in zip(names, (fused, langevin), strict=True)}


def test_the_table_of_times_has_medians_quartiles_and_three_digits():
    steady = timings([1e-3, 1.01e-3, 1.02e-3], [1.2e-3, 1.212e-3, 1.224e-3])
    lines = report.times_table({"small": steady, "large": timings([2e-6] * 3, [2.5e-6] * 3)}).splitlines()
    assert "medians (quartiles)" in lines[0] and lines[1].split() == ["small", "large"]
    assert " ".join(lines[2].split()) == (
        f"{report.FUSED} 1,010 us (1,000 to 1,020) x 1.00 2.00 us (2.00 to 2.00) x 1.00"
    )
    assert " ".join(lines[3].split()[4:]) == "1,212 us (1,200 to 1,224) x 1.20 2.50 us (2.50 to 2.50) x 1.25"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("fused", "langevin", "busy"),
    [
        ([1e-3, 1.1e-3, 1.19e-3], [1e-3, 1.1e-3, 1.19e-3], False),
        ([1e-3, 1.1e-3, 1.5e-3], [1e-3, 1.1e-3, 1.5e-3], True),  # the peer alone
        ([1e-3, 1e-3, 1e-3], [1e-3, 1.1e-3, 1.4e-3], True),  # the ratio
    ],
)
def test_a_busy_host_is_told(fused, langevin, busy):
    text = report.times_table({"small": timings(fused, langevin)})
    assert ("The host was too busy to compare: the middle half of the rounds spans " in text) == busy


def test_paired_interval_by_hand():
    difference, width = report.compare([1.0, 2.0, 3.0], [0.0, 2.0, 2.5])
    # Differences 1, 0, .5, of standard deviation .5; Student's t of 2 degrees of freedom is 4.3027 at 97.5%. The splits
    # share digits: the variance of their mean is 1/3 + 1097/700 of a difference's.
    assert difference == pytest.approx(0.5)
    assert width == pytest.approx(4.302653 * 0.5 * math.sqrt(1 / 3 + 1097 / 700), rel=1e-6)
    assert report.compare([1.0], [0.5]) == (0.5, math.inf)
