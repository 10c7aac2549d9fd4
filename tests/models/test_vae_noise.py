"""The noise of ``fe.models.VAE`` without a seed: fresh after each step, shared before it, kept in checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from fekernels.models.noise_counter import REMEMBERED
from tests.models.test_vae import data, small


def test_noise_is_fresh_after_a_step_and_shared_before_it():
    model, x = small(), data("bernoulli")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)

    def step():
        optimizer.zero_grad()
        model.free_energy(x).free_energy.backward()
        optimizer.step()

    first = model.noise(x)
    assert model.noise(x) == first == {"seed": 5, "stream": 0, "step": 1, "offset": 0}
    step()
    assert model.noise(x)["step"] == 2
    with torch.no_grad():
        model.decoder[-1].bias.data -= 0.01  # which no version counter sees
    assert model.noise(x)["step"] == 3
    assert model.noise(x.clone())["step"] == 4  # another batch
    x += 0.0
    assert model.noise(x)["step"] == 5  # which may have been written
    assert model.noise(x, seed=3) == {"seed": 3, "stream": 0, "step": 0, "offset": 0}
    assert model.noise(x, step=9, offset=4) == {"seed": 5, "stream": 0, "step": 9, "offset": 4}
    model.eval()
    evaluation = model.noise(x)
    assert model.noise(x.clone()) == evaluation and evaluation["stream"] != 0
    assert model.train().noise(x)["step"] == 5  # evaluation has not counted


def test_batches_keep_their_noise_until_the_weights_change_and_are_forgotten_with_them():
    model, x, y = small(), data("bernoulli"), data("bernoulli", seed=1)
    first, second = model.noise(x), model.noise(y)
    assert (first["step"], second["step"]) == (1, 2)
    assert model.noise(x) == first and model.noise(y) == second and model.noise(x) == first
    assert model.noise(x[:5])["step"] == 3 and model.noise(x[:5])["step"] == 4  # slices are new tensors
    for step in range(5, 1005):  # micro-batches
        assert model.noise(torch.rand(4, 3, 2))["step"] == step
    assert len(model.noise_counter._batches) <= 2 * REMEMBERED
    kept = [torch.rand(2, 3, 2) for _ in range(3 * REMEMBERED)]
    steps = [model.noise(each)["step"] for each in kept]
    assert steps == list(range(1005, 1005 + len(kept))) == [model.noise(each)["step"] for each in kept]
    assert model.noise(x) == first and model.noise(y) == second, "still known"
    model.noise_counter.load_state_dict(model.noise_counter.state_dict())
    step = steps[-1] + 1
    assert model.noise(x)["step"] == step
    with torch.no_grad():
        model.decoder[-1].bias += 1
    assert model.noise(y)["step"] == step + 1 and model.noise(x)["step"] == step + 2
    assert copy.deepcopy(model).noise(x)["step"] == step + 3


def test_every_sample_without_a_seed_is_fresh_and_goes_on_from_a_saved_state():
    model, other, x = small(seed=7), small(seed=8), torch.rand(4, 3, 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.sample(9), other.sample(9, seed=7))  # the first is that of the model's seed
    drawn = [model.sample(9) for _ in range(20)]
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == 20
    assert not torch.equal(drawn[0], model.sample(9, seed=7))
    other.load_state_dict(model.state_dict())
    assert other.state_dict()["noise_counter.state"].tolist() == [
        7,
        21 << 32,
    ]  # those with a seed are not counted
    assert torch.equal(other.sample(9), model.sample(9))
    assert torch.equal(copy.deepcopy(model).sample(9), model.sample(9))
    # The noise of training is what it was, and its count leaves that of the samples.
    assert [model.noise(x.clone())["step"] for _ in range(3)] == [1, 2, 3]
    assert model.noise_counter.state.tolist() == [7, (23 << 32) + 3]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sample(9), model.sample(9)) and other.noise(x)["step"] == 4
    torch.manual_seed(3)
    first = small(seed=None).sample(9)
    torch.manual_seed(3)
    assert torch.equal(small(seed=None).sample(9), first)


def test_samples_are_counted_on_past_the_last_that_is_told_apart():
    model = small(seed=7)
    first = model.sample(9)
    with torch.no_grad():
        model.noise_counter.state[1] = (((1 << 31) - 1) << 32) + 5
    assert not torch.equal(model.sample(9), first)
    assert model.noise_counter.state.tolist() == [7, 5] and torch.equal(model.sample(9), first)


def trained(model, x, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.free_energy(x).free_energy
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_checkpoint_goes_on_with_the_same_noise():
    x = data("bernoulli")
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, x, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    wanted = trained(model, x, optimizer, 3)
    file.seek(0)
    again = small(seed=77)
    adam = torch.optim.Adam(again.parameters())
    trained(again, x, adam, 1)
    saved = torch.load(file)
    again.load_state_dict(saved["model"])
    adam.load_state_dict(saved["optimizer"])
    assert trained(again, x, adam, 3) == wanted
    with torch.no_grad():
        again.noise_counter.state.copy_(saved["model"]["noise_counter.state"])  # as a loader in place does
    assert again.noise(x)["step"] == 4


def test_copies_and_pickles_have_their_own_count():
    model, x = small(), data("bernoulli")
    model.noise(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.noise(x)["step"] == 2 and model.noise(x)["step"] == 1
        assert other.noise(x, seed=1) == model.noise(x, seed=1)
