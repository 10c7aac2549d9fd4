"""Belief propagation beside its peers: ``pytest benchmarks/bench_graph.py``.

Every row of ``python -m fekernels bench --only graph`` is one benchmark here; PGMax is skipped where
it is not installed.
"""

from benchmarks import harness

test_row = harness.rows("graph")

if __name__ == "__main__":
    harness.main(__file__)
