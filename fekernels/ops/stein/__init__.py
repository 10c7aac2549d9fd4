"""Stein's method: direction, discrepancy, ranks of distances; schemas, checks, autograd."""
