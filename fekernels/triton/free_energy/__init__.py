"""The free energy and reparameterized samples by Triton."""
