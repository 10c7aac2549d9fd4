"""The restricted Boltzmann machine's cases: ``pytest benchmarks/bench_rbm.py``.

Every row of ``python -m fekernels bench --only rbm`` is one benchmark here.
"""

from benchmarks import harness

test_row = harness.rows("rbm")

if __name__ == "__main__":
    harness.main(__file__)
