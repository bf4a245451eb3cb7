"""Reference text and what a model makes of it."""

from mint.reference.idle import idle_neurons, idle_order, nearly_free, other_places, written_energy
from mint.reference.moments import (
    Statistics,
    reference_key,
    sample_layers,
    statistics,
    store_tensors,
)
from mint.reference.texts import WINDOW, passages, reference_digest, reference_lines, reference_texts

__all__ = [
    "WINDOW",
    "Statistics",
    "idle_neurons",
    "idle_order",
    "nearly_free",
    "other_places",
    "passages",
    "reference_digest",
    "reference_key",
    "reference_lines",
    "reference_texts",
    "sample_layers",
    "statistics",
    "store_tensors",
    "written_energy",
]
