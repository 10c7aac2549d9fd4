"""A user's file that names everything public passes mypy --strict, and what it gets back has the types that it says."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fekernels as fe
from tests.support import ROOT

PROGRAM = ROOT / "tests/support/user_program.py"
# Of torch, what it compiles and exports with: half of its lines, and none of a type that a user meets here. Were one of
# them met, it would be Any, which no assert_type of the program passes.
UNREAD = (
    "_decomp", "_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_prims", "_refs", "_subclasses",
    "ao", "export", "fx", "onnx", "testing",
)  # fmt: skip
# As installed: what mypy has to say of the library itself is not the user's.
SETTINGS = f"""[mypy]
strict = true
[mypy-fekernels.*]
follow_imports = silent
[mypy-sympy.*,{",".join(f"torch.{name}.*" for name in UNREAD)}]
follow_imports = skip
"""


def public_modules() -> list[ModuleType]:
    names = [
        "plots",
        "distributed.cost",
        "losses.likelihoods",
        "stein.kernels",
    ]  # and those that are public names
    names += [name for name in fe.__all__ if isinstance(getattr(fe, name), ModuleType)]
    modules = {
        importlib.import_module(f"fekernels.{name}")
        for name in names
        if name not in ("kernels", "likelihoods")
    }
    return [fe, *sorted(modules, key=lambda module: module.__name__)]


def test_every_public_name_is_in_it() -> None:
    pytest.importorskip("matplotlib")
    used = {
        (node.value.id if isinstance(node.value, ast.Name) else node.value.attr, node.attr)
        for node in ast.walk(ast.parse(PROGRAM.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)
    }
    called = {"fekernels": "fe"}  # other modules go by the last part of their name
    missing = [
        f"{module.__name__}.{name}"
        for module in public_modules()
        for name in module.__all__
        if (called.get(module.__name__, module.__name__.rpartition(".")[2]), name) not in used
    ]
    assert not missing


def mypy(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini")]
    command += ["--cache-dir", str(folder / "cache"), str(program)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_users_file_is_well_typed(tmp_path: Path) -> None:
    """And one with mistakes is not: what is asserted of it is looked at, and a name that does not exist is noticed."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    wrong = "\n\nfe.LangevinAdamW\nfe.models.Vae\nassert_type(fe.energy(x, target), int)\n"
    program.write_text(PROGRAM.read_text() + wrong)
    done = mypy(program, tmp_path)
    told = done.stdout.splitlines()
    last = len(program.read_text().splitlines())
    assert [line.split(":")[1] for line in told[:-1]] == [str(last - 2), str(last - 1), str(last)], (
        done.stdout + done.stderr
    )
