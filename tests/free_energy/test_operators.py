"""The free energy's raw operators refuse what does not fit together, and nothing without plain memory is read."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fekernels as fe
from fekernels._runtime import extension
from tests.support.implementations import Place
from tests.support.public_free_energy import close

X, Z, ROW = torch.zeros(4, 6), torch.zeros(4, 2), torch.ones(4)
SEEN, THERE = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
GOOD = {
    "params": [X, X], "target": X, "mask": SEEN, "latent": [Z] * 4, "weight": ROW, "likelihood": "gaussian",
    "reduction": "sum", "needs": 63, "latent_mask": THERE,
}  # fmt: skip
LOGITS = {
    "params": [torch.zeros(4, 6, 3)],
    "target": torch.zeros(4, 6).long(),
    "likelihood": "categorical",
    "needs": 31,
}
BAD = [
    ({"params": [], "target": None, "mask": None, "latent": [], "latent_mask": None, "needs": 0}, "latent must hold"),
    *(({"latent": [Z] * n, "needs": 3}, f"latent must hold 2 tensors, 4 with a prior, or none beside params; got {n}")
      for n in (1, 3, 5)),
    ({"params": [], "needs": 3}, "params and target must be given together"),
    ({"target": None, "mask": None}, "params and target must be given together"),
    ({"params": [X] * 3}, "params must hold 1 or 2 tensor(s) for 'gaussian'; got 3"),
    ({"params": [X], "likelihood": "student_t"}, "params must hold 3 tensor(s)"),
    ({"likelihood": "normal"}, "likelihood must be one of mse, gaussian, bernoulli"),
    ({"reduction": "average"}, "reduction must be one of none, mean, sum; got 'average'"),
    ({"needs": 64}, "needs must have a bit for each of 6 operands; got 64"),
    ({"needs": -1}, "needs must have a bit"),
    ({"params": [X, torch.zeros(4, 5)]}, "params[1] must have shape (4 or 1, 6 or 1); got (4, 5)"),
    ({"params": [torch.zeros(1 << 20), X]}, "params[0] must have shape"),
    ({"params": [X.long(), X]}, "params[0] must be float32, bfloat16, float16 or float64; got int64"),
    ({"params": [X.to(torch.float8_e4m3fn), X]}, "params[0] must be float32"),
    ({"params": [X.to_sparse(), X]}, "params[0] must be dense"),
    ({"params": [X, X.to("meta")]}, "params[1] must be on cpu like the others; got meta"),
    ({"target": torch.zeros(4, 5)}, "params[0] must have shape (4 or 1, 5 or 1)"),
    ({"target": torch.zeros(9, 6)}, "params[0] must have shape (9 or 1"),
    ({"target": torch.zeros(24)}, "target must have shape (rows, columns); got (24,)"),
    ({"target": X.long()}, "target must be float32"),
    ({"target": X.double()}, "target must be float32, bfloat16 or float16 like params; got float64"),
    ({"target": X.to("meta")}, "target must be on cpu"),
    ({"mask": SEEN[:, :5]}, "mask must have shape (4, 6); got (4, 5)"),
    ({"mask": SEEN[:1]}, "mask must have shape (4, 6); got (1, 6)"),
    ({"mask": X}, "mask must be bool; got float32"),
    ({"mask": SEEN.to("meta")}, "mask must be on cpu"),
    ({"latent": [torch.zeros(3, 2)] * 2, "needs": 15, "latent_mask": None}, "mean must have shape (4 or 1, 2 or 1)"),
    ({"latent": [Z, torch.zeros(4, 3)], "needs": 15}, "logvar must have shape (4 or 1, 2 or 1); got (4, 3)"),
    ({"latent": [Z, Z, Z, torch.zeros(5, 1)]}, "prior_logvar must have shape (4 or 1, 2 or 1); got (5, 1)"),
    ({"latent": [torch.zeros(4)] * 2, "needs": 15}, "mean must have shape (rows, latents); got (4,)"),
    ({"latent": [Z, Z.int()], "needs": 15}, "logvar must be float32"),
    ({"latent": [Z, Z.to("meta")], "needs": 15}, "logvar must be on cpu"),
    ({"latent_mask": THERE[:, :1]}, "latent_mask must have shape (4, 2); got (4, 1)"),
    ({"latent_mask": Z}, "latent_mask must be bool; got float32"),
    ({"latent": [], "needs": 3}, "latent_mask must come with latent"),
    ({"weight": ROW[:3]}, "weight must have shape (4,); got (3,)"),
    ({"weight": ROW[:, None]}, "weight must have shape (4,); got (4, 1)"),
    ({"weight": ROW.long()}, "weight must be float32"),
    ({"weight": ROW.to("meta")}, "weight must be on cpu"),
    ({**LOGITS, "target": X}, "target must be int64; got float32"),
    ({**LOGITS, "target": torch.zeros(4, 5).long()}, "target must have shape (4, 6) like params[0] without its last"),
    ({**LOGITS, "params": [X]}, "params[0] must have shape (rows, positions, classes); got (4, 6)"),
    ({**LOGITS, "params": [torch.zeros(4, 6, 3)] * 2}, "params must hold 1 tensor(s) for 'categorical'; got 2"),
]  # fmt: skip
UPSTREAM = [
    ({"g_energy": ROW[:3]}, "g_energy must have shape (4,); got (3,)"),
    ({"g_kl": ROW[:, None]}, "g_kl must have shape (4,); got (4, 1)"),
    ({"g_kl": ROW.long()}, "g_kl must be float32"),
    ({"g_energy": ROW.to("meta")}, "g_energy must be on cpu"),
]


def call(**change):
    return torch.ops.fekernels.free_energy(**{**GOOD, **change})


def backward(g_energy=ROW, g_kl=ROW, **change):
    given = {**GOOD, **change}
    del given["reduction"]
    return torch.ops.fekernels.free_energy_backward(g_energy, g_kl, **given)


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_wrong_operands(change, message, backend):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
        call(**change)
    assert str(caught.value).startswith("free_energy: ")
    if "reduction" not in change:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
            backward(**change)
        assert str(caught.value).startswith("free_energy_backward: ")


@pytest.mark.parametrize(("change", "message"), UPSTREAM, ids=range(len(UPSTREAM)))
def test_wrong_factors_from_above(change, message, backend):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        backward(**change)


@pytest.mark.parametrize(("change", "message"), [BAD[i] for i in (1, 6, 11, 16, 20, 24, 28, 33, 37, 43)])
def test_wrong_operands_of_a_graph(change, message):
    """As shapes alone, which torch.compile and torch.export see."""
    with FakeTensorMode() as mode:

        def faked(value):
            tensor = isinstance(value, torch.Tensor)
            return (
                mode.from_tensor(value)
                if tensor
                else [*map(faked, value)]
                if isinstance(value, list)
                else value
            )

        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            torch.ops.fekernels.free_energy(**{name: faked(v) for name, v in {**GOOD, **change}.items()})


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((Z, torch.zeros(4, 3), None, None, "sum"), "logvar must have shape (4 or 1, 2 or 1)"),
        ((Z, Z, Z, None, "sum"), "prior_mean and prior_logvar must be given together"),
        ((Z, Z, Z, torch.zeros(7, 2), "sum"), "prior_logvar must have shape"),
        ((Z, Z, None, None, "elements"), "reduction must be one of none, mean, sum"),
        ((Z.long(), Z, None, None, "sum"), "mean must be float32"),
        ((Z, Z, None, None, "sum", THERE[:3]), "latent_mask must have shape (4, 2)"),
        ((torch.zeros(8), torch.zeros(8), None, None, "sum"), "mean must have shape (rows, latents)"),
    ],
)
def test_wrong_operands_of_the_kl(operands, message, backend):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
        torch.ops.fekernels.gaussian_kl(*operands)
    assert str(caught.value).startswith("gaussian_kl: ")


def test_a_gradient_that_was_left_out_is_no_silent_none(backend):
    leaf = torch.ones(4, 2, device=backend.device, requires_grad=True)
    for reduction in ("none", "sum"):
        kl = torch.ops.fekernels.free_energy([], None, None, [leaf, leaf], None, "mse", reduction, 1)[1]
        with pytest.raises(
            RuntimeError, match="needs must have the bit of each operand that requires a gradient"
        ):
            torch.autograd.grad(kl.sum(), leaf)


def test_the_compiled_operators_refuse_it_too():
    """They take two dimensions and what the others have checked; the rest raises before anything is read."""
    if (obstacle := Place("cpp", "cpu").obstacle()) is not None:
        pytest.skip(obstacle)
    extension.load()
    native = torch.ops.fekernels_native.free_energy
    good = [[X], X, None, [Z, Z], None, [], 0, 1, 1.0, 7, False, None]
    assert len(native(*good)) == 6
    for at, value in (
        (0, []), (0, [X, X]), (0, [X[:2]]), (0, [X.view(24)]), (0, [X.double()]), (1, None), (1, X[:, :3]), (1, X[0]),
        (2, SEEN[:2]), (2, X), (3, [Z]), (3, [Z] * 3), (3, [Z] * 5), (3, [Z, X]), (4, ROW[:2]), (4, ROW.double()),
        (5, [ROW]), (5, [ROW] * 3), (5, [ROW, ROW[:1]]), (6, 2), (6, 5), (6, 7), (6, 11), (6, -1), (7, 3), (7, -1),
        (11, THERE[:3]), (11, Z),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            native(*good[:at], value, *good[at + 1 :])
    for likelihood in (2, 5, 7, 10, 11, -1):
        assert native.plain(X, X, Z, Z, likelihood, 1, 1.0, 7, False) == []


# Operands without plain memory.


def without_plain_memory(kind, tensor):
    if kind == "negated":
        return torch._neg_view(-tensor)
    if kind == "expanded":
        return tensor[:1].expand_as(tensor) if tensor.dim() else tensor
    if kind == "subclass":
        return TwoTensor(tensor, tensor)
    leftover = []  # a tensor of a transform that has ended
    torch.vmap(lambda t: leftover.append(t) or t)(tensor[None])
    return leftover[0]


@pytest.mark.parametrize("raw", [False, True], ids=["function", "operator"])
@pytest.mark.parametrize("which", ["params", "target", "mean", "logvar", "prior_mean", "weight", "mask"])
@pytest.mark.parametrize("kind", ["negated", "expanded", "subclass", "leftover"])
def test_operands_without_plain_memory(kind, which, raw, backend):
    """The values of plain ones, or an error; never what lies at an address."""
    device = backend.device
    given = {
        name: torch.rand(6, 5, device=device) for name in ("params", "target", "mean", "logvar", "prior_mean")
    }
    given |= {"weight": torch.rand(6, device=device), "mask": torch.rand(6, 5, device=device) < 0.5}
    if which == "mask" and kind == "negated":
        return  # PyTorch has no such view of a bool

    def run(each):
        if raw:
            latent = [each["mean"], each["logvar"], each["prior_mean"], each["prior_mean"]]
            energy, kl, grads = torch.ops.fekernels.free_energy(
                [each["params"]], each["target"], each["mask"], latent, each["weight"], "mse", "sum", 7
            )
            return [energy, kl, *grads]
        leaves = [each[name].detach().requires_grad_() for name in ("params", "mean", "logvar")]
        r, m, v = leaves
        prior = each["prior_mean"]
        terms = fe.free_energy(
            r, each["target"], m, v, likelihood="mse", prior_mean=prior, prior_logvar=prior, mask=each["mask"],
            weight=each["weight"], reduction="sum",
        )  # fmt: skip
        return [terms.energy, terms.kl, *torch.autograd.grad(terms.free_energy, leaves)]

    odd = without_plain_memory(kind, given[which])
    try:
        results = run({**given, which: odd})
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        assert kind == "leftover" or (kind == "subclass" and raw)
        return
    plain = odd.clone() if kind == "expanded" else given[which]
    results = [r.a if isinstance(r, TwoTensor) else r for r in results]
    assert close(results, run({**given, which: plain}))


def test_latents_of_one_width_have_the_gradient_of_their_sum():
    mean = torch.randn(2, 7)
    for backend in ("reference", "auto"):
        logvar = torch.randn(2, 1, generator=torch.Generator().manual_seed(1))
        with fe.use_backend(backend):
            got = torch.ops.fekernels.free_energy([], None, None, [mean, logvar], None, "mse", "sum", 3)[2][1]
        torch.testing.assert_close(got, 7 * torch.expm1(logvar) / 2, rtol=1e-5, atol=1e-6)
