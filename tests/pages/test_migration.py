"""What the pages of docs/migrate say of other libraries: their lines and ours run as they stand there, and agree."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.random import LANGEVIN_NOISE, WEIGHT_SAMPLE
from tests.support import ROOT
from tests.support.pages import blocks, execute

PAGES = ROOT / "docs/migrate"
Names = dict[str, Any]
Draw = Callable[..., Tensor]


def run(
    page: str, drawing: str = "", draw: Callable[[Names], Draw] | None = None, **replaced: tuple[str, str]
) -> Names:
    """The namespace after all blocks of a page; texts of ``replaced`` stand for others.

    While a block of the other library runs, torch.``drawing`` is what ``draw`` makes of the names so far: our noise.
    """
    path = PAGES / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    for old, new in replaced.values():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    found = [block for block in blocks(text) if block.language == "python"]
    for block in found:
        if block.needs is not None:
            reason = f"{block.needs} is not installed: pip install 'fekernels[peers]'"
            pytest.importorskip(block.needs, reason=reason)
    names: Names = {"__name__": page}
    for block in found:
        with pytest.MonkeyPatch.context() as patch:
            if block.needs is not None and draw is not None:
                patch.setattr(torch, drawing, draw(names))
            execute(block, str(path), names)
    return names


def langevin_noise(names: Names, seed: int = 0) -> Draw:
    """What a sampler of one parameter draws, step by step, whatever names the shape in the call."""
    steps = itertools.count(1)

    def draw(like: Tensor | None = None, size: torch.Size | None = None, **_: object) -> Tensor:
        shape = size if like is None else like.shape
        return fe.random.normal(shape, seed=seed, step=next(steps), purpose=LANGEVIN_NOISE)

    return draw


def weights(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_every_page_is_tested_and_in_the_table() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"index"}
    prefix = "test_coming_from_"
    assert pages == {name.removeprefix(prefix) for name in globals() if name.startswith(prefix)}
    assert pages == set(re.findall(r"\((\w+)\.md\)", (PAGES / "index.md").read_text(encoding="utf-8")))


def test_coming_from_adam() -> None:
    names = run("adam")

    def same(ours: str, theirs: torch.nn.Module) -> None:
        assert (weights(theirs) - weights(names["net"])).abs().min() > 1e-4
        torch.testing.assert_close(weights(names[ours]), weights(theirs), rtol=1e-6, atol=4e-6)

    same("ours", names["theirs"])
    same("ours_w", names["theirs_w"])
    assert (weights(names["theirs"]) - weights(names["theirs_w"])).abs().max() > 1e-5

    plain = copy.deepcopy(names["net"])
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    names["train"](plain, adam, 100)
    same("resumed", plain)
    back = copy.deepcopy(names["adam"].state_dict())  # with our states
    adam.load_state_dict(back)
    names["train"](plain, adam, 50)
    names["train"](names["resumed"], names["opt"], 50)
    same("resumed", plain)


def test_coming_from_ivon() -> None:
    def weight_noise(names: Names) -> Draw:
        draws = itertools.count(1)

        def draw(*_: object, **__: object) -> Tensor:
            which = {"seed": 0, "step": next(draws), "purpose": WEIGHT_SAMPLE}
            shapes = [p.shape for p in names["net"].parameters()]
            return torch.cat([fe.random.normal(s, stream=i, **which).flatten() for i, s in enumerate(shapes)])

        return draw

    names = run("ivon", "randn", weight_noise)
    theirs, ours = weights(names["theirs"]), weights(names["ours"])
    assert (theirs - weights(names["net"])).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    class Inside(Exception):
        pass

    def disturbed(make: Callable[..., Any]) -> tuple[bool, bool, bool]:
        """Whether a frozen parameter moves, an exception leaves the draw, and what happens to .grad later is unseen."""
        frozen, free = torch.nn.Parameter(torch.ones(3), False), torch.nn.Parameter(torch.ones(3))
        optimizer = make([frozen, free], lr=0.1, ess=4.0)
        with optimizer.sampled_params(train=True):
            drawn = not torch.equal(frozen, torch.ones(3))
            (frozen * free).sum().backward()
        free.grad.zero_()
        optimizer.step()
        stepped = not torch.equal(frozen, torch.ones(3))
        late = bool((free - 1).abs().max() > 1e-3)
        mean = free.detach().clone()
        with pytest.raises(Inside), optimizer.sampled_params():
            raise Inside
        return drawn and stepped, not torch.equal(free, mean), late

    assert disturbed(names["ivon"].IVON) == (True, True, True)
    assert disturbed(fe.VariationalAdam) == (False, False, False)


def test_coming_from_posteriors() -> None:
    def noise(names: Names) -> Draw:
        if "energy" not in names:
            return langevin_noise(names)
        draw = langevin_noise(names, seed=1)
        return lambda like: -draw(like)  # the momentum of SGHMC points along the step, ours against it

    names = run("posteriors", "randn_like", noise)
    assert names["theirs"].abs().min() > 0.1
    torch.testing.assert_close(names["ours"].detach(), names["theirs"], rtol=1e-5, atol=1e-6)

    e, a, s, T, k = (names[name] for name in "easTk")
    b, x = 1 - e * a / s**2, e**2 * k / s**2
    # Of the stationary second moments of its step, and of ours (docs/langevin_adam.md).
    theirs = (1 - b) * (1 + b + x) / (1 - b * b - x * (1 + 3 * b + x) / 2)
    ours = 1 / (1 - e * k / a * (1 - b) / (2 * (1 + b)))
    assert (round(theirs, 2), round(ours, 3)) == (1.26, 1.005)  # as the page says
    for name, factor in (("theirs_hmc", theirs), ("ours_hmc", ours)):
        found = names[name].detach()
        error = 5 * math.sqrt(2 / found.numel())
        assert float(found.var()) == pytest.approx(factor * T / k, rel=error)
        assert float(found.mean()) == pytest.approx(1 / k, abs=error)

    # Under a constant force the order does not matter, but for one step by which theirs is late.
    linear = run(
        "posteriors", "randn_like", noise,
        curvature=("e, a, s, T, k = 0.1, 0.5, 0.7, 0.5, 1.0", "e, a, s, T, k = 0.1, 0.5, 0.7, 0.5, 0.0"),
        steps=("for _ in range(200):\n    state", "for _ in range(201):\n    state"),
    )  # fmt: skip
    found, expected = linear["ours_hmc"].detach(), linear["theirs_hmc"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert expected.std() > 1


def test_coming_from_devinterp() -> None:
    def noise(names: Names) -> Draw:
        if "theirs" not in names:
            return langevin_noise(names)
        count = itertools.count()  # one chain after another there, all in one step here

        def draw(*, size: torch.Size, **_: object) -> Tensor:
            chain, before = divmod(next(count), 200)
            return fe.random.normal((4, *size), seed=1, step=before + 1, purpose=LANGEVIN_NOISE)[chain]

        return draw

    names = run("devinterp", "normal", noise)
    theirs, ours, start = names["theirs"].detach(), names["ours"].detach(), names["model"].weight.detach()
    assert (theirs - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    assert names["their_llc"] == pytest.approx(names["our_llc"], abs=2e-3)
    assert names["our_llc"] == pytest.approx(6, abs=1.5)  # of few draws
    assert float(names["result"].llc_mean) < names["their_llc"] - 0.1

    from devinterp.utils import default_nbeta

    loader = torch.utils.data.DataLoader(names["data"], batch_size=8)
    assert default_nbeta(loader) == pytest.approx(8 / math.log(8))


def test_coming_from_pyro_svgd() -> None:
    names = run("pyro_svgd")
    start, distances = names["start"], {}
    for mode in ("univariate", "multivariate"):
        one = names["pyro_particles"](mode, 1)
        phi = names["our_particles"](names[mode], 1) - start
        torch.testing.assert_close(one - start, phi, rtol=1e-5, atol=1e-5 * float(phi.abs().max()))
        theirs, ours = names["pyro_particles"](mode, 40), names["our_particles"](names[mode], 40)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        distances[mode] = theirs
    assert (distances["univariate"] - distances["multivariate"]).abs().max() > 1e-2
    assert (distances["univariate"] - start).abs().max() > 0.1

    # Two sites of one number each: the rows that meet are those of a vector that is packed site by site.
    import pyro
    import pyro.distributions as dist

    def two() -> None:
        for site in "ab":
            pyro.sample(site, dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    options = {"num_particles": 8, "max_plate_nesting": 0, "mode": "univariate"}
    svgd = pyro.infer.SVGD(two, pyro.infer.RBFSteinKernel(), pyro.optim.SGD({"lr": 1.0}), **options)
    svgd.guide()
    z = pyro.param("svgd_particles")
    before = z.detach().clone()
    svgd.step()
    moved = z.detach() - before
    particles, rows = before.view(2, 8).T, before.view(8, 2)
    right, mixed = (names["univariate"](x, -x) for x in (particles, rows))
    torch.testing.assert_close(moved.view(8, 2), mixed, rtol=1e-4, atol=1e-5)
    assert (moved.view(2, 8).T - right).abs().max() > 0.05


def test_coming_from_numpyro_steinvi() -> None:
    names = run("numpyro_steinvi")
    start, log_prob = names["start"], names["log_prob"]
    scores = torch.autograd.functional.jacobian(lambda z: log_prob(z).sum(), start)
    h = fe.median_bandwidth(start, "numpyro")
    for stein, ours, temperature in (("svgd", "ours", 1.0), ("stein_vi", "ours_vi", 1 / names["n"])):
        path = names["numpyro_particles"](names[stein], 20)
        phi = fe.svgd_direction(start, scores, bandwidth=h, temperature=temperature)
        first = (path[0] - start) / names["lr"]
        torch.testing.assert_close(first, phi, rtol=1e-5, atol=1e-5 * float(phi.abs().max()))
        assert (path[-1] - start).abs().max() > 0.1
        torch.testing.assert_close(names[ours], path[-1], rtol=1e-5, atol=1e-5)
    assert (names["ours"] - names["ours_vi"]).abs().max() > 1e-2


def test_coming_from_scvi() -> None:
    names = run("scvi")
    assert names["counts"].max() > 20 and (names["counts"] == 0).any()
    for likelihood in ("nb", "zinb"):
        ours, theirs = names[f"our_{likelihood}"], names[f"their_{likelihood}"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(names["our_loss"], names["their_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(names["terms"].kl, names["kl"].sum(1).mean(), rtol=1e-5, atol=0)

    mu, theta = torch.full((2000, 1), 20.0), torch.tensor(1e5)
    counts = torch.poisson(mu)
    logits = (mu.double() / theta).log()
    exact = torch.distributions.NegativeBinomial(theta.double(), logits=logits).log_prob(counts.double())
    theirs = names["NegativeBinomial"](mu=mu, theta=theta).log_prob(counts) - exact
    ours = fe.energy((mu, theta), counts, "negative_binomial") + exact[:, 0]
    assert theirs.abs().max() > 0.1 and ours.abs().max() < 2e-6


def test_coming_from_pythae(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("pythae")
    gradients = {}
    for reconstruction, beta in (("bce", 1.0), ("mse", 1.0), ("mse", 4.0)):
        for side in ("pythae_loss", "loss"):
            with monkeypatch.context() as patch:
                if side == "pythae_loss":
                    zeros = torch.zeros(32, 4)
                    xi = fe.reparameterize(zeros, zeros, seed=0, step=0)
                    patch.setattr(torch, "randn_like", lambda *_, xi=xi, **__: xi)
                loss = names[side](reconstruction, beta)
            names["encoder"].zero_grad()
            loss.backward()
            gradients[side] = loss.detach(), names["encoder"].weight.grad.clone()
        for theirs, ours in zip(*gradients.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
