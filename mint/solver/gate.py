"""When a neuron fires: input rows that answer at chosen inputs and keep silent on everything else.

Weighted least squares against the second moment of reference inputs, exact at the chosen inputs, sharpened on the
reference inputs that it would still answer to. Pure functions of tensors; knows nothing about models or targets.
Source: mint's design notes, "Rewrite edits"; the ridge against a corpus second moment is the key of ROME
(Meng et al. 2022, arXiv 2202.05262, section 3.1) turned from an output matrix to the input rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.rows import STEEP, InputRows


@dataclass(frozen=True)
class Inputs:
    """Inputs of one layer, and what the neuron should do at them; all [k, d_model]."""

    fire: Tensor
    """Must fire: the neuron's activation is exactly `level` here."""
    level: Tensor
    """[k] activation at `fire`, as a share of the gain; not negative in a plain block."""
    hold: Tensor
    """Must stay at exactly zero: the right positions of the same target."""
    like: Tensor
    """Should fire as well: the same positions behind other prompts."""
    like_level: Tensor
    like_weight: Tensor
    """[k] weight of each."""
    unlike: Tensor
    """Should stay silent: near-misses, inputs of earlier repairs."""
    unlike_weight: Tensor


@dataclass(frozen=True)
class Background:
    """Reference inputs of a layer: what the neuron must stay silent on."""

    second: Tensor
    """E[x x'], [d_model, d_model]."""
    mean: Tensor
    """E[x], [d_model]."""
    sample: Tensor
    """Single inputs, [m, d_model], to look for false alarms."""


def _solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    factor = torch.linalg.cholesky(matrix)
    return lambda right: torch.cholesky_solve(right, factor)


def _exact(solve: Callable[[Tensor], Tensor], right: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """argmin r'Ar/2 - right'r  s.t.  points r = values, with A given by its solve. Dependent points are averaged."""
    free = solve(right[:, None])[:, 0]
    if not len(points):
        return free
    reach = solve(points.T)
    gram = points @ reach
    gram = gram + 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return free + reach @ torch.linalg.solve(gram, values - points @ free)


def _reach(act: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Pre-activations z >= 0 with act(z) = wanted, for an activation that grows there; by bisection."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 4 * STEEP)
    for _ in range(60):
        middle = (low + high) / 2
        under = act(middle) < wanted
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (low + high) / 2


def fit_rows(
    inputs: Inputs,
    background: Background,
    act: Callable[[Tensor], Tensor],
    *,
    gated: bool,
    bias: tuple[float, float] = (0.0, 0.0),
    silence: float = 1.0,
    ridge: float = 1e-3,
    rounds: int = 6,
    tolerance: float = 0.02,
) -> InputRows:
    """Rows whose neuron is exactly `level` at `fire`, exactly 0 at `hold`, and nearly silent elsewhere.

    bias: the biases of gate and up that the neuron has in the model. They are kept, and every wanted pre-activation z
    becomes z - bias, so that nothing but matrices changes (a low-rank adapter has no biases).
    silence: how far below the firing threshold reference inputs are pulled (theta; lower generalizes more).
    ridge: lambda, as a share of the mean variance. rounds: how often the fit is repeated with more weight on
    reference inputs that still answer above `tolerance`. A plain block (gated=False) has one row: its activation is
    `level` times the gain where `level` is positive, and only nearly 0 at `hold`.
    """
    x = {f: getattr(inputs, f).double() for f in ("fire", "hold", "like", "unlike")}
    level, like_level = inputs.level.double(), inputs.like_level.double()
    like_weight, unlike_weight = inputs.like_weight.double(), inputs.unlike_weight.double()
    second, mean = background.second.double(), background.mean.double()
    width = len(mean)
    scale = second.diagonal().mean()
    base = second + ridge * scale * torch.eye(width, dtype=torch.float64)
    base = base + (x["like"].T * like_weight) @ x["like"] + (x["unlike"].T * unlike_weight) @ x["unlike"]
    # Wanted values of the rows' products with x, in units of the gain: what the biases give already is taken off.
    lift = act(torch.tensor(STEEP)).item()
    gate_bias, up_bias = bias[0] / STEEP, bias[1] * lift
    silence = silence + gate_bias
    silent = -silence * mean - silence * (unlike_weight @ x["unlike"])
    still = -up_bias * (mean + unlike_weight @ x["unlike"])
    hard = torch.zeros(0, width, dtype=torch.float64)
    hard_weight = torch.zeros(0, dtype=torch.float64)
    pool = torch.cat([background.sample.float(), inputs.unlike.float()])
    while True:
        solve = _solver(base + (hard.T * hard_weight) @ hard)
        # A gated neuron opens for negative levels too, its other row gives the sign; a plain one cannot write them.
        opens = (like_level != 0).double() if gated else torch.sign(like_level)
        gate_right = (like_weight * (opens - gate_bias)) @ x["like"] + silent - silence * (hard_weight @ hard)
        if gated:
            gate = _exact(solve, gate_right, x["fire"], torch.ones(len(level)).double() - gate_bias)
            up_points, up_values = (
                torch.cat([x["fire"], x["hold"]]),
                torch.cat([level, torch.zeros(len(x["hold"]))]),
            )
            up_right = (
                (like_weight * (like_level - up_bias)) @ x["like"] + still - up_bias * (hard_weight @ hard)
            )
            up = _exact(solve, up_right, up_points, up_values.double() - up_bias)
            rows = InputRows((STEEP * gate).float(), (up / lift).float(), bias=bias)
        else:
            points = torch.cat([x["fire"], x["hold"]])
            values = torch.cat(
                [
                    _reach(act, STEEP * level) / STEEP - gate_bias,
                    torch.full((len(x["hold"]),), -silence).double(),
                ]
            )
            gate = _exact(solve, gate_right, points, values)
            rows = InputRows((STEEP * gate).float(), None, STEEP, bias)
        if not rounds or not len(pool):
            return rows
        rounds -= 1
        answer = rows.respond(pool, act).abs()
        loud = (answer > tolerance).nonzero().flatten()
        if not len(loud):
            return rows
        worst = loud[answer[loud].argsort(descending=True)[:512]]
        added = pool[worst].double()
        hard = torch.cat([hard, added])
        hard_weight = torch.cat([hard_weight, (answer[worst].double().clamp(max=3.0) * 0.05)])
