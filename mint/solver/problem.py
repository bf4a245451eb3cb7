"""What every solver takes and gives: a problem, settings, a solution that can be put into the model and taken out.

A solver never leaves the model changed: it returns a `Solution`, and whoever wants it applies its change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint.case import Case
from mint.model.lm import LM, Encoded
from mint.model.margins import margins as margins  # where solvers look for them
from mint.model.margins import margins_of as margins_of
from mint.patch import Patch
from mint.patch import apply as apply_patch
from mint.patch import revert as revert_patch


@dataclass(frozen=True)
class Settings:
    """What a user may ask of a solver. Solvers ignore what does not concern them."""

    max_neurons: int = 2
    """Most neurons that may change; 1 or 2."""
    margin: float | None = None
    """Logit margin of every target token over its best rival; None: the solver's default."""
    firm: bool = False
    """Whether tokens that the model writes already must reach the margin, too; else they keep half of the lead they have."""
    generalize: float = 0.5
    """0: change as little elsewhere as possible; 1: carry over to rephrasings as far as possible."""
    where: str = "auto"
    """`responsible`: only neurons that attribution blames; `idle`: only idle carriers; `auto`: the cheapest."""
    layers: tuple[int, ...] | None = None
    """Layers to edit in; None: the solver chooses."""
    learn_rephrasings: bool = False
    """Whether the case's own rephrasings may be learnt from."""
    reference: tuple[str, ...] = ()
    """The user's own text files, for `mint.reference.statistics` beside the text that ships."""
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """One case to repair, and what must survive."""

    case: Case
    encoded: Encoded
    keep: tuple[Encoded, ...] = ()
    """Outputs that must stay exactly as given here."""
    earlier: tuple[Encoded, ...] = ()
    """Earlier repairs of the same model: they must still hold."""
    used: frozenset[tuple[int, int]] = frozenset()
    """(layer, index) of neurons that earlier repairs rewrote; not to be used again."""
    others: tuple[Encoded, ...] = ()
    """Other cases of the same run, repaired or not: none of them is to be answered with this target."""


def case_key(case: Case) -> str:
    """What the choice among idle neurons hangs on, see `mint.reference.idle_order`."""
    return f"{case.prompt}\0{case.target}"


@dataclass(frozen=True)
class TensorChange:
    """A change of whole tensors (baselines that are no neuron edits): parameter name -> weights before and after."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @torch.no_grad()
    def write(self, lm: LM, side: str) -> None:
        for name, value in getattr(self, side).items():
            lm.parameter(name).copy_(value)


Change = Patch | TensorChange


@dataclass(frozen=True)
class Solution:
    """What a solver found. `change` is None where it found nothing acceptable, and `reason` says why."""

    solver: str
    change: Change | None
    reason: str | None = None
    margin_min: float | None = None
    """Smallest teacher-forced logit margin over the target with the change applied."""
    seconds: float = 0.0
    """Time inside the solver, everything after loading included (statistics that are cached per model excluded)."""
    details: dict = field(default_factory=dict)
    """JSON values: candidates tried, iterations, why this neuron."""

    @property
    def neurons(self) -> int | None:
        """How many neurons change; None for changes of whole matrices."""
        return len(self.change.edits) if isinstance(self.change, Patch) else None


Solver = Callable[[LM, Problem, Settings], Solution]


def put_in(lm: LM, change: Change) -> None:
    """Write a change into the model."""
    if isinstance(change, Patch):
        apply_patch(lm, change)
    else:
        change.write(lm, "after")


def take_out(lm: LM, change: Change) -> None:
    """Undo `put_in`, bit for bit."""
    if isinstance(change, Patch):
        revert_patch(lm, change)
    else:
        change.write(lm, "before")


@contextmanager
def changed(lm: LM, change: Change | None) -> Iterator[LM]:
    """Within: the change (if any) is in the model; afterwards it is out again."""
    if change is None:
        yield lm
        return
    put_in(lm, change)
    try:
        yield lm
    finally:
        take_out(lm, change)
