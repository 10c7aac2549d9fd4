"""``GradientMessages``: what autograd gives for layer outputs, in every way that layers are called; SGD bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fekernels as fe


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def network(inplace=False):
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def by_hand(model, x, loss):
    """d loss / d the output of every layer of a Sequential, by autograd, with nothing in place."""
    outputs = [x]
    for layer in model:
        outputs.append(layer(outputs[-1].clone()))
    return torch.autograd.grad(loss(outputs[-1]), outputs[1:])


def loss(y):
    return (y**2).sum() + y[:, 0].mean()


@pytest.mark.parametrize("inplace", [False, True])
def test_messages_are_the_gradients_of_outputs(inplace):
    model, x = network(inplace), torch.randn(7, 4)
    expected = by_hand(model, x, loss)
    messages = fe.messages.GradientMessages(model)
    assert len(messages) == 0 and "0" not in messages
    loss(model(x)).backward()
    assert list(messages) == ["0", "1", "2", "3", "4"]
    for k, error in enumerate(expected):
        assert same(messages[str(k)], error), k
    assert messages.norms()["2"] == pytest.approx(float(expected[2].norm()), rel=1e-6)


def test_a_weights_gradient_follows_from_message_and_input():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(7, 4)
    messages = fe.messages.GradientMessages(model)
    loss(model(x)).backward()
    torch.testing.assert_close(messages["0"].T @ x, model[0].weight.grad)
    torch.testing.assert_close(messages["0"].sum(0), model[0].bias.grad)


class Twice(nn.Module):
    """One layer in two places, called twice; another under two names; a tuple, and a dict, as outputs."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.other_name = self.shared
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, kept):
        first = self.shared(x)
        with torch.no_grad():
            self.unused(first)
        second = self.other_name(self.frozen(torch.relu(first)))
        output, (hidden, cell) = self.rnn(second.unsqueeze(1))
        kept += [first, second, output, hidden, cell]
        return output.sum() + (hidden**2).sum() + (cell**3).sum()


def test_layers_called_twice_shared_frozen_and_with_several_outputs():
    model, x, kept = Twice(), torch.randn(7, 4), []
    messages = fe.messages.GradientMessages(model)
    total = model(x, kept)
    expected = torch.autograd.grad(total, kept, retain_graph=True)
    total.backward()
    assert list(messages) == [
        "shared",
        "frozen",
        "rnn",
    ]  # under its first name; none of what is under no_grad
    assert all(map(same, messages["shared"], expected[:2]))
    assert all(map(same, messages["rnn"], expected[2:]))
    assert messages["frozen"].shape == (7, 4)
    with pytest.raises(KeyError):
        messages["unused"]


def test_each_backward_pass_begins_anew():
    model, x = network(), torch.randn(7, 4)
    twin = copy.deepcopy(model)
    messages = fe.messages.GradientMessages(model)
    for factor in (1.0, 2.0):
        (factor * loss(model(x))).backward()
        assert same(messages["0"], factor * by_hand(twin, x, loss)[0])  # no sum of both
    model(x)  # a look at the predictions, without backward
    total = loss(model(x))
    total.backward(retain_graph=True)
    assert isinstance(messages["0"], torch.Tensor)
    (4 * total).backward()
    assert same(messages["0"], 4 * by_hand(twin, x, loss)[0])
    assert len(messages.history["0"].norm) == 4
    both = loss(model(x)) + loss(model(2 * x))
    both.backward()
    assert same(messages["0"][1], by_hand(twin, 2 * x, loss)[0])
    messages.clear()
    assert len(messages) == 0 and len(messages.history["0"].norm) == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_forward_within_backward(reentrant):
    model, x = network(), torch.randn(7, 4, requires_grad=True)
    messages = fe.messages.GradientMessages(model)
    h = model[0](x)
    h = checkpoint(model[1:4], h, use_reentrant=reentrant)
    loss(model[4](h)).backward()
    for k, error in enumerate(by_hand(model, x, loss)):
        assert same(messages[str(k)], error), k


