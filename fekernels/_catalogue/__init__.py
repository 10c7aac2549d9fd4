"""What each family of operations lists, in the order of its codes. Imports no layer, so that all may read it."""
