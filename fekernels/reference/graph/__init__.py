"""Messages on graphs, in plain PyTorch."""
