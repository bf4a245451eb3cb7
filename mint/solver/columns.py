"""What a neuron writes: the smallest columns that give every target token its margin, for given activations.

Gauss-Newton on the constraints: linearise the margins over single rivals, find the smallest columns by a quadratic
programme (qp.py), search along the way, add the rivals that overtook, repeat. Source: mint's design notes, section 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.qp import smallest
from mint.solver.tail import Tail

ITERATIONS = 8
_RIVALS = 2
"""Rivals of a short position that become constraints at once."""
_SPARE = 0.5
"""Share of the tolerance, beyond the wanted margin, that the linear model aims for."""


@dataclass(frozen=True)
class Trial:
    """Columns for the neurons of one tail, and the margins they give."""

    columns: Tensor
    """[neurons, d_model], added to what the neurons write."""
    margins: Tensor
    """[n] target logit minus the best rival's."""
    rivals: Tensor
    """[n, k] the best rivals, best first."""

    def shortfall(self, wanted: Tensor) -> float:
        return float((wanted - self.margins).clamp(min=0).sum())


def _judge(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [n] and best rivals [n, k] of logits [n, vocab]."""
    own = logits.gather(1, target[:, None])
    top = logits.scatter(1, target[:, None], float("-inf")).topk(_RIVALS, dim=1)
    return (own - top.values[:, :1])[:, 0], top.indices


def fit_columns(
    tail: Tail,
    target: Tensor,
    levels: Tensor,
    wanted: Tensor,
    clean: Tensor,
    *,
    tolerance: float,
    iterations: int = ITERATIONS,
) -> tuple[Trial, int]:
    """Smallest columns under which every position has its wanted margin, up to `tolerance`; and the iterations used.

    target: [n] ids. levels: [neurons, m] activation of each neuron at the tail's tokens. wanted: [n] margins. clean:
    [n, vocab] logits without the edit. The margins may fall short after `iterations`: the caller looks.
    """
    start = torch.zeros(levels.shape[0], tail.inputs.shape[1])
    trial = best = Trial(start, *_judge(clean, target))
    constraints: dict[tuple[int, int], None] = {}
    for iteration in range(iterations):
        short = wanted - trial.margins > tolerance
        if not short.any():
            return trial, iteration
        for i in (wanted - trial.margins > -3 * tolerance).nonzero().flatten().tolist():
            for rival in trial.rivals[i, : _RIVALS if short[i] else 1].tolist():
                constraints[i, rival] = None
        at = torch.tensor([place for place, _ in constraints])
        rivals = torch.tensor([rival for _, rival in constraints])
        jacobian, value = _linearise(tail, levels, trial.columns, target, at, rivals)
        need = wanted[at] + _SPARE * tolerance - value + jacobian @ trial.columns.reshape(-1)
        goal, _ = smallest(jacobian, need)
        step = goal.view_as(trial.columns) - trial.columns
        trial = min(
            _trials(tail, target, levels, [trial.columns + t * step for t in (1.0, 0.6, 0.3)]),
            key=lambda t: t.shortfall(wanted),
        )
        if trial.shortfall(wanted) < best.shortfall(wanted):
            best = trial
    return best, iterations


def shrink(
    tail: Tail, target: Tensor, levels: Tensor, trial: Trial, wanted: Tensor, tolerance: float
) -> Trial:
    """The same columns, scaled down as far as the margins that hold now still hold (to a tenth of the tolerance)."""
    goal = torch.minimum(wanted - tolerance, trial.margins) - 0.1 * tolerance
    shorter = _trials(tail, target, levels, [factor * trial.columns for factor in (0.8, 0.88, 0.94, 0.97)])
    return next((t for t in shorter if bool((t.margins >= goal).all())), trial)


def _linearise(
    tail: Tail, levels: Tensor, columns: Tensor, target: Tensor, at: Tensor, rivals: Tensor
) -> tuple[Tensor, Tensor]:
    """Jacobian [constraints, neurons * d_model] of the margins over single rivals, and their values."""
    count = len(at)
    with torch.enable_grad():
        each = columns.expand(count, *columns.shape).clone().requires_grad_()
        writes = torch.einsum("km,bkd->bmd", levels, each)
        logits = tail.logits(writes, torch.arange(count), at)
        value = logits.gather(1, target[at][:, None])[:, 0] - logits.gather(1, rivals[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(value.sum(), each)
    return gradient.reshape(count, -1), value.detach()


@torch.no_grad()
def _trials(tail: Tail, target: Tensor, levels: Tensor, columns: list[Tensor]) -> list[Trial]:
    """Each of several columns [neurons, d_model] tried, in one batch."""
    n = len(target)
    writes = torch.einsum("km,bkd->bmd", levels, torch.stack(columns))
    rows = torch.arange(len(columns)).repeat_interleave(n)
    logits = tail.logits(writes, rows, torch.arange(n).repeat(len(columns))).view(len(columns), n, -1)
    return [Trial(c, *_judge(logits[i], target)) for i, c in enumerate(columns)]
