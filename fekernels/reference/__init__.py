"""Plain PyTorch that reads like the formulas: the truth for tests, and what runs where nothing is compiled."""
