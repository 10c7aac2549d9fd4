"""What a model's checkpoint holds, and when an index is of another model than now."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from fekernels.models import HashedTextEncoder, RelevanceModel

QUERIES = ["open a file", "join a thread", "parse a date"]
CONTEXTS = ["a stream of a path's bytes", "waits for the thread to end", "the date of a str"]


def model(**options: Any) -> RelevanceModel:
    return RelevanceModel(HashedTextEncoder(**{"dim": 16, "buckets": 64, **options}), seed=0).eval()


def trained() -> RelevanceModel:
    made = model(seed=1)
    made.fit([(QUERIES, CONTEXTS)], epochs=2, lr=0.1, progress=False)
    return made


def test_a_checkpoint_of_the_same_codes_gives_the_same_scores() -> None:
    ours, theirs, file = trained(), model(seed=1), io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(ours.score(QUERIES, CONTEXTS).score, theirs.score(QUERIES, CONTEXTS).score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 0}, "seed 0; got those of a checkpoint of seed 1"),
        ({"seed": 1, "prefix": 3}, "prefix 3; got those of a checkpoint of prefix 5"),
        ({"seed": 1, "prefix": 0}, "prefix 0; got those of a checkpoint of prefix 5"),
    ],
)
def test_a_checkpoint_of_other_codes_does_not_load(options: Any, message: str) -> None:
    saved, other = trained().state_dict(), model(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=rf"HashedTextEncoder \(query_encoder\): the codes must be those of .*{message}"
    ):
        other.load_state_dict(saved)
    after = other.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]


def test_the_width_is_part_of_the_codes() -> None:
    narrow, wide = HashedTextEncoder(8, 64), HashedTextEncoder(16, 64)
    with pytest.raises(ValueError, match="dim 16; got those of a checkpoint of dim 8"):
        wide.load_state_dict(narrow.state_dict())


def test_the_second_of_two_encoders_is_looked_at_before_the_first_is_written() -> None:
    def made(seed: int) -> RelevanceModel:
        return RelevanceModel(HashedTextEncoder(16, 64), HashedTextEncoder(16, 64, seed=seed), seed=0)

    saved, other = made(1), made(2)
    with torch.no_grad():
        for weight in saved.parameters():
            weight += 1
    before = [weight.clone() for weight in other.parameters()]
    with pytest.raises(
        ValueError, match=r"\(context_encoder\): .*seed 2; got those of a checkpoint of seed 1"
    ):
        other.load_state_dict(saved.state_dict())
    assert all(map(torch.equal, before, other.parameters()))


def by_loading(of: RelevanceModel) -> None:
    of.load_state_dict(trained().state_dict())


def by_assigning(of: RelevanceModel) -> None:
    of.load_state_dict(trained().state_dict(), assign=True)


def by_frequency(of: RelevanceModel) -> None:
    of.query_encoder.weigh_by_frequency(CONTEXTS)  # type: ignore[operator]


def by_a_step(of: RelevanceModel) -> None:
    optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
    of.loss(QUERIES, CONTEXTS).backward()
    optimizer.step()


def by_another_encoder(of: RelevanceModel) -> None:
    of.context_encoder = HashedTextEncoder(16, 64, seed=9)


def by_data(of: RelevanceModel) -> None:
    weight = of.query_encoder.log_weight
    weight.data = weight.data + 1


@pytest.mark.parametrize(
    "change", [by_loading, by_assigning, by_frequency, by_a_step, by_another_encoder, by_data]
)
def test_an_index_of_other_weights_is_refused(change: Any) -> None:
    of = model(seed=1)
    index = of.encode_contexts(CONTEXTS)
    change(of)
    for call in (lambda: index.score(QUERIES), lambda: index.append(CONTEXTS), lambda: index.top(QUERIES, 1)):
        with pytest.raises(
            ValueError, match=r"ContextIndex\.\w+: .* have changed since: encode_contexts again"
        ):
            call()
    assert len(of.encode_contexts(CONTEXTS).score(QUERIES).score) == 3


def test_an_index_stays_good_while_the_weights_do() -> None:
    of = model(seed=1).train()
    index = of.encode_contexts(CONTEXTS)
    wanted = index.score(QUERIES).score
    of.loss(QUERIES, CONTEXTS).backward()
    assert torch.equal(index.score(QUERIES).score, wanted)
    copied = copy.deepcopy(index)
    assert torch.equal(copied.score(QUERIES).score, wanted)
    by_frequency(of)
    stale = copy.deepcopy(index)
    for each in (index, stale):
        with pytest.raises(ValueError, match="encode_contexts again"):
            each.score(QUERIES)
    assert torch.equal(copied.score(QUERIES).score, wanted)
