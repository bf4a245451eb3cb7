"""What a rule's neuron writes: the smallest column that gives every learn prompt its margins, at every size it may have.

Gauss-Newton on margins over single rivals: linearise over all prompts and scenarios at once, one convex quadratic
programme with slack (mint/solver/qp.py), search along the way, repeat. A scenario is a set of activations: those of
the gate as it is, and those it would have had without the prompt. Knows nothing about gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.rules.bundle import Bundle, judge
from mint.solver.qp import smallest

_RIVALS = 2
_STEPS = (1.0, 0.5, 0.2)


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

    def solve(self, out: int | None = None) -> Tensor:
        """Columns [neurons * d_model], without the constraints of text `out`."""
        keep = torch.ones(len(self.need), dtype=torch.bool) if out is None else self.owner != out
        if not keep.any():
            return torch.zeros(self.jacobian.shape[1])
        return smallest(self.jacobian[keep], self.need[keep], self.bound[keep])[0]


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
    """Margins [b, m] and best rivals [b, m, 2]."""
    b = task.bundle
    found, best = judge(b.logits(writes(task, scenario, columns)), b.target[b.real], _RIVALS)
    out, rivals = torch.zeros(b.real.shape), torch.zeros(*b.real.shape, _RIVALS, dtype=torch.long)
    out[b.real], rivals[b.real] = found, best
    return out, rivals


def _shortfall(task: Task, found: Tensor) -> float:
    missing = (task.wanted - found).clamp(min=0)
    missing[~task.bundle.real] = 0
    return float((missing * task.price[:, None]).sum())


def _cost(tasks: Sequence[Task], columns: Tensor) -> tuple[float, list[list[tuple[Tensor, Tensor]]]]:
    seen = [[margins(t, s, columns) for s in range(len(t.levels))] for t in tasks]
    short = sum(_shortfall(t, m) for t, each in zip(tasks, seen, strict=True) for m, _ in each)
    return 0.5 * float(columns.square().sum()) + short, seen


def _linearise(
    tasks: Sequence[Task], columns: Tensor, seen: list[list[tuple[Tensor, Tensor]]], slack: float
) -> Linear:
    rows, need, bound, owner = [], [], [], []
    offset = 0
    for task, each in zip(tasks, seen, strict=True):
        b = task.bundle
        for s, (found, rivals) in enumerate(each):
            levels = task.levels[s]
            # A constraint that the neuron cannot move (silent up to there) is no constraint.
            moved = levels.abs().amax(0).cumsum(1) > 1e-3
            near = b.real & moved & (found < task.wanted + slack)
            for j in range(_RIVALS):
                want = near if j == 0 else near & (found < task.wanted)
                if not want.any():
                    continue
                lead, gradient = b.leads(writes(task, s, columns), want, rivals[..., j])
                i, p = want.nonzero().T
                row = torch.einsum("kcq,cqd->ckd", levels[:, i], gradient[i, p]).flatten(1)
                rows.append(row)
                need.append(task.wanted[i, p] - lead[i, p] + row @ columns.flatten())
                bound.append(task.price[i])
                owner.append(offset + i)
        offset += len(b)
    if not rows:
        width = columns.numel()
        return Linear(torch.zeros(0, width), torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    return Linear(torch.cat(rows), torch.cat(need), torch.cat(bound), torch.cat(owner))


def fit(tasks: Sequence[Task], start: Tensor, iterations: int, slack: float = 2.0, enough: float = 0.02) -> Columns:
    """Columns [neurons, d_model] that minimise |columns|^2 / 2 + priced shortfalls over all tasks and scenarios.

    start: where to begin. slack: logits beyond its wanted margin up to which a place stays a constraint. enough: stop once
    an iteration gains less than this share.
    """
    columns = start
    cost, seen = _cost(tasks, columns)
    linear = _linearise(tasks, columns, seen, slack)
    for iteration in range(iterations):
        step = linear.solve().view_as(columns) - columns
        tried = []
        for t in _STEPS:
            tried.append((*_cost(tasks, columns + t * step), columns + t * step))
            if tried[-1][0] < cost - 0.3 * t * abs(cost) or t == _STEPS[-1]:
                break
        best = min(tried, key=lambda x: x[0])
        if best[0] >= cost:
            break
        gain, cost, seen, columns = cost - best[0], best[0], best[1], best[2]
        linear = _linearise(tasks, columns, seen, slack)
        if gain < enough * cost:
            break
    short = cost - 0.5 * float(columns.square().sum())
    return Columns(columns, linear, iteration + 1 if iterations else 0, short)
