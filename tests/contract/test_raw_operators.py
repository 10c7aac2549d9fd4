"""The raw operators of noise go by addresses: whatever does not fit is refused before one is taken."""

import pytest
import torch

import fekernels as fe
from tests.support.implementations import Place

CPP = Place("cpp", "cpu")
META = torch.device("meta")


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (mean, logvar, numbers that replace (seed, stream, step, offset, samples)), and what the message says of it.
FORWARD = {
    "smaller": (
        zeros(1, 1),
        zeros(300, 300),
        {},
        r"mean must have shape \(300, 300\) like logvar; got \(1, 1\)",
    ),
    "larger": (zeros(3, 2), zeros(1, 1), {}, r"mean must have shape \(1, 1\) like logvar; got \(3, 2\)"),
    "transposed": (zeros(2, 3), zeros(3, 2), {}, "mean must have shape"),
    "one dimension": (zeros(4), zeros(4), {}, r"logvar must have shape \(rows, latents\); got \(4,\)"),
    "three dimensions": (zeros(2, 2, 2), zeros(2, 2, 2), {}, r"logvar must have shape \(rows, latents\)"),
    "integers": (zeros(2, 3, dtype=torch.int32), zeros(2, 3), {}, "mean must be float32"),
    "integer logvar": (zeros(2, 3), zeros(2, 3, dtype=torch.int64), {}, "logvar must be float32"),
    "complex": (zeros(2, 3, dtype=torch.complex64), zeros(2, 3), {}, "mean must be float32"),
    "devices": (zeros(2, 3), zeros(2, 3, device=META), {}, "logvar must be on cpu like the others; got meta"),
    "sparse": (zeros(2, 3).to_sparse(), zeros(2, 3), {}, "mean must be dense"),
    "samples": (zeros(2, 3), zeros(2, 3), {4: -1}, "samples must be in"),
    "too many samples": (zeros(0, 3), zeros(0, 3), {4: 1 << 40}, "samples must be in"),
    "stream": (zeros(2, 3), zeros(2, 3), {1: 1 << 32}, "stream must be in"),
    "streams": (zeros(2, 3), zeros(2, 3), {1: (1 << 32) - 1, 4: 2}, "stream must be in"),
    "step": (zeros(2, 3), zeros(2, 3), {2: -1}, "step must be in"),
    "offset": (zeros(2, 3), zeros(2, 3), {3: -1}, "offset must be in"),
    "last offset": (zeros(2, 3), zeros(2, 3), {3: (1 << 50) // 3 - 1}, "offset must be in"),
}
BACKWARD = {
    "larger": (
        zeros(2, 30, 30),
        zeros(1, 1),
        {},
        r"grad must have shape \(samples,\) \+ \(1, 1\) like logvar",
    ),
    "smaller": (zeros(1, 1, 1), zeros(30, 30), {}, "grad must have shape"),
    "no samples": (zeros(2, 3), zeros(2, 3), {}, "grad must have shape"),
    "scalar": (zeros(), zeros(2, 3), {}, "grad must have shape"),
    "integers": (zeros(1, 2, 3, dtype=torch.int32), zeros(2, 3), {}, "grad must be float32"),
    "devices": (zeros(1, 2, 3), zeros(2, 3, device=META), {}, "logvar must be on cpu"),
    "offset": (zeros(1, 2, 3), zeros(2, 3), {3: 1 << 50}, "offset must be in"),
    "streams": (zeros(2, 2, 3), zeros(2, 3), {1: (1 << 32) - 1}, "stream must be in"),
}
CALLS = [("reparameterize", name, *call) for name, call in FORWARD.items()]
CALLS += [("reparameterize_backward", name, *call) for name, call in BACKWARD.items()]
IDS = [f"{op}-{name}" for op, name, *_ in CALLS]


def numbers(op, changes):
    values = [1, 0, 0, 0] + [1] * (op == "reparameterize")
    for at, value in changes.items():
        values[at] = value
    return values


@pytest.mark.parametrize(("op", "name", "first", "logvar", "changes", "message"), CALLS, ids=IDS)
def test_public_operators_refuse(op, name, first, logvar, changes, message, backend):
    with pytest.raises((TypeError, ValueError), match=f"{op}: {message}"):
        getattr(torch.ops.fekernels, op)(first, logvar, *numbers(op, changes))


# Streams of the compiled library wrap around: no address depends on them.
BY_ADDRESS = [call[:-1] for call in CALLS if call[1] not in ("streams", "too many samples")]


@pytest.mark.parametrize(("op", "name", "first", "logvar", "changes"), BY_ADDRESS)
def test_the_compiled_library_refuses(op, name, first, logvar, changes):
    if (obstacle := CPP.obstacle()) is not None:
        pytest.skip(obstacle)
    fe.backends()
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(torch.ops.fekernels_native, op)(first, logvar, *numbers(op, changes))


@pytest.mark.parametrize("name", ["smaller", "larger", "transposed", "one dimension", "integers"])
def test_tracing_refuses(name):
    mean, logvar, *_ = FORWARD[name]
    with pytest.raises(Exception, match="reparameterize: "):
        torch.compile(torch.ops.fekernels.reparameterize, backend="eager", fullgraph=True)(
            mean, logvar, 1, 0, 0, 0, 1
        )


def test_gaps_and_halves_are_no_obstacle(backend):
    mean, logvar = torch.randn(3, 8), torch.randn(6, 4, dtype=torch.bfloat16)
    for m, v in ((mean[:, ::2], logvar[::2]), (mean.T[:4].T, logvar[:3])):
        got = torch.ops.fekernels.reparameterize(m, v, 1, 0, 0, 0, 2)
        assert torch.equal(
            got, torch.ops.fekernels.reparameterize(m.contiguous(), v.contiguous(), 1, 0, 0, 0, 2)
        )


@pytest.mark.parametrize("kind", ["bits", "uniform", "normal"])
def test_fillers_refuse(kind, backend):
    dtype, other = (torch.int32, torch.float32) if kind == "bits" else (torch.float32, torch.int32)
    good = zeros(6, dtype=dtype)
    bad = {
        "dtype": ((zeros(6, dtype=other), 0, 0, 0, 0, 0), "out must be"),
        "narrow": ((zeros(6, dtype=torch.uint8), 0, 0, 0, 0, 0), "out must be"),
        "strides": ((zeros(12, dtype=dtype)[::2], 0, 0, 0, 0, 0), "out must be contiguous"),
        "expanded": ((zeros(1, dtype=dtype).expand(6), 0, 0, 0, 0, 0), "out must be contiguous"),
        "stream": ((good, 0, 1 << 32, 0, 0, 0), "stream must be in"),
        "step": ((good, 0, 0, -1, 0, 0), "step must be in"),
        "offset": ((good, 0, 0, 0, (1 << 50) - 5, 0), "offset must be in"),
        "purpose": ((good, 0, 0, 0, 0, 1 << 16), "purpose must be in"),
    }
    for arguments, message in bad.values():
        with pytest.raises(ValueError, match=f"philox_{kind}: {message}"):
            getattr(torch.ops.fekernels, f"philox_{kind}")(*arguments)
        assert not arguments[0].any()
        if CPP.obstacle() is None:
            fe.backends()
            with pytest.raises(RuntimeError):
                getattr(torch.ops.fekernels_native, f"philox_{kind}")(*arguments)
            assert not arguments[0].any()


def test_draw_refuses():
    with pytest.raises(ValueError, match="draw: kind must be one of bits, uniform, normal; got 'gamma'"):
        torch.ops.fekernels.draw(torch.empty(0), "gamma", [2], 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="draw: shape must not be negative"):
        torch.ops.fekernels.draw(torch.empty(0), "bits", [-2], 0, 0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["bits", "normal"])
def test_opcheck_of_draw(kind):
    result = torch.library.opcheck(
        torch.ops.fekernels.draw.default, (torch.empty(0), kind, [2, 3], 1, 2, 3, 4, 5)
    )
    assert set(result.values()) == {"SUCCESS"}


WRONG_ON_META = {
    "kernel_stein_discrepancy": [
        (
            lambda x, h, shape=shape: (x, x, h, torch.ones(shape, device=x.device), 0, -0.5, 1.0),
            "weights must have shape",
        )
        for shape in ((), (5,), (1, 5), (2, 4, 1), (1, 5, 1, 1))
    ]
    + [(lambda x, h: (x[0], x, h, x, 0, -0.5, 1.0), "particles must have shape")],
    "svgd_direction": [
        (lambda x, h: (x, x[:, :2], h, 0, -0.5, 1.0, 1.0, 0), "scores must have shape"),
        (lambda x, h: (x[0, 0], x, h, 0, -0.5, 1.0, 1.0, 0), "particles must have shape"),
    ],
    "sq_dist_rank": [(lambda x, h: (x[0, 0, 0], [0], None), "particles must have shape")],
    "philox_normal": [(lambda x, h: (x.double(), 1, 0, 0, 0, 4), "out must be torch.float32")],
    "philox_bits": [(lambda x, h: (x, 1, 0, 0, 0, 4), "out must be torch.int32")],
    "draw": [(lambda x, h: (x, "other", [2], 1, 0, 0, 0, 4), "kind must be one of")],
}


@pytest.mark.parametrize("name", WRONG_ON_META)
def test_the_meta_device_refuses_what_others_do(name):
    for make, message in WRONG_ON_META[name]:
        for device in ("cpu", "meta"):
            x, h = torch.ones(3, 5, 2, device=device), torch.ones(3, device=device)
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                getattr(torch.ops.fekernels, name)(*make(x, h))
