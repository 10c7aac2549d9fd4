"""The free energy and reparameterized samples: schemas, checks, broadcasting, autograd."""
