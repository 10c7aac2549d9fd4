"""What each family of operations lists, in the order of its codes. Imports nothing, so that every layer may read it."""
