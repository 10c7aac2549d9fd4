"""Forward passes read the weights as they were last written, where FSDP2 or autocast keeps copies of older ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels._runtime import parts
from tests.support.processes import run_processes
from tests.support.tensors import bits_equal

WORLD = 2
OPTIONS = {
    "one draw": {},
    "two draws": {"draws": 2},
    "reparam": {"estimator": "reparam"},
    "temperature 0": {"temperature": 0.0},
}
SHARDED = ("root", "layers", "kept", "ahead", "frozen")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def history(net: nn.Module, draws: int = 1, ahead: bool = False, **options: object) -> list[Tensor]:
    """What forward passes give at every moment of three steps: all ranks have the same rows."""
    x = torch.linspace(-1, 1, 12).view(3, 4)
    optimizer = fe.VariationalAdam(net.parameters(), 0.1, 20.0, betas=(0.8, 0.9), seed=11, **options)  # type: ignore[arg-type]
    seen = []

    def look() -> None:
        with torch.no_grad():
            seen.append(net(x).float())

    for _ in range(3):
        look()
        for _ in range(2):
            if ahead:
                net.unshard(async_op=True)  # type: ignore[operator]
            with optimizer.sampled_params():
                look()
        look()
        for _ in range(draws):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                net(x).float().square().mean().backward()
        look()
        optimizer.step()
        look()
    return seen


def sharded(how: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = network()
    if how == "frozen":
        net[0].requires_grad_(False)
    if how in ("layers", "kept"):
        for layer in (net[0], net[2]):
            fully_shard(layer, reshard_after_forward=how == "layers")
    return fully_shard(net)


def on_a_rank() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    found = {}
    for how in SHARDED:
        for name, options in OPTIONS.items():
            plain = network()
            if how == "frozen":
                plain[0].requires_grad_(False)
            found[f"{how}, {name}"] = (
                history(sharded(how), ahead=how == "ahead", **options),
                history(plain, **options),
            )
    return found


def test_forward_passes_under_fsdp_are_those_of_one_process() -> None:
    for results in run_processes(on_a_rank, WORLD):
        assert len(results) == len(SHARDED) * len(OPTIONS)
        for name, (got, want) in results.items():
            assert len({tuple(out.flatten().tolist()) for out in want}) > 3
            for i, (out, wanted) in enumerate(zip(got, want, strict=True)):
                assert bits_equal(out, wanted), f"{name}: forward pass {i}"


def test_draws_and_steps_inside_one_region_of_autocast() -> None:
    """The same cast, in a region for each forward pass, is what each pass reads then."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                out: Tensor = self.net(x)
                return out

    for options in OPTIONS.values():
        with torch.autocast("cpu", torch.bfloat16):
            got = history(network(), **options)  # type: ignore[arg-type]
        for out, wanted in zip(got, history(Cast(), **options), strict=True):  # type: ignore[arg-type]
            assert bits_equal(out, wanted)


def test_a_torch_that_hides_what_is_gathered_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody whose parameters are no shards."""
    monkeypatch.setattr(parts, "gathering_groups", lambda params: None)
    optimizer = fe.VariationalAdam(network().parameters(), 0.1, 20.0)
    with optimizer.sampled_params():
        pass
    monkeypatch.setattr(parts, "is_sharded", lambda tensor: True)
    with pytest.warns(UserWarning, match=r"does not tell what fully_shard has gathered.* call reshard\(\)"):
        with optimizer.sampled_params():
            pass


def test_a_new_centre_inside_autocast_has_the_gradient_of_its_own_weights() -> None:
    net, x = network(), torch.linspace(-1, 1, 12).view(3, 4)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch).float().square().mean()
        return out

    with torch.autocast("cpu", torch.bfloat16):
        control = fe.ControlVariate(net, loss, [x])
        with torch.no_grad():
            net[2].bias.add_(1.0)
            net[2].weight.mul_(2.0)
        control.recentre()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = fe.ControlVariate(net, loss, [x])
    for got, want in zip(control.full_gradient, wanted.full_gradient, strict=True):
        assert bits_equal(got, want)
