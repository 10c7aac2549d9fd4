"""Stein's method by Triton."""
