"""PosteriorSamples against averages worked out by hand; what it keeps, where, and what it leaves alone."""

import math
import pathlib
import random

import pytest
import torch
from torch import nn

from fekernels.optim import _sample_store
from fekernels.optim.posterior_samples import PosteriorSamples

LOG2 = math.log(2)


class Constant(nn.Module):
    """Answers with its weights whatever the input, so that every average is known."""

    def __init__(self, *values):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.value.expand(len(x), -1)


def collected(model, *rows, **settings):
    samples = PosteriorSamples(model, **settings)
    for row in rows:
        with torch.no_grad():
            model.value.copy_(torch.tensor(row))
        samples.collect()
    return samples


def marks(samples):
    """The number each sample was marked with by `counting`."""
    return [int(state["value"][0]) for state in samples]


def counting(samples, model, calls, start=0):
    for number in range(start + 1, start + calls + 1):
        model.value.data.fill_(number)
        samples.update()
    return samples


def test_classification_by_hand():
    # Probabilities (.8, .2), (.5, .5) and (.2, .8).
    model = Constant(0.0, 0.0)
    logits = [[math.log(4), 0.0], [7.0, 7.0], [0.0, math.log(4)]]
    result = collected(model, *logits).predict(torch.zeros(2, 1))
    assert result.count == 3 and result.mean.dtype == torch.float64 and result.mean.shape == (2, 2)
    assert torch.allclose(result.mean, torch.tensor(0.5).double())
    assert torch.allclose(result.log_mean, torch.tensor(-LOG2).double())
    assert torch.allclose(result.variance, torch.tensor(2 * 0.09 / 3).double())
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
        assert torch.allclose(getattr(theirs, name), getattr(own, name), atol=1e-12), name
    with pytest.raises(ValueError, match="must return probabilities; got a negative one"):
        samples.predict(x, lambda logits: logits)


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
    assert torch.allclose(whole.mean, parts.mean, atol=1e-7)
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
    samples, x, expected = PosteriorSamples(model), torch.randn(6, 3), []
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
    assert torch.allclose(result.mean, torch.stack(expected).mean(0), atol=1e-6)
    assert torch.allclose(result.variance, torch.stack(expected).var(0, correction=0), atol=1e-5)
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
    assert torch.allclose(samples.predict(x, None).mean.float(), expected, atol=1e-6)
    stored = next((tmp_path / "chain").glob("*.safetensors"))
    assert stored.stat().st_size < 2 * 4 * 4 * 4 + 600
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fresh.load_state_dict(samples[0])
    assert torch.allclose(fresh(x), expected, atol=1e-6)


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


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_disk_resumes_as_if_it_had_not_stopped(tmp_path, policy):
    model, settings = Constant(0.0), {"burn_in": 2, "thinning": 2, "max_samples": 4, "policy": policy}
    counting(PosteriorSamples(model, directory=tmp_path / "a", **settings), model, 14)
    # The count of calls is as of the last sample, so stop at one.
    again = PosteriorSamples(model, directory=str(tmp_path / "a"), **settings)
    assert again.calls == 14 and len(again) == 4
    counting(again, model, 16, start=14)
    straight = counting(PosteriorSamples(model, **settings), model, 30)
    assert marks(again) == marks(straight)
    assert len(list((tmp_path / "a").iterdir())) == 4 + 1


