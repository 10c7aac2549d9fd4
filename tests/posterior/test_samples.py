"""PosteriorSamples against averages worked out by hand; which samples it keeps, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fekernels.posterior.samples import PosteriorSamples
from tests.support.posterior_samples import Constant, counting, marks
from tests.support.tensors import UNIT

LOG2 = math.log(2)


def collected(model, *rows, **settings):
    samples = PosteriorSamples(model, **settings)
    for row in rows:
        with torch.no_grad():
            model.value.copy_(torch.tensor(row))
        samples.collect()
    return samples


def test_classification_by_hand():
    # Probabilities (.8, .2), (.5, .5) and (.2, .8).
    model = Constant(0.0, 0.0)
    logits = [[math.log(4), 0.0], [7.0, 7.0], [0.0, math.log(4)]]
    result = collected(model, *logits).predict(torch.zeros(2, 1))
    assert result.count == 3 and result.mean.dtype == torch.float64 and result.mean.shape == (2, 2)
    # The weights, log 4 among them, are float32; the rest is float64.
    wanted = {"mean": 0.5, "log_mean": -LOG2, "variance": 2 * 0.09 / 3}
    for name, value in wanted.items():
        got = getattr(result, name)
        torch.testing.assert_close(got, torch.full_like(got, value), rtol=2 * UNIT, atol=0)
    single = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    expected = (2 * single + LOG2) / 3
    assert result.predictive_entropy.tolist() == pytest.approx([LOG2] * 2)
    assert result.expected_entropy.tolist() == pytest.approx([expected] * 2)
    assert result.mutual_information.tolist() == pytest.approx([LOG2 - expected] * 2)


def test_agreement_has_no_mutual_information():
    result = collected(Constant(0.0, 0.0), [1.0, 3.0], [11.0, 13.0]).predict(torch.zeros(1, 1))
    assert result.mutual_information.item() == pytest.approx(0.0, abs=1e-12)
    assert result.variance.max().item() == pytest.approx(0.0, abs=1e-12)
    assert result.predictive_entropy.item() > 0.3


def test_log_mean_survives_underflow():
    # exp(-2000) is 0 even in float64; half of exp(-1000) too.
    model = Constant(0.0, 0.0)
    result = collected(model, [-1000.0, 0.0], [-2000.0, 0.0]).predict(torch.zeros(1, 1))
    assert result.mean[0, 0] == 0.0
    assert result.log_mean[0, 0].item() == pytest.approx(-1000 - LOG2)
    assert result.predictive_entropy.item() == 0.0 and result.expected_entropy.item() == 0.0


def test_impossible_classes_give_no_nan():
    result = collected(Constant(0.0, 0.0), [-math.inf, 0.0], [-math.inf, 0.0]).predict(torch.zeros(1, 1))
    assert result.mean.tolist() == [[0.0, 1.0]] and result.mutual_information.item() == 0.0


def test_sigmoid_by_hand():
    result = collected(Constant(0.0), [math.log(4)], [-math.log(4)]).predict(torch.zeros(1, 1), "sigmoid")
    assert result.mean.item() == pytest.approx(0.5)
    single = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert result.predictive_entropy.item() == pytest.approx(LOG2)
    assert result.mutual_information.item() == pytest.approx(LOG2 - single)


def test_own_activation_gives_what_softmax_gives():
    samples = collected(Constant(0.0, 0.0, 0.0), [1.0, 2.0, 0.0], [0.0, -1.0, 3.0])
    x = torch.zeros(2, 1)
    theirs, own = samples.predict(x), samples.predict(x, lambda logits: logits.double().softmax(-1))
    for name in ("mean", "variance", "log_mean", "predictive_entropy", "expected_entropy"):
        torch.testing.assert_close(
            getattr(theirs, name), getattr(own, name), rtol=1e-12, atol=1e-12, msg=name
        )
    with pytest.raises(ValueError, match="must return probabilities; got a negative one"):
        samples.predict(x, lambda logits: logits - 2)
    with pytest.raises(ValueError, match="sum to 1 over dim=-1; got sums from 3 to 3 "):
        samples.predict(x, torch.abs)


def test_regression_keeps_its_digits():
    # A variance of 2/3 on top of 2^23, where the squares have no room left for it in float32.
    rows = [[2.0**23 - 1], [2.0**23], [2.0**23 + 1]]
    result = collected(Constant(0.0), *rows).predict(torch.zeros(1, 1), None)
    assert result.mean.item() == 2.0**23
    assert result.variance.item() == pytest.approx(2 / 3, rel=1e-9)
    assert result.std.item() == pytest.approx(math.sqrt(2 / 3), rel=1e-9)
    assert result.predictive_entropy is None and result.mutual_information is None


def test_batches_and_several_inputs():
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x, weight, scale):
            return self.layer(x) * weight[:, None] * scale

    model = Scaled()
    samples = PosteriorSamples(model)
    for _ in range(3):
        nn.init.normal_(model.layer.weight)
        samples.collect()
    inputs = (torch.randn(7, 3), torch.rand(7), torch.tensor(2.0))
    whole = samples.predict(inputs)
    assert whole.mean.shape == (7, 4) and whole.variance.min() > 0
    parts = samples.predict(inputs, batch_size=3, progress=True)
    # Probabilities of logits that a matrix product of another size may round otherwise.
    torch.testing.assert_close(whole.mean, parts.mean, rtol=0, atol=4 * UNIT)
    empty = samples.predict((torch.randn(0, 3), torch.rand(0), torch.tensor(2.0)), batch_size=3)
    assert empty.mean.shape == (0, 4)


def test_burn_in_and_thinning():
    model = Constant(0.0)
    samples = counting(PosteriorSamples(model, burn_in=4, thinning=3), model, 12)
    assert marks(samples) == [7, 10] and samples.calls == 12
    plain = counting(PosteriorSamples(model), model, 3)
    assert marks(plain) == [1, 2, 3]


def test_update_with_the_number_of_steps():
    model = Constant(0.0)
    samples = PosteriorSamples(model, burn_in=10, thinning=20)
    assert [s for s in range(0, 101, 10) if samples.update(step=s)] == [30, 50, 70, 90]
    # Back at an older checkpoint: what was collected before is not collected again.
    assert [s for s in range(60, 121, 10) if samples.update(step=s)] == [110]


def test_fifo_keeps_the_last():
    model = Constant(0.0)
    assert marks(counting(PosteriorSamples(model, max_samples=3), model, 8)) == [6, 7, 8]


def test_reservoir_is_uniform():
    model, kept = Constant(0.0), torch.zeros(20)
    for seed in range(400):
        samples = PosteriorSamples(model, max_samples=5, policy="reservoir", seed=seed)
        here = marks(counting(samples, model, 20))
        assert len(here) == 5 and here == sorted(here)
        kept[torch.tensor(here) - 1] += 1
    # 400 draws of probability 1/4: mean 100, standard deviation 8.7.
    assert (kept - 100).abs().max() < 5 * math.sqrt(400 / 4 * 3 / 4)


def test_snapshots_do_not_follow_the_model():
    model = Constant(1.0)
    samples = PosteriorSamples(model, device=None)
    samples.collect()
    model.value.data.fill_(9.0)
    assert samples[0]["value"].item() == samples[-1]["value"].item() == 1.0
    with pytest.raises(IndexError, match="got 1"):
        samples[1]


def test_batch_norm_statistics_belong_to_the_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    with pytest.warns(UserWarning, match="running statistics"):
        samples = PosteriorSamples(model)
    x, expected = torch.randn(6, 3), []
    for _ in range(3):
        model.train()
        nn.init.normal_(model[0].weight)
        for _ in range(5):
            model(torch.randn(16, 3) * 3 + 1)
        samples.collect()
        model.eval()
        expected.append(model(x).detach().double())
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = samples.predict(x, None)
    # The outputs are the same float32 numbers, and their averages float64.
    torch.testing.assert_close(result.mean, torch.stack(expected).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        result.variance, torch.stack(expected).var(0, correction=0), rtol=1e-12, atol=1e-12
    )
    # Modes come back one by one, and nothing of the model has moved.
    assert [m.training for m in model] == [True, True, False] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counter(nn.Module):
    """Writes two buffers when it predicts, one of them not part of the state."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.hidden += 1
        if x.isnan().any():
            raise RuntimeError("no number")
        return x * self.weight


