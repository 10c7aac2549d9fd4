"""Which noise a parameter gets, and what its bits may depend on."""

import copy
import math
import pickle

import pytest
import torch

import fekernels as fe
from tests.support.implementations import at_places, instruction_set, threads
from tests.support.optimizers import NOISES
from tests.support.tensors import DTYPES, UNIT, bits_equal, lay_out

HOT = dict(lr=0.1, temperature=1.0, eps=0.1, seed=3)


def train(params, steps=3, optimizer=None, **keywords):
    """Steps with gradients that depend on the step and the element alone."""
    optimizer = optimizer or fe.LangevinAdam(params, **{**HOT, **keywords})
    for i in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                wave = torch.arange(p.numel(), dtype=torch.float64).view(p.shape).sin() + i
                p.grad = wave.to(p.device, p.dtype)
        optimizer.step()
    return optimizer


def leaf(values, place=None):
    return values.detach().clone().to(place.device if place else "cpu").requires_grad_()


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_the_named_draw(noise, place):
    p = leaf(torch.zeros(33, 7), place)
    optimizer = fe.LangevinAdam(
        [leaf(torch.zeros(2), place), p], 0.5, betas=(0.0, 0.9), temperature=2.0, noise=noise, eps=1.0, seed=2**63 + 5,
        backend=place.backend,
    )  # fmt: skip
    for t in (1, 2, 3):
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        xi = fe.random.normal((33, 7), seed=2**63 + 5, stream=1, step=t, purpose=0)
        # D = 1, no drift: each rule moves by sqrt(2 T h) xi, "momentum" against the gradient's direction
        sign = -1 if noise == "momentum" else 1
        moved, wanted = (p.detach() - before).cpu(), sign * math.sqrt(2.0) * xi.double()
        # The sum is rounded once, what is added has come through at most six roundings.
        assert ((moved - wanted).abs() <= UNIT * (p.detach().cpu().abs() + 6 * wanted.abs())).all()


def test_streams_count_over_all_groups_and_go_on_in_new_ones(place):
    values = [torch.randn(n) for n in (5, 70, 9, 130)]
    together = [leaf(v, place) for v in values]
    train([{"params": together[:2]}, {"params": together[2:], "lr": 0.05}], backend=place.backend)
    grown = [leaf(v, place) for v in values]
    optimizer = fe.LangevinAdam(grown[:2], **HOT, backend=place.backend)
    optimizer.add_param_group({"params": grown[2:], "lr": 0.05})
    assert [group["streams"] for group in optimizer.param_groups] == [[0, 1], [2, 3]]
    train(grown, optimizer=optimizer)
    assert all(bits_equal(a, b) for a, b in zip(together, grown, strict=True))


def test_a_group_added_later_leaves_the_others_alone(place):
    values = [torch.randn(5), torch.randn(70)]
    a, b = (train([leaf(values[0], place)], steps=2, backend=place.backend) for _ in range(2))
    late = leaf(values[1], place)
    b.add_param_group({"params": [late], "temperature": 0.5})
    for optimizer in (a, b):
        train(None, steps=2, optimizer=optimizer)
    assert bits_equal(a.param_groups[0]["params"][0], b.param_groups[0]["params"][0])
    assert b.state[late]["step"].item() == 2


def test_named_parameters_carry_their_streams_with_them(place):
    values = {"head.weight": torch.randn(6, 4), "body.weight": torch.randn(70), "body.bias": torch.randn(3)}
    results = []
    for names in (list(values), list(reversed(values)), [["body.bias"], ["body.weight", "head.weight"]]):
        params = {name: leaf(value, place) for name, value in values.items()}
        if isinstance(names[0], list):
            groups = [{"params": [(name, params[name]) for name in part]} for part in names]
        else:
            groups = [(name, params[name]) for name in names]
        optimizer = train(groups, backend=place.backend)
        streams = [stream for group in optimizer.param_groups for stream in group["streams"]]
        assert len(set(streams)) == 3 and all(0 <= stream < 2**31 for stream in streams)
        results.append(params)
    for other in results[1:]:
        assert all(bits_equal(results[0][name], other[name]) for name in values)


class Wrapped(torch.nn.Module):
    """As torch wraps a whole model (DistributedDataParallel), or a layer (``part``: checkpoint_wrapper)."""

    def __init__(self, module: torch.nn.Module, name: str = "module") -> None:
        super().__init__()
        self.add_module(name, module)