@pytest.mark.parametrize("crash_at", ["sample", "index", "remove"])
def test_a_crash_leaves_a_consistent_set(tmp_path, monkeypatch, crash_at):
    model = Constant(0.0)
    samples = counting(PosteriorSamples(model, directory=tmp_path, max_samples=2), model, 3)
    real, store = _sample_store._rename_into_place, _sample_store.DiskStore

    def rename(temporary, path):
        if path.name.startswith("sample") == (crash_at == "sample"):
            raise KeyboardInterrupt
        real(temporary, path)

    if crash_at == "remove":
        monkeypatch.setattr(store, "_remove", lambda self, names: 1 / 0)
    else:
        monkeypatch.setattr(_sample_store, "_rename_into_place", rename)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        counting(samples, model, 1, start=3)
    monkeypatch.undo()
    again = PosteriorSamples(model, directory=tmp_path, max_samples=2)
    assert marks(again) == ([3, 4] if crash_at == "remove" else [2, 3])
    counting(again, model, 2, start=10)
    assert marks(again) == marks(PosteriorSamples(model, directory=tmp_path, max_samples=2)) == [11, 12]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_save_and_load(tmp_path):
    model, other = Constant(0.0, 0.0), Constant(0.0, 0.0)
    samples = counting(PosteriorSamples(model, thinning=2), model, 25)
    samples.save(tmp_path / "all.safetensors")
    for target in (PosteriorSamples(other), PosteriorSamples(other, directory=tmp_path / "d")):
        counting(target, other, 2)
        assert target.load(tmp_path / "all.safetensors") is target
        assert marks(target) == list(range(2, 25, 2)) and target.calls == 25
    assert marks(PosteriorSamples(other, directory=tmp_path / "d")) == list(range(2, 25, 2))
    assert other.value[0].item() == 2.0
    PosteriorSamples(model).save(tmp_path / "none.safetensors")
    assert len(samples.load(tmp_path / "none.safetensors")) == 0


def test_low_precision_and_strides_survive_the_disk(tmp_path):
    model = nn.Conv2d(2, 3, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    samples = PosteriorSamples(model, directory=tmp_path)
    samples.collect()
    assert samples[0]["weight"].dtype == torch.bfloat16
    assert torch.equal(samples[0]["weight"], model.weight)


def test_another_model_is_refused(tmp_path):
    samples = PosteriorSamples(nn.Linear(2, 3), directory=tmp_path / "d")
    samples.collect()
    samples.save(tmp_path / "file")
    message = r"names and shapes of .*'weight' of \[3, 2\]; got \[3, 4\]"
    with pytest.raises(ValueError, match=message):
        PosteriorSamples(nn.Linear(4, 3), directory=tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        PosteriorSamples(nn.Linear(4, 3)).load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"'bias' of \[3\]; got None"):
        PosteriorSamples(nn.Linear(2, 3, bias=False)).load(tmp_path / "file")


def test_damage_is_reported(tmp_path):
    model = Constant(0.0)
    counting(PosteriorSamples(model, directory=tmp_path), model, 3)
    with pytest.raises(ValueError, match="max_samples must be at least 3.*got 2"):
        PosteriorSamples(model, directory=tmp_path, max_samples=2)
    victim = random.Random(0).choice(sorted(tmp_path.glob("*.safetensors")))
    victim.unlink()
    with pytest.raises(ValueError, match=f"all files of its index; got no {victim.name}"):
        PosteriorSamples(model, directory=tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="must be an index of samples"):
        PosteriorSamples(model, directory=tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="must have an index.json beside its samples; got none"):
        PosteriorSamples(model, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="must be a file of PosteriorSamples.save"):
        PosteriorSamples(model).load(next(tmp_path.iterdir()))
    with pytest.raises(ValueError, match="path must be a file; got"):
        PosteriorSamples(model).load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module; got int"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0; got -1"),
        ({"thinning": 0}, ValueError, "thinning must be at least 1; got 0"),
        ({"thinning": 1.0}, TypeError, "thinning must be an int; got float"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1; got 0"),
        ({"policy": "lifo"}, ValueError, "policy must be 'fifo' or 'reservoir'; got 'lifo'"),
        ({"directory": 3}, TypeError, "directory must be a path or None; got int"),
    ],
)
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        PosteriorSamples(**{"model": Constant(0.0), **settings})


def test_bad_predictions():
    model = Constant(0.0)
    samples = PosteriorSamples(model)
    with pytest.raises(ValueError, match="there must be a sample; got none"):
        samples.predict(torch.zeros(1, 1))
    samples.collect()
    with pytest.raises(ValueError, match="activation must be 'softmax'.*got 'relu'"):
        samples.predict(torch.zeros(1, 1), "relu")
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        samples.predict(torch.zeros(1, 1), batch_size=0)
    model.forward = lambda x: (x, x)
    with pytest.raises(TypeError, match="output must be a floating-point tensor; got tuple"):
        samples.predict(torch.zeros(1, 1))


def test_the_page_runs():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "posterior_samples.md").read_text(
        encoding="utf-8"
    )
    exec(page.split("```python")[1].split("```")[0], {})
