"""Patches: edits of a few neurons, their algebra, their file, and models on disk."""

from mint.patch.algebra import compose, scale
from mint.patch.edit import (
    NeuronEdit,
    Patch,
    applied,
    apply,
    check,
    identity,
    make_edit,
    read_neuron,
    revert,
    versions,
)
from mint.patch.file import FORMAT, from_bytes, load, save, to_bytes

__all__ = [
    "FORMAT",
    "NeuronEdit",
    "Patch",
    "applied",
    "apply",
    "check",
    "compose",
    "from_bytes",
    "identity",
    "load",
    "make_edit",
    "read_neuron",
    "revert",
    "save",
    "scale",
    "to_bytes",
    "versions",
]
