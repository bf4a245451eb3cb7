"""How much a rule needs to learn from: the same rule solved anew from fewer and from more prompts, each on its own."""

from dataclasses import dataclass, replace

from mint.console import Say
from mint.model.lm import LM
from mint.rules.repair import RuleRepair, RuleWishes, repair_rules

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class CurvePoint:
    """What became of a rule that learnt from so many prompts."""

    learn: int
    unseen: dict
    """Figures of the unseen faults, as generated; also of an edit that was refused."""
    near: dict
    reason: str | None
    """Why the edit was refused, if it was."""


def learn_curve(lm: LM, one: RuleRepair, wishes: RuleWishes, say: Say = lambda _: None) -> list[CurvePoint]:
    """A point for each of `COUNTS` that the rule has learn prompts for. The model stays as it is.

    one: the rule's repair, whose own number of prompts is not repaired again. Whatever share of unseen prompts comes out right, a
    point is measured; so `wishes.accept` has no part in it. A repair a point: minutes on a real model.
    """
    wrong = [x for x in one.lines if x.row.role == "fault" and x.row.split == "learn" and not x.right_before]
    points = []
    for count in (c for c in COUNTS if c <= len(wrong)):
        if count == len(one.learnt):
            found = one
        else:
            say(f"rule {one.rule.name}: learnt from {count} prompts")
            (found,) = repair_rules(lm, [one.rule], replace(wishes, learn=count, accept=0.0), say=say).repairs
        figures = found.figures
        points.append(CurvePoint(count, figures["unseen"], figures["near"], found.reason))
    return points
