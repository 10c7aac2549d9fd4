"""Stein's method in plain PyTorch."""
