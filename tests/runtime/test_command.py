"""The command line: what it tells of the machine, and of variables and arguments that it cannot take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fekernels as fe
from fekernels.__main__ import COMMANDS, main
from fekernels._runtime import build


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FEKERNELS_BUILD", "gpu", "FEKERNELS_BUILD must be one of auto, none, cpu, cuda; got 'gpu'"),
        ("FEKERNELS_BACKEND", "fast", "FEKERNELS_BACKEND must be one of auto, reference, cpp, triton, cuda"),
    ],
)
@pytest.mark.parametrize("command", ["info", "demo", "bench"])
def test_a_variable_that_no_op_takes_is_a_usage_error(
    command: str,
    variable: str,
    value: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        main([command])
    assert f"python -m fekernels {command}: error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--all"], "python -m fekernels: error: unrecognized arguments: --all"),
        (["info", "--json", "/no/such/folder/a.json"], "--json must be in a directory that exists"),
        (["train"], "argument command: invalid choice: 'train'"),
        (["info", "--all"], "python -m fekernels info: error: unrecognized arguments: --all"),
        (["demo", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
    ],
)
def test_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[:1] == ["demo"]:
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed, errors = capsys.readouterr()
    assert all(f"python -m fekernels {name}" in printed for name in COMMANDS) and not errors


def test_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["fekernels"] == fe.__version__ and torch.__version__ in written["torch"]
    assert written["backends"]["langevin_adam_ on cpu"] == fe.backends()["langevin_adam_", "cpu"].in_use
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {path}"


def test_info_tells_why_there_is_nothing(tmp_path: Path) -> None:
    """As the one command to find out with, it ends well where every op raises."""
    environment = os.environ | {
        "FEKERNELS_BUILD": "cpu",
        "FEKERNELS_CACHE_DIR": str(tmp_path),
        "CXX": "g++ '",
        "PYTHONPATH": str(Path(fe.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fekernels", "info"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason = 'CXX must be a command as a shell takes it; got "g++ \'" (No closing quotation)'
    assert f"none: prebuilt: none installed; compiling for cpu: {reason}" in done.stdout
    assert f"cpp: prebuilt: none installed; compiling for cpu: {reason}" in done.stdout


def test_build_names_its_arguments() -> None:
    for call, error, said in (
        (lambda: fe.build("gpu"), ValueError, "build: device must be one of cpu, cuda; got 'gpu'"),
        (lambda: fe.build(None), TypeError, "build: device must be a string, one of cpu, cuda; got NoneType"),
        (lambda: fe.build(torch.device("cpu")), TypeError, "build: device must be a string.*; got device"),
        (lambda: fe.build(verbose="yes"), TypeError, "build: verbose must be a bool; got str"),
    ):
        with pytest.raises(error, match=said):
            call()


def test_use_backend_and_the_table_name_their_arguments() -> None:
    with pytest.raises(TypeError, match="use_backend: name of the backend must be a string; got NoneType"):
        fe.use_backend(None)
    with pytest.raises(ValueError, match="use_backend: name of the backend must be one of auto.*; got 'CPP'"):
        fe.use_backend("CPP")
    with pytest.raises(
        KeyError, match=r"backends: a key must be \(op, device\) with an op of philox_bits, .*got 'x'"
    ):
        fe.backends()["x"]


def test_a_number_of_jobs_that_is_none_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAX_JOBS", "2")
    assert build._jobs(8) == 2 and not caplog.text
    monkeypatch.setenv("MAX_JOBS", "many")
    assert build._jobs(1) == 1
    assert "MAX_JOBS must be a whole number of at least 1; got 'many'" in caplog.text
