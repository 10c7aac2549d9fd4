"""Measurements of fekernels beside its peers. Run from the root of the source tree; nothing here is installed."""
