"""A sample's dimensions in another order: summed as they lie, without a copy, gradients in the operand's own layout."""

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from fekernels.ops.free_energy.broadcasting import gather
from fekernels.ops.free_energy.memory_order import memory_order
from tests.support.free_energy import NAMES, Case
from tests.support.implementations import Place
from tests.support.pairwise import pairwise
from tests.support.public_free_energy import close

CPP = Place("cpp", "cpu")
SHAPE = (5, 3, 4, 6)  # [B, C, H, W]
LATENT = (5, 2, 3, 2)
CHANNELS_LAST = (0, 2, 3, 1)
# Of parameters: memory order is no matter of the formula.
WITH_ANY_NUMBER = [NAMES.index(name) for name in ("mse1", "gaussian2", "student_t3")]
ORDERS = [CHANNELS_LAST, (0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1)]


def laid_out(tensor, order):
    """The same values, with the dimensions in ``order`` in memory."""
    back = [order.index(d) for d in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(back)


def problem(likelihood, device, shape=SHAPE, latent=LATENT):
    """[B, *event] operands as they come, contiguous: (params, target, latent, mask, weight)."""
    event = torch.Size(shape[1:]).numel()
    case = Case(likelihood, (shape[0], event, torch.Size(latent[1:]).numel()), weight="random")
    call = case.call(torch.default_generator).to(device)
    params = [p.expand(shape[0], event).reshape(shape) for p in call.params]
    mask = torch.rand(shape, device=device) < 0.7
    return params, call.target.reshape(shape), [t.reshape(latent) for t in call.latent], mask, call.weight


def evaluate(likelihood, params, target, latent, **keywords):
    """[free energy, energy, KL], and the gradients of what is a leaf here."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*params, *latent)]
    n = len(params)
    terms = fe.free_energy(
        tuple(leaves[:n]), target, *leaves[n:], likelihood=LIKELIHOODS[likelihood].name, beta=0.5, **keywords
    )
    return list(terms), torch.autograd.grad(terms.free_energy.sum(), leaves), leaves


@pytest.mark.parametrize(
    ("likelihood", "order", "reduction"),
    pairwise(likelihood=WITH_ANY_NUMBER, order=ORDERS, reduction=("mean", "none")),
    ids=lambda value: NAMES[value] if isinstance(value, int) else str(value),
)
def test_every_order_gives_the_contiguous_result(likelihood, order, reduction, backend, poisoned):
    params, target, latent, mask, weight = problem(likelihood, backend.device)
    for keywords in ({}, {"mask": mask, "weight": weight}):
        wanted, slopes, _ = evaluate(likelihood, params, target, latent, reduction=reduction, **keywords)
        moved = {**keywords, "mask": laid_out(mask, order)} if keywords else {}
        got, grads, leaves = evaluate(
            likelihood,
            [laid_out(p, order) for p in params],
            laid_out(target, order),
            [laid_out(t, order) for t in latent],
            reduction=reduction,
            **moved,
        )
        assert close(got, wanted)
        for grad, slope, leaf in zip(grads, slopes, leaves, strict=True):
            assert torch.equal(grad, slope)  # an element's own gradient is in no sum
            assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_nothing_is_copied(order):
    params, target, latent, mask, weight = problem(2, "cpu")
    params, target, mask, latent = (
        [laid_out(p, order) for p in params],
        laid_out(target, order),
        laid_out(mask, order),
        [laid_out(t, order) for t in latent],
    )
    operands = gather(
        "free_energy", params, target, *latent, None, None, mask, weight, LIKELIHOODS[2].name, [1, 2]
    )  # fmt: skip
    given, taken = [*params, target, mask, *latent], [
        *operands.params, operands.target, operands.mask, *operands.latent,
    ]  # fmt: skip
    assert [t.data_ptr() for t in taken] == [t.data_ptr() for t in given]


@pytest.mark.parametrize("shape", [(64, 64, 8, 8), (2, 3, 70, 70), (3, 5, 1, 1), (3, 1, 4, 4)], ids=str)
def test_channels_last_images(shape, backend, poisoned):
    # The short way of the compiled kernels, sizes that are one and all.
    def images():
        return torch.randn(shape, device=backend.device).contiguous(memory_format=torch.channels_last)

    prediction, target = images().requires_grad_(), images()
    mean, logvar = (torch.randn(shape[0], 7, device=backend.device) for _ in range(2))
    in_float64 = prediction.detach().double().contiguous().requires_grad_()
    value = fe.free_energy(prediction, target, mean, logvar, likelihood="mse").free_energy
    wanted = fe.free_energy(
        in_float64, target.double().contiguous(), mean.double(), logvar.double(), likelihood="mse"
    ).free_energy
    assert close([value], [wanted])
    value.backward(retain_graph=True)
    wanted.backward()
    assert close([prediction.grad], [in_float64.grad])
    assert prediction.grad.is_contiguous(memory_format=torch.channels_last)
    first = prediction.grad.clone()
    prediction.grad = None
    value.backward()
    assert torch.equal(prediction.grad, first)
    assert prediction.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_does_not_depend_on_its_batch(backend):
    params, target, latent, mask, _ = problem(3, backend.device, (7, 3, 40, 41), (7, 2, 3, 2))
    params, target, mask = (
        [laid_out(params[0], CHANNELS_LAST)],
        laid_out(target, CHANNELS_LAST),
        laid_out(mask, CHANNELS_LAST),
    )
    whole, slopes, _ = evaluate(3, params, target, latent, mask=mask, reduction="none")
    for rows in (slice(0, 1), slice(2, 7), slice(6, 7)):
        part, some, _ = evaluate(
            3,
            [params[0][rows]],
            target[rows],
            [t[rows] for t in latent],
            mask=mask[rows],
            reduction="none",
        )
        assert all(torch.equal(p, w[rows]) for p, w in zip((*part, *some), (*whole, *slopes), strict=True))


@pytest.mark.parametrize("of", ["target", "mask", "second", "prediction"])
def test_layouts_that_differ(of, backend):
    params, target, latent, mask, _ = problem(2, backend.device)
    wanted, slopes, _ = evaluate(2, params, target, latent, mask=mask)

    def move(name, tensor):
        return tensor if name == of else laid_out(tensor, CHANNELS_LAST)

    got, grads, _ = evaluate(
        2,
        [move("prediction", params[0]), move("second", params[1])],
        move("target", target),
        latent,
        mask=move("mask", mask),
    )
    assert close(got, wanted) and all(map(torch.equal, grads, slopes))


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 3, 1, 1), (5, 3, 1, 1), (6,), (4, 1), (5, 1, 1, 1), (1,), ()], ids=str
)
@pytest.mark.parametrize("order", [None, *ORDERS[:2]], ids=str)
def test_what_broadcasts_meets_its_own_elements(shape, order, backend):
    params, target, latent, _, _ = problem(2, backend.device)
    scale = torch.randn(shape, device=backend.device)
    in_float64 = [t.double() for t in (params[0], scale, target, *latent)]
    wanted, slopes, _ = evaluate(2, in_float64[:2], in_float64[2], in_float64[3:])
    pair = (params[0], target) if order is None else (laid_out(params[0], order), laid_out(target, order))
    got, grads, _ = evaluate(2, [pair[0], scale], pair[1], latent)
    assert close(got, wanted) and close(grads, slopes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_place(reduction, backend):
    if backend.backend == "reference":
        pytest.skip("the reference does not write in place")
    params, target, latent, _, _ = problem(3, backend.device)
    leaf = laid_out(params[0], CHANNELS_LAST).requires_grad_()
    target = laid_out(target, CHANNELS_LAST)
    slopes = []
    for inplace in (False, True):
        prediction = leaf * 1
        prediction.retain_grad()
        fe.free_energy(
            prediction, target, *latent, likelihood="bernoulli", reduction=reduction, inplace_backward=inplace
        ).free_energy.backward()
        slopes.append(prediction.grad)
        assert torch.equal(prediction, prediction.grad) == inplace
    assert torch.equal(*slopes)


def test_gradients_of_gradients():
    params, target, latent, _, _ = problem(2, "cpu", (2, 2, 2, 3), (2, 2))
    leaves = [laid_out(p, CHANNELS_LAST).double().requires_grad_() for p in params]
    target, latent = laid_out(target, CHANNELS_LAST).double(), [t.double() for t in latent]

    def function(*params):
        return fe.free_energy(params, target, *latent, likelihood="gaussian").energy

    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    for pair in (single, leaves):
        (slope,) = torch.autograd.grad(
            fe.free_energy(
                tuple(pair), target.to(pair[0].dtype), *(t.to(pair[0].dtype) for t in latent)
            ).energy,
            pair[0],
            create_graph=True,
        )
        pair.append(torch.autograd.grad(slope.pow(2).sum(), pair[1])[0])
    assert close([single[2]], [leaves[2]])


def test_compiled_and_mapped(backend):
    torch._dynamo.reset()
    params, target, latent, mask, _ = problem(2, backend.device)
    params, target, mask = (
        [laid_out(p, CHANNELS_LAST) for p in params],
        laid_out(target, CHANNELS_LAST),
        laid_out(mask, CHANNELS_LAST),
    )

    def energy(r, s, x, seen):
        return fe.energy((r, s), x, mask=seen)

    eager = energy(*params, target, mask)
    compiled = torch.compile(energy, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*params, target, mask), eager)
    mapped = torch.vmap(lambda *each: energy(*(t[None] for t in each))[0])(*params, target, mask)
    assert close([mapped], [eager])


def test_an_order_is_of_a_sample_alone():
    image = torch.empty(4, 3, 5, 6)
    last = image.to(memory_format=torch.channels_last)
    assert memory_order(image) is None and memory_order(image[:1]) is None
    assert memory_order(last) == memory_order(last[:1]) == memory_order(last[::2]) == CHANNELS_LAST
    assert memory_order(last[:, :2]) is None and memory_order(last.expand(4, 3, 5, 6)[..., ::2]) is None
    assert memory_order(torch.empty(3, 1, 1).expand(4, 3, 5, 6)) is None
    assert memory_order(torch.empty(6, 4).T) is None
    assert memory_order(last.unflatten(0, (2, 2)), 2) == (0, 1, 3, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (5, 1, 1, 1), (3, 4, 6)], ids=str)
def test_gradients_that_are_sums_have_their_dtype(dtype, shape, backend):
    params, target, latent, _, _ = problem(2, backend.device)
    scale = torch.randn(shape, device=backend.device).to(dtype).requires_grad_()
    in_float64 = scale.detach().double().requires_grad_()
    fe.free_energy((params[0], scale), target, *latent).free_energy.backward()
    fe.free_energy(
        (params[0].double(), in_float64), target, *(t.double() for t in latent)
    ).free_energy.backward()
    assert scale.grad.dtype == dtype
    error = (scale.grad.double() - in_float64.grad).abs().max()
    assert error <= (2e-6 + 2 * torch.finfo(dtype).eps) * in_float64.grad.abs().max()


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_one_layout_that_differs_in_the_shortest_call(moved, backend):
    params, target, latent, _, _ = problem(3, backend.device)
    operands = [params[0], target, *latent]
    wanted, slopes, _ = evaluate(3, operands[:1], operands[1], operands[2:])
    operands[moved] = laid_out(operands[moved], CHANNELS_LAST)
    got, grads, _ = evaluate(3, operands[:1], operands[1], operands[2:])
    assert close(got, wanted) and all(map(torch.equal, grads, slopes))
