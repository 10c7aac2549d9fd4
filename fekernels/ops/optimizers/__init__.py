"""The optimizers: schemas, checks, and one step over rows of tensors or pointer tables."""
