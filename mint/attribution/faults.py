"""Where a model goes wrong on a case, and the metric that attribution explains: logit(wrong) - logit(desired).

The metric is a difference of raw logits, never a probability: its gradient does not vanish where the desired token is
unlikely, and a constant added to all logits changes nothing (Zhang & Nanda 2309.16042, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.errors import CaseError
from mint.model.lm import LM, Encoded


@dataclass(frozen=True)
class Fault:
    """One wrong next token, the true prefix standing before it."""

    position: int
    """Position in prompt + target (0 = the prompt's first token) whose *next* token is wrong."""
    wrong: int
    """Id of the token the model prefers."""
    desired: int
    """Id of the token it should write."""
    logit_difference: float
    """logit(wrong) - logit(desired); positive while the fault is there."""


@torch.no_grad()
def find_faults(lm: LM, encoded: Encoded) -> list[Fault]:
    """All faults of a case in order, from one teacher-forced forward; an empty list if every token is right."""
    logits = lm.logits([encoded.ids], [encoded.positions])  # [target tokens, vocab]
    best = logits.argmax(1)
    faults = []
    for row, (position, desired) in enumerate(zip(encoded.positions, encoded.target, strict=True)):
        wrong = int(best[row])
        if wrong != desired:
            difference = float(logits[row, wrong] - logits[row, desired])
            faults.append(Fault(position, wrong, desired, difference))
    return faults


def first_fault(lm: LM, encoded: Encoded) -> Fault:
    """The first fault. Raises `CaseError` if the model already writes the target."""
    faults = find_faults(lm, encoded)
    if not faults:
        raise CaseError(
            "expected a target that the model gets wrong, but it already prefers every token of this one;"
            " give the target it fails on"
        )
    return faults[0]


def differences(logits: Tensor, faults: Sequence[Fault]) -> Tensor:
    """The metric, logit(wrong) - logit(desired), [faults], from logits [faults, vocab], row i belonging to fault i."""
    wrong = torch.tensor([f.wrong for f in faults], device=logits.device)[:, None]
    desired = torch.tensor([f.desired for f in faults], device=logits.device)[:, None]
    return (logits.gather(1, wrong) - logits.gather(1, desired))[:, 0]
