"""No n x n matrix: what the Stein functions take beyond their operands, by the peak of the resident size."""

import subprocess
import sys

import pytest

CALLS = {
    "direction": "stein.svgd_direction(x, s, bandwidth=2.0)",
    "gradient": "stein.svgd_direction(x.requires_grad_(), s, bandwidth=2.0).sum().backward()",
    "discrepancy": "stein.kernel_stein_discrepancy(x, s, bandwidth=2.0)",
    "gradient_of_discrepancy": "stein.kernel_stein_discrepancy(x.requires_grad_(), s, bandwidth=2.0).backward()",
    "median": "stein.median_bandwidth(x)",
}
# A float32 matrix of 7000 x 7000 has 196; blocks in float64, and a gradient of the discrepancy has many, take 140.
MEGABYTES = 180


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("call", CALLS)
def test_memory_grows_with_the_particles_not_their_pairs(call, place):
    if place.device != "cpu":
        pytest.skip("resident size is the CPU's")
    code = f"""
import resource, torch, fekernels as fe
from fekernels import stein
torch.set_num_threads(1)
fe.use_backend({place.backend!r})
def run(n):
    x = torch.randn(n, 3)
    s = -x
    {CALLS[call]}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(300)
before = peak()
run(7000)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < MEGABYTES