def wrapped(how: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)]
    if "checkpoint" in how:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        layers[1] = checkpoint_wrapper(layers[1])
    if "FSDP1" in how:
        layers[0] = Wrapped(layers[0], "_fsdp_wrapped_module")
    if "layer compiled" in how:
        layers[0] = torch.compile(layers[0], backend="eager")
    model: torch.nn.Module = torch.nn.Sequential(*layers)
    for wrapper in how.split(" of "):
        if wrapper == "compiled":
            model = torch.compile(model, backend="eager")
        if wrapper == "DDP":
            model = Wrapped(model)
    return model


@pytest.mark.parametrize("kind", [fe.LangevinAdam, fe.VariationalAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        "compiled",
        "DDP",
        "DDP of compiled",
        "compiled of DDP",
        "DDP of DDP",
        "checkpoint",
        "FSDP1 of layer compiled",
    ],
)
def test_the_names_of_wrappers_change_no_noise(how, grouped, kind):
    def optimizer_of(model):
        pairs = list(model.named_parameters())
        given = [{"params": iter(pairs[:2])}, {"params": iter(pairs[2:])}] if grouped else pairs
        return kind(
            given, lr=0.1, temperature=0.5, seed=3, **({"ess": 9.0} if kind is fe.VariationalAdam else {})
        )

    plain, other = optimizer_of(wrapped("")), optimizer_of(wrapped(how))
    assert [g["streams"] for g in other.param_groups] == [g["streams"] for g in plain.param_groups]
    names = [name for group in other.param_groups for name in group["param_names"]]
    assert names == [name for name, _ in wrapped(how).named_parameters()]
    model = wrapped(how)  # a part of it, as ZeRO hands it to each rank
    part = fe.distributed.streams_of(kind, model.named_parameters())(
        list(model.parameters())[1:], lr=0.1, **({"ess": 9.0} if kind is fe.VariationalAdam else {})
    )
    flat = [stream for group in plain.param_groups for stream in group["streams"]]
    assert part.param_groups[0]["streams"] == flat[1:]
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        group = {"params": [(name + "2", leaf(torch.zeros(2))) for name in names]}
        copied.add_param_group(group)
        added = {
            "params": [
                (name + "2", leaf(torch.zeros(2))) for g in plain.param_groups for name in g["param_names"]
            ]
        }
        again = copy.deepcopy(plain)
        again.add_param_group(added)
        assert copied.param_groups[-1]["streams"] == again.param_groups[-1]["streams"]


def test_module_is_a_name_like_others_where_not_all_begin_with_it():
    a, b = leaf(torch.zeros(2)), leaf(torch.zeros(2))

    def streams(*names):
        optimizer = fe.LangevinAdam(list(zip(names, (a, b), strict=True)))
        return optimizer.param_groups[0]["streams"]

    def one(name):
        return fe.LangevinAdam([(name, a)]).param_groups[0]["streams"]

    assert streams("module.a", "b") != streams("a", "b")
    assert streams("x.module.a", "b") != streams("x.a", "b")
    assert one("module") != one("a")
    # A wrapped and a plain model of the same names, as of a GAN: their noise stays apart.
    assert len(set(streams("_orig_mod.a", "a"))) == 2
    both = fe.LangevinAdam([{"params": [("_orig_mod.a", a)]}, {"params": [("a", b)]}])
    assert both.param_groups[0]["streams"] != both.param_groups[1]["streams"]
    assert len(set(streams("module.a", "a"))) == 2
    later = fe.LangevinAdam([("module.a", a)])
    later.add_param_group({"params": [("b.a", b)]})
    assert later.param_groups[1]["streams"] == one("b.a")


def test_checkpoints_with_the_streams_of_wrapped_names_go_on_with_them():
    """Earlier releases hashed the names of wrappers too; a checkpoint's streams are what its noise is made from."""
    from fekernels.optim.noise_streams import stream_of_name

    values = {"module.a": torch.ones(3), "module.b": torch.ones(3)}
    old = fe.LangevinAdam([(name, leaf(value)) for name, value in values.items()], temperature=0.1, seed=3)
    old.param_groups[0]["streams"] = hashed = [stream_of_name(name) for name in values]
    saved = old.state_dict()
    params = [(name, leaf(value)) for name, value in values.items()]
    for given in (params, params[::-1]):
        new = fe.LangevinAdam(given, temperature=0.1, seed=3)
        assert new.param_groups[0]["streams"] != hashed
        new.load_state_dict(copy.deepcopy(saved))
        by_name = dict(zip([name for name, _ in given], new.param_groups[0]["streams"], strict=True))
        assert by_name == dict(zip(values, hashed, strict=True))


