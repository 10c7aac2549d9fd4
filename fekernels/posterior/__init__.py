"""Samples of a posterior: kept in memory or on disk, and what they predict together."""

from fekernels.posterior.samples import PosteriorSamples

__all__ = ["PosteriorSamples"]
