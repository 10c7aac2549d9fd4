"""Messages on graphs: belief propagation on discrete pairwise models."""

from fekernels.graph.propagation import BeliefPropagation, belief_propagation
from fekernels.ops.graph.belief_propagation import NotConverged

__all__ = ["BeliefPropagation", "NotConverged", "belief_propagation"]