def test_update_is_sgd_bit_for_bit():
    model = network()
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.037)
    messages = fe.messages.GradientMessages(model)
    for seed in range(5):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
        loss(model(x)).backward()
        messages.update(lr=0.037)
        sgd.zero_grad()
        loss(twin(x)).backward()
        sgd.step()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, other) and one.grad is None
    assert len(messages.history["4"].norm) == 5
    with pytest.raises(RuntimeError, match="no weight has a gradient"):
        messages.update(lr=0.1)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"GradientMessages.update: lr must be finite and > 0"):
            messages.update(lr=bad)


def test_removed_hooks_leave_the_module_as_it_was():
    model, x = network(), torch.randn(7, 4)
    with fe.messages.GradientMessages(model) as messages:
        loss(model(x)).backward()
        late = loss(model(x))
    norms = messages.norms()
    late.backward()  # of a graph made while it listened
    loss(model(x)).backward()
    messages.remove()
    assert messages.norms() == norms and len(messages.history["0"].norm) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_the_statistics():
    layer = nn.Identity()
    messages = fe.messages.GradientMessages(layer)
    assert messages.module is layer
    upstream = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 7.0]])
    for factor in (upstream, upstream.flip(1)):
        (layer(torch.zeros(3, 2, requires_grad=True)) * factor).sum().backward()
    (history,) = messages.history.values()
    mean, spread = upstream.mean(0), upstream.var(0).sum() / 3
    assert history.norm == pytest.approx(2 * [math.sqrt(67)])
    assert history.signal_to_noise == pytest.approx(2 * [float(mean.square().sum() / spread)])
    assert math.isnan(history.angle[0])
    cosine = 2 * 6 * 9 / (6**2 + 9**2)
    assert history.angle[1] == pytest.approx(math.degrees(math.acos(cosine)))


def test_the_batch_may_be_another_dimension():
    """The same data points, time first: the same numbers."""
    layer, x = nn.Linear(4, 3), torch.randn(7, 64, 4)
    ratios = {}
    for dim, data in ((0, x.transpose(0, 1)), (1, x), (-2, x), (0, x)):
        with fe.messages.GradientMessages(layer, batch_dim=dim) as heard:
            layer(data).square().mean().backward()
            error = heard[""].movedim(dim, 0).flatten(1).double()
        (ratio,) = heard.history[""].signal_to_noise
        assert ratio == pytest.approx((error.mean(0).square().sum() / error.var(0).sum() * len(error)).item())
        ratios.setdefault(dim, ratio)
    assert ratios[1] == pytest.approx(ratios[0]) and ratios[-2] == pytest.approx(ratios[0])
    assert ratio < ratios[0] / 2  # time steps as data points


def test_layers_may_differ_in_their_batch_dimension():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][-1])

    model, x = Last(), torch.randn(5, 32, 4)
    heard = fe.messages.GradientMessages(model, batch_dim={"lstm": 1})
    model(x).square().mean().backward()
    for name, dim in (("lstm", 1), ("head", 0)):
        error = heard[name].movedim(dim, 0).flatten(1).double()
        expected = (error.mean(0).square().sum() / error.var(0).sum() * len(error)).item()
        assert heard.history[name].signal_to_noise == [pytest.approx(expected)]
    with pytest.raises(ValueError, match="batch_dim must map layers, of 'lstm', 'head'; got 'tail'"):
        fe.messages.GradientMessages(model, batch_dim={"tail": 1})
    with pytest.raises(TypeError, match=r"GradientMessages: batch_dim must be an int; got float"):
        fe.messages.GradientMessages(model, batch_dim=1.5)


def test_an_output_without_the_batch_dimension():
    layer, loss = nn.Linear(4, 3), nn.MSELoss()
    with fe.messages.GradientMessages(layer, batch_dim=1) as heard:
        layer(torch.randn(5, 4)).sum().backward()
        message = r"must have the dimension batch_dim = 1; got one of shape \(3,\) of layer ''"
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(4))
    with fe.messages.GradientMessages(layer, batch_dim=1, statistics=False):
        layer(torch.randn(4))
    # A scalar is one data point.
    with fe.messages.GradientMessages(loss, batch_dim=1) as heard:
        loss(torch.randn(5, requires_grad=True), torch.zeros(5)).backward()
    assert heard.history[""].norm == [1.0] and math.isnan(heard.history[""].signal_to_noise[0])


