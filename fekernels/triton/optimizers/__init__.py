"""Steps of the optimizers by Triton, over pointer tables."""
