"""Operators of messages on graphs: schemas, checks, gradients."""
