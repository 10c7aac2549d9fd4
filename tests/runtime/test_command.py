"""The command line: what it tells of the machine, and of variables and arguments that it cannot take."""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fekernels as fe
from fekernels.__main__ import COMMANDS, main
from fekernels._runtime import build, extension
from fekernels._runtime.command_line import EXIT_CODES, painted
from tests.support import fork_server


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FEKERNELS_BUILD", "gpu", "FEKERNELS_BUILD must be one of auto, none, cpu, cuda; got 'gpu'"),
        ("FEKERNELS_BACKEND", "fast", "FEKERNELS_BACKEND must be one of auto, reference, cpp, triton, cuda"),
        ("FEKERNELS_ISA", "sse9", "FEKERNELS_ISA must be one of auto, all, "),
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
    *_, told, last = capsys.readouterr().out.splitlines()
    assert told == f"written: {path}"
    assert last.startswith(f"Of {len(fe.backends())} operators ") and " run as " in last


def test_info_says_a_thing_once_and_refuses_a_set_that_the_library_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.count("host module") == 1

    def refused() -> str:
        raise ValueError("FEKERNELS_ISA must be one of those that this processor has")

    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(
        torch.ops, "fekernels_native", SimpleNamespace(build_info=lambda: "", isa=refused), raising=False
    )
    with pytest.raises(SystemExit, match="2"):
        main(["info"])
    assert "info: error: FEKERNELS_ISA must be one of those" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_plain_text_and_tells_the_exit_codes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a variable holds nonsense: who asks for help is not told of that first."""
    if command in ("demo", "unified"):
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    monkeypatch.setenv("FEKERNELS_BACKEND", "nonsense")
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    printed, errors = capsys.readouterr()
    words = " ".join(printed.split())
    assert words.startswith(f"usage: python -m fekernels {command}".rstrip()) and not errors
    assert "Exit codes: 0 " in words and words.endswith(EXIT_CODES)
    assert not set("`*\033") & set(printed) and ("--json PATH" in words) == bool(command)


def test_the_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{fe.__version__}\n"


def test_what_is_missing_and_what_is_interrupted_have_codes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["unified"]) == 1
    assert capsys.readouterr().err == "fekernels unified needs sklearn: pip install 'fekernels[demo]'\n"
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=interrupted))
    assert main(["bench"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()
    assert painted("fine", "green", stream) == "fine"
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert painted("fine", "green", stream) == "\033[32mfine\033[0m"
    assert painted("fine", None, stream) == "fine"
    monkeypatch.setenv("TERM", "dumb")
    assert painted("fine", "green", stream) == "fine"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted("fine", "green", stream) == "fine"


def test_info_is_coloured_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, once in a pipe (as everywhere here) and once with a terminal's end for its output."""
    assert main(["info"]) == 0 and "\033" not in capsys.readouterr().out
    try:
        master, end = pty.openpty()
    except OSError as error:
        pytest.skip(f"this system has no pseudo-terminals: {error}")
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm",
        "PYTHONPATH": str(Path(fe.__file__).parents[1]),
    }
    code = "import sys; from fekernels.__main__ import main; sys.exit(main(['info']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=end, env=environment) as process:
        os.close(end)
        printed = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not piece:
                break
            printed += piece
    os.close(master)
    assert process.returncode == 0 and printed.count(b"\033[") == 2


def test_info_tells_why_there_is_nothing(tmp_path: Path) -> None:
    """As the one command to find out with, it ends well where every op raises."""
    variables = {"FEKERNELS_BUILD": "cpu", "FEKERNELS_CACHE_DIR": str(tmp_path), "CXX": "g++ '"}
    done = fork_server.run_module("fekernels", "info", **variables)
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
