"""Critical points, ways and planes beside what is known of them by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fekernels as fe
from fekernels.diagnostics import critical_points, loss_plane, trajectories


def documents(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return (a**2 + b**2 - 2) ** 2 + (a + b) ** 2 / 10


def test_the_documents_minima_saddles_and_maximum() -> None:
    """By hand: on a = -b the second term is 0; on a = b the gradient is 4 (2 a^2 - 2) a + .4 a, 0 at a^2 = .95."""
    found = critical_points(documents)
    side = math.sqrt(0.95)
    expected = [
        ("minimum", (-1.0, 1.0), 0.0), ("minimum", (1.0, -1.0), 0.0), ("saddle", (-side, -side), 0.39),
        ("saddle", (side, side), 0.39), ("maximum", (0.0, 0.0), 4.0),
    ]  # fmt: skip
    assert [point.kind for point in found] == [kind for kind, _, _ in expected]
    for point, (_, at, value) in zip(found, expected, strict=True):
        assert point.position.tolist() == pytest.approx(at, abs=1e-9)
        assert point.value == pytest.approx(value, abs=1e-9)
    assert found[0].eigenvalues.tolist() == pytest.approx([0.4, 16.0])
    assert found[2].eigenvalues.tolist() == pytest.approx([-0.4, 15.2])
    assert found[4].eigenvalues.tolist() == pytest.approx([-8.0, -7.6])
    assert repr(found[2]) == "CriticalPoint(saddle at (-0.9747, -0.9747), value 0.39)"
    # Outside of the bounds are none.
    assert [point.kind for point in critical_points(documents, (0.5, 2.0, 0.5, 2.0))] == ["saddle"]


def test_critical_points_of_other_dimensions_and_kinds() -> None:
    sines = critical_points(lambda x: x.sin().sum(1), (0.0, 2 * math.pi) * 3, starts=5)
    assert sorted(point.kind for point in sines) == ["maximum"] + ["minimum"] + ["saddle"] * 6
    (flat,) = critical_points(
        lambda x: x[:, 0] ** 2 + x[:, 1] ** 4, (-1.0, 1.0, -1.0, 1.0), tolerance=1e-6, starts=3
    )
    assert flat.kind == "degenerate"
    assert critical_points(lambda x: x.sum(1) + 0 * x.square().sum(1)) == []


def test_ways_are_those_of_the_optimizers_by_themselves() -> None:
    start = fe.random.normal((5, 2), seed=1)
    found = trajectories(documents, start, steps=20, lr=0.03, temperature=0.2, std=0.5, seed=4)
    assert list(found) == ["Adam", "LangevinAdam", "SVGD"]
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.03)
    for step in range(21):
        torch.testing.assert_close(found["Adam"].positions[step], x.detach(), rtol=1e-5, atol=1e-6)
        adam.zero_grad()
        documents(x).sum().backward()
        adam.step()
    particles = fe.SVGD(lambda x: -documents(x) / 0.2, start, lr=0.03)
    particles.run(20, progress=False)
    torch.testing.assert_close(found["SVGD"].positions[-1], particles.particles)
    for way in found.values():
        assert way.positions.shape == (21, 5, 2) and torch.equal(way.positions[0], start)
        torch.testing.assert_close(way.values, documents(way.positions))
        assert way.kl is not None
        moved = way.positions.double().diff(dim=0).square().sum((1, 2))
        assert way.kl.tolist() == pytest.approx((moved / (2 * 0.25)).tolist(), rel=1e-4)
    again = trajectories(documents, start, ["LangevinAdam"], steps=20, lr=0.03, temperature=0.2, seed=4)
    assert torch.equal(again["LangevinAdam"].positions, found["LangevinAdam"].positions)
    own = trajectories(documents, start, {"sgd": lambda params: torch.optim.SGD(params, lr=0.01)}, steps=1)[
        "sgd"
    ]
    (slope,) = torch.autograd.grad(documents(x := start.clone().requires_grad_()).sum(), x)
    torch.testing.assert_close(own.positions[1], start - 0.01 * slope)
    assert own.kl is None


def test_langevins_kl_is_that_of_its_preconditioner() -> None:
    """sum D delta^2 / 2T, D = sqrt(v / (1 - beta2^t)) + eps, v from the gradients along the way."""
    start = fe.random.normal((3, 2), seed=2).double()
    way = trajectories(documents, start, ["LangevinAdam"], steps=6, lr=0.02, temperature=0.3)["LangevinAdam"]
    v = torch.zeros_like(start)
    expected = []
    for t in range(6):
        x = way.positions[t].clone().requires_grad_()
        (slope,) = torch.autograd.grad(documents(x).sum(), x)
        v = 0.999 * v + 0.001 * slope**2
        denominator = (v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-3
        expected.append(float((denominator * (way.positions[t + 1] - way.positions[t]) ** 2).sum() / 0.6))
    assert way.kl is not None and way.kl.tolist() == pytest.approx(expected)


def test_late_langevin_positions_follow_the_temperature() -> None:
    """An eighth of 2 T: the mean of x^2 under exp(-4 x^2 / T), within a tenth."""
    start = torch.zeros(400, 2)
    way = trajectories(
        lambda x: 4 * x.square().sum(1), start, ["LangevinAdam"], steps=400, lr=0.05, temperature=0.2
    )
    late = way["LangevinAdam"].positions[200:]
    assert float(late.square().mean()) == pytest.approx(0.2 / 8, rel=0.1)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


BATCH = (fe.random.normal((30, 3), seed=5), (fe.random.uniform((30,), seed=6) <= 0.5).long())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_the_plane_of_filter_normalised_directions() -> None:
    net = model().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plane = loss_plane(net, loss, BATCH, points=5, span=0.5, seed=3)
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert plane.axes[0].tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5] and plane.values.shape == (5, 5)
    parameters = list(net.parameters())
    for direction in plane.directions:
        for p, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            if p.dim() == 2:
                torch.testing.assert_close(part.view(p.shape).norm(dim=1), p.detach().double().norm(dim=1))
            else:
                assert not part.any()
    other = model().eval()
    nn.utils.vector_to_parameters(
        (plane.centre + 0.25 * plane.directions[0] - 0.5 * plane.directions[1]).float(), other.parameters()
    )
    assert float(plane.values[3, 0]) == pytest.approx(float(loss(other, BATCH).detach()), rel=1e-5)
    torch.testing.assert_close(
        plane.project(plane.centre + plane.directions[0] * 0.3 + plane.directions[1]),
        torch.tensor([0.3, 1.0]).double(),
    )
    assert not torch.equal(
        loss_plane(net, loss, BATCH, points=2, seed=4).values,
        loss_plane(net, loss, BATCH, points=2, seed=3).values,
    )


def test_a_run_is_projected_on_its_own_two_directions() -> None:
    net = model().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    steps = [nn.utils.parameters_to_vector(net.parameters()).detach()]
    for _ in range(15):
        optimizer.zero_grad()
        loss(net, BATCH).backward()
        optimizer.step()
        steps.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    net.eval()
    plane = loss_plane(net, loss, BATCH, directions="trajectory", trajectory=steps, points=3)
    assert plane.path is not None and plane.path.shape == (16, 2) and plane.explained is not None
    away = torch.stack(steps).double() - steps[-1].double()
    kept = torch.linalg.svdvals(away).square()
    assert plane.explained == pytest.approx(float(kept[:2].sum() / kept.sum())) and plane.explained > 0.9
    assert plane.path[-1].abs().max() < 1e-6 and float(plane.axes[0][-1]) >= float(plane.path.abs().max())
    random = loss_plane(net, loss, BATCH, trajectory=steps, points=2)
    assert random.explained is not None and random.explained < 0.5


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    from fekernels import plots

    start = fe.random.normal((4, 2), seed=1)
    ways = trajectories(documents, start, ["Adam", "SVGD"], steps=5)
    figure = plots.landscape(
        documents, trajectories=ways, critical=critical_points(documents), solid=True, points=31
    )
    solid, adam, svgd = sorted(figure.axes, key=lambda ax: ax.get_title())
    assert solid.name == "3d" and [ax.get_title() for ax in (adam, svgd)] == ["Adam", "SVGD"]
    for ax, label in ((adam, "Adam"), (svgd, "SVGD")):
        lines = ax.get_lines()
        assert [line.get_marker() for line in lines[:5]] == [
            "o",
            "o",
            "X",
            "X",
            "^",
        ]  # at the critical points
        drawn = torch.stack([torch.tensor(line.get_xydata()) for line in lines[5:9]], 1)
        torch.testing.assert_close(drawn, ways[label].positions.double())
    surface = adam.collections[0]
    assert (
        float(surface.get_array().max()) > 27
    )  # the middle of the highest layer, which ends at the corners, 37.6
    net = model().eval()
    steps = torch.stack([nn.utils.parameters_to_vector(net.parameters()).detach() + k / 10 for k in range(3)])
    plane = loss_plane(net, loss, BATCH, trajectory=steps, points=4)
    (ax,) = plots.landscape(plane).axes
    assert plane.path is not None
    torch.testing.assert_close(torch.tensor(ax.get_lines()[0].get_xydata()), plane.path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: critical_points(3), TypeError, "critical_points: function must be callable"),
        (lambda: critical_points(lambda x: x), ValueError, r"must map points \[n, d\] to \[n\], here \(2, 2\) to"),
        (lambda: critical_points(documents, (1.0, 0.0)), ValueError, "of each coordinate, low < high"),
        (lambda: trajectories(documents, torch.zeros(2)), ValueError, r"start must have shape \(n, d\)"),
        (lambda: trajectories(documents, torch.zeros(1, 2), ["Eve"]), ValueError, "of Adam, LangevinAdam, SVGD, or"),
        (lambda: trajectories(documents, torch.zeros(1, 2), temperature=0), ValueError, "temperature must be finite"),
        (lambda: loss_plane(3, loss, BATCH), TypeError, "model must be a torch.nn.Module; got int"),
        (lambda: loss_plane(model(), loss, BATCH, directions="pca"), ValueError, "must be one of random, trajectory"),
        (lambda: loss_plane(model(), loss, BATCH, directions="trajectory"), ValueError, "trajectory must be given"),
        (lambda: loss_plane(model(), loss, BATCH, trajectory=[torch.zeros(3)]), ValueError, r"42 weights; got \(3,\)"),
        (lambda: loss_plane(nn.BatchNorm1d(3), loss, BATCH), ValueError, "a weight of two dimensions or more"),
    ],
)  # fmt: skip
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def unbatched(point: Tensor) -> Tensor:
    return (point[0] ** 2 + point[1] ** 2 - 2) ** 2


def single() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def picture(function: object = documents, **options: object) -> object:
    pytest.importorskip("matplotlib")
    from fekernels import plots

    return plots.landscape(function, **options)


DOUBLE = r"function must take points of float64, as a module does after .to\(torch.float64\); got: "


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: critical_points(single()), TypeError, f"^critical_points: {DOUBLE}"),
        (lambda: critical_points(unbatched), ValueError, r"^critical_points: .* \[n, d\] to \[n\], here \(3, 2\)"),
        (lambda: trajectories(unbatched, torch.randn(2, 2), steps=2), ValueError, r"here \(3, 2\) to \(3,\); got \(2,"),
        (lambda: trajectories(lambda x: 3, torch.randn(2, 2)), TypeError, "must be a tensor; got int"),
        (lambda: loss_plane(model(), lambda m, b: m(b[0]), BATCH, points=3), ValueError,
         r"^loss_plane: loss_fn must give a scalar, the mean of its rows for instance; got shape \("),
        (lambda: loss_plane(model(), lambda m, b: "x", BATCH, points=3), TypeError, "a scalar tensor or a number; got"),
        (lambda: picture(single()), TypeError, f"^landscape: {DOUBLE}"),
        (lambda: picture(lambda x: documents(x) * math.nan, points=5), ValueError,
         "^landscape: the values of function must be finite somewhere; got 25 NaN or infinite"),
        (lambda: picture(lambda x: x, points=5), ValueError, r"\[n, 2\] to \[n\], here n = 25; got \(25, 2\)"),
        (lambda: picture(bounds=(-1, 1)), ValueError, r"bounds must be \(left, right, low, high\), .*; got \(-1, 1\)"),
        (lambda: picture(bounds=(1, -1, 1, -1)), ValueError, r"left < right and low < high; got \(1.0, -1.0"),
        (lambda: picture(bounds=3), ValueError, "bounds must be .*; got 3"),
        (lambda: picture(points=1), ValueError, "^landscape: points must be at least 2; got 1"),
        (lambda: picture(trajectories={"a": torch.randn(5, 3)}), ValueError,
         r"^landscape: trajectories\['a'\] must have shape \(steps, n, 2\) or \(steps, 2\); got \(5, 3\)"),
        (lambda: picture(trajectories={"a": [1.0]}), TypeError, r"trajectories\['a'\] must be a tensor; got list"),
        (lambda: picture(trajectories=[torch.randn(5, 2)]), TypeError, "trajectories must be a mapping .*; got list"),
        (lambda: picture(critical=critical_points(lambda x: x.square().sum(1), (-1.0, 1.0))), ValueError,
         r"^landscape: critical\[0\] must be a point of two parameters; got \(1,\)"),
    ],
)  # fmt: skip
def test_errors_name_what_was_expected(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_what_is_right_passes_the_checks() -> None:
    net = single().double()
    critical_points(net, starts=2)
    trajectories(documents, torch.randn(2, 2), steps=2)
    assert torch.equal(
        loss_plane(model(), lambda m, b: loss(m, b).view(1), BATCH, points=2).values,
        loss_plane(model(), lambda m, b: float(loss(m, b)), BATCH, points=2).values,
    )
    picture(net, bounds=torch.tensor([-1, 1, 0, 1]), points=5)
    picture(lambda x: documents(x).log().masked_fill(x[:, 0] > 0, math.nan), points=5)
    picture(lambda x: x[:, 0].long(), trajectories={"a": torch.zeros(3, 2).long()}, points=5)


def test_the_number_of_starts_is_bounded() -> None:
    """It is exponential in the number of parameters."""
    with pytest.raises(
        ValueError,
        match=r"critical_points: starts\^d, the grid's points, must be at most 1048576; got starts = 21 and d = 12",
    ):
        critical_points(lambda x: x.square().sum(1), (-1.0, 1.0) * 12)
    (found,) = critical_points(lambda x: x.square().sum(1), (-1.0, 1.0) * 6, starts=2)
    assert found.kind == "minimum" and found.position.abs().max() < 1e-9


def test_a_plane_inside_autocast_is_of_the_weights_at_each_point() -> None:
    """Autocast keeps what it has cast of a weight until its region ends."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 1), torch.randn(8, 4)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()

    plain = loss_plane(net, loss, x, points=3, seed=1, progress=False).values
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_plane(net, loss, x, points=3, seed=1, progress=False).values
        after = loss(net, x)
    torch.testing.assert_close(cast, plain, rtol=0.05, atol=0.05)
    assert len(cast.unique()) > 1
    torch.testing.assert_close(after.detach().double(), plain[1, 1], rtol=0.05, atol=0.05)
