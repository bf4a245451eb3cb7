"""What a neuron writes: the smallest columns that give every target token its margin.

Gauss-Newton on the constraints: linearise the margins over single rivals, find the smallest columns by a quadratic
programme (qp.py), search along the way, add the rivals that overtook, repeat. The activations at the target's tokens
are given (`fit_columns`), or move along with the columns (`fit_levels_too`). Source: mint's design notes, section 5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.qp import smallest
from mint.solver.tail import Tail

ITERATIONS = 8
_FREE_ITERATIONS = 32
_RIVALS = 2
"""Rivals of a short position that become constraints at once."""
_ROWS = 256
"""Rows of logits at once: 150 MB in float32 for 150,000 tokens."""
_SPARE = 0.5
"""Share of the tolerance, beyond the wanted margin, that the linear model aims for."""
_MEMORY = 6
"""Iterations for which an overtaken rival stays a constraint where the levels move too."""


@dataclass(frozen=True)
class Trial:
    """Activations and columns for the neurons of one tail, and the margins they give."""

    levels: Tensor
    """[neurons, m] activation of each neuron at the tail's tokens."""
    columns: Tensor
    """[neurons, d_model], added to what the neurons write."""
    margins: Tensor
    """[n] target logit minus the best rival's."""
    rivals: Tensor
    """[n, k] the best rivals, best first."""

    def shortfall(self, wanted: Tensor) -> float:
        return float((wanted - self.margins).clamp(min=0).sum())


