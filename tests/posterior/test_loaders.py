"""Loaders whose batches hold more than rows, or rows that are several points: the posterior is that of their data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels._loader_batches import split
from fekernels.posterior import run
from fekernels.posterior.chains import Chains
from fekernels.posterior.pilot import Data, Energy

BATCHES, ROWS = 4, 10
X = torch.randn(BATCHES * ROWS, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(BATCHES * ROWS) % 2
TEXTS = ["long" if i % 3 else "s" for i in range(BATCHES * ROWS)]
bce, cross_entropy = nn.functional.binary_cross_entropy_with_logits, nn.functional.cross_entropy


def lengths(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text), 1.0, 0.0] for text in texts])


def of_classes(model: Any, batch: Any) -> Tensor:
    return (cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2][batch[1]]).mean()


def of_numbers(model: Any, batch: Any) -> Tensor:
    return bce(model(batch["x"])[:, 0] * batch["scale"], batch["y"])


def of_texts(model: Any, batch: Any) -> Tensor:
    return bce(model(lengths(batch["texts"]))[:, 0], batch["y"])


def parts() -> list[slice]:
    return [slice(k * ROWS, (k + 1) * ROWS) for k in range(BATCHES)]


def class_weights() -> list[Any]:
    return [(X[i], LABELS[i], torch.tensor([1.0, 2.0])) for i in parts()]


def numbers(of: Callable[[float], Any] = float) -> list[Any]:
    return [{"x": X[i], "y": LABELS[i].float(), "scale": of(1.0 + k)} for k, i in enumerate(parts())]


def texts() -> list[Any]:
    return [{"y": LABELS[i].float(), "texts": TEXTS[i]} for i in parts()]


def padded() -> list[Any]:
    return [{"x": X[i, : 2 + k % 2], "y": LABELS[i].float()} for k, i in enumerate(parts())]


def of_padded(model: Any, batch: Any) -> Tensor:
    return bce(model.weight[0, : batch["x"].shape[1]] @ batch["x"].T, batch["y"])


@pytest.fixture
def short_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that are trained for little more than a pass over the data."""
    monkeypatch.setattr(run, "TRAIN_STEPS", BATCHES)


CASES = [
    pytest.param(class_weights(), of_classes, 2, id="class weights"),
    pytest.param(numbers(), of_numbers, 1, id="a number"),
    pytest.param(numbers(torch.tensor), of_numbers, 1, id="a tensor without dimensions"),
    pytest.param(texts(), of_texts, 1, id="texts"),
    pytest.param(padded(), of_padded, 1, id="other lengths"),
]


@pytest.mark.parametrize(("loader", "loss_fn", "outputs"), CASES)
def test_every_batch_keeps_its_own_entries(loader: list[Any], loss_fn: Any, outputs: int) -> None:
    """Full gradients and those of a batch for each chain, beside autograd's of the model itself."""
    torch.manual_seed(0)
    model = nn.Linear(3, outputs, bias=False)
    exact = [torch.autograd.grad(loss_fn(model, batch), model.weight)[0] for batch in loader]
    data = Data("t", loader, BATCHES * ROWS, 0)
    energy = Energy(Chains(model, BATCHES), loss_fn, data)
    assert data.whole is None
    (full,) = energy.full_gradient()[1]
    torch.testing.assert_close(full, torch.stack(exact).mean(0).expand_as(full))
    (each,) = energy.gradients_of([(batch, 1.0) for batch in loader])[1]
    torch.testing.assert_close(each, torch.stack(exact))


@pytest.mark.parametrize(("loader", "loss_fn", "outputs"), CASES)
def test_a_run_takes_them(loader: list[Any], loss_fn: Any, outputs: int, short_starts: None) -> None:
    result = fe.sample_posterior(
        nn.Linear(3, outputs, bias=False), loss_fn, loader, data_size=BATCHES * ROWS, prior_precision=1.0, chains=2,
        samples=4, thinning=1, burn_in=20, progress=False, seed=0,
    )  # fmt: skip
    assert bool(result.report.trace.isfinite().all())


