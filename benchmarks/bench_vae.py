"""The variational autoencoder's cases: ``pytest benchmarks/bench_vae.py``.

Every row of ``python -m fekernels bench --only vae`` is one benchmark here.
"""

from benchmarks import harness

test_row = harness.rows("vae")

if __name__ == "__main__":
    harness.main(__file__)
