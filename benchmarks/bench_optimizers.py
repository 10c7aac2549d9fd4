"""The optimizers beside their peers: ``pytest benchmarks/bench_optimizers.py``.

Every row of ``python -m fekernels bench --only optimizers`` is one benchmark here. BENCH_THREADS sets torch's
threads (default 2); BENCH_QUICK=1 takes the small sizes.
"""

from benchmarks import harness

test_row = harness.rows("optimizers")

if __name__ == "__main__":
    harness.main(__file__)
