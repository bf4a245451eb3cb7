"""Which neurons a model can do without: those that write least on reference text."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from mint.console import Say
from mint.model.lm import LM
from mint.reference.moments import Statistics, statistics

IDLE = 96
"""One in so many neurons of a layer counts as idle: the quietest on reference text."""


def written_energy(lm: LM, stats: Statistics, layer: int) -> Tensor:
    """Energy that each neuron of a layer writes on reference text, E[n^2] |column|^2, [d_ff]."""
    return stats.neurons_energy[layer] * lm.columns(layer).float().square().sum(1).cpu()


def nearly_free(energy: Tensor, used: Collection[int] = ()) -> list[int]:
    """The idle neurons of a layer that are not in use, quietest first. energy: see `written_energy`."""
    taken = set(used)
    free = torch.tensor([i not in taken for i in range(len(energy))])
    quiet = energy.masked_fill(~free, float("inf")).argsort()[: max(4, len(energy) // IDLE)].tolist()
    return [i for i in quiet if free[i]]


def idle_neurons(lm: LM, say: Say = lambda _: None) -> Callable[[int], list[int]]:
    """layer -> its idle neurons; the statistics of a layer are measured (and cached) when it is asked for."""
    stats = statistics(lm, say=say)
    return lambda layer: nearly_free(written_energy(lm, stats, layer)) if lm.d_ff(layer) else []