def test_batches_of_rows_alone_are_joined_and_a_single_batch_is_taken_as_it_is() -> None:
    pairs = [(X[i], [LABELS[i], None]) for i in parts()]
    whole = Data("t", pairs, BATCHES * ROWS, 0).whole
    assert torch.equal(whole[0], X) and torch.equal(whole[1][0], LABELS) and whole[1][1] is None
    for batch, *_ in (class_weights(), texts(), numbers()):
        assert Data("t", [batch], ROWS, 0).whole is batch


def test_parts_of_a_batch_have_their_own_texts() -> None:
    found = split("t", texts()[0], 4)
    assert [part["texts"] for part in found] == [TEXTS[0:4], TEXTS[4:8], TEXTS[8:10]]
    assert [len(part["y"]) for part in found] == [4, 4, 2]


SEQUENCES, TOKENS = 60, 8


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SEQUENCES, TOKENS, 3, generator=generator)
    return x, x.sum(-1) + torch.randn(SEQUENCES, TOKENS, generator=generator)


def of_tokens(model: Any, batch: Any) -> Tensor:
    return (model(batch[0])[..., 0] - batch[1]).square().mean() / 2


# A plain minibatch of a third of the data: its noise lets steps be five times those of a tenth. More chains, which walk
# in the same calls, say more of the variance.
@pytest.mark.parametrize(
    ("batch", "control_variates", "chains"), [(SEQUENCES, "auto", 4), (6, True, 4), (20, False, 16)]
)
def test_a_mean_over_tokens_has_the_posterior_of_the_tokens(
    batch: int, control_variates: Any, chains: int
) -> None:
    x, y = sequences()
    torch.manual_seed(0)
    result = fe.sample_posterior(
        nn.Linear(3, 1, bias=False), of_tokens, list(zip(x.split(batch), y.split(batch), strict=True)),
        data_size=SEQUENCES * TOKENS, prior_precision=1.0, control_variates=control_variates, chains=chains,
        progress=False, seed=0,
    )  # fmt: skip
    assert result.report.converged, str(result.report)
    assert result.report.warnings == (
        "data_size is 8 for each point of the loader, as of sequences that hold so many tokens",
    )
    rows = x.double().flatten(0, 1)
    exact = torch.linalg.inv(rows.T @ rows + torch.eye(3, dtype=torch.float64)).diagonal()
    ratio = result.report.trace.double().flatten(0, 1).var(0) / exact
    assert 0.85 < float(ratio.min()) and float(ratio.max()) < 1.2, ratio
    assert abs(result.report.variance_inflation / float(ratio.median()) - 1) < 0.15


def test_the_next_tokens_are_one_fewer_than_the_tokens() -> None:
    tokens = torch.zeros(40, 9, dtype=torch.long)
    assert [Data("t", [tokens], size, 0).fits for size in (40, 320, 360, 280)] == [True, True, True, False]
    assert not Data("t", [tokens.float()], 320, 0).fits


@pytest.mark.parametrize(
    ("data_size", "drop_last", "fits"),
    [(60, False, True), (180, False, True), (480, False, False), (181, False, False), (30, False, False),
     (63, True, True), (189, True, True), (126, True, False), (90, True, False)],
)  # fmt: skip
def test_posterior_and_learning_coefficient_take_the_same_sizes(
    data_size: int, drop_last: bool, fits: bool, short_starts: None
) -> None:
    """60 points are given, of 63 where the last batch is dropped; each holds three numbers."""
    held = 63 if drop_last else 60
    x, y = torch.zeros(held, 3), torch.arange(float(held))
    loader: Any = torch.utils.data.DataLoader(
        range(held), 10, drop_last=drop_last, collate_fn=lambda rows: (x[rows], y[rows])
    )
    assert Data("t", loader, data_size, 0).fits == fits
    settings: dict[str, Any] = {"data_size": data_size, "chains": 2, "progress": False, "seed": 0}
    model = nn.Linear(3, 1)
    report = fe.sample_posterior(
        model, of_tokens, loader, prior_precision=1.0, samples=4, thinning=1, burn_in=16, **settings
    ).report
    with pytest.warns(UserWarning):
        told = fe.local_learning_coefficient(model, of_tokens, loader, draws=8, lr=1e-4, **settings)
    wrong = "which the estimate is of" in " ".join(told.diagnostics.warnings)
    assert wrong == (not fits)
    if not fits:
        assert "which the posterior is of" in " ".join(report.warnings)
