"""What samplers' draws are judged by."""
