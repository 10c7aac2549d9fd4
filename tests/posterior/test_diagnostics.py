import math

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels.diagnostics import auroc, calibration, mutual_information, predictive_entropy
from tests.support import fork_server
from tests.support.tensors import UNIT


def test_calibration_of_a_hand_example():
    # Ten bins. Confidence .9 twice, one right; .65 once, right; .55 once, wrong.
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.65, 0.35], [0.55, 0.45]])
    result = calibration(p, torch.tensor([0, 0, 0, 1]), bins=10)
    # The probabilities are float32.
    assert result.error == pytest.approx(2 / 4 * 0.4 + 1 / 4 * 0.35 + 1 / 4 * 0.55, abs=UNIT)
    assert result.maximum_error == pytest.approx(0.55, abs=UNIT)
    assert result.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 2, 0]
    assert result.accuracy[8] == 0.5 and math.isnan(result.accuracy[0])
    assert result.confidence[6] == pytest.approx(0.65, abs=UNIT)


def test_bins_are_closed_on_the_right():
    p = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    result = calibration(p, np.array([0, 0, 0]), bins=4)
    assert result.count.tolist() == [0, 1, 1, 1]


def test_sure_and_right_has_no_error_and_sure_and_wrong_has_all():
    p = torch.eye(3, dtype=torch.float64)
    assert calibration(p, torch.arange(3)).error == 0.0
    assert calibration(p, (torch.arange(3) + 1) % 3).error == 1.0


def test_calibrated_predictions_have_a_small_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(100_000, generator=generator, dtype=torch.float64) / 2 + 0.5
    labels = (torch.rand(len(p), generator=generator, dtype=torch.float64) > p).long()
    both = torch.stack([p, 1 - p], 1)
    # A bin holds some 13,000 points, so its accuracy is off by about 0.004.
    assert calibration(both, labels).error < 0.01
    assert calibration(both, 1 - labels).error > 0.4


@pytest.mark.parametrize(
    ("p", "labels", "bins", "error", "message"),
    [
        (torch.ones(2, 2).long(), [0, 1], 15, TypeError, "probabilities must be floating point"),
        (torch.ones(2), [0, 1], 15, ValueError, "at least 2 dimensions"),
        (torch.ones(0, 2), torch.zeros(0).long(), 15, ValueError, "n >= 1"),
        (torch.ones(2, 2) / 2, [0, 1, 1], 15, ValueError, r"shape \(2,\); got \(3,\)"),
        (torch.ones(2, 2) / 2, [0.0, 1.0], 15, TypeError, "labels must be integers"),
        (torch.ones(2, 2) / 2, [0, 2], 15, ValueError, r"in \[0, 2\); got 0 to 2"),
        (torch.ones(2, 2) * 2, [0, 1], 15, ValueError, r"in \[0, 1\]; got 2.0"),
        (torch.full((2, 2), math.nan), [0, 1], 15, ValueError, r"in \[0, 1\]; got nan"),
        (
            torch.ones(3, 2) / 3,
            [0, 1, 0],
            15,
            ValueError,
            "sum to 1 in every row; got a sum of 0.667 in row 0",
        ),
        (torch.tensor([[0.5, 0.5], [0.9, 0.8]]), [0, 1], 15, ValueError, "got a sum of 1.7 in row 1"),
        (torch.ones(2, 2) / 2, [0, 1], 0, ValueError, "bins must be at least 1; got 0"),
        (torch.ones(2, 2) / 2, [0, 1], 1.5, TypeError, "bins must be an int; got float"),
    ],
)
def test_calibration_rejects(p, labels, bins, error, message):
    with pytest.raises(error, match=message):
        calibration(p, labels, bins)


def test_entropy_and_information_by_hand():
    assert predictive_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == [0.0, math.log(2)]
    opposed = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])  # two predictors, two points
    assert mutual_information(opposed).tolist() == [math.log(2), 0.0]


def test_what_is_no_distribution_has_no_entropy():
    for function in (predictive_entropy, mutual_information):
        with pytest.raises(
            ValueError, match=rf"^{function.__name__}: probabilities must be in \[0, 1\]; got -2.0 to 3"
        ):
            function(torch.tensor([[-2.0, 3.0], [0.5, 0.5]]))  # logits
        with pytest.raises(ValueError, match=f"^{function.__name__}: .* a sum of 1.7 in row 1"):
            function(torch.tensor([[0.5, 0.5], [0.9, 0.8]]))
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            function(torch.tensor([[math.nan, 0.5], [2.0, 0.5]]))
    unknown = torch.tensor([[[0.5, 0.5], [math.nan, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    assert predictive_entropy(unknown).isnan().tolist() == [[False, True], [False, False]]
    assert mutual_information(unknown).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got nan"):
        calibration(unknown[0], [0, 1])


def test_auroc_counts_ties_half():
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1.0
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 0.0
    assert auroc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert auroc(torch.tensor([0.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 3.0])) == (1 + 2 / 2 + 3) / 8


def test_auroc_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 20, 300).astype(float), rng.integers(5, 25, 200).astype(float)
    truth = np.r_[np.zeros(300), np.ones(200)]
    assert auroc(low, high) == pytest.approx(metrics.roc_auc_score(truth, np.r_[low, high]), abs=1e-12)


@pytest.mark.parametrize("scores", [torch.tensor([]), torch.tensor([1.0, math.nan])])
def test_auroc_rejects(scores):
    with pytest.raises(ValueError, match="positive must hold scores"):
        auroc(torch.ones(2), scores)


def test_the_package_has_them_and_does_not_import_them_before() -> None:
    program = (
        "import sys, fekernels as fe; assert 'fekernels.diagnostics' not in sys.modules; "
        "assert 'diagnostics' in fe.__all__; print(fe.diagnostics.auroc([0.0], [1.0]))"
    )
    done = fork_server.run(program)
    assert done.stdout == "1.0\n", done.stderr
    with pytest.raises(AttributeError, match="module 'fekernels' has no attribute 'pears'"):
        _ = fe.pears
