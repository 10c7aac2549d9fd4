"""RelevanceModel: indexes against pairs, training, restarts, schedules, calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.models import (
    ContextIndex,
    HashedTextEncoder,
    LinearLogit,
    Relevance,
    RelevanceModel,
    relevance_index,
)
from fekernels.models.relevance import LENGTH

KINDS = ("score", "probability", "epistemic", "aleatoric", "kl", "logit")
WORDS = "file path open read socket send thread lock tree node date time parse token hash key".split()


class Bent(nn.Module):
    """A logit that is not linear in z."""

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Bilinear(latents, width, 1)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        return self.inner(z, context.expand(*z.shape[:-1], -1).contiguous())[..., 0] - z.square().mean(-1)


def small(kind: str = "linear", dtype: torch.dtype = torch.float32, **options: Any) -> RelevanceModel:
    torch.manual_seed(0)
    encoders = nn.Linear(5, 6), nn.Linear(4, 7)
    logit = {"linear": None, "bent": Bent(3, 7), "weighted": None}[kind]
    model = RelevanceModel(
        *encoders, 3, query_dim=6, context_dim=7, logit=logit, importance_weighted=kind == "weighted", seed=1, **options
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return fe.random.normal((rows, width), seed=seed).to(dtype)


def texts(rows: int, seed: int) -> tuple[list[str], list[str]]:
    """Queries of two words about their own subject and one about nothing; contexts with one of the two, and others."""
    noise = [fe.random.bits(len(WORDS), seed=seed, step=row).argsort().tolist() for row in range(rows)]
    filler = [[WORDS[i] for i in own] for own in noise]
    first = seed * rows
    return (
        [f"subject{n} matter{n} {words[0]}" for n, words in enumerate(filler, first)],
        [f"matter{n} {' '.join(words[1:7])}" for n, words in enumerate(filler, first)],
    )


@pytest.mark.parametrize("kind", ["linear", "bent", "weighted"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_an_index_scores_as_pairs_do(
    kind: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(kind, dtype).eval()
    model.calibration = fe.models.Calibration(0.7, -0.3)
    query, context = features(5, 5, 1, dtype), features(11, 4, 2, dtype)
    pairs = model.score(query.repeat_interleave(11, 0), context.repeat(5, 1))
    # Blocks of every size, also where none divides the numbers.
    for block in (1, 3 * 4 * model.numbers_per_latent, relevance_index.BLOCK):
        monkeypatch.setattr(relevance_index, "BLOCK", block)
        found = model.encode_contexts(context).score(query)
        for name in KINDS:
            assert getattr(found, name).shape == (5, 11)
            torch.testing.assert_close(
                getattr(found, name), getattr(pairs, name).view(5, 11), rtol=tolerance, atol=tolerance
            )
    assert (found.total_variance - found.epistemic - found.aleatoric).abs().max() < 1e-6


def test_the_history_grows_without_being_encoded_again() -> None:
    model = small().eval()
    context, query = features(9, 4, 2), features(2, 5, 1)
    index = model.encode_contexts(context[:4])
    rows = []
    hook = model.context_encoder.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    index.append(context[4:])
    grown = index.score(query)
    hook.remove()
    assert rows == [5] and len(index) == 9
    torch.testing.assert_close(grown.score, model.encode_contexts(context).score(query).score)
    places, best = index.top(query, 3)
    assert torch.equal(places, grown.score.topk(3).indices)
    assert torch.equal(best.kl, grown.kl.gather(1, places))


def test_no_tensor_of_all_pairs_times_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance_index, "BLOCK", 1 << 16)
    torch.manual_seed(0)
    model = RelevanceModel(
        nn.Linear(8, 128), nn.Linear(8, 128), query_dim=128, context_dim=128, seed=0
    ).eval()
    index, query, largest = model.encode_contexts(features(100, 8, 2)), features(120, 8, 1), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Watch():
        index.score(query)
    assert largest <= relevance_index.BLOCK < 100 * 120 * 128 / 20


def test_linear_logits_are_scored_without_noise() -> None:
    model = small(dtype=torch.float64).eval()
    query, context = features(4, 5, 1, torch.float64), features(4, 4, 2, torch.float64)
    exact = model.score(query, context)
    plain = nn.Module()
    plain.forward = model.logit.forward  # type: ignore[method-assign]
    model.logit, model.scoring_samples = plain, 4000
    sampled = model.score(query, context)
    for name, limit in (("score", 0.1), ("probability", 0.02), ("epistemic", 0.01), ("kl", 1e-12)):
        assert (getattr(exact, name) - getattr(sampled, name)).abs().max() < limit
    assert not torch.equal(exact.score, sampled.score)


@pytest.mark.parametrize("kind", ["linear", "bent", "weighted"])
def test_the_loss_and_its_gradients_are_plain_autograds(kind: str) -> None:
    model = small(kind, torch.float64, samples=2, temperature=0.6)
    query, context = features(3, 5, 1, torch.float64), features(4, 4, 2, torch.float64)
    query[0] /= 20  # a vector shorter than 1 stays
    with torch.no_grad():
        model.query_encoder.bias.zero_()
    model.steps = 6
    found = model.loss(query, context)
    gradients = torch.autograd.grad(found, list(model.parameters()))

    def normal(vector: Tensor, side: Any) -> tuple[Tensor, Tensor]:
        return nn.functional.softplus(side.precision(vector)), LENGTH * side.gain * (
            vector @ side.map.weight.T
        )

    def shortened(vectors: Tensor) -> Tensor:
        return torch.stack([v / v.norm() if v.norm() > 1 else v for v in vectors])

    expected, queries = torch.zeros((), dtype=torch.float64), shortened(model.query_encoder(query))
    vectors = shortened(model.context_encoder(context))
    for i in range(3):
        for j in range(4):
            t_q, s_q = normal(queries[i], model.query_evidence)
            t_c, s_c = normal(vectors[j], model.context_evidence)
            variance = 1 / (1 + t_q + t_c)
            mean = variance * (s_q + s_c)
            eps = torch.stack(
                [fe.random.normal(3, seed=1, step=7, stream=k, offset=(4 * i + j) * 3, purpose=3) for k in range(2)]
            ).double()  # fmt: skip
            z = mean + variance.sqrt() * eps
            logits = model.logit(z[:, None], vectors[j : j + 1])[:, 0]
            log_p = (logits if i == j else -logits).sigmoid().log()
            ratio = (z.square() - eps.square() + variance.log()).sum(-1) / 2 - variance.log().sum()
            kl = (mean.square() + variance - 1 - variance.log()).sum() / 2
            bound = log_p.mean() - 0.15 * kl  # one intent's among four answers
            if kind == "weighted":
                bound = 0.15 * (log_p / 0.15 - ratio).exp().mean().log()
            expected = expected - bound / 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_noise_is_fresh_at_each_training_step_and_fixed_in_evaluation() -> None:
    model = small()
    query, context = features(3, 5, 1), features(3, 4, 2)
    losses = [model.loss(query, context).item() for _ in range(3)]
    assert len(set(losses)) == 3 and model.steps == 3
    model.eval()
    assert model.loss(query, context) == model.loss(query, context) and model.steps == 3
    # Rows of one batch over two processes: the second's noise is where the whole batch has it.
    model.train().steps = 0
    whole = model.loss(query, context, relevant=torch.zeros(3, 3, dtype=torch.bool))
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        model.steps = 0
        none = torch.zeros(rows.stop - rows.start, 3, dtype=torch.bool)
        parts.append(model.loss(query[rows], context, relevant=none, offset=rows.start) * len(none))
    torch.testing.assert_close(whole * 3, sum(parts))


def test_training_ranks_by_what_belongs_together_and_a_restart_repeats_it() -> None:
    query, context = texts(64, seed=5)
    loader = [(query[i : i + 16], context[i : i + 16]) for i in range(0, 64, 16)]

    def made() -> tuple[RelevanceModel, torch.optim.Optimizer]:
        model = RelevanceModel(HashedTextEncoder(128, 1 << 12, prefix=0), seed=3)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    def annealed(step: int) -> float:
        return 0.3 * 0.9**step

    model, optimizer = made()
    means = model.fit(loader, 6, optimizer=optimizer, temperature=annealed, progress=False)
    assert means[-1] < 0.8 * means[0] and model.steps == 24 and model.training
    assert model.temperature == annealed(23)

    first, optimizer = made()
    first.fit(loader, 2, optimizer=optimizer, temperature=annealed, progress=False)
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    second, optimizer = made()
    second.seed = 77  # the state's is what counts
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert second.fit(loader, 4, optimizer=optimizer, temperature=annealed, progress=False) == means[2:]
    for ours, theirs in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    query, context = texts(64, seed=6)
    found = second.encode_contexts(context).score(query)
    assert (found.score.argmax(1) == torch.arange(64)).double().mean() > 0.3  # of 1/64 by chance


def test_temperature_schedules() -> None:
    loader = [(features(4, 5, 1), features(4, 4, 2))] * 5
    carrier = fe.SGLD([torch.zeros(1, requires_grad=True)], lr=1.0, temperature=2.0)
    cosine = fe.optim.CosineTemperature(carrier, T_max=9, eta_min=0.5)
    seen: list[float] = []
    model = small()
    model.loss = lambda *pair: seen.append(model.temperature) or type(model).loss(model, *pair)  # type: ignore
    model.fit(loader, 1, temperature=cosine, progress=False)
    model.fit(loader, 1, temperature=cosine, progress=False)  # goes on where the last one ended
    assert seen == [float(cosine.get_temperature(step)[0]) for step in range(10)]
    assert seen[0] == 2.0 and seen[-1] == 0.5 and model.temperature == 0.5
    model.fit(loader, 1, temperature=3, progress=False)
    assert model.temperature == 3.0
    with pytest.raises(ValueError, match="RelevanceModel: temperature must be finite and >= 0; got -1"):
        model.fit(loader, 1, temperature=lambda step: -1.0, progress=False)


def test_temperature_weighs_the_kl_of_a_score() -> None:
    model = small(dtype=torch.float64).eval()
    pair = features(4, 5, 1, torch.float64), features(4, 4, 2, torch.float64)
    model.temperature = 0.0
    energy = model.score(*pair)
    model.temperature = 2.5
    found = model.score(*pair)
    torch.testing.assert_close(found.score, energy.score - 2.5 * energy.kl)
    assert torch.equal(found.probability, energy.probability) and energy.kl.min() > 0


def test_calibration_changes_probabilities_and_no_score() -> None:
    model = small().eval()
    query, context = features(60, 5, 1), features(60, 4, 2)
    index = model.encode_contexts(context)
    before = index.score(query)
    # Answers that follow a shifted and flattened logit.
    chance = torch.sigmoid(0.5 * torch.logit(before.probability.double().clamp(1e-6, 1 - 1e-6)) + 2)
    relevant = fe.random.uniform((60, 60), seed=3) < chance
    calibration = model.calibrate(query, context, relevant)
    after = index.score(query)
    assert torch.equal(after.score, before.score) and torch.equal(after.kl, before.kl)

    def nll(p: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(p, relevant.float())

    assert nll(after.probability) < nll(before.probability) - 0.05
    assert abs(after.probability.mean() - relevant.float().mean()) < 0.005
    assert model.calibration == calibration and calibration.scale > 0
    copy = small()
    copy.load_state_dict(model.state_dict())
    assert copy.calibration == calibration
    everything = model.calibrate(query, context)  # each query's own place
    assert everything.shift < calibration.shift and everything.sharpness != 1
    copy.load_state_dict(model.state_dict())
    assert copy.calibration == everything


def test_a_query_of_nothing_known_is_the_least_certain() -> None:
    """Without a word there is no evidence: q is all but the prior and the KL all but zero."""
    model = RelevanceModel(HashedTextEncoder(64, 1 << 10), seed=0).eval()
    found = model.score(["open file", ""], ["open the file", "open the file"])
    model.train().loss(["open file", ""], ["open the file", ""]).backward()
    model.score(["open file", ""], ["", ""]).score.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert found.kl[1] < 0.4 < found.kl[0] and found.probability[1] < found.probability[0]


def bad_calls() -> list[tuple[Any, type[Exception], str]]:
    model = small()
    query, context, index = features(3, 5, 1), features(4, 4, 2), model.encode_contexts(features(4, 4, 2))
    text = HashedTextEncoder(4, 16)
    flat = RelevanceModel(nn.Flatten(0), nn.Identity(), query_dim=2, context_dim=2)
    column = RelevanceModel(nn.Linear(5, 2), nn.Linear(4, 2), query_dim=2, context_dim=2, logit=Column())
    square = torch.ones(3, 3)
    return [
        (
            lambda: model.score(query, context),
            ValueError,
            "score: context must be as many as query, 3; got 4",
        ),
        (lambda: model.score(query[:1], context), ValueError, "context must be as many as query, 1; got 4"),
        (
            lambda: model.loss(context=context[:2], query=query),
            ValueError,
            "at least the 3 contexts .* got 2",
        ),
        (lambda: model.loss(query, context, relevant=square), TypeError, "relevant must be a bool tensor"),
        (
            lambda: model.loss(query, context, relevant=square.bool()),
            ValueError,
            r"loss: relevant must have shape \(3, 4\), queries by contexts; got \(3, 3\)",
        ),
        (lambda: model.calibrate(query, context[:2]), ValueError, "at least the 3 contexts .* got 2"),
        (
            lambda: model.calibrate(query[:0], context[:0]),
            ValueError,
            "calibrate: query must hold a query; got none",
        ),
        (
            lambda: RelevanceModel(text).calibrate([], []),
            ValueError,
            "calibrate: query must hold a query; got none",
        ),
        (
            lambda: flat.score(query, query),
            ValueError,
            r"query encoder's result must have shape .* got \(15,\)",
        ),
        (
            lambda: column.score(query, context[:3]),
            ValueError,
            r"logit\(z\) must have shape \(64, 3\) .* got \(64, 3, 1\)",
        ),
        (lambda: index.top(query, 5), ValueError, "k must be in"),
        (lambda: RelevanceModel(lambda x: x), TypeError, "query_encoder must be a Module; got function"),
        (
            lambda: RelevanceModel(nn.Linear(2, 3)),
            ValueError,
            "query_dim must be the width of Linear's vectors",
        ),
        (lambda: model.fit(iter([])), TypeError, "starts anew every time"),
        (lambda: model.fit([]), ValueError, "loader must hold a batch; got none"),
        (lambda: model.fit([query]), TypeError, r"must be \(queries, contexts\); got Tensor"),
        (lambda: model.fit([(query,)]), TypeError, r"must be \(queries, contexts\); got 1 of them"),
        (lambda: text("open"), TypeError, "texts must be a sequence of str; got str"),
        (lambda: text(["open", 1]), TypeError, "texts must hold str; got int"),
        (lambda: LinearLogit(3, 3, scale=0), ValueError, "scale must be"),
    ]


class Column(nn.Module):
    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        return (z * context).sum(-1, keepdim=True)


@pytest.mark.parametrize("place", range(len(bad_calls())))
def test_bad_calls(place: int) -> None:
    call, error, message = bad_calls()[place]
    with pytest.raises(error, match=message):
        call()


def test_an_index_is_one() -> None:
    model = small()
    assert isinstance(model.encode_contexts(features(4, 4, 2)), ContextIndex)
    assert isinstance(model.encode_contexts(features(4, 4, 2)).score(features(1, 5, 1)), Relevance)
