"""PosteriorSamples.predict of models whose classes are elsewhere than last, or whose answer is more than a tensor."""

import collections
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fekernels as fe
from fekernels.posterior.samples import PosteriorSamples
from tests.support.posterior_samples import Constant
from tests.support.tensors import UNIT


def samples_of(model, count=3):
    """Samples of random weights, and those weights."""
    samples, states = PosteriorSamples(model), []
    for _ in range(count):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        samples.collect()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return samples, states


def by_hand(model, states, x, dim):
    """Mean, predictive entropy and expected entropy of a softmax over `dim`, in float64."""
    model = model.double()
    probabilities = []
    for state in states:
        model.load_state_dict(state)
        probabilities.append(model(x.double()).detach().softmax(dim))
    model.float()
    stacked = torch.stack(probabilities)
    mean = stacked.mean(0)
    entropy = -(mean * mean.log()).sum(dim)
    return mean, entropy, -(stacked * stacked.log()).sum(dim + 1).mean(0)


@pytest.mark.parametrize("dim", [1, -3])
def test_classes_of_an_image_are_in_dimension_1(dim):
    model, x = nn.Conv2d(1, 3, 1), torch.randn(2, 1, 4, 5)
    samples, states = samples_of(model)
    mean, entropy, expected = by_hand(model, states, x, 1)
    result = samples.predict(x, dim=dim, batch_size=1)
    assert result.predictive_entropy.shape == result.mutual_information.shape == (2, 4, 5)
    close = {"rtol": 64 * UNIT, "atol": 64 * UNIT}  # the logits are float32 sums
    torch.testing.assert_close(result.mean, mean, **close)
    torch.testing.assert_close(result.log_mean, mean.log(), **close)
    torch.testing.assert_close(result.predictive_entropy, entropy, **close)
    torch.testing.assert_close(result.expected_entropy, expected, **close)
    own = samples.predict(x, lambda logits: logits.softmax(1), dim=dim)
    torch.testing.assert_close(own.mean, mean, **close)
    torch.testing.assert_close(own.predictive_entropy, entropy, **close)
    torch.testing.assert_close(own.expected_entropy, expected, **close)


def test_the_last_dimension_of_an_image_is_warned_about_unless_it_is_meant():
    samples, _ = samples_of(nn.Conv2d(1, 3, 1))
    x = torch.randn(2, 1, 4, 5)
    with pytest.warns(UserWarning, match=r"\(2, 3, 4, 5\).*images and volumes.* dim=1") as caught:
        samples.predict(x)
    images = [each for each in caught if "images" in str(each.message)]
    assert len(images) == 1 and images[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples.predict(x, dim=1)
        samples.predict(x, dim=3)
        samples.predict(x, None)
        samples.predict(x[0], dim=1)  # [3, 4, 5]: tokens and their classes look the same


@pytest.mark.parametrize("activation", ["softmax", lambda logits: logits.sigmoid()])
def test_one_logit_a_row_is_no_softmax(activation):
    x = torch.randn(4, 3)
    samples, _ = samples_of(nn.Linear(3, 1))
    with pytest.raises(
        ValueError, match=r"more than one class.*dim=-1 of size 1 in shape \(4, 1\).*'sigmoid'"
    ):
        samples.predict(x, activation)
    flat, _ = samples_of(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    with pytest.raises(ValueError, match=r"behind the batch; got dim=-1 .*shape \(4,\).*'sigmoid'"):
        flat.predict(x, activation)
    assert flat.predict(x, "sigmoid").predictive_entropy.shape == (4,)
    result = samples.predict(x, "sigmoid")
    assert result.mean.shape == result.predictive_entropy.shape == (4, 1)
    assert 0 < result.mean.min() and result.mean.max() < 1 and result.predictive_entropy.min() > 0


@pytest.mark.parametrize("dim", [0, -2, 2, -3, 5])
def test_a_dimension_that_is_none_of_the_classes(dim):
    samples, _ = samples_of(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=rf"behind the batch; got dim={dim} for .*\(4, 2\)"):
        samples.predict(torch.randn(4, 3), dim=dim)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dim": 1.0}, TypeError, "dim must be an int; got float"),
        ({"dim": None}, TypeError, "dim must be an int; got NoneType"),
        ({"output": 1.5}, TypeError, "output must be a key, an index, a callable or None; got float"),
        ({"activation": np.zeros(2)}, TypeError, "activation must be 'softmax'.*; got ndarray"),
        ({"output": True}, TypeError, "output must be a key, an index, a callable or None; got bool"),
    ],
)
def test_bad_settings(settings, error, message):
    samples, _ = samples_of(Constant(0.0, 0.0))
    with pytest.raises(error, match=f"PosteriorSamples.predict: {message}"):
        samples.predict(torch.zeros(1, 1), **settings)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: None, TypeError, "must be a tensor; got NoneType"),
        (lambda x: x.tolist(), TypeError, "must be a tensor; got list"),
        (lambda x: x.numpy(), TypeError, "must be a tensor; got ndarray"),
        (lambda x: x.to_sparse(), TypeError, "must be dense; got layout sparse_coo"),
        (lambda x: torch.nested.nested_tensor(list(x)), TypeError, "must be dense; got nested"),
        (lambda x: x.to("meta"), ValueError, "must hold values; got a tensor on the meta device"),
        (lambda x: x.long(), TypeError, "must be float32, bfloat16, float16 or float64; got int64"),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            TypeError,
            "must be float32, .*; got quint8",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*uantize")