def _margins(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [n] and best rivals [n, k] of logits [n, vocab], on the CPU; the logits stay where they are."""
    target = target.to(logits.device)
    own = logits.gather(1, target[:, None])
    top = logits.scatter(1, target[:, None], float("-inf")).topk(_RIVALS, dim=1)
    return (own - top.values[:, :1])[:, 0].cpu(), top.indices.cpu()


@torch.no_grad()
def _try(tail: Tail, target: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Trial]:
    """Several (levels, columns), in batches of at most about `_ROWS` rows of logits."""
    n = len(target)
    most = max(1, _ROWS // n)
    if len(pairs) > most:
        return [
            trial for i in range(0, len(pairs), most) for trial in _try(tail, target, pairs[i : i + most])
        ]
    levels, columns = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    writes = torch.einsum("bkm,bkd->bmd", levels, columns)
    rows = torch.arange(len(pairs)).repeat_interleave(n)
    logits = tail.logits(writes, rows, torch.arange(n).repeat(len(pairs))).view(len(pairs), n, -1)
    return [Trial(p[0], p[1], *_margins(each, target)) for p, each in zip(pairs, logits, strict=True)]


class _Constraints:
    """Margins over single rivals, linear in columns and levels around the trial at which each was last looked at."""

    def __init__(self, tail: Tail, target: Tensor, levels: Tensor):
        (k, m), d = levels.shape, tail.inputs.shape[1]
        self._tail, self._target = tail, target
        self._row: dict[tuple[int, int], int] = {}
        self.at = torch.zeros(0, dtype=torch.long)
        self.by_column, self.by_level = torch.zeros(0, k, d), torch.zeros(0, k, m)
        self.offset = torch.zeros(0)
        """What the linear margins are at zero columns and levels."""

    def look_at(self, trial: Trial, pairs: Sequence[tuple[int, int]], rows: Sequence[int] = ()) -> None:
        """Linearise anew around a trial: (position, rival) pairs, which join if they are new, and known rows."""
        for pair in pairs:
            self._row.setdefault(pair, len(self._row))
        new = len(self._row) - len(self.at)
        self.by_column, self.by_level, self.offset, self.at = (
            torch.cat([x, x.new_zeros(new, *x.shape[1:])])
            for x in (self.by_column, self.by_level, self.offset, self.at)
        )
        places = list(self._row)
        here = torch.tensor(sorted({*rows, *(self._row[pair] for pair in pairs)}))
        at, rival = torch.tensor([places[row] for row in here.tolist()]).T
        value, by_write = self._tail.leads(trial.levels.T @ trial.columns, at, self._target[at], rival)
        self.at[here] = at
        self.by_column[here] = torch.einsum("km,cmd->ckd", trial.levels, by_write)
        self.by_level[here] = torch.einsum("kd,cmd->ckm", trial.columns, by_write)
        self.offset[here] = value - self.given(trial)[here]

    def given(self, trial: Trial) -> Tensor:
        """The linear parts at a trial, [constraints]."""
        by_column = torch.einsum("ckd,kd->c", self.by_column, trial.columns)
        return by_column + torch.einsum("ckm,km->c", self.by_level, trial.levels)


def fit_columns(
    tail: Tail, target: Tensor, levels: Tensor, wanted: Tensor, clean: Tensor, *, tolerance: float
) -> tuple[Trial, int]:
    """Smallest columns under which every position has its wanted margin, up to `tolerance`; and the iterations used.

    target: [n] ids. levels: [neurons, m] activation of each neuron at the tail's tokens. wanted: [n] margins. clean:
    [n, vocab] logits without the edit. The margins may fall short after `ITERATIONS`: the caller looks.
    """
    start = torch.zeros(levels.shape[0], tail.inputs.shape[1])
    trial = best = Trial(levels, start, *_margins(clean, target))
    constraints, active = _Constraints(tail, target, levels), []
    for iteration in range(ITERATIONS):
        short = wanted - trial.margins > tolerance
        if not short.any():
            return trial, iteration
        near = (wanted - trial.margins > -3 * tolerance).nonzero().flatten().tolist()
        pairs = [(i, r) for i in near for r in trial.rivals[i, : _RIVALS if short[i] else 1].tolist()]
        constraints.look_at(trial, pairs, active)
        need = wanted[constraints.at] + _SPARE * tolerance - constraints.offset
        need = need - torch.einsum("ckm,km->c", constraints.by_level, levels)
        found, multipliers = smallest(constraints.by_column.flatten(1), need)
        active = multipliers.nonzero().flatten().tolist()
        step = found.view_as(trial.columns) - trial.columns
        tried = _try(tail, target, [(levels, trial.columns + step)])
        if (wanted - tried[0].margins > tolerance).any():
            tried += _try(tail, target, [(levels, trial.columns + t * step) for t in (0.6, 0.3)])
        trial = min(tried, key=lambda t: t.shortfall(wanted))
        if trial.shortfall(wanted) < best.shortfall(wanted):
            best = trial
    return best, ITERATIONS


def fit_levels_too(
    tail: Tail,
    target: Tensor,
    levels: Tensor,
    wanted: Tensor,
    clean: Tensor,
    *,
    tolerance: float,
    signed: bool,
) -> tuple[Trial, int]:
    """As `fit_columns`, but where a neuron fires at all, its level may move too; for targets that resist otherwise.

    signed: whether levels may be negative. Slower: short steps, up to `_FREE_ITERATIONS`.
    """
    k, m = levels.shape
    free = (levels.abs().sum(0) > 0).float()
    start = torch.zeros(k, tail.inputs.shape[1])
    trial = best = Trial(levels, start, *_margins(clean, target))
    seen: dict[tuple[int, int], int] = {}
    for iteration in range(_FREE_ITERATIONS):
        if not (wanted - trial.margins > tolerance).any():
            return trial, iteration
        seen |= {(i, r): iteration for i in range(len(target)) for r in trial.rivals[i].tolist()}
        seen = {c: last for c, last in seen.items() if last > iteration - _MEMORY}
        constraints = _Constraints(tail, target, levels)
        constraints.look_at(trial, list(seen))
        # A unit of level is worth as much as the column it scales.
        unit = max(float(trial.columns.norm()) / math.sqrt(k), 1e-3)
        by_level = (constraints.by_level * free).flatten(1) / unit
        jacobian = torch.cat([constraints.by_column.flatten(1), by_level], 1)
        here = torch.cat([trial.columns.reshape(-1), torch.zeros(k * m)])
        anchor = (0.0 if iteration < 2 else 0.9) * here  # later steps stay near, where the linear model holds
        value = constraints.offset + constraints.given(trial)
        need = wanted[constraints.at] + _SPARE * tolerance - value + jacobian @ (here - anchor)
        step = anchor + smallest(jacobian, need)[0] - here
        pairs = []
        for t in (1.0, 0.6, 0.3, 0.1, 0.03):
            moved = trial.levels + t * step[start.numel() :].view(k, m) / unit
            columns = trial.columns + t * step[: start.numel()].view_as(start)
            pairs.append((moved if signed else moved.clamp(min=0), columns))
        tried = _try(tail, target, pairs)
        seen |= {
            (i, int(other.rivals[i, 0])): iteration
            for other in tried
            for i in (other.margins < wanted).nonzero().flatten().tolist()
        }
        trial = min(tried, key=lambda t: t.shortfall(wanted))
        if trial.shortfall(wanted) < best.shortfall(wanted):
            best = trial
    return best, _FREE_ITERATIONS


def shrink(tail: Tail, target: Tensor, trial: Trial, wanted: Tensor, tolerance: float) -> Trial:
    """The same columns, scaled down as far as the margins that hold now still hold (to a tenth of the tolerance)."""
    goal = torch.minimum(wanted - tolerance, trial.margins) - 0.1 * tolerance
    shorter = _try(
        tail, target, [(trial.levels, factor * trial.columns) for factor in (0.8, 0.88, 0.94, 0.97)]
    )
    return next((t for t in shorter if bool((t.margins >= goal).all())), trial)
