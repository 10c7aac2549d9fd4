"""The Triton backend: one kernel launch per call, no compiler needed beyond the one Triton brings.

Importing this package imports nothing; its modules need `triton` itself (ModuleNotFoundError without it) but no GPU:
with `TRITON_INTERPRET=1` in the environment before the first import of triton they run on CPU tensors, slowly, for
tests.
"""
