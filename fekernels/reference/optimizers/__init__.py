"""Steps of the optimizers in plain PyTorch."""