def test_a_message_that_there_is_not_says_why():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    heard = fe.messages.GradientMessages(nn.Sequential(model, nn.Identity()))
    with pytest.raises(
        KeyError, match="must be that of a layer that is listened to: '0', '0.out_proj', '1'; got 'x'"
    ):
        heard["x"]
    assert "x" not in heard and heard.get("x") is None and "0" not in heard
    with pytest.raises(
        KeyError, match="layer '0' has no message: it was not called in the last forward pass"
    ):
        heard["0"]
    q = torch.randn(2, 5, 8)
    out = model(q, q, q)[0]
    with pytest.raises(
        KeyError, match=r"layer '0' has no message: no gradient has reached its output; call backward"
    ):
        heard["0"]
    out.sum().backward()
    assert "0" in heard
    with pytest.raises(
        KeyError, match=r"'0.out_proj' has no message: it was not called .* as nn.MultiheadAttention"
    ):
        heard["0.out_proj"]


def test_a_batch_of_no_rows_has_messages_of_norm_0():
    model = network()
    with fe.messages.GradientMessages(model) as messages:
        for rows in (3, 0, 3):
            model(torch.randn(rows, 4)).sum().backward()
            history = messages.history["0"]
    assert history.norm[1] == 0 and history.norm[2] > 0
    assert math.isnan(history.angle[1]) and math.isnan(history.signal_to_noise[1])


def test_noise_alone_has_a_ratio_of_one():
    layer = nn.Identity()
    messages = fe.messages.GradientMessages(layer)
    for _ in range(30):
        (layer(torch.zeros(50, 100, requires_grad=True)) * torch.randn(50, 100)).sum().backward()
    (history,) = messages.history.values()
    ratios = torch.tensor(history.signal_to_noise)
    assert abs(ratios.mean() - 1) < 5 * math.sqrt(2 / 100 / 30)
    assert abs(torch.tensor(history.angle[1:]).mean() - 90) < 5 * math.degrees(1) / math.sqrt(100 * 29)


def test_it_hears_a_vae_and_keeps_its_gradients():
    model = fe.models.VAE(6, 2, (8,), seed=0)
    x = torch.rand(5, 6)
    model.free_energy(x, seed=1).free_energy.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    messages = fe.messages.GradientMessages(model)
    model.free_energy(x, seed=1).free_energy.backward()
    assert all(map(torch.equal, expected, (weight.grad for weight in model.parameters())))
    assert {"encoder.0", "fc_mean", "fc_logvar", "decoder.0", "decoder.2"} <= set(messages)
    torch.testing.assert_close(messages["decoder.2"].sum(0), model.decoder[2].bias.grad)


def test_bad_arguments():
    with pytest.raises(TypeError, match="module must be a torch.nn.Module; got str"):
        fe.messages.GradientMessages("model")
    with pytest.raises(ValueError, match=r"layers must be of '', '0', .*; got '9'"):
        fe.messages.GradientMessages(network(), layers=["9"])
    with pytest.raises(ValueError, match="module must not be compiled"):
        fe.messages.GradientMessages(torch.compile(network()))
    only = fe.messages.GradientMessages(model := network(), layers=["2"], statistics=False)
    loss(model(torch.randn(7, 4))).backward()
    assert list(only) == ["2"] and only.history == {}


def test_the_picture():
    pytest.importorskip("matplotlib")
    model = network()
    messages = fe.messages.GradientMessages(model)
    for _ in range(3):
        loss(model(torch.randn(7, 4))).backward()
        messages.update(0.01)
    figure = messages.plot()
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["0", "1", "2", "3", "4"]
    assert list(lines[0].get_ydata()) == messages.history["0"].norm
