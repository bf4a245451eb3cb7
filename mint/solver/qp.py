"""The smallest vector that meets linear constraints: a convex quadratic programme, solved in its dual by DAQP."""

import daqp
import numpy as np
import torch
from torch import Tensor

HARD = 1e4
"""Multiplier bound of constraints that must hold; beyond it they count as infeasible."""


def smallest(jacobian: Tensor, need: Tensor, bound: Tensor | float = HARD) -> tuple[Tensor, Tensor]:
    """argmin |v|^2/2 + sum_c bound_c * max(0, need_c - jacobian_c.v), and its multipliers.

    jacobian: [constraints, d]; need: [constraints]; bound: most that one unit of violation may cost, per constraint.
    The dual has one unknown in [0, bound] a constraint: max need'y - y'(JJ')y/2, v = J'y.
    """
    j = jacobian.cpu().double().numpy()
    gram = j @ j.T
    m = len(gram)
    gram += 1e-9 * (np.trace(gram) / m + 1e-12) * np.eye(m)
    upper = np.broadcast_to(np.asarray(bound, dtype=float), (m,)).copy()
    y, _, flag, _ = daqp.solve(
        gram, -need.cpu().double().numpy(), np.zeros((0, m)), upper, np.zeros(m), np.zeros(m, dtype=np.int32)
    )
    if flag < 1:
        y = np.zeros(m)
    y = np.clip(y, 0.0, upper)
    return torch.from_numpy(j.T @ y).to(jacobian.dtype), torch.from_numpy(y).to(jacobian.dtype)
