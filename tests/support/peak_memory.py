"""Peaks of the benchmark's passes without importing torch for each."""

from fekernels.bench.case import Shape
from tests.support import fork_server


def forked_growth(name: str, shape: Shape) -> int:
    """``memory.in_process`` on one thread, in a process that has imported torch already."""
    program = "import torch; from fekernels.bench import memory; torch.set_num_threads(1)"
    done = fork_server.run(f"{program}; print(memory.growth({name!r}, {tuple(shape)!r}))")
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
