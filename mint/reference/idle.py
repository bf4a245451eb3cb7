"""Which neurons a model can do without: those that write least on reference text."""

import hashlib
import random
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


SPARE = 16
"""One in so many can still be had where all idle ones are taken: a bank of many patches in one layer needs them."""


def nearly_free(energy: Tensor, used: Collection[int] = (), share: int = IDLE) -> list[int]:
    """One in `share` of a layer's neurons, those that write least and are not in use, quietest first.

    energy: see `written_energy`.
    """
    taken = set(used)
    free = torch.tensor([i not in taken for i in range(len(energy))])
    quiet = energy.masked_fill(~free, float("inf")).argsort()[: max(4, len(energy) // share)].tolist()
    return [i for i in quiet if free[i]]


def idle_order(
    lm: LM, stats: Statistics, layer: int, key: str, used: Collection[tuple[int, int]] = ()
) -> list[int]:
    """The idle neurons of a layer (`nearly_free`) in an order that hangs on `key` alone, without those in use.

    They cost next to nothing alike, so who takes the first of them for what is being repaired (the key) rarely takes the
    same as a repair that knows nothing of this one, and both patches can be put together. used: (layer, index).
    """
    quiet = nearly_free(written_energy(lm, stats, layer), [index for at, index in used if at == layer])
    random.Random(hashlib.sha256(key.encode()).digest()).shuffle(quiet)
    return quiet


OTHERS = 16
"""How many other neurons a patch names."""


def other_places(lm: LM, layer: int, idle: Collection[int]) -> list[list[int]]:
    """Neurons that could carry a repair as well, for when another patch wants this one: `spare` of a patch's header."""
    expert = lm.block(layer).expert
    owner = [] if expert is None else [expert]
    return [[layer, index, *owner] for index in list(idle)[:OTHERS]]


def idle_neurons(lm: LM, say: Say = lambda _: None) -> Callable[[int], list[int]]:
    """layer -> its quietest neurons, one in `SPARE`; a layer's statistics are measured (and cached) when it is asked for."""
    stats = statistics(lm, say=say)

    def idle(layer: int) -> list[int]:
        return nearly_free(written_energy(lm, stats, layer), share=SPARE) if lm.d_ff(layer) else []

    return idle
