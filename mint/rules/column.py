"""What a rule's neuron writes: the smallest column that gives every learn prompt its margins, at every size it may have.

Gauss-Newton on margins over the soft maximum of all rivals: linearise over all prompts and scenarios at once, one convex quadratic
programme with slack (mint/solver/qp.py), damped where the linear model fails, repeat. A scenario is a set of activations: those of
the gate as it is, and those it would have had without the prompt. Knows nothing about gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.bundle import Bundle, accepted_margins
from mint.solver.qp import smallest

_TRIES = 10
"""Dampings tried in one iteration."""


@dataclass(frozen=True)
class Task:
    """What the columns have to do in one bundle of texts."""

    bundle: Bundle
    levels: Tensor
    """[scenarios, neurons, b, m] activations."""
    wanted: Tensor
    """[b, m] margins to reach; -inf where nothing is asked."""
    price: Tensor
    """[b] most that one logit short may cost, in units of |column|^2 / 2."""
    base: Tensor
    """[b, m, d_model] what is written anyway (a carrier's old write, negative)."""


@dataclass(frozen=True)
class Linear:
    """Constraints jacobian.w >= need, and whose they are."""

    jacobian: Tensor
    """[c, neurons * d_model]."""
    need: Tensor
    bound: Tensor
    owner: Tensor
    """[c] index of the text, counted through all tasks."""

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
    short: float
    """Logits short in all, over scenarios and places, priced."""


def writes(task: Task, scenario: int, columns: Tensor) -> Tensor:
    """[b, m, d_model] for columns [neurons, d_model], or [neurons, b, d_model] for one set a text."""
    levels = task.levels[scenario]
    if columns.dim() == 2:
        return task.base + torch.einsum("kbm,kd->bmd", levels, columns)
    return task.base + torch.einsum("kbm,kbd->bmd", levels, columns)


@torch.no_grad()
def margins(task: Task, scenario: int, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [b, m] over the best rival, and over the soft maximum of all rivals."""
    b = task.bundle
    found, soft = accepted_margins(b.logits(writes(task, scenario, columns)), b.accepted())
    out = torch.zeros(2, *b.real.shape)
    out[0][b.real], out[1][b.real] = found, soft
    return out[0], out[1]


def _cost(tasks: Sequence[Task], columns: Tensor) -> float:
    cost = 0.5 * float(columns.square().sum())
    for task in tasks:
        for s in range(len(task.levels)):
            missing = (task.wanted - margins(task, s, columns)[1]).clamp(min=0)
            missing[~_movable(task, s)] = 0
            cost += float((missing * task.price[:, None]).sum())
    return cost


def _movable(task: Task, scenario: int) -> Tensor:
    """[b, m] bool: places that the neurons can move at all, being awake there or before."""
    return task.bundle.real & (task.levels[scenario].abs().amax(0).cumsum(1) > 1e-3)


def _linearise(tasks: Sequence[Task], columns: Tensor, slack: float) -> Linear:
    width = columns.numel()
    rows, need, bound, owner = (
        [torch.zeros(0, width)],
        [torch.zeros(0)],
        [torch.zeros(0)],
        [torch.zeros(0).long()],
    )
    offset = 0
    for task in tasks:
        b = task.bundle
        for s in range(len(task.levels)):
            levels = task.levels[s]
            lead, gradient, seen = b.soft_margins(
                writes(task, s, columns), _movable(task, s), task.wanted + slack
            )
            i, p = seen.nonzero().T
            row = torch.einsum("kcq,cqd->ckd", levels[:, i], gradient[i, p]).flatten(1)
            rows.append(row)
            need.append(task.wanted[i, p] - lead[i, p] + row @ columns.flatten())
            bound.append(task.price[i])
            owner.append(offset + i)
        offset += len(b)
    return Linear(torch.cat(rows), torch.cat(need), torch.cat(bound), torch.cat(owner))


def fit(
    tasks: Sequence[Task], start: Tensor, iterations: int, slack: float = 3.0, enough: float = 0.03
) -> Columns:
    """Columns [neurons, d_model] that minimise |columns|^2 / 2 + priced shortfalls over all tasks and scenarios.

    start: where to begin. slack: logits beyond its wanted margin up to which a place stays a constraint. enough: stop once
    an iteration gains less than this share. Steps are held back by a proximal term that grows where the linear model
    promised too much (Levenberg's damping).
    """
    columns, damping = start, 0.0
    cost = _cost(tasks, columns)
    linear = _linearise(tasks, columns, slack)
    done = 0
    while done < iterations:
        for _ in range(_TRIES):
            moved = linear.solve(near=columns.flatten(), damping=damping).view_as(columns)
            then = _cost(tasks, moved)
            if then < cost:
                break
            damping = max(0.5, 4 * damping)
        else:
            break
        done, gain, cost, columns = done + 1, cost - then, then, moved
        damping = 0.0 if damping <= 0.25 else damping / 2
        linear = _linearise(tasks, columns, slack)
        # A small gain is the end only of an undamped step: a damped one says nothing about what is left.
        if gain < enough * cost and damping == 0.0 and done > 1:
            break
    return Columns(columns, linear, done, cost - 0.5 * float(columns.square().sum()))
