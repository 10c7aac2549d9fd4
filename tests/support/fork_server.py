"""New processes from one that has imported torch, which takes 2 s, and what several ranks need of it, as much again.

A process of it has imported nothing of this package: how kernels are found and built is read from its own environment.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from typing import Any

from tests.support import ROOT

__all__ = ["Child", "process", "run", "run_module"]

# One server serves all, so that it is told once what to import.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["__main__", "torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
     "torch.distributed.checkpoint.state_dict", "torch.distributed.optim", "torch._dynamo"]
)  # fmt: skip


def process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str]) -> BaseProcess:
    """Of a function that can be imported; it is not started yet. Its variables are `environment` and no others."""
    return _CONTEXT.Process(target=_run, args=(function, dict(environment), arguments))


def _run(function: Callable[..., Any], environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    function(*arguments)


class Child:
    """A process that runs code as ``python -c`` would."""

    def __init__(self, code: str, environment: Mapping[str, str]) -> None:
        self._output = [tempfile.TemporaryFile() for _ in range(2)]
        descriptors = [reduction.DupFd(file.fileno()) for file in self._output]
        self._process = process(_execute, code, descriptors, environment=environment)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> tuple[str, str]:
        """(stdout, stderr) so far."""
        said = []
        for file in self._output:
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
        return said[0], said[1]

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """(stdout, stderr) of the whole run."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s")
        return self.said()


def _execute(code: str, descriptors: list[reduction.DupFd]) -> None:
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor.detach(), target)
    sys.path.insert(0, str(ROOT))
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run(code: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    child = Child(code, environment)
    stdout, stderr = child.communicate()
    return subprocess.CompletedProcess(code, child.poll() or 0, stdout, stderr)


def run_module(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As ``python -m``, with these variables changed."""
    code = f"import runpy, sys; sys.argv = {[name, *arguments]!r}; runpy.run_module({name!r}, run_name='__main__')"
    return run(code, {**os.environ, **variables})
