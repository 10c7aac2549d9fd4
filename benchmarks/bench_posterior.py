"""The posterior's cases: ``pytest benchmarks/bench_posterior.py``.

Every row of ``python -m fekernels bench --only posterior`` is one benchmark here.
"""

from benchmarks import harness

test_row = harness.rows("posterior")

if __name__ == "__main__":
    harness.main(__file__)
