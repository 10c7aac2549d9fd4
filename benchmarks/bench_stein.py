"""The Stein direction, discrepancy and median beside their peers: ``pytest benchmarks/bench_stein.py``.

Every row of ``python -m fekernels bench --only stein`` is one benchmark here. Packages that are not installed are
skipped. BENCH_THREADS sets torch's threads (default 2); BENCH_QUICK=1 takes the small sizes.
"""

from benchmarks import harness

test_row = harness.rows("stein")

if __name__ == "__main__":
    harness.main(__file__)
