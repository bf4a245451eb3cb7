"""When a rule's neuron fires: a large-margin linear classifier on a layer's inputs, and rows that keep its size even.

Pure functions of tensors; knows nothing about models, tokens or columns. Source of the classifier: the squared hinge
in its primal, solved by Newton's method (Chapelle 2007, Training a Support Vector Machine in the Primal, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.solver.rows import STEEP, InputRows

ROUNDS = 40


@dataclass(frozen=True)
class Examples:
    """Inputs of one layer, and whether the neuron should fire at them."""

    x: Tensor
    """[n, d_model] float32, each dimension divided by its root mean square on reference text."""
    fire: Tensor
    """[n] bool."""
    weight: Tensor
    """[n] cost of one squared unit of violation."""

    def without(self, out: Tensor) -> "Examples":
        """The same but for the rows [n] bool."""
        keep = ~out
        return Examples(self.x[keep], self.fire[keep], self.weight[keep])


def fit_direction(
    examples: Examples,
    *,
    silence: float,
    ridge: float,
    start: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """argmin_a ridge |a - prior|^2/2 + sum_i weight_i hinge_i(a.x_i)^2/2, [d_model].

    hinge: (1 - f)+ where the neuron should fire, (f + silence)+ elsewhere. silence: how far below the firing threshold
    other inputs are pulled. start: where Newton's method starts. prior: direction that costs nothing; zero by default.
    """
    x, fire, weight = examples.x, examples.fire, examples.weight
    width = x.shape[1]
    anchor = torch.zeros(width) if prior is None else prior
    a = anchor.clone() if start is None else start.clone()
    goal = torch.where(fire, 1.0, -silence)
    sign = torch.where(fire, 1.0, -1.0)

    def short(f: Tensor) -> Tensor:
        return (sign * (goal - f)).clamp(min=0)

    def cost(a: Tensor, f: Tensor) -> float:
        return float(0.5 * ridge * (a - anchor).square().sum() + 0.5 * (weight * short(f).square()).sum())

    f = x @ a
    now = cost(a, f)
    for _ in range(ROUNDS):
        missing = short(f)
        active = missing > 0
        xa, wa = x[active], weight[active]
        slope = ridge * (a - anchor) - xa.T @ (wa * sign[active] * missing[active])
        hessian = (xa.T * wa) @ xa + ridge * torch.eye(width)
        step = -torch.linalg.solve(hessian, slope[:, None])[:, 0]
        moved = x @ step
        t, then, fall = 1.0, cost(a + step, f + moved), abs(float(slope @ step))
        while t > 1e-3 and then > now - 1e-4 * t * fall:
            t /= 2
            then = cost(a + t * step, f + t * moved)
        if t <= 1e-3:
            break
        a, f = a + t * step, f + t * moved
        gain, now = now - then, then
        if gain <= 1e-4 * now:
            break
    return a


def fit_constant(second: Tensor, mean: Tensor, scale: Tensor, near: Tensor, ridge: float = 1e-2) -> Tensor:
    """Direction [d_model] that answers 1 wherever it can: least squares on reference text and on the inputs `near`.

    second, mean: E[x x'] and E[x] of raw inputs; scale: [d_model] by which they are divided; near: [k, d_model], divided.
    There is no bias weight in most models, but inputs have a mean, and a direction along it serves as one.
    """
    scaled = second / scale[:, None] / scale[None]
    width = len(mean)
    share = 1.0 / max(1, len(near))
    matrix = scaled + share * near.T @ near + ridge * torch.eye(width)
    right = mean / scale + share * near.sum(0)
    return torch.linalg.solve(matrix.double(), right.double()[:, None])[:, 0].float()


def fit_level(
    examples: Examples,
    direction: Tensor,
    constant: Tensor,
    width: float,
    act: Callable[[Tensor], Tensor],
    ridge: float,
) -> Tensor:
    """argmin_u ridge |u - even|^2/2 + sum_i weight_i (n_i u.x_i - y_i)^2/2, [d_model]: what a gated neuron multiplies by.

    n_i: what the gate lets through; y_i: 1 where the neuron should fire, else 0. So it is as loud at every fault that was
    learnt, and less so where the gate errs. even: the direction of `make_rows` for this width, which costs nothing.
    """
    even = _even(direction, constant, width)
    n = act(STEEP * (examples.x @ direction)) / STEEP
    heard = n.abs() > 1e-3
    x, weight = examples.x[heard] * n[heard, None], examples.weight[heard]
    left = (x.T * weight) @ x + ridge * torch.eye(len(even))
    right = (x.T * weight) @ examples.fire[heard].float() + ridge * even
    return torch.linalg.solve(left, right[:, None])[:, 0]


def _even(direction: Tensor, constant: Tensor, width: float) -> Tensor:
    return (width * constant - direction) / (width - 1)


def make_rows(
    direction: Tensor,
    constant: Tensor,
    scale: Tensor,
    width: float,
    gated: bool,
    bias: tuple[float, float] = (0.0, 0.0),
    level: Tensor | None = None,
) -> InputRows:
    """Rows for raw inputs, from directions for scaled ones: activation f (w - f) / (w - 1) above 0, f in a plain block.

    f = direction.x is 1 at a typical fault. width: w > 1; the activation is the same at f = 1 and f = w - 1 and highest
    between, so that it hardly depends on how surely a fault is recognised. bias: what the neuron's own biases add to gate.x
    and up.x; taken back along the constant. level: the activation is f level.x instead, see `fit_level`.
    """
    gate = (STEEP * direction - bias[0] * constant) / scale
    if not gated:
        return InputRows(gate, None, STEEP, bias)
    level = _even(direction, constant, width) if level is None else level
    return InputRows(gate, (level / STEEP - bias[1] * constant) / scale, 1.0, bias)


def activation(
    answer: Tensor,
    constant: Tensor,
    width: float,
    act: Callable[[Tensor], Tensor],
    gated: bool,
    bias: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """What the neuron of `make_rows` does, over gain, where direction and constant answer so: [...] each."""
    left = 1 - constant  # of a bias, what the rows do not take back
    n = act(STEEP * answer + bias[0] * left) / STEEP
    return n * ((width * constant - answer) / (width - 1) + STEEP * bias[1] * left) if gated else n
