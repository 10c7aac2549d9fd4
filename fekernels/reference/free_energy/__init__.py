"""The free energy, its likelihoods, and reparameterized samples in plain PyTorch."""
