"""What importing the package does, and does not do."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import pytest


def test_import_is_light_and_compiles_nothing(tmp_path):
    """No compiler, and none of the modules that take long: those would be paid by everyone who imports fekernels."""
    code = (
        "import sys, torch; before = set(sys.modules); import fekernels; new = set(sys.modules) - before\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'matplotlib', 'sklearn', 'safetensors')\n"
        "print(sorted(name for name in new if name.startswith(slow)))"
    )
    environment = {**os.environ, "FEKERNELS_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_public_names():
    import fekernels as fe

    missing = [name for name in fe.__all__ if not hasattr(fe, name)]
    missing += [f"optim.{name}" for name in fe.optim.__all__ if not hasattr(fe.optim, name)]
    assert missing == []
    assert fe.__version__


def test_lazy_names(tmp_path, monkeypatch):
    """Imported at the first use and kept; listed before it; and who mistypes one is told module and name."""
    package = tmp_path / "lazily"
    package.mkdir()
    attach = '_lazy.attach(__name__, {".home": ["answer"], "math": ["tau"]}, ["cellar"])'
    (package / "__init__.py").write_text(
        f"from fekernels import _lazy\nhere = 1\n__getattr__, __dir__ = {attach}\n"
    )
    (package / "home.py").write_text("answer = object()")
    (package / "cellar.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    lazily = importlib.import_module("lazily")
    try:
        names = {"answer", "cellar", "tau"}
        assert not names & set(vars(lazily)) and {"here", *names} <= set(dir(lazily))
        assert not {"lazily.home", "lazily.cellar"} & set(sys.modules)
        assert lazily.answer is sys.modules["lazily.home"].answer and lazily.tau == math.tau
        assert lazily.cellar is sys.modules["lazily.cellar"]
        assert names <= set(vars(lazily)) and dir(lazily).count("answer") == 1
        with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'anwser'"):
            _ = lazily.anwser
    finally:
        for name in ("lazily", "lazily.home", "lazily.cellar"):
            sys.modules.pop(name, None)


def test_packages_of_lazy_names_have_all_they_name():
    for name in ("diagnostics", "distributed", "models", "optim", "posterior", "stein"):
        package = importlib.import_module(f"fekernels.{name}")
        assert set(package.__all__) <= set(dir(package))
        assert [public for public in package.__all__ if not hasattr(package, public)] == []
