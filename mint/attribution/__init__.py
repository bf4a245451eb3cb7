"""Which neurons are behind a fault, how sure that is, and whether a repair removes the cause or carries around it."""

from mint.attribution.faults import Fault, find_faults, first_fault
from mint.attribution.linear import LinearScores, linear_scores
from mint.attribution.rank import Attribution, attribute
from mint.attribution.verdict import Verdict, verdict

__all__ = [
    "Attribution",
    "Fault",
    "LinearScores",
    "Verdict",
    "attribute",
    "find_faults",
    "first_fault",
    "linear_scores",
    "verdict",
]
