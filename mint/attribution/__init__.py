"""Which neurons are behind a fault, how sure that is, and whether a repair removes the cause or carries around it."""

from mint.attribution.faults import Fault, find_faults, first_fault
from mint.attribution.linear import LinearScores, linear_scores

__all__ = ["Fault", "LinearScores", "find_faults", "first_fault", "linear_scores"]
