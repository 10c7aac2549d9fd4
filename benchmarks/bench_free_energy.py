"""The free energy, forward + backward, beside its peers: ``pytest benchmarks/bench_free_energy.py``.

Every row of ``python -m fekernels bench --only free_energy`` is one benchmark here. BENCH_THREADS sets torch's
threads (default 2); BENCH_QUICK=1 takes the small sizes.
"""

from benchmarks import harness

test_row = harness.rows("free_energy")

if __name__ == "__main__":
    harness.main(__file__)
