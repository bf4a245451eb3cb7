"""The smallest columns under which several texts are written at once, by neurons whose activations are given.

Gauss-Newton on margins over the soft maximum of all rivals: linearise every place of every text with exact gradients (what
a token writes reaches later tokens, too), one convex quadratic programme with priced shortfall (qp.py), a line search on
the true cost, repeat. Knows nothing about gates, contexts or rules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.bundle import Bundle, accepted_margins
from mint.solver.qp import smallest

STEPS = (1.0, 0.5, 0.25, 0.12, 0.05)
"""Shares of a programme's step that are tried, longest first; never more than twice what the last step allowed."""
SLACK = 2.0
"""Logits beyond its wanted margin up to which a place stays a constraint."""
ENOUGH = 0.02
"""Share of the cost that an iteration must gain for another one to follow."""


@dataclass(frozen=True)
class Demand:
    """What the columns have to do in a bundle of texts."""

    bundle: Bundle
    levels: Tensor
    """[neurons, b, m] activations."""
    wanted: Tensor
    """[b, m] margins to reach, in logits; -inf where nothing is asked."""
    price: Tensor
    """[b] cost of one logit short, in units of |columns|^2 / 2."""

    @property
    def movable(self) -> Tensor:
        """[b, m] bool: places that the neurons can move, being awake there or before."""
        return self.bundle.real & (self.levels.abs().amax(0).cumsum(1) > 1e-3)

    def writes(self, columns: Tensor) -> Tensor:
        """[b, m, d_model]."""
        return torch.einsum("kbm,kd->bmd", self.levels, columns)

    @torch.no_grad()
    def margins(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """[b, m] over the best rival, and over the soft maximum of all rivals."""
        found = torch.zeros(2, *self.bundle.real.shape)
        for kind, values in zip(
            found,
            accepted_margins(self.bundle.logits(self.writes(columns)), self.bundle.accepted()),
            strict=True,
        ):
            kind[self.bundle.real] = values
        return found[0], found[1]

    def cost(self, columns: Tensor) -> float:
        """|columns|^2 / 2 and the priced shortfall."""
        missing = (self.wanted - self.margins(columns)[1]).clamp(min=0).masked_fill(~self.movable, 0)
        return 0.5 * float(columns.square().sum()) + float((missing * self.price[:, None]).sum())

    def programme(self, columns: Tensor) -> Tensor:
        """Columns that would cost least if every margin were linear around these."""
        lead, gradient, seen = self.bundle.soft_margins(
            self.writes(columns), self.movable, self.wanted + SLACK
        )
        i, p = seen.nonzero().T
        if not len(i):
            return columns
        rows = torch.einsum("kcq,cqd->ckd", self.levels[:, i], gradient[i, p]).flatten(1)
        need = self.wanted[i, p] - lead[i, p] + rows @ columns.flatten()
        return smallest(rows, need, self.price[i])[0].view_as(columns)


def fit(demand: Demand, iterations: int) -> tuple[Tensor, Tensor, int]:
    """Columns [neurons, d_model], the margins [b, m] over the best rivals that they give, and the iterations used."""
    columns = torch.zeros(len(demand.levels), demand.bundle.inputs.shape[-1])
    cost, length, done = demand.cost(columns), 1.0, 0
    while done < iterations:
        step = demand.programme(columns) - columns
        best, taken = cost, 0.0
        for share in (s for s in STEPS if s <= 2 * length):
            now = demand.cost(columns + share * step)
            if now < best:
                best, taken = now, share
            elif taken:
                break  # it was better further out
        done += 1
        if not taken:
            break
        columns, length, gain, cost = columns + taken * step, taken, cost - best, best
        if gain < ENOUGH * cost:
            break
    return columns, demand.margins(columns)[0], done
