"""Shards and ranks beside one process: ``pytest benchmarks/bench_distributed.py``.

Every row of ``python -m fekernels bench --only distributed`` is one benchmark here. Its contestants run in processes of
their own: pytest-benchmark's own figure has the messages to them in it, ``extra_info`` has their time alone.
"""

from benchmarks import harness

test_row = harness.rows("distributed")

if __name__ == "__main__":
    harness.main(__file__)