def test_nothing_is_written_while_predicting_and_exceptions_restore():
    model = Counter()
    samples = PosteriorSamples(model)
    samples.collect()
    model.weight.data.fill_(5.0)
    weight = model.weight
    assert samples.predict(torch.ones(1, 1), None).mean.item() == 1.0
    with pytest.raises(RuntimeError, match="no number"):
        samples.predict(torch.full((1, 1), math.nan), None)
    assert model.training and model.weight is weight and weight.item() == 5.0 and weight.requires_grad
    assert model.calls.item() == model.hidden.item() == samples[0]["calls"].item() == 0
    assert list(samples[0]) == ["weight", "calls"]


def test_tied_weights_are_kept_once_and_load_everywhere(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    samples = PosteriorSamples(model, directory=tmp_path / "chain")
    samples.collect()
    x = torch.randn(2, 4)
    expected = model(x).detach()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(samples.predict(x, None).mean.float(), expected)
    stored = next((tmp_path / "chain").glob("*.safetensors"))
    assert stored.stat().st_size < 2 * 4 * 4 * 4 + 600
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fresh.load_state_dict(samples[0])
    assert torch.equal(fresh(x), expected)


def test_outputs_one_by_one():
    samples = collected(Constant(0.0), [1.0], [2.0])
    outputs = list(samples.outputs(torch.zeros(1, 1)))
    assert [y.item() for y in outputs] == [1.0, 2.0]
    layer = nn.Linear(2, 2)
    linear = PosteriorSamples(layer)
    linear.collect()
    x = torch.randn(1, 2, requires_grad=True)
    assert not next(linear.outputs(x)).requires_grad and layer(x).requires_grad


def test_a_compiled_module_is_unwrapped():
    model = Constant(1.0, 2.0)
    samples = PosteriorSamples(torch.compile(model))
    samples.collect()
    assert list(samples[0]) == ["value"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module; got int"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0; got -1"),
        ({"thinning": 0}, ValueError, "thinning must be at least 1; got 0"),
        ({"thinning": 1.0}, TypeError, "thinning must be an int; got float"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1; got 0"),
        ({"policy": "lifo"}, ValueError, "policy must be one of fifo, reservoir; got 'lifo'"),
        ({"policy": np.zeros(2)}, TypeError, "policy must be one of fifo, reservoir; got ndarray"),
        ({"device": "nonsense"}, ValueError, "PosteriorSamples: device must be a device; got 'nonsense'"),
        ({"device": 1.5}, TypeError, "PosteriorSamples: device must be a device or its name; got float"),
        ({"device": np.zeros(2)}, TypeError, "PosteriorSamples: device must be .*; got ndarray"),
        ({"directory": 3}, TypeError, "directory must be a path or None; got int"),
    ],
)
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        PosteriorSamples(**{"model": Constant(0.0), **settings})


def test_bad_predictions():
    model = Constant(0.0)
    samples = PosteriorSamples(model)
    with pytest.raises(ValueError, match="samples must hold at least one; got none"):
        samples.predict(torch.zeros(1, 1))
    samples.collect()
    with pytest.raises(ValueError, match="activation must be 'softmax'.*got 'relu'"):
        samples.predict(torch.zeros(1, 1), "relu")
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        samples.predict(torch.zeros(1, 1), batch_size=0)
    model.forward = lambda x: (x, x)
    with pytest.raises(TypeError, match="output must be a floating-point tensor; got tuple"):
        samples.predict(torch.zeros(1, 1))
