"""The smallest columns under which several texts are written at once, by neurons whose activations are given.

Gauss-Newton on margins over the soft maximum of all rivals: linearise over all texts and scenarios at once, with exact gradients
(what a token writes reaches later tokens, too), one convex quadratic programme with slack (qp.py), a line search on
the true cost, damping where that finds nothing, repeat. A scenario is a set of activations: those of the gate as it is, and those it
would have had without a text. Knows nothing about gates, contexts or rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.bundle import Bundle
from mint.solver.qp import smallest

_SHARES = (1.0, 0.5, 0.25, 0.12, 0.05)
"""Shares of a programme's step that are tried, longest first; never more than twice what the last step allowed."""
_TRIES = 6
"""Dampings tried in one iteration."""


@dataclass(frozen=True)
class Demand:
    """What the columns have to do in one bundle of texts."""

    bundle: Bundle
    levels: Tensor
    """[scenarios, neurons, b, m] activations."""
    wanted: Tensor
    """[b, m] margins to reach; -inf where nothing is asked."""
    price: Tensor
    """[b] most that one logit short may cost, in units of |column|^2 / 2."""
    base: Tensor
    """[b, m, d_model] what is written anyway; of rewritten neurons see `lost`."""

    def movable(self, scenario: int) -> Tensor:
        """[b, m] bool: places that the neurons can move at all, being awake there or before."""
        return self.bundle.real & (self.levels[scenario].abs().amax(0).cumsum(1) > 1e-3)

    def writes(self, scenario: int, columns: Tensor) -> Tensor:
        """[b, m, d_model] for columns [neurons, d_model], or [neurons, b, d_model] for one set a text."""
        each = "kd" if columns.dim() == 2 else "kbd"
        return self.base + torch.einsum(f"kbm,{each}->bmd", self.levels[scenario], columns)

    def margins(self, scenario: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Margins [b, m] over the best rival, and over the soft maximum of all rivals; 0 where there is no token."""
        return self.bundle.margins(self.writes(scenario, columns))


def lost(bundle: Bundle, indices: Sequence[int]) -> Tensor:
    """[b, m, d_model]: minus what neurons write in the clean model, which their rewriting takes away."""
    columns = bundle.lm.columns(bundle.layer)[list(indices)].float().cpu()
    return -bundle.neurons[..., list(indices)] @ columns


@dataclass(frozen=True)
class Linear:
    """Constraints jacobian.w >= need, and whose they are."""

    jacobian: Tensor
    """[c, neurons * d_model]."""
    need: Tensor
    bound: Tensor
    owner: Tensor
    """[c] index of the text, counted through all demands."""

    def solve(self, out: int | None = None, near: Tensor | None = None, damping: float = 0.0) -> Tensor:
        """argmin |w|^2/2 + damping |w - near|^2/2 + bound.(need - jacobian.w)+, [neurons * d_model].

        out: a text whose constraints are left out.
        """
        keep = torch.ones(len(self.need), dtype=torch.bool) if out is None else self.owner != out
        centre = torch.zeros(self.jacobian.shape[1]) if near is None else near * damping / (1 + damping)
        if not keep.any():
            return centre
        j = self.jacobian[keep]
        return centre + smallest(j, self.need[keep] - j @ centre, self.bound[keep] / (1 + damping))[0]


@dataclass(frozen=True)
class Columns:
    columns: Tensor
    """[neurons, d_model]."""
    linear: Linear
    """The programme of the last iteration."""
    iterations: int


def cost(demands: Sequence[Demand], columns: Tensor) -> float:
    """|columns|^2 / 2 and the priced shortfall, over all scenarios."""
    total = 0.5 * float(columns.square().sum())
    for demand in demands:
        for s in range(len(demand.levels)):
            missing = (demand.wanted - demand.margins(s, columns)[1]).clamp(min=0)
            missing[~demand.movable(s)] = 0
            total += float((missing * demand.price[:, None]).sum())
    return total


def _linearise(demands: Sequence[Demand], columns: Tensor, slack: float) -> Linear:
    width = columns.numel()
    rows, need, bound, owner = (
        [torch.zeros(0, width)],
        [torch.zeros(0)],
        [torch.zeros(0)],
        [torch.zeros(0).long()],
    )
    offset = 0
    for demand in demands:
        b = demand.bundle
        for s in range(len(demand.levels)):
            levels = demand.levels[s]
            lead, gradient, seen = b.soft_margins(
                demand.writes(s, columns), demand.movable(s), demand.wanted + slack
            )
            i, p = seen.nonzero().T
            row = torch.einsum("kcq,cqd->ckd", levels[:, i], gradient[i, p]).flatten(1)
            rows.append(row)
            need.append(demand.wanted[i, p] - lead[i, p] + row @ columns.flatten())
            bound.append(demand.price[i])
            owner.append(offset + i)
        offset += len(b)
    return Linear(torch.cat(rows), torch.cat(need), torch.cat(bound), torch.cat(owner))


def fit(
    demands: Sequence[Demand], start: Tensor, iterations: int, slack: float = 3.0, enough: float = 0.03
) -> Columns:
    """Columns [neurons, d_model] that minimise |columns|^2 / 2 + priced shortfalls over all demands and scenarios.

    start: where to begin. slack: logits beyond its wanted margin up to which a place stays a constraint. enough: stop once
    an iteration gains less than this share. Each step is searched along on the true cost; where no part of it gains, the
    programme is solved again nearer to where it is, by a proximal term that grows (Levenberg's damping).
    """
    columns, damping, length = start, 0.0, 1.0
    now = cost(demands, columns)
    linear = _linearise(demands, columns, slack)
    done = 0
    while done < iterations:
        for _ in range(_TRIES):
            step = linear.solve(near=columns.flatten(), damping=damping).view_as(columns) - columns
            then, share = _search(demands, columns, step, now, 2 * length)
            if share:
                break
            damping, length = max(0.5, 4 * damping), 1.0
        else:
            break
        done, gain, now, length = done + 1, now - then, then, share
        columns = columns + share * step
        last = gain < enough * now and damping == 0.0 and done > 1
        damping = 0.0 if damping <= 0.25 else damping / 2
        linear = _linearise(demands, columns, slack)
        # A small gain is the end only of an undamped step: a damped one says nothing about what is left.
        if last:
            break
    return Columns(columns, linear, done)


def _search(
    demands: Sequence[Demand], columns: Tensor, step: Tensor, now: float, most: float
) -> tuple[float, float]:
    """The least cost along a step, and the share of it (at most `most`) that gives it; (now, 0) where nothing gains."""
    best, taken = now, 0.0
    for share in (s for s in _SHARES if s <= most):
        then = cost(demands, columns + share * step)
        if then < best:
            best, taken = then, share
        elif taken:
            break  # it was better further out
    return best, taken
