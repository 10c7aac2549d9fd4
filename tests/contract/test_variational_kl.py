"""``variational_kl`` in every implementation: the sums of the formula in float64, and the C++ kernel's bits."""

import pytest
import torch

import fekernels as fe
from fekernels.ops.optimizers.variational_kl import variational_kl
from tests.support.implementations import CPU_PLACES, instruction_set, threads

OP = torch.ops.fekernels.variational_kl
SIZES = (0, 1, 7, 63, 64, 65, 128, 129, 4095, 4096, 4097, 40001)
# ess, weight_decay, temperature, whether the spread is std itself.
SETTINGS = {
    "curvature": (40.0, 0.3, 1.0, False),
    "hot": (40.0, 0.3, 2.5, False),
    "cold": (40.0, 0.3, 0.25, False),
    "deviations": (40.0, 0.3, 1.0, True),
    "narrow": (40.0, 0.3, 1.0, False),
    "narrow deviations": (40.0, 0.3, 1.0, True),
}


def operands(
    count: int, setting: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Curvatures from nearly nothing to 1e6, some of them below 0; deviations from 1e-4 to 10 of the prior's.

    "narrow": nearly all far narrower than the prior, as trained weights are, whose logarithms the C++ kernel takes by
    fours: one in 300 is above the range of that, every fifth row of 64 below it.
    """
    generator = torch.Generator().manual_seed(count)
    mean = torch.randn(count, generator=generator)
    scales = torch.rand(count, generator=generator)
    if setting.startswith("narrow"):
        ratio = 10 ** (-8 * scales - 0.4)
        ratio[torch.rand(count, generator=generator) < 1 / 300] = 3.0
        ratio[torch.arange(count) // 64 % 5 == 4] = 1e-11
        spread = (ratio / 12).sqrt() if SETTINGS[setting][3] else 0.3 / ratio - 0.3
        return mean.to(dtype), spread.to(dtype)
    if SETTINGS[setting][3]:
        return mean.to(dtype), (10 ** (5 * scales - 4) / 12**0.5).to(dtype)
    spread = 10 ** (14 * scales - 8)
    return mean.to(dtype), torch.where(scales < 0.1, -0.2 * scales, spread).to(dtype)


def exact(mean: torch.Tensor, spread: torch.Tensor, setting: str) -> torch.Tensor:
    ess, decay, temperature, deviations = SETTINGS[setting]
    std = spread.double() if deviations else (temperature / ess / (spread.double() + decay)).sqrt()
    q = torch.distributions.Normal(mean.double(), std)
    prior_sd = torch.tensor(ess * decay, dtype=torch.float64).rsqrt()
    kl = torch.distributions.kl_divergence(
        q, torch.distributions.Normal(torch.zeros_like(prior_sd), prior_sd)
    ).sum()
    return torch.stack([kl, 2 * (std / prior_sd).log().sum()])


@pytest.mark.parametrize("place", CPU_PLACES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sums_are_the_formula(setting, place):
    if (obstacle := place.obstacle()) is not None:
        pytest.skip(obstacle)
    for count in SIZES:
        given = operands(count, setting)
        found = OP(*given, *SETTINGS[setting], place.backend)
        assert found.dtype == torch.float64 and found.shape == (2,)
        torch.testing.assert_close(found, exact(*given, setting), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_bits_do_not_depend_on_threads_or_instruction_set(setting, isa):
    for count in SIZES:
        given = operands(count, setting)
        with threads(2):
            found = OP(*given, *SETTINGS[setting], "cpp")
        with threads(1), instruction_set("baseline"):
            want = OP(*given, *SETTINGS[setting], "cpp")
        assert torch.equal(found, want), count


@pytest.mark.parametrize("setting", SETTINGS)
def test_interpreted_triton_sums_the_same_elements(setting, interpret):
    for count in (0, 1, 65, 4096, 5003):
        given = operands(count, setting)
        found = interpret("variational_kl", *given, *SETTINGS[setting])
        torch.testing.assert_close(found, exact(*given, setting), rtol=1e-6, atol=1e-6)


def test_other_dtypes_and_layouts_go_through_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        given = operands(129, "curvature", dtype)
        found = OP(*given, *SETTINGS["curvature"], "cpp")
        torch.testing.assert_close(found, exact(*given, "curvature"), rtol=1e-12, atol=1e-12)
    mean, spread = (t.view(4, 16).T for t in operands(64, "curvature"))
    found = OP(mean, spread, *SETTINGS["curvature"])
    torch.testing.assert_close(found, exact(mean, spread, "curvature"), rtol=1e-12, atol=1e-12)


def test_opcheck():
    result = torch.library.opcheck(OP.default, (*operands(9, "hot"), *SETTINGS["hot"]))
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


def test_bad_input_names_itself():
    mean, spread = operands(5, "curvature")
    for arguments, error, message in (
        ((mean, spread[:4], 40.0, 0.3, 1.0, False), ValueError, r"spread must have shape \(5,\) like mean"),
        ((mean.int(), spread, 40.0, 0.3, 1.0, False), TypeError, "mean must be"),
        ((mean, spread, 0.0, 0.3, 1.0, False), ValueError, "ess must be finite and > 0; got 0.0"),
        ((mean, spread, 40.0, 0.0, 1.0, False), ValueError, "weight_decay must be finite and > 0; got 0.0"),
        ((mean, spread, 40.0, 0.3, -1.0, False), ValueError, "temperature must be finite and > 0; got -1.0"),
    ):
        with pytest.raises(error, match=f"variational_kl: {message}"):
            variational_kl(*arguments)
    with pytest.raises(fe.BackendUnavailable):
        OP(mean, spread, 40.0, 0.3, 1.0, False, "cuda")
