"""What samplers' draws are judged by, in plain PyTorch."""
