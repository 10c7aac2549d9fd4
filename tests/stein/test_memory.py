"""No n x n matrix: what the Stein functions take beyond their operands, by the peak of the resident size."""

import functools
import json
import sys

import pytest

from tests.support import fork_server

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")

# name: (n, d, the call). A float32 matrix of 4,000 x 4,000 has 64 MB, one of 20,000 x 20,000 has 1,600.
CALLS = {
    "direction": (4000, 3, "fe.svgd_direction(x, s, bandwidth=2.0)"),
    "gradient": (4000, 3, "fe.svgd_direction(x.requires_grad_(), s, bandwidth=2.0).sum().backward()"),
    "discrepancy": (4000, 3, "fe.kernel_stein_discrepancy(x, s, bandwidth=2.0)"),
    "gradient_of_discrepancy": (
        4000, 3, "fe.kernel_stein_discrepancy(x.requires_grad_(), s, bandwidth=2.0).backward()",
    ),
    "median": (4000, 3, "fe.median_bandwidth(x)"),
    "many": (20_000, 4, "fe.svgd_direction(x.requires_grad_(), s.requires_grad_(), bandwidth=1.0).sum().backward()"),
    "ranks": (20_000, 16, "torch.ops.fekernels.sq_dist_rank(x[None], [n * (n - 1) // 4, n * (n - 1) // 4 + 1], None)"),
}  # fmt: skip
# Blocks in float64 that are smaller than the library's, as what they take does not depend on n, and the number of pairs
# is time: a gradient of the discrepancy has many, which take 40. Of the C++ kernels, particles padded to 16 coordinates
# are 1.3 MB of 20,000, of which a backward has some thirty, and huge pages round each up to 2 MB; points twice, a
# sample of the distances and those in the bracket fill 20.
PAIRS_OF_A_BLOCK = 1 << 17
MEGABYTES = {"many": 100, "ranks": 40}
COMPILED = (
    "many",
    "ranks",
    "gradient_of_discrepancy",
)  # too long for the reference, whose the last is anyway

PROGRAM = """
import ctypes, json, torch, fekernels as fe
from fekernels.reference.stein import kernel_matrix, kernels, sq_dist_rank
torch.set_num_threads(1)
fe.use_backend(BACKEND)
for module in (kernel_matrix, kernels, sq_dist_rank):
    module.PAIRS = PAIRS

def run(n, d, call):
    x, s = torch.randn(n, d), torch.randn(n, d)
    exec(call, {"fe": fe, "torch": torch, "x": x, "s": s, "n": n})

def resident(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024

peaks = {}
for name, (n, d, call) in CALLS.items():
    run(300, d, call)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    run(n, d, call)
    peaks[name] = resident("VmHWM") - before
print(json.dumps(peaks))
"""


@functools.cache
def peaks(backend: str) -> dict[str, float]:
    """Of all calls in one process, where nothing else grows or is freed."""
    calls = {name: call for name, call in CALLS.items() if backend == "cpp" or name not in COMPILED}
    done = fork_server.run(f"BACKEND, CALLS, PAIRS = {backend!r}, {calls!r}, {PAIRS_OF_A_BLOCK}\n{PROGRAM}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_memory_grows_with_the_particles_not_their_pairs(call, place):
    if place.device != "cpu":
        pytest.skip("resident size is the CPU's")
    if place.backend == "reference" and call in COMPILED:
        pytest.skip("takes the reference too long")
    assert 0 < peaks(place.backend)[call] < MEGABYTES.get(call, 58)
