"""Inductor without vector instructions in its own loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def scalar_loops() -> Iterator[None]:
    """To know which instructions it may use Inductor compiles a program for each set and loads it in a new process.

    That takes longer than what a test compiles, and says nothing of operators that it only calls.
    """
    from torch._inductor import config  # as long as a test to import

    with config.patch({"cpp.vec_isa_ok": False}):
        yield
