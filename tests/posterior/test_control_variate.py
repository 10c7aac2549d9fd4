"""Control variates: the right mean, little noise near the centre, and nothing changed but the gradients."""

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.posterior.control_variate import gradients
from tests.support.posteriors import batches

ROWS, BATCH = 130, 16  # the last batch is short


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return batches(torch.randn(ROWS, 3, generator=g), torch.randn(ROWS, 1, generator=g), BATCH)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def loss_fn(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return (model(rows[0]) - rows[1]).square().mean()


def moved(model: nn.Module, by: float) -> None:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=by)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def full(model: nn.Module) -> Tensor:
    model.zero_grad()
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    loss_fn(model, (x, y)).backward()
    return gradient(model)


def test_the_mean_over_an_epoch_is_the_full_gradient_and_the_variance_is_small_near_the_centre() -> None:
    model = network()
    control = fe.ControlVariate(model, loss_fn, data())
    moved(model, 1e-3)
    plain, controlled = [], []
    for rows in data():
        model.zero_grad()
        loss = loss_fn(model, rows)
        loss.backward()
        plain.append(gradient(model).clone())
        torch.testing.assert_close(control.backward(rows), loss.detach())
        controlled.append(gradient(model).clone())
    weights = torch.tensor([float(len(rows[0])) for rows in data()])[:, None]
    mean = (torch.stack(controlled) * weights).sum(0) / ROWS
    torch.testing.assert_close(mean, full(model), rtol=1e-4, atol=1e-6)
    noise = [(torch.stack(each) - torch.stack(each).mean(0)).square().mean() for each in (plain, controlled)]
    assert float(noise[1]) < 1e-4 * float(noise[0])


def test_at_the_centre_every_batch_gives_the_full_gradient_and_recentring_moves_it_there() -> None:
    model = network()
    control = fe.ControlVariate(model, loss_fn, data())
    moved(model, 0.5)
    control.backward(data()[0])
    assert float((gradient(model) - full(model)).abs().max()) > 1e-3
    control.recentre()
    for rows in data()[:3]:
        control.backward(rows)
        got = gradient(model).clone()
        torch.testing.assert_close(got, full(model), rtol=1e-5, atol=1e-6)


def test_chains_share_a_centre() -> None:
    model = network()
    chains = fe.Chains(model, 3, jitter=1e-3)
    control = fe.ControlVariate(chains, loss_fn, data())
    losses = control.backward(data()[1])
    assert losses.shape == (3,)
    for state, *own in zip(chains.states(), *(p.grad for p in chains.parameters()), strict=True):
        one = network()
        one.load_state_dict(state)
        for p, got, at_centre in zip(one.parameters(), own, control.full_gradient, strict=True):
            assert got.shape == p.shape == at_centre.shape
        torch.testing.assert_close(torch.cat([g.flatten() for g in own]), full(one), rtol=0.1, atol=2e-3)


def test_dropout_is_the_same_at_both_places() -> None:
    model = network(dropout=0.5).train()
    control = fe.ControlVariate(model, loss_fn, data())
    control.backward(data()[0])
    # At the centre the two gradients are the same to the bit, and only the full one is left.
    torch.testing.assert_close(gradient(model), torch.cat([g.flatten() for g in control.full_gradient]))


def test_bad_arguments() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or fe.Chains; got str"):
        fe.ControlVariate("model", loss_fn, data())
    with pytest.raises(TypeError, match="loss_fn must be callable; got int"):
        fe.ControlVariate(model, 3, data())
    with pytest.raises(TypeError, match="loader must be an iterable of batches that starts anew every time"):
        fe.ControlVariate(model, loss_fn, iter(data()))
    with pytest.raises(ValueError, match="loader must hold a batch; got none"):
        fe.ControlVariate(model, loss_fn, [])
    with pytest.raises(TypeError, match="a batch of loader must hold a tensor with rows; got int"):
        fe.ControlVariate(model, lambda model, rows: model(torch.ones(1, 3)).sum(), [3])


def test_gradients_of_stacked_layers_lie_as_backward_would_store_them() -> None:
    chains = fe.Chains(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), 2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return chains.losses(lambda model, rows: model(rows).square().mean(), x).sum()

    parameters = list(chains.parameters())
    found = gradients(loss(), parameters)
    loss().backward()
    for g, p in zip(found, parameters, strict=True):
        assert g.is_contiguous()
        assert torch.equal(g, p.grad)
    assert gradients(parameters[1].sum(), parameters)[1].is_contiguous()  # not one element, expanded