def test_what_a_callable_may_return(answer, error, message):
    samples, _ = samples_of(Constant(0.0, 0.0))
    with pytest.raises(error, match=f"^PosteriorSamples.predict: what activation returns {message}"):
        samples.predict(torch.zeros(3, 1), activation=answer)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_answer_is_dense():
    samples, _ = samples_of(Constant(0.0, 0.0))
    x = torch.zeros(3, 1)
    samples._model.forward = lambda x: torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match="the model's output must be dense; got layout sparse_coo"):
        samples.predict(x)
    with pytest.raises(TypeError, match="of the model must be dense; got nested"):
        samples.predict(x, output=lambda _: torch.nested.nested_tensor([torch.ones(2)] * 3))


def test_an_index_of_numpy_is_one():
    samples, _ = samples_of(Wrapped("tuple"))
    x = torch.randn(4, 6)
    assert torch.equal(samples.predict(x, output=np.int64(1)).mean, samples.predict(x, output=1).mean)
    with pytest.raises(TypeError, match="output 0 of the model must be a floating-point tensor"):
        samples.predict(x, output=np.int64(0))


Answer = collections.namedtuple("Answer", "loss logits")


class Wrapped(nn.Module):
    """Answers as Hugging Face models do: a dict with more than the logits, or a tuple or an object of the same."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(6, 2)

    def forward(self, x, scale=None):
        logits = self.layer(x) if scale is None else self.layer(x) * scale
        parts = {"loss": logits.long().sum(), "logits": logits}
        return (
            parts
            if self.kind == "dict"
            else Answer(**parts)
            if self.kind == "named"
            else tuple(parts.values())
        )


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("dict", "logits"),
        ("named", "logits"),
        ("named", 1),
        ("tuple", 1),
        ("tuple", -1),
        ("dict", lambda answer: answer["logits"]),
    ],
)
def test_a_part_of_the_answer(kind, output):
    model, x = Wrapped(kind), torch.randn(5, 6)
    samples, states = samples_of(model)
    logits = torch.stack([x @ state["layer.weight"].T + state["layer.bias"] for state in states])
    result = samples.predict(x, output=output, batch_size=2)
    torch.testing.assert_close(
        result.mean, logits.double().softmax(-1).mean(0), rtol=64 * UNIT, atol=64 * UNIT
    )
    twice = samples.predict({"x": x, "scale": torch.tensor(2.0)}, output=output, batch_size=2)
    torch.testing.assert_close(
        twice.mean, (2 * logits).double().softmax(-1).mean(0), rtol=64 * UNIT, atol=64 * UNIT
    )


@pytest.mark.parametrize(
    ("kind", "output", "error", "message"),
    [
        ("dict", None, TypeError, "dict with the keys 'loss', 'logits' .output= picks a part"),
        ("tuple", None, TypeError, "got tuple of 2 .output= picks"),
        ("dict", "logit", ValueError, "output must name a part of .*'loss', 'logits'; got 'logit'"),
        ("dict", 0, ValueError, "'logits'; got 0"),
        ("named", "logit", ValueError, "Answer of loss, logits; got 'logit'"),
        ("tuple", 2, ValueError, "tuple of 2; got 2"),
        ("tuple", "logits", ValueError, "tuple of 2; got 'logits'"),
        (
            "dict",
            "loss",
            TypeError,
            "output 'loss' of the model must be a floating-point tensor; got torch.int64",
        ),
    ],
)
def test_a_part_that_is_not_there(kind, output, error, message):
    samples, _ = samples_of(Wrapped(kind))
    with pytest.raises(error, match=message):
        samples.predict(torch.randn(5, 6), output=output)


def test_probabilities_of_a_callable_sum_to_one():
    samples, _ = samples_of(Constant(0.0, 0.0, 0.0))
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"sum to 1 over dim=-1; got sums from .*'sigmoid'"):
        samples.predict(x, torch.sigmoid)
    low = samples.predict(x, lambda logits: logits.bfloat16().softmax(-1))
    assert low.mean.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-2)
    with torch.no_grad():
        samples[0]["value"].fill_(math.nan)
    assert samples.predict(x, lambda logits: logits.softmax(-1)).mean.isnan().all()


def test_an_ensemble_takes_and_refuses_the_same():
    def loss(answer, y):
        return nn.functional.cross_entropy(answer["logits"], y)

    ensemble = fe.SVGD.from_model(lambda: Wrapped("dict"), loss, size=3, seed=0)
    x = torch.randn(5, 6)
    outputs = torch.stack([answer["logits"] for answer in ensemble.outputs(x)])
    result = ensemble.predict({"x": x}, output="logits")
    torch.testing.assert_close(
        result.mean, outputs.double().softmax(-1).mean(0), rtol=64 * UNIT, atol=64 * UNIT
    )
    with pytest.raises(TypeError, match="SVGDEnsemble.predict: the model's output must be .*'logits'"):
        ensemble.predict(x)
    with pytest.raises(ValueError, match=r"SVGDEnsemble.predict: dim must be .*got dim=0 for .*\(5, 2\)"):
        ensemble.predict(x, output="logits", dim=0)
    binary = fe.SVGD.from_model(nn.Linear(6, 1), nn.functional.mse_loss, size=2, seed=0)
    with pytest.raises(ValueError, match="SVGDEnsemble.predict: .*more than one class"):
        binary.predict(x)