def test_names_that_hash_alike_raise(monkeypatch):
    monkeypatch.setattr("fekernels.optim.noise_streams.stream_of_name", len)
    a, b, c = leaf(torch.zeros(2)), leaf(torch.zeros(2)), leaf(torch.zeros(2))
    with pytest.raises(
        ValueError, match="parameters 'aa' and 'bb' hash to the same noise stream; rename one"
    ):
        fe.LangevinAdam([("aa", a), ("bb", b)])
    optimizer = fe.LangevinAdam([("aa", a), ("b", b)])
    with pytest.raises(ValueError, match="'aa' and 'cc' hash to the same noise stream"):
        optimizer.add_param_group({"params": [("cc", c)]})
    assert len(optimizer.param_groups) == 1


def test_mixed_dtypes_in_one_group_are_each_alone(place):
    values = {f"{dtype}": torch.randn(97).to(dtype) for dtype in DTYPES}
    together = {name: leaf(value, place) for name, value in values.items()}
    train(list(together.items()), backend=place.backend, stochastic_rounding=True)
    for name, value in values.items():
        alone = leaf(value, place)
        train([(name, alone)], backend=place.backend, stochastic_rounding=True)
        assert bits_equal(alone, together[name]), name


@pytest.mark.parametrize("states", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dtype(dtype, states, place):
    p = leaf(torch.randn(97).to(dtype), place)
    optimizer = train([p], steps=1, backend=place.backend, state_dtype=states, amsgrad=True)
    kept = {name: tensor.clone() for name, tensor in optimizer.state[p].items()}
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "step": torch.float32, "exp_avg": states, "exp_avg_sq": states, "max_exp_avg_sq": states,
        "noise_unit": torch.float64,
    }  # fmt: skip
    copy = optimizer.state_dict()
    optimizer.load_state_dict(copy)
    assert all(bits_equal(optimizer.state[p][name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    **at_places(
        layout=["transposed", "sliced", "misaligned", "channels_last"], dtype=[torch.float32, torch.bfloat16]
    )
)
def test_layout_of_a_parameter_does_not_change_its_bits(dtype, layout, place):
    values = torch.randn(3, 5, 8, 9).to(dtype)
    plain = leaf(values, place)
    train([plain], backend=place.backend, stochastic_rounding=True)
    p = lay_out(values, layout).to(place.device).requires_grad_()
    train([p], backend=place.backend, stochastic_rounding=True)
    assert layout == "misaligned" or not p.is_contiguous()
    assert bits_equal(p, plain)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["cold", "hot"])
def test_bfloat16_straight_from_memory_or_through_a_buffer_has_the_same_bits(temperature, stochastic, isa):
    values = torch.randn(50_001).bfloat16()
    values[::97] = math.nan
    values[1::97] = math.inf
    values[2::97] = 1e-39
    values[3::97] = 3.3e38
    keywords = dict(temperature=temperature, stochastic_rounding=stochastic, backend="cpp")
    runs = []
    for name, count, layout in (
        ("baseline", 1, "sliced"),
        (isa, 1, "sliced"),
        (isa, 1, None),
        (isa, 2, None),
    ):
        p = lay_out(values, layout).requires_grad_() if layout else leaf(values)
        with instruction_set(name), threads(count):
            optimizer = train([p], steps=2, **keywords)
        assert p.is_contiguous() != (layout == "sliced")
        runs.append([p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]])
    assert runs[0][0].isnan().sum() == values.isnan().sum() and runs[0][0].isfinite().sum() > 45_000
    for other in runs[1:]:
        assert all(bits_equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_seeds(place):
    def run(seed):
        p = leaf(torch.zeros(100), place)
        optimizer = train([p], seed=seed, backend=place.backend)
        return p.detach().cpu(), optimizer.param_groups[0]["seed"]

    assert not bits_equal(run(1)[0], run(2)[0]) and not bits_equal(run(1)[0], run(1 + 2**32)[0])
    assert bits_equal(run(2**64 - 1)[0], run(-1)[0])
    drawn = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        drawn.append(run(None))
    assert drawn[0][1] == drawn[1][1] != drawn[2][1]
    assert isinstance(drawn[0][1], int) and bits_equal(drawn[0][0], drawn[1][0])
