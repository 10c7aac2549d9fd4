"""C++ and Triton have the codes that the catalogues of optimizers and noise list."""

import importlib
import re

import pytest
import torch

from fekernels._catalogue import optimizers, random
from fekernels._runtime import pointer_table
from fekernels.ops.optimizers.step import HEAD
from tests.support import ROOT

CSRC = ROOT / "csrc"
PURPOSES = {name.lower(): getattr(random, name) for name in random.__all__}
DTYPES = {name: code for code, name in enumerate(optimizers.DTYPES)}


def enum(path: str, name: str) -> list[tuple[str, int]]:
    """The entries of a C++ enum: kOneName as one_name."""
    text = re.sub(r"//.*", "", (CSRC / path).read_text())
    (body,) = re.findall(rf"enum (?:class )?{name} : \w+ \{{([^}}]*)\}}", text)
    entries = re.findall(r"k(\w+) = (\d+)", body)
    return [(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower(), int(code)) for key, code in entries]


def test_the_enums_of_the_cpp_sources():
    by_code = sorted(PURPOSES.items(), key=lambda entry: entry[1])
    assert enum("core/philox.h", "Purpose") == by_code
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    assert enum("core/pointer_table.h", "DType") == list(DTYPES.items())
    noises = enum("formulas/langevin_adam.h", "Noise")
    assert noises[:-1] == [*optimizers.NOISES.items(), ("none", optimizers.NO_NOISE)]
    for (short, code), (name, flag) in zip(
        enum("core/pointer_table.h", "StepFlags"), optimizers.FLAGS.items(), strict=True
    ):
        assert name.startswith(short) and code == flag


def test_where_the_momentum_ends():
    (above,) = re.findall(r"kAboveOfMomentum = (\d+)", (CSRC / "formulas/step.h").read_text())
    assert int(above) == optimizers.ABOVE_OF_MOMENTUM


def numbers(path: str, struct: str) -> tuple[str, ...]:
    """The members of a C++ struct of doubles, in order."""
    text = re.sub(r"//.*", "", (CSRC / path).read_text())
    (body,) = re.findall(rf"struct {struct} (?:: \w+ )?\{{(.*?)\}}", text, re.S)
    return tuple(", ".join(re.findall(r"double ([\w, ]+);", body)).split(", ")) if body else ()


def test_the_operations_and_settings_of_the_cpp_sources():
    lines = re.findall(r"^FE_OPTIMIZER\((\w+), (\w+)\)", (CSRC / "formulas/optimizers.def").read_text(), re.M)
    assert tuple(name for _, name in lines) == optimizers.OPERATIONS
    assert numbers("formulas/step.h", "StepSettings") == (*HEAD, "flags")
    for struct, name in lines:
        settings = importlib.import_module(f"fekernels.ops.optimizers.{name}").OPERATION.settings
        assert settings.__name__ == f"{struct}Settings"
        own = tuple("noise_code" if number == "noise" else number for number in settings.NUMBERS)
        assert numbers(f"formulas/{name}.h", f"{struct}Settings") == own


def test_flags_are_bits_of_their_own():
    flags = list(optimizers.FLAGS.values())
    assert all(flag.bit_count() == 1 for flag in flags) and sum(flags) == (1 << len(flags)) - 1


def test_the_codes_of_the_pointer_table():
    assert pointer_table.DTYPE_CODES == {getattr(torch, name): code for name, code in DTYPES.items()}


def test_the_codes_of_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    from fekernels.triton.optimizers import codes

    def values(*names: str) -> list[int]:
        return [getattr(codes, name.upper()).value for name in names]

    assert values(*optimizers.NOISES, "none") == [*optimizers.NOISES.values(), optimizers.NO_NOISE]
    assert values(*DTYPES) == list(DTYPES.values())
    flags = [name.replace("_weight_decay", "").replace("_rounding", "") for name in optimizers.FLAGS]
    assert values(*flags) == list(optimizers.FLAGS.values())
    assert values("langevin_noise", "stochastic_rounding") == [
        PURPOSES["langevin_noise"], PURPOSES["stochastic_rounding"]
    ]  # fmt: skip
