"""The changes that a model holds, in the order in which they came, and the way back to the clean bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mint.errors import MintError
from mint.model.lm import LM
from mint.patch import Patch, compose
from mint.solver.problem import Change, put_in, take_out


class Stack:
    """Changes put into one model one after another. Patches are kept; of whole matrices only the clean tensors are, for
    copies of every step would not fit in memory."""

    def __init__(self, lm: LM):
        self.lm = lm
        self.patches: list[Patch] = []
        self.originals: dict[str, Tensor] = {}
        """Clean tensors that changes of whole matrices overwrote, by parameter name."""

    @property
    def used(self) -> frozenset[tuple[int, int]]:
        """(layer, index) of the neurons that are taken."""
        return neurons_of(self.patches)

    def put_in(self, change: Change) -> None:
        """Apply one more change. Raises `MintError` where patches and changes of whole matrices would mix."""
        if isinstance(change, Patch):
            if self.originals:
                raise MintError(
                    "a solver returned whole matrices and then patches; it must return one kind of change"
                )
            put_in(self.lm, change)
            self.patches.append(change)
            return
        if self.patches:
            raise MintError(
                "a solver returned patches and then whole matrices; it must return one kind of change"
            )
        new = {name: value.clone() for name, value in change.before.items() if name not in self.originals}
        self.originals |= new
        put_in(self.lm, change)

    @torch.no_grad()
    def clear(self) -> None:
        """Take everything out again, last first."""
        while self.patches:
            take_out(self.lm, self.patches[-1])
            self.patches.pop()
        for name, value in self.originals.items():
            self.lm.parameter(name).copy_(value)
        self.originals.clear()

    def norm(self) -> tuple[float, float]:
        """Frobenius norm of the whole change, and its share of the norm of the matrices it touched."""
        if self.originals:
            pairs = [(o.cpu(), self.lm.parameter(n).detach().cpu()) for n, o in self.originals.items()]
            names = sorted(self.originals)
        elif self.patches:
            whole = compose(self.patches)
            pairs = [(e.before[r], e.after[r]) for e in whole.edits for r in e.after]
            blocks = {e.place: self.lm.layout.slices(*e.neuron) for e in whole.edits}
            names = sorted({s.parameter for slices in blocks.values() for s in slices.values()})
        else:
            return 0.0, 0.0
        changed = sum(float((a.float() - b.float()).cpu().double().square().sum()) for b, a in pairs)
        touched = sum(float(self.lm.parameter(n).detach().float().norm()) ** 2 for n in names)
        return changed**0.5, (changed / touched) ** 0.5


def neurons_of(patches: Sequence[Patch]) -> frozenset[tuple[int, int]]:
    """(layer, index) of the neurons that patches change. An index that one routed expert of a layer has given away is
    left alone in all of them: nothing is short of neurons, and solvers see the block of one expert at a time."""
    return frozenset((e.layer, e.index) for p in patches for e in p.edits)
